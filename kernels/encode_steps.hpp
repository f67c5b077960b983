// The order of encode_append's steps (kernels/encode_block.hpp). Host and device.
#pragma once

#include <type_traits>

#include "encode_block.hpp"
#include "row_rotation.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cuda::detail {

// A block's jobs, each step by step. each(f) runs f(thread) for every thread of the block and waits
// for all; each_warp(f) waits for those of the thread's warp. `block` is any of them: what it is
// asked is the same for all. copies.copy16(to, from) starts a copy to shared memory, copies.wait()
// waits for the thread's own.
//
// Raw rows of the next job are under way from the moment that nobody reads the tile's raw rows or
// mean rows any more; packed codes lie beside them.
template <int kDim, class Block, class Each, class EachWarp, class Copies>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void encode_steps(const Block& block, Each each, EachWarp each_warp,
                                                  Copies copies) {
  const auto wait_for_all = [&] { each([](auto&) {}); };
  each([&](auto& thread) { thread.begin(copies); });
  TQ_NO_UNROLL
  while (true) {
    each([&](auto& thread) { thread.land(copies); });
    if (block.overwrites()) {
      each([](auto& thread) { thread.scan_jobs(); });
      each([](auto& thread) { thread.overwrite(); });
    }
    each([](auto& thread) { thread.load(); });
    if (block.smooths()) each_warp([](auto& thread) { thread.divide_rest(); });
    const auto rotate = [&](auto round) { rotate_steps<kDim, decltype(round)::value>(each_warp); };
    static_assert(quant::SignHadamardRotation::kRounds == 3);
    rotate(std::integral_constant<int, 0>{});
    rotate(std::integral_constant<int, 1>{});
    rotate(std::integral_constant<int, 2>{});
    if (block.centres()) {
      each_warp([](auto& thread) { thread.find_non_finite(); });
      each([](auto& thread) { thread.put_finite_row(); });
      each([](auto& thread) { thread.find_mean(); });
    } else if (block.smooths()) {
      wait_for_all();  // those that divide in the tile
    }
    each_warp([&](auto& thread) { thread.fetch_next(copies); });
    each_warp([](auto& thread) { thread.centre(); });
    each_warp([](auto& thread) { thread.find_squares(); });
    each_warp([](auto& thread) { thread.rescue(); });
    if constexpr (Block::finds_pairs()) {
      each([](auto& thread) { thread.put_row(); });
      each([](auto& thread) { thread.find_pairs(); });
      each_warp([](auto& thread) { thread.sum_pairs(); });
      each_warp([](auto& thread) { thread.find_sums(); });
    } else {
      each_warp([](auto& thread) { thread.quantise(); });
      each_warp([](auto& thread) {
        thread.find_sums();
        thread.join_quads();
      });
      each([](auto& thread) { thread.pack(); });
    }
    each_warp([](auto& thread) {
      thread.store_scale();
      thread.store_codes();
    });
    if (block.last()) break;
    each_warp([](auto& thread) { thread.advance(); });
    if (!block.under_way()) {
      wait_for_all();  // those that store from the tile
      each_warp([&](auto& thread) { thread.fetch_late(copies); });
    }
  }
}

}  // namespace turboquant::cuda::detail
