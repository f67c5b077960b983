// Attention of a warp over one page (64 tokens of a KV head) that lies in shared memory.
#pragma once

#include "decode_attention_codes.cuh"
#include "decode_attention_queries.cuh"

namespace turboquant::cuda::detail {

// Bits of |x|; 0 for NaN and infinity.
TQ_DEVICE uint32_t finite_magnitude(float x) {
  const uint32_t bits = ptx::bits_of(x) & 0x7FFFFFFFu;
  return bits < 0x7F800000u ? bits : 0;
}

TQ_DEVICE float load_scale(const std::byte* scales, int slot, bool half) {
  return half ? ptx::f32_from_f16(load_as<uint16_t>(scales + 2 * slot))
              : load_as<float>(scales + 4 * slot);
}

// Tiles of keys that are decoded beside each other, so that their products do not wait for each
// other, and k-steps whose operands are in registers at once.
inline constexpr int kTilesAtOnce = 2;
inline constexpr int kStepsAhead = 4;

// q'.m of the lane's two columns of every row tile. `page` holds the key part of a block.
template <class Traits, class Queries>
TQ_DEVICE void page_mean(const std::byte* page, const Queries& queries,
                         float (&mean)[Traits::kRowTiles][2]) {
  using Steps = QuerySteps<Traits::kDim>;
  constexpr int kRowTiles = Traits::kRowTiles;
  const int lane = ptx::lane_index_here(), t = lane & 3;
  // Even steps in row 0, odd steps in row 8; other rows are of no use, and their lanes load
  // nothing.
  float sum[kRowTiles][2][4] = {};
  uint32_t m[4] = {};
  TQ_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step) {
    const bool in_fours = step < Steps::kInFours / 2;
    if (lane < 4) {
      TQ_UNROLL
      for (int k = 0; k < 4 && (!in_fours || step % 2 == 0); ++k) {
        const int u = in_fours ? Steps::pair(step, 0) + k : Steps::pair(step, k / 2);
        m[k] = load_as<uint32_t>(page + 4 * key_pair_of<Traits::kDim, Traits::kKeyBits>(u, t));
      }
    }
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      const Words2 q = queries.step(r, step);
      ptx::mma_f16(sum[r][step % 2], m[0], m[1], m[2], m[3], q.w[0], q.w[1]);
    }
  }
  TQ_UNROLL
  for (int n = 0; n < 2 * kRowTiles; ++n) {
    mean[n / 2][n % 2] = ptx::shuffle(sum[n / 2][0][n % 2] + sum[n / 2][1][2 + n % 2], t);
  }
}

// s = scale s + mean, for the scales of slots first, first + 8, ... of a page. kHalf: fp16.
template <bool kHalf, int kRowTiles, int kTiles>
TQ_DEVICE void scale_scores(const std::byte* scales, int first, const float (&mean)[kRowTiles][2],
                            float (&s)[kRowTiles][kTiles][4]) {
  TQ_UNROLL
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float scale = load_scale(scales, first + 8 * i, kHalf);
    TQ_UNROLL
    for (int n = 0; n < 2 * kRowTiles; ++n) {
      float& x = s[n / 2][i / 2][i % 2 * 2 + n % 2];
      x = fmaf(x, scale, mean[n / 2][n % 2]);
    }
  }
}

// q'.c of kTilesAtOnce tiles of keys from tile `first` of a page on; `codes` are the page's,
// `shared` starts with the table.
template <class Traits>
TQ_DEVICE void score_tiles(const std::byte* shared, const std::byte* codes, int first,
                           const PassQueries<Traits>& queries,
                           float (&s)[Traits::kRowTiles][kTilesAtOnce][4]) {
  constexpr int kRowTiles = Traits::kRowTiles;
  const int lane = ptx::lane_index_here();
  const int g = lane >> 2, t = lane & 3;
  const auto table = lane_table<Traits, 0>(shared, lane);
  KeyOperandsOf<Traits> keys[kTilesAtOnce];
  TQ_UNROLL
  for (int i = 0; i < kTilesAtOnce; ++i) {
    keys[i].load(codes, (first + i) * kTileTokens + tile_slot(g), t);
    TQ_UNROLL
    for (int k = 0; k < 4 * kRowTiles; ++k) s[k / 4][i][k % 4] = 0.0f;
  }
  TQ_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step) {
    // Operands of later steps are not loaded before this: registers.
    if (step > 0 && step % kStepsAhead == 0) ptx::sync_warp();
    Words2 q[kRowTiles];
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) q[r] = queries.step(r, step);
    TQ_UNROLL
    for (int i = 0; i < kTilesAtOnce; ++i) {
      uint32_t a[4];
      keys[i].take(step, table, a);
      TQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::mma_f16(s[r][i], a[0], a[1], a[2], a[3], q[r].w[0], q[r].w[1]);
      }
    }
  }
}

// Scores of a page before their factor and any mask: s = scale (q'.c) + q'.m. `shared` starts with
// the table, `page` holds the key part of a block.
template <class Traits>
TQ_DEVICE void page_scores(const DecodeArgs& args, const std::byte* shared, const std::byte* page,
                           const PassQueries<Traits>& queries, PageScores<Traits>& s) {
  using Row = typename Traits::Key;
  constexpr int kRowTiles = Traits::kRowTiles;
  float mean[kRowTiles][2] = {};
  const bool has_mean = ptx::argument_here(args.has_mean);
  if (has_mean) page_mean<Traits>(page, queries, mean);

  const std::byte* const codes = page + (has_mean ? 2 * Traits::kDim : 0);
  float tiles[kRowTiles][kTilesAtOnce][4];
  const auto take_tiles = [&](int from) {
    TQ_UNROLL
    for (int n = 0; n < 4 * kRowTiles * kTilesAtOnce; ++n) {
      const int r = n / (4 * kTilesAtOnce), i = n / 4 % kTilesAtOnce;
      s[r][from + i][n % 4] = tiles[r][i][n % 4];
    }
  };
  if constexpr (kRowTiles == 1) {
    // A rolled loop, in which the scores so far move down: half the instructions to fetch.
    static_assert(kTilesPerPage == 2 * kTilesAtOnce);
    TQ_NO_UNROLL
    for (int first = 0; first < kTilesPerPage; first += kTilesAtOnce) {
      TQ_UNROLL
      for (int n = 0; n < 4 * kTilesAtOnce; ++n) {
        s[0][n / 4][n % 4] = first == 0 ? 0.0f : s[0][kTilesAtOnce + n / 4][n % 4];
      }
      score_tiles<Traits>(shared, codes, first, queries, tiles);
      take_tiles(kTilesAtOnce);
    }
  } else {
    TQ_UNROLL
    for (int first = 0; first < kTilesPerPage; first += kTilesAtOnce) {
      score_tiles<Traits>(shared, codes, first, queries, tiles);
      take_tiles(first);
    }
  }
  const int g = ptx::lane_index_here() >> 2;
  const std::byte* const scales = codes + cache::kBlockTokens * Row::kRowBytes;
  if (ptx::argument_here(args.half_scales)) {
    scale_scores<true>(scales, tile_slot(g), mean, s);
  } else {
    scale_scores<false>(scales, tile_slot(g), mean, s);
  }
}

// Scores times factor, which becomes 1, and the soft cap.
template <int kTiles>
TQ_DEVICE void apply_factor(const DecodeArgs& args, float (&factor)[2], float (&s)[kTiles][4]) {
  TQ_UNROLL
  for (int n = 0; n < 4 * kTiles; ++n) {
    float& score = s[n / 4][n % 4];
    score *= factor[n % 2];
    if (args.softcap > 0.0f) score = capped_score(score, args.softcap_scale, args.softcap_rate);
  }
  factor[0] = factor[1] = 1.0f;
}

// Calls f(n) for the scores s[n / 4][n % 4] of a page that are not of slots [begin, end), by
// column.
template <class F>
TQ_DEVICE void each_unseen_score(const int (&begin)[2], const int (&end)[2], F f) {
  const int first = tile_slot(ptx::lane_index_here() >> 2);
  TQ_UNROLL
  for (int n = 0; n < 4 * kTilesPerPage; ++n) {
    const int slot = n / 4 * kTileTokens + first + n % 4 / 2 * 8;
    if (slot >= begin[n % 2] && slot < end[n % 2]) continue;
    f(n);
  }
}

// Value scales are brought below 2 by a power of two that only grows (by column), so that weight *
// scale fits fp16 whatever the values' size; outputs are kept in that unit. This is the value part
// of a page, with its scales.
template <class Traits>
class PageValues {
 public:
  TQ_DEVICE PageValues(const DecodeArgs& args, const std::byte* page)
      : page_(page),
        scales_(page + cache::kBlockTokens * Traits::Value::kRowBytes),
        half_(ptx::argument_here(args.half_scales)) {}

  // Whether one of this lane's two of the page's scales does not fit the state's unit.
  TQ_DEVICE bool outgrow(const PassState<Traits>& state) const {
    constexpr uint32_t kTwice = 1u << 23;
    uint32_t unit = state[0].exponent[0];
    TQ_UNROLL
    for (int n = 1; n < 2 * Traits::kRowTiles; ++n) {
      const uint32_t other = state[n / 2].exponent[n % 2];
      unit = unit < other ? unit : other;
    }
    const float least = ptx::float_of(unit + kTwice);
    float scale[2];
    load_pair(scale);
    return (fabsf(scale[0]) >= least) | (fabsf(scale[1]) >= least);
  }

  // The unit follows the finite scales of the tokens whose bit of `seen` is 1 (4 i + n for s[i][n];
  // all: of every token of the page), and `factor` of the outputs with it. Whole warp.
  template <int kSteps>
  TQ_DEVICE void raise_unit(bool all, uint32_t seen, WarpState<kSteps>& state,
                            float (&factor)[2]) const {
    constexpr uint32_t kExponent = 0x7F800000u;
    constexpr uint32_t kLargestUnit = 253u << 23, kOne = 127u << 23;
    uint32_t largest[2] = {0, 0};
    if (all) {
      float scale[2];
      load_pair(scale);
      const uint32_t x = finite_magnitude(scale[0]), y = finite_magnitude(scale[1]);
      largest[0] = largest[1] = ptx::reduce_max(x > y ? x : y);
    } else {
      const int first = tile_slot(ptx::lane_index_here() >> 2);
      TQ_NO_UNROLL
      for (int i = 0; i < 2 * kTilesPerPage; ++i) {
        const uint32_t bits = finite_magnitude(load_scale(scales_, first + 8 * i, half_));
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
          if ((seen >> (2 * i + c) & 1u) != 0 && bits > largest[c]) largest[c] = bits;
        }
      }
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        TQ_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) {
          const uint32_t other = ptx::bits_of(ptx::shuffle_xor(ptx::float_of(largest[c]), mask));
          largest[c] = largest[c] > other ? largest[c] : other;
        }
      }
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      uint32_t unit = largest[c] & kExponent;
      unit = unit < kLargestUnit ? unit : kLargestUnit;
      unit = unit > state.exponent[c] ? unit : state.exponent[c];
      const uint32_t growth = unit - state.exponent[c];
      factor[c] *= growth < kOne ? ptx::float_of(kOne - growth) : 0.0f;
      state.exponent[c] = unit;
    }
  }

  // The second product. `shared` starts with the table; s holds weights. partial: weights whose bit
  // of `seen` is 0 are of tokens that are not seen or do not exist; their scales may be NaN.
  TQ_DEVICE void attend(const std::byte* shared, bool partial,
                        const uint32_t (&seen)[Traits::kRowTiles], PageScores<Traits>& s,
                        PassState<Traits>& state) const {
    scale_weights(0, state, s);
    uint32_t p[Traits::kRowTiles][kTilesPerPage][2];
    weight_operands(partial, seen, s, p);
    const int lane = ptx::lane_index_here();
    const auto table = lane_table<Traits, Traits::kValueTableOffset>(shared, lane);
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      const auto values = operands(i, lane);
      TQ_UNROLL
      for (int v = 0; v < Traits::kSteps; ++v) {
        uint32_t a[4];
        values.take(v, table, a);
        TQ_UNROLL
        for (int r = 0; r < Traits::kRowTiles; ++r) {
          ptx::mma_f16(state[r].out[v], a[0], a[1], a[2], a[3], p[r][i][0], p[r][i][1]);
        }
      }
    }
  }

  // Weight * scale of tiles first, first + 1, ...
  template <int kRowTiles, int kSteps, int kTiles>
  TQ_DEVICE void scale_weights(int first, const WarpState<kSteps> (&state)[kRowTiles],
                               float (&s)[kRowTiles][kTiles][4]) const {
    if (half_) {
      scale_weights_by<true>(first, state, s);
    } else {
      scale_weights_by<false>(first, state, s);
    }
  }

  // From rows of tokens to rows of queries: operand B. Bits of `seen` are those of s.
  template <int kRowTiles, int kTiles>
  TQ_DEVICE static void weight_operands(bool partial, const uint32_t (&seen)[kRowTiles],
                                        float (&s)[kRowTiles][kTiles][4],
                                        uint32_t (&p)[kRowTiles][kTiles][2]) {
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      if (partial) {
        TQ_UNROLL
        for (int n = 0; n < 4 * kTiles; ++n) {
          if ((seen[r] >> n & 1u) == 0) s[r][n / 4][n % 4] = 0.0f;
        }
      }
      TQ_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        TQ_UNROLL
        for (int k = 0; k < 2; ++k) {
          p[r][i][k] = ptx::move_transposed(ptx::pack_f16(s[r][i][2 * k], s[r][i][2 * k + 1]));
        }
      }
    }
  }

  // Operands A of tile i.
  TQ_DEVICE auto operands(int i, int lane) const {
    using Row = typename Traits::Value;
    const int g = lane >> 2, t = lane & 3;
    typename Traits::Pairs pairs[2];
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      Row first, second;
      const int start = i * kTileTokens + 8 * k;
      first.load(page_, start + tile_slot(2 * t), g, t);
      second.load(page_, start + tile_slot(2 * t + 1), g, t);
      pairs[k].take(first, second);
    }
    std::conditional_t<Traits::kWideTable, WideValueOperands<Traits>, ValueOperands<Traits>>
        operands;
    operands.take(pairs);
    return operands;
  }

 private:
  // Two of the page's scales, other ones in every lane.
  TQ_DEVICE void load_pair(float (&scale)[2]) const {
    const int lane = ptx::lane_index_here();
    if (half_) {
      const auto pair = load_as<uint32_t>(scales_ + 4 * lane);
      scale[0] = ptx::f32_from_f16(pair & 0xFFFFu);
      scale[1] = ptx::f32_from_f16(pair >> 16);
    } else {
      const auto pair = load_as<Words2>(scales_ + 8 * lane);
      scale[0] = ptx::float_of(pair.w[0]);
      scale[1] = ptx::float_of(pair.w[1]);
    }
  }

  template <bool kHalf, int kRowTiles, int kSteps, int kTiles>
  TQ_DEVICE void scale_weights_by(int first_tile, const WarpState<kSteps> (&state)[kRowTiles],
                                  float (&s)[kRowTiles][kTiles][4]) const {
    const int first = first_tile * kTileTokens + tile_slot(ptx::lane_index_here() >> 2);
    float inverse[kRowTiles][2];
    TQ_UNROLL
    for (int n = 0; n < 2 * kRowTiles; ++n) {
      inverse[n / 2][n % 2] = ptx::float_of((254u << 23) - state[n / 2].exponent[n % 2]);
    }
    TQ_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float scale = load_scale(scales_, first + 8 * i, kHalf);
      TQ_UNROLL
      for (int n = 0; n < 2 * kRowTiles; ++n) {
        s[n / 2][i / 2][i % 2 * 2 + n % 2] *= scale * inverse[n / 2][n % 2];
      }
    }
  }

  const std::byte* page_;
  const std::byte* scales_;
  bool half_;
};

}  // namespace turboquant::cuda::detail
