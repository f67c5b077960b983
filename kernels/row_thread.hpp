// One thread of a thread block that holds 64 rows, each in one or two threads' registers: its part
// of a row, and what it exchanges with the thread that holds the other one. Host and device.
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
  // 1, or -1 for the second thread of a row.
  TQ_HOST_DEVICE float sign() const { return 1.0f - 2.0f * static_cast<float>(part()); }
  // Numbers between the two threads of a row: registers on the device. The host's threads take
  // turns: offered numbers wait in the thread's part of the tile.
  template <int kCount>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void offer(const float (&numbers)[kCount], int place = 0) const {
#if defined(__CUDA_ARCH__)
    (void)numbers;
    (void)place;
#else
    if constexpr (Shape::kThreads == 2) store_row(region(thread()) + place, numbers);
#endif
  }
  // The partner's numbers[own]; of part 1's, numbers[others]. Whole warps only.
  template <int kCount>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float partner(const float (&numbers)[kCount], int own, int others,
                                                int place = 0) const {
#if defined(__CUDA_ARCH__)
    (void)place;
    return __shfl_xor_sync(0xFFFFFFFFu, part() == 0 ? numbers[own] : numbers[others], 1);
#else
    (void)numbers;
    return region(thread() ^ 1)[place + (part() == 0 ? others : own)];
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

  // Round kRound's transform of the row: up to the exchange, and from there.
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void transform_begin() {
    hadamard_begin<kDim, kRound>(sign(), x_);
    offer(x_);
  }
  template <int kRound, bool kTranspose>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void transform_end() {
    if constexpr (Shape::kThreads == 2) {
      cross_rows<kDim, kRound>(
          sign(), [&](int e) { return partner(x_, e, e); }, x_);
    }
    hadamard_end<kDim, kRound, kTranspose>(x_);
  }
  // Its normaliser, the same for every coordinate.
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void normalise() {
    const float second = mul_rn(sign(), kNormaliser<kDim>);  // where part 1 has the wrong sign
    TQ_UNROLL
    for (int e = 0; e < kElems; ++e) {
      const bool negated = Shape::negated(kRound, Shape::coordinate(kRound + 1, 1, e));
      x_[e] = mul_rn(x_[e], negated ? second : kNormaliser<kDim>);
    }
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

}  // namespace turboquant::cuda::detail
