// One thread of a thread block of encode_append: which rows it holds, and where its block's shared
// memory has what. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encode_args.hpp"
#include "encode_plan.hpp"
#include "row_thread.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

template <class Int>
TQ_HOST_DEVICE Int min_int(Int a, Int b) {
  return a < b ? a : b;
}
template <class Int>
TQ_HOST_DEVICE Int max_int(Int a, Int b) {
  return a > b ? a : b;
}
// Of the two unsigned halves of a word.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  return max_int(a & 0xFFFF, b & 0xFFFF) | max_int(a >> 16, b >> 16) << 16;
#endif
}
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t min_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vminu2(a, b);
#else
  return min_int(a & 0xFFFF, b & 0xFFFF) | min_int(a >> 16, b >> 16) << 16;
#endif
}

template <int kDim, EncodeCodes kCodes>
class EncodeThread : public RowThread<kDim> {
 protected:
  using Base = RowThread<kDim>;
  using Base::memory_;
  using Base::thread_;
  using Base::token;
  using typename Base::Shape;
  using Plan = EncodePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;

 public:
  // `memory` is shared by the block's threads. The block's jobs are place.item and every workers'th
  // behind it; those without tokens are left out.
  TQ_HOST_DEVICE EncodeThread(const EncodeArgs& args, std::byte* memory, BlockPlace place,
                              int thread)
      : Base(memory, thread), args_(args), place_(place) {
    place_.item = job_from(place.item);
  }

  // Whether there is no job; whether there is none behind the one at hand.
  TQ_HOST_DEVICE bool empty() const { return place_.item >= args_.num_jobs; }
  TQ_HOST_DEVICE bool last() const { return next_ >= args_.num_jobs; }
  TQ_HOST_DEVICE void advance() {
    place_.item = next_;
    slot_ ^= 1;
  }
  TQ_HOST_DEVICE bool smooths() const { return place_.side == 0 && args_.smoothing != nullptr; }
  TQ_HOST_DEVICE static constexpr bool finds_pairs() { return kCodes == EncodeCodes::kVector; }
  TQ_HOST_DEVICE bool centres() const { return place_.side == 0 && args_.center_keys; }

 protected:
  TQ_HOST_DEVICE bool active() const { return token() < state().job.tokens; }
  TQ_HOST_DEVICE const EncodeSideArgs& side() const { return args_.sides[place_.side]; }
  TQ_HOST_DEVICE EncodeState& state(int slot) const {
    return *reinterpret_cast<EncodeState*>(memory_ + Plan::kState + slot * Plan::kStateBytes);
  }
  TQ_HOST_DEVICE EncodeState& state() const { return state(slot_); }
  TQ_HOST_DEVICE int job_from(int item) const {
    while (item < args_.num_jobs && uniform(job_arg(args_, item).tokens) <= 0)
      item += args_.workers;
    return item;
  }
  TQ_HOST_DEVICE uint8_t* non_finite() const {
    return reinterpret_cast<uint8_t*>(memory_ + Plan::kNonFinite);
  }
  // Of a thread's elements as they came: short_quotient and the rotation take them; or divide_rest
  // must divide them.
  static constexpr uint8_t kModerate = 1, kDivideRest = 2;
  TQ_HOST_DEVICE uint8_t* flags() const {
    return reinterpret_cast<uint8_t*>(memory_ + Plan::kFlags);
  }
  TQ_HOST_DEVICE std::byte* chunk_row(const JobArg& job, const RowArg& row, int32_t token) const {
    const int32_t at = args_.chunk_tokens - row.new_tokens + token - row.length;
    return side().chunk.head(job.row, place_.head) + at * side().chunk.token_stride;
  }
  TQ_HOST_DEVICE std::byte* exact_row(const JobArg& job, int32_t ring) const {
    return side().exact.head(job.row, place_.head) +
           (args_.exact.sink_tokens + ring) * side().exact.token_stride;
  }

  // Few: between them and a row of 128 floats there must be room for the work.
  const EncodeArgs& args_;
  BlockPlace place_;
  int next_ = 0;  // job; known once rows are asked for
  int slot_ = 0;  // of the job's state
};

}  // namespace turboquant::cuda::detail
