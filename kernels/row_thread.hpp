// One thread of a thread block that holds 64 rows, each in the registers of one to four threads:
// its part of a row, and what it exchanges with the others. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "row_rotation.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

template <int kDim>
class RowThread {
 protected:
  using Shape = RowShape<kDim>;
  static constexpr int kElems = Shape::kElems;
  static constexpr int kPitch = Shape::kPitch;

  // `memory` is the block's; at its start is the tile of rows, kPitch floats a thread.
  TQ_HOST_DEVICE RowThread(std::byte* memory, int thread)
      : memory_(memory), thread_(static_cast<unsigned>(thread)) {}

  // Forgets what was computed from the thread's number: left alone, the compiler would keep it all
  // in registers from one turn of a loop to the next.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void renew_thread() {
#if defined(__CUDA_ARCH__)
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_));
#endif
  }

  TQ_HOST_DEVICE int thread() const { return static_cast<int>(thread_); }
  TQ_HOST_DEVICE int token() const { return static_cast<int>(thread_ / Shape::kThreads); }
  TQ_HOST_DEVICE int part() const { return static_cast<int>(thread_ % Shape::kThreads); }
  TQ_HOST_DEVICE float* table(int offset) const {
    return reinterpret_cast<float*>(memory_ + offset);
  }
  TQ_HOST_DEVICE const float* part_table(int offset) const {
    return table(offset) + part() * kPitch;
  }
  TQ_HOST_DEVICE float* region(int thread) const { return table(0) + thread * kPitch; }
  // On the host, of up to as many threads as a tile has rows.
  TQ_HOST_DEVICE float* offered(int thread) const { return table(0) - (thread + 1) * kPitch; }
  // -1 where the thread's part has bit n, else 1.
  TQ_HOST_DEVICE float sign(int n) const {
    return 1.0f - 2.0f * static_cast<float>(part() >> n & 1);
  }
  // Numbers between the threads of a row: registers on the device. The host's threads take turns:
  // offered numbers wait before the block's memory, kPitch floats a thread.
  template <int kCount>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void offer(const float (&numbers)[kCount], int place = 0) const {
#if defined(__CUDA_ARCH__)
    (void)numbers;
    (void)place;
#else
    if constexpr (Shape::kThreads > 1) store_row(offered(thread()) + place, numbers);
#endif
  }
  // What the thread whose part differs by `distance` has as `own`; it has it in `place`. Whole
  // warps only.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float partner(int distance, float own, int place) const {
#if defined(__CUDA_ARCH__)
    (void)place;
    return __shfl_xor_sync(0xFFFFFFFFu, own, distance);
#else
    (void)own;
    return offered(thread() ^ distance)[place];
#endif
  }
  // The sum of `own` over a row's threads: of parts that differ in the highest bit first.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float sum_of_parts(float own, int place) const {
#if defined(__CUDA_ARCH__)
    (void)place;
    TQ_UNROLL
    for (int distance = Shape::kThreads / 2; distance > 0; distance /= 2) {
      own = add_rn(own, __shfl_xor_sync(0xFFFFFFFFu, own, distance));
    }
    return own;
#else
    (void)own;
    float sums[Shape::kThreads];
    for (int p = 0; p < Shape::kThreads; ++p) sums[p] = offered(thread() - part() + p)[place];
    for (int left = Shape::kThreads / 2; left > 0; left /= 2) {
      for (int p = 0; p < left; ++p) sums[p] = add_rn(sums[p], sums[p + left]);
    }
    return sums[0];
#endif
  }
  // Whether it holds for every thread of the warp; on the host a thread is a warp.
  TQ_HOST_DEVICE static bool whole_warp(bool holds) {
#if defined(__CUDA_ARCH__)
    return __all_sync(0xFFFFFFFFu, holds) != 0;
#else
    return holds;
#endif
  }

  // Round kRound's transform of the row, in parts: up to the first stage between threads, those
  // stages (offer_row() before each), the rest.
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void transform_begin() {
    hadamard_begin<kDim, kRound>([this](int n) { return sign(n); }, x_);
  }
  template <int kRound, int kNth>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void transform_cross() {
    hadamard_cross<kDim, kRound, kNth>([this](int n) { return sign(n); },
                                       [this](int e) { return partner(1 << kNth, x_[e], e); }, x_);
  }
  template <int kRound, bool kTranspose>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void transform_end() {
    hadamard_end<kDim, kRound, kTranspose>(x_);
  }
  // Its normaliser, the same for every coordinate but for the sign, which is wrong by the part and
  // one bit of the element.
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void normalise() {
    constexpr int kSlot = Shape::low_bit(kRound) - 1;
    float factor[2];
    TQ_UNROLL
    for (int bit = 0; bit < 2; ++bit) {
      const int i = Shape::coordinate(kRound + 1, part(), bit << kSlot);
      factor[bit] = Shape::negated(kRound, i) ? -kNormaliser<kDim> : kNormaliser<kDim>;
    }
    TQ_UNROLL
    for (int e = 0; e < kElems; ++e) x_[e] = mul_rn(x_[e], factor[e >> kSlot & 1]);
  }
  // Its normaliser and a sign, for a table of layout kRound + 1.
  TQ_HOST_DEVICE static float signed_normaliser(int round, int i, float sign) {
    const float factor = mul_rn(sign, kNormaliser<kDim>);
    return Shape::negated(round, i) ? -factor : factor;
  }

  std::byte* memory_;
  unsigned thread_;  // unsigned: halves and remainders are shifts and masks
  float x_[kElems];
};

// The steps of a rotation's kNth round; each_warp as in encode_steps().
template <int kDim, int kNth, class EachWarp>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_steps(EachWarp each_warp) {
  using Shape = RowShape<kDim>;
  each_warp([](auto& thread) { thread.template rotate_begin<kNth>(); });
  if constexpr (Shape::kPartBits > 0) {
    each_warp([](auto& thread) { thread.offer_row(); });
    each_warp([](auto& thread) { thread.template rotate_cross<kNth, 0>(); });
  }
  if constexpr (Shape::kPartBits > 1) {
    each_warp([](auto& thread) { thread.offer_row(); });
    each_warp([](auto& thread) { thread.template rotate_cross<kNth, 1>(); });
  }
  each_warp([](auto& thread) { thread.template rotate_end<kNth>(); });
}

}  // namespace turboquant::cuda::detail
