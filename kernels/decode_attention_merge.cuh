// States to one partial result: those of a group's warps through shared memory, those of the pages
// of a whole split in a warp's registers.
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

// Maxima are whole numbers, so what a state is multiplied by before it is added is a power of two
// and exact: states that are merged as they come and states that are merged at once, with the
// greatest maximum known, have the same bits if they are added in the same order. (Of a state whose
// maximum is more than 126 below another's, something may be left the one way and nothing the
// other.)

// A short split that a warp takes alone, row tile `tile`: outputs in units of 1 in registers,
// the greatest maximum so far and each page's sum in shared memory.
template <class Work, int kSteps>
class WholeSplit {
 public:
  TQ_DEVICE void begin(Work& work, int tile) {
    merged_.clear();
    merged_.store_columns(work, tile);
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) sum_of_lane(work, tile, c) = 0.0f;
  }

  // The state of entry `entry` joins.
  TQ_DEVICE void add(Work& work, int tile, int entry, WarpState<kSteps>& state) {
    state.reduce_sums();
    merged_.load_columns(work, tile);
    const bool own = ptx::lane_index_here() >> 2 == entry % kShortSplitPages;
    float of_merged[2], of_state[2];
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float max = fmaxf(merged_.max[c], state.max[c]);
      of_merged[c] = ptx::exp2_fast(merged_.max[c] - max);
      of_state[c] = ptx::exp2_fast(state.max[c] - max);
      merged_.max[c] = max;
    }
    ptx::sync_warp();
    if (ptx::any(of_merged[0] != 1.0f || of_merged[1] != 1.0f)) {
      merged_.store_columns(work, tile);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        sum_of_lane(work, tile, c) *= of_merged[c];
        merged_.scale_outputs(c, of_merged[c]);
      }
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      if (own) sum_of_lane(work, tile, c) = of_state[c] * state.sum[c];
      of_state[c] *= ptx::float_of(state.exponent[c]);
    }
    TQ_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      TQ_UNROLL
      for (int n = 0; n < 4; ++n) {
        merged_.out[i][n] = fmaf(of_state[n % 2], state.out[i][n], merged_.out[i][n]);
      }
    }
  }

  // All of the split, with its maxima and sums.
  TQ_DEVICE WarpState<kSteps>& end(Work& work, int tile) {
    ptx::sync_warp();
    merged_.load_columns(work, tile);
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) merged_.sum[c] = sum_of_lane(work, tile, c);
    merged_.reduce_sums();
    return merged_;
  }

 private:
  // Lane 4 g + t has those of page g, columns 2 t and 2 t + 1.
  TQ_DEVICE static float& sum_of_lane(Work& work, int tile, int c) {
    const int lane = ptx::lane_index_here();
    return work.sums[lane >> 2][tile * kTileRows + 2 * (lane & 3) + c];
  }

  WarpState<kSteps> merged_;
};

// Outputs of m-tile `step` to the rows of a partial result that exist.
template <int kDim>
TQ_DEVICE void store_outputs(float* partial, int used_rows, int step, const float (&out)[4]) {
  const int lane = ptx::lane_index_here(), g = lane >> 2, t = lane & 3;
  TQ_UNROLL
  for (int c = 0; c < 2; ++c) {
    if (2 * t + c >= used_rows) continue;
    *reinterpret_cast<Words2*>(partial + (2 * t + c) * kDim + 2 * (8 * step + g)) =
        Words2{{ptx::bits_of(out[c]), ptx::bits_of(out[2 + c])}};
  }
}
template <int kDim>
TQ_DEVICE void store_stats(float* partial, int row, float max, float sum) {
  partial[kTileRows * kDim + row] = max - kWeightBias;
  partial[kTileRows * kDim + kTileRows + row] = sum;
}
// Of a state whose sums are those of all tokens.
template <int kDim, int kSteps>
TQ_DEVICE void store_stats(float* partial, const WarpState<kSteps>& state) {
  const int lane = ptx::lane_index_here();
  if (lane >= kTileRows / 2) return;
  TQ_UNROLL
  for (int c = 0; c < 2; ++c) {
    store_stats<kDim>(partial, 2 * lane + c, state.max[c], state.sum[c]);
  }
}

// A merged state as a partial result.
template <int kDim>
TQ_DEVICE void store_partial(float* partial, int used_rows, const WarpState<kDim / 16>& merged) {
  TQ_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    store_outputs<kDim>(partial, used_rows, step, merged.out[step]);
  }
  store_stats<kDim>(partial, merged);
}

// Merges the states of warps 0 ... kGroupWarps - 1 of a group, in that order, into one partial
// result for each of kTiles row tiles, of which used_rows rows exist: `partial` and every
// partial_stride floats behind it. first_stage: the value stage of the group's first warp; every
// warp's carries its states, of a tile [D / 16][32 lanes][4] and behind it maxima [8], sums [8] and
// exponents [8].
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
  constexpr int kStatsOffset = kTileRows * Traits::kDim * 4;  // max [8], sum [8], exponent [8]
  const int g = lane >> 2, t = lane & 3;

  // 1. Publish.
  TQ_UNROLL
  for (int r = 0; r < kTiles; ++r) {
    std::byte* const own = stage_of(member, r);
    TQ_UNROLL
    for (int i = 0; i < Traits::kSteps; ++i) {
      store_four(own + (i * kWarpLanes + lane) * 16, state[r].out[i]);
    }
    state[r].reduce_sums();
    if (g == 0) {
      float* const stats = reinterpret_cast<float*>(own + kStatsOffset);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        stats[2 * t + c] = state[r].max[c];
        stats[kTileRows + 2 * t + c] = state[r].sum[c];
        stats[2 * kTileRows + 2 * t + c] = ptx::float_of(state[r].exponent[c]);
      }
    }
  }
  ptx::sync_group(1 + group, Traits::kGroupWarps * kWarpLanes);

  TQ_UNROLL
  for (int r = 0; r < kTiles; ++r) {
    float* const of_tile = partial + r * partial_stride;

    // 2. Factors: lane 4 g + t those of warp g.
    float of_outputs[2];
    {
      const std::byte* const stats = stage_of(g % Traits::kGroupWarps, r) + kStatsOffset + 8 * t;
      const Words2 maxima = load_as<Words2>(stats);
      const Words2 sums = load_as<Words2>(stats + kTileRows * 4);
      const Words2 units = load_as<Words2>(stats + 2 * kTileRows * 4);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float own = ptx::float_of(maxima.w[c]);
        float max = own;
        TQ_UNROLL
        for (int mask = 4; mask < 4 * Traits::kGroupWarps; mask *= 2) {
          max = fmaxf(max, ptx::shuffle_xor(max, mask));
        }
        const float of_state = ptx::exp2_fast(own - max);
        of_outputs[c] = of_state * ptx::float_of(units.w[c]);
        float sum = of_state * ptx::float_of(sums.w[c]);
        TQ_UNROLL
        for (int mask = 4; mask < 4 * Traits::kGroupWarps; mask *= 2) {
          sum += ptx::shuffle_xor(sum, mask);
        }
        if (member == 0 && g == 0) store_stats<Traits::kDim>(of_tile, 2 * t + c, max, sum);
      }
    }

    // 3. Outputs: every warp its m-tiles.
    float of_warp[Traits::kGroupWarps][2];
    TQ_UNROLL
    for (int w = 0; w < Traits::kGroupWarps; ++w) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) of_warp[w][c] = ptx::shuffle(of_outputs[c], 4 * w + t);
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
      store_outputs<Traits::kDim>(of_tile, used_rows - r * kTileRows, step, out);
    }
  }

  // 4. The stages may be overwritten.
  ptx::sync_group(1 + group, Traits::kGroupWarps * kWarpLanes);
  ptx::fence_copy_engine();
  ptx::sync_warp();
}

}  // namespace turboquant::cuda::detail
