// The query operands of a pass over pages, as a lane of a warp holds or finds them.
#pragma once

#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// The lane's query operands of a pass's row tiles, by k-step: held in registers, or read anew where
// they are needed (from the L1) where those would not leave room for the outputs. operands: of the
// first row tile.
template <class Traits, bool kHeld = Traits::kHoldsQueries>
class PassQueries {
 public:
  TQ_DEVICE void begin_split(const uint32_t*) {}
  TQ_DEVICE void begin_page(const uint32_t* operands) {
    of_lane_ = operands + uint32_t{2} * ptx::lane_index_here();
  }
  TQ_DEVICE Words2 step(int r, int step) const {
    Words2 words;
    ptx::load_anew(of_lane_ + r * Traits::kUnitWords + int64_t{step} * 2 * kWarpLanes, words.w);
    return words;
  }

 private:
  const uint32_t* of_lane_;
};
template <class Traits>
class PassQueries<Traits, true> {
 public:
  TQ_DEVICE void begin_split(const uint32_t* operands) {
    PassQueries<Traits, false> anew;
    anew.begin_page(operands);
    TQ_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      TQ_UNROLL
      for (int step = 0; step < Traits::kSteps; ++step) words_[r][step] = anew.step(r, step);
    }
  }
  TQ_DEVICE void begin_page(const uint32_t*) {}
  TQ_DEVICE Words2 step(int r, int step) const { return words_[r][step]; }

 private:
  Words2 words_[Traits::kRowTiles][Traits::kSteps];
};

}  // namespace turboquant::cuda::detail
