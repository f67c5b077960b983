// The states of a group's warps to one partial result, through shared memory.
#pragma once

#include "decode_attention_rotation.cuh"
#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

TQ_DEVICE void store_four(std::byte* to, const float (&x)[4]) {
  Words4 words;
  TQ_UNROLL
  for (int k = 0; k < 4; ++k) words.w[k] = ptx::bits_of(x[k]);
  *reinterpret_cast<Words4*>(to) = words;
}

// Merges the states of warps 0 ... kGroupWarps - 1 of a group, in that order, into one partial
// result for each of kTiles row tiles, of which used_rows rows exist: `partial` and every
// partial_stride floats behind it. first_stage: the value stage of the group's first warp; every
// warp's carries its states, of a tile [D / 16][32 lanes][4] and behind it maxima [8] and sums [8].
// All warps of the group; the stages are free when it returns.
template <class Traits, int kTiles>
TQ_DEVICE void merge_group(std::byte* first_stage, int group, int member, int used_rows,
                           float* partial, int64_t partial_stride,
                           WarpState<Traits::kSteps> (&state)[kTiles]) {
  static_assert(kTiles * Traits::kStateBytes <= Traits::kValueStageBytes);
  const int lane = ptx::lane_index_here();
  const auto stage_of = [&](int w, int r) {
    return first_stage + w * Traits::kWarpStageBytes + r * Traits::kStateBytes;
  };
  constexpr int kStatsOffset = kTileRows * Traits::kDim * 4;  // max [8], sum [8]
  const int g = lane >> 2, t = lane & 3;

  // 1. Publish.
  TQ_UNROLL
  for (int r = 0; r < kTiles; ++r) {
    std::byte* const own = stage_of(member, r);
    TQ_UNROLL
    for (int i = 0; i < Traits::kSteps; ++i) {
      store_four(own + (i * kWarpLanes + lane) * 16, state[r].out[i]);
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      TQ_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        state[r].sum[c] += ptx::shuffle_xor(state[r].sum[c], mask);
      }
    }
    if (g == 0) {
      float* const stats = reinterpret_cast<float*>(own + kStatsOffset);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        stats[2 * t + c] = state[r].max[c];
        stats[kTileRows + 2 * t + c] = state[r].sum[c];
      }
    }
  }
  ptx::sync_group(1 + group, Traits::kGroupWarps * kWarpLanes);

  TQ_UNROLL
  for (int r = 0; r < kTiles; ++r) {
    float* const of_tile = partial + r * partial_stride;

    // 2. Weights: lane 4 g + t those of warp g.
    float weight[2];
    {
      const float* const stats =
          reinterpret_cast<const float*>(stage_of(g % Traits::kGroupWarps, r) + kStatsOffset);
      const Words2 maxima = load_as<Words2>(reinterpret_cast<const std::byte*>(stats + 2 * t));
      const Words2 sums =
          load_as<Words2>(reinterpret_cast<const std::byte*>(stats + kTileRows + 2 * t));
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float own = ptx::float_of(maxima.w[c]);
        float max = own;
        TQ_UNROLL
        for (int mask = 4; mask < 4 * Traits::kGroupWarps; mask *= 2) {
          max = fmaxf(max, ptx::shuffle_xor(max, mask));
        }
        weight[c] = ptx::exp2_fast(own - max);
        float sum = weight[c] * ptx::float_of(sums.w[c]);
        TQ_UNROLL
        for (int mask = 4; mask < 4 * Traits::kGroupWarps; mask *= 2) {
          sum += ptx::shuffle_xor(sum, mask);
        }
        if (member == 0 && g == 0) {
          of_tile[kTileRows * Traits::kDim + 2 * t + c] = max - kWeightBias;
          of_tile[kTileRows * Traits::kDim + kTileRows + 2 * t + c] = sum;
        }
      }
    }

    // 3. Outputs: every warp its m-tiles.
    float of_warp[Traits::kGroupWarps][2];
    TQ_UNROLL
    for (int w = 0; w < Traits::kGroupWarps; ++w) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) of_warp[w][c] = ptx::shuffle(weight[c], 4 * w + t);
    }
    TQ_UNROLL
    for (int i = 0; i < Traits::kSteps; i += Traits::kGroupWarps) {
      const int step = i + member;
      if (Traits::kSteps % Traits::kGroupWarps != 0 && step >= Traits::kSteps) break;
      float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      TQ_UNROLL
      for (int w = 0; w < Traits::kGroupWarps; ++w) {
        const Words4 words = load_as<Words4>(stage_of(w, r) + (step * kWarpLanes + lane) * 16);
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) {
          out[k] = fmaf(of_warp[w][k % 2], ptx::float_of(words.w[k]), out[k]);
        }
      }
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        if (r * kTileRows + 2 * t + c >= used_rows) continue;
        *reinterpret_cast<Words2*>(of_tile + (2 * t + c) * Traits::kDim + 2 * (8 * step + g)) =
            Words2{{ptx::bits_of(out[c]), ptx::bits_of(out[2 + c])}};
      }
    }
  }

  // 4. The stages may be overwritten.
  ptx::sync_group(1 + group, Traits::kGroupWarps * kWarpLanes);
  ptx::fence_copy_engine();
  ptx::sync_warp();
}

}  // namespace turboquant::cuda::detail
