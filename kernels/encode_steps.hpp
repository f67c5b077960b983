// The order of encode_append's steps (kernels/encode_block.hpp). Host and device.
#pragma once

#include "encode_block.hpp"
#include "row_rotation.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cuda::detail {

// A block's steps in order. each(f) runs f(thread) for every thread of the block and waits for all.
// `block` is any of them: what it is asked is the same for all.
template <int kDim, class Block, class Each, class Fetch>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void encode_steps(const Block& block, Each each, Fetch fetch) {
  each(fetch);
  if (block.overwrites()) {
    each([](auto& thread) { thread.scan_jobs(); });
    each([](auto& thread) { thread.overwrite(); });
  }
  constexpr bool kCross = RowShape<kDim>::kThreads == 2;
  each([](auto& thread) { thread.load(); });
  if (block.smooths()) each([](auto& thread) { thread.divide_rest(); });
  // Unrolled: a loop would move every coordinate back to its register at the end of a round.
  if constexpr (kCross) {
    TQ_UNROLL
    for (int round = 0; round < quant::SignHadamardRotation::kRounds; ++round) {
      each([=](auto& thread) {
        thread.rotate_begin(round);
        thread.put_row();
      });
      each([=](auto& thread) {
        thread.cross_rows();
        thread.rotate_end();
      });
    }
    each([](auto& thread) { thread.normalise(); });
  } else {
    each([](auto& thread) {
      TQ_UNROLL
      for (int round = 0; round < quant::SignHadamardRotation::kRounds; ++round) {
        thread.rotate_begin(round);
        thread.rotate_end();
      }
      thread.normalise();
    });
  }
  if (block.centres()) {
    each([](auto& thread) { thread.find_non_finite(); });
    each([](auto& thread) { thread.put_finite_row(); });
    each([](auto& thread) { thread.find_mean(); });
  }
  each([](auto& thread) { thread.centre(); });
  each([](auto& thread) { thread.find_squares(); });
  if (block.finds_pairs()) {
    each([](auto& thread) { thread.rescale(); });
    each([](auto& thread) { thread.find_pairs(); });
    each([](auto& thread) { thread.sum_pairs(); });
  } else {
    each([](auto& thread) { thread.quantise(); });
  }
  each([](auto& thread) {
    thread.store_scale();
    thread.store_codes();
  });
}

}  // namespace turboquant::cuda::detail
