// Attention of a warp over one page (64 tokens of a KV head) that lies in shared memory.
#pragma once

#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// One lane's copy of the look-up table of a side: entry e is at 256 e. The address of a look-up is
// one byte permutation: {lane * 4, index, 0, 0}.
struct LaneTable {
  const std::byte* table;   // of the side
  uint32_t lane_bytes = 0;  // 4 lane

  TQ_DEVICE uint32_t at_byte(uint32_t word, int byte) const {
    return load_as<uint32_t>(table +
                             ptx::permute_bytes(word, lane_bytes, 0x7604u | unsigned(byte) << 4));
  }
  TQ_DEVICE uint32_t at_code(uint32_t code) const {
    return load_as<uint32_t>(table + (code << 8 | lane_bytes));
  }
};

// The same where the table's place in shared memory is known when the kernel is compiled: the
// address of a look-up takes no addition.
template <int kOffset>
struct FixedLaneTable {
  const std::byte* shared;
  uint32_t lane_bytes;

  TQ_DEVICE uint32_t at_byte(uint32_t word, int byte) const {
    return ptx::load_shared_word<kOffset>(
        shared, ptx::permute_bytes(word, lane_bytes, 0x7604u | unsigned(byte) << 4));
  }
  TQ_DEVICE uint32_t at_code(uint32_t code) const {
    return ptx::load_shared_word<kOffset>(shared, code << 8 | lane_bytes);
  }
};

// Entry `entry` of the look-up table of a side: levels are DecodeTable::levels.
TQ_DEVICE uint32_t table_entry(const float* levels, int entry, int bits, bool vector) {
  if (vector || index_kind(bits) == IndexKind::kByte) {
    return ptx::pack_f16(levels[2 * entry], levels[2 * entry + 1]);
  } else if (index_kind(bits) == IndexKind::kNibble) {
    // Entries below 16 have no codes in their upper half.
    return ptx::pack_f16(levels[4 * (entry % 16)], levels[4 * (entry % 16) + 1]);
  } else {
    return entry < 1 << bits ? ptx::pack_f16(levels[entry], levels[entry]) : 0;
  }
}

// The fp16 pair of pair u of a key row (of a value row: the same order of coordinates).
template <int kDim, int kBits, class Table>
TQ_DEVICE uint32_t key_levels(const KeyRow<kDim, kBits>& row, int u, const Table& table) {
  if constexpr (index_kind(kBits) == IndexKind::kCode) {
    return ptx::permute_bytes(table.at_code(row.code(2 * u)), table.at_code(row.code(2 * u + 1)),
                              0x5410);
  } else {
    const auto [word, byte] = row.index(u);
    return table.at_byte(word, byte);
  }
}

// The operand registers of pair v of a value row: its even coordinate in both tokens, then its odd
// one.
template <int kDim, int kBits, class Table>
TQ_DEVICE void value_levels(const ValuePairs<kDim, kBits>& pairs, int v, const Table& table,
                            uint32_t (&levels)[2]) {
  const auto even = pairs.index(v, false), odd = pairs.index(v, true);
  levels[0] = table.at_byte(even.word, even.byte);
  levels[1] = table.at_byte(odd.word, odd.byte);
}
template <int kDim, int kBits, class Table>
TQ_DEVICE void value_levels(const VectorValuePairs<kDim, kBits>& pairs, int v, const Table& table,
                            uint32_t (&levels)[2]) {
  const auto first = pairs.index(v, 0), second = pairs.index(v, 1);
  const uint32_t a = table.at_byte(first.word, first.byte);
  const uint32_t b = table.at_byte(second.word, second.byte);
  levels[0] = ptx::permute_bytes(a, b, 0x5410);
  levels[1] = ptx::permute_bytes(a, b, 0x7632);
}

// Bits of |x|; 0 for NaN and infinity.
TQ_DEVICE uint32_t finite_magnitude(float x) {
  const uint32_t bits = ptx::bits_of(x) & 0x7FFFFFFFu;
  return bits < 0x7F800000u ? bits : 0;
}

TQ_DEVICE float load_scale(const std::byte* scales, int slot, bool half) {
  return half ? ptx::f32_from_f16(load_as<uint16_t>(scales + 2 * slot))
              : load_as<float>(scales + 4 * slot);
}

// Scales of slots first, first + 8, ... of either width, without a branch.
class EighthScales {
 public:
  TQ_DEVICE EighthScales(const std::byte* scales, uint32_t first, bool half)
      : from_(scales + (half ? first / 2 : first) * 4),
        step_(half ? 16 : 32),
        shift_(half ? first % 2 * 16 : 0),
        half_(half) {}
  TQ_DEVICE float at(int i) const {
    const uint32_t bits = load_as<uint32_t>(from_ + i * step_) >> shift_;
    return half_ ? ptx::f32_from_f16(bits & 0xFFFFu) : ptx::float_of(bits);
  }

 private:
  const std::byte* from_;
  uint32_t step_, shift_;
  bool half_;
};

// The lane's operands of one k-step, read anew where they are needed (from the L1): held in
// registers they would not leave room for the outputs. operands: the lane's of the first step.
TQ_DEVICE Words2 query_step(const uint32_t* operands, int step) {
  Words2 words;
  ptx::load_anew(operands + int64_t{step} * 2 * kWarpLanes, words.w);
  return words;
}

// q'.m of the lane's two columns. `page` holds the key part of a block.
template <class Traits>
TQ_DEVICE void page_mean(const std::byte* page, const uint32_t* operands, float (&mean)[2]) {
  using Steps = QuerySteps<Traits::kDim>;
  const int lane = ptx::lane_index_here(), t = lane & 3;
  const uint32_t* const of_lane = operands + uint32_t{2} * lane;
  float sum[2][4] = {};  // even steps in rows g, odd steps in rows g + 8
  uint32_t m[4];
  TQ_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step) {
    const bool in_fours = step < Steps::kInFours / 2;
    TQ_UNROLL
    for (int k = 0; k < 4 && (!in_fours || step % 2 == 0); ++k) {
      const int u = in_fours ? Steps::pair(step, 0) + k : Steps::pair(step, k / 2);
      m[k] = load_as<uint32_t>(page + 4 * key_pair_of<Traits::kDim, Traits::kKeyBits>(u, t));
    }
    const Words2 q = query_step(of_lane, step);
    ptx::mma_f16(sum[step % 2], m[0], m[1], m[2], m[3], q.w[0], q.w[1]);
  }
  TQ_UNROLL
  for (int c = 0; c < 2; ++c) mean[c] = sum[0][c] + sum[1][2 + c];
}

// Scores of half a page before any mask, in units of log2 (natural units under a soft cap):
//   s = (scale (q'.c) + q'.m) factor.
// `shared` starts with the table, `page` holds the key part of a block.
template <class Traits>
TQ_DEVICE void half_scores(const DecodeArgs& args, const std::byte* shared, const std::byte* page,
                           int half, const uint32_t* operands, const float* factors,
                           const float (&mean)[2], float (&s)[kHalfTiles][4]) {
  using Row = typename Traits::Key;
  using Steps = QuerySteps<Traits::kDim>;
  const int lane = ptx::lane_index_here();
  const int g = lane >> 2, t = lane & 3;
  const FixedLaneTable<0> table{shared, static_cast<uint32_t>(4 * lane)};
  const std::byte* const codes = page + (args.has_mean ? 2 * Traits::kDim : 0);
  const int first = half * kHalfTokens + tile_slot(g);

  // 1. q'.c.
  Row rows[kHalfTiles][2];
  TQ_UNROLL
  for (int i = 0; i < kHalfTiles; ++i) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) rows[i][k].load(codes, first + i * kTileTokens + 8 * k, t);
  }
  const uint32_t* const of_lane = operands + uint32_t{2} * lane;
  float dot[kHalfTiles][4] = {};
  TQ_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step) {
    const int u = Steps::pair(step, 0), v = Steps::pair(step, 1);
    const Words2 q = query_step(of_lane, step);
    TQ_UNROLL
    for (int i = 0; i < kHalfTiles; ++i) {
      ptx::mma_f16(dot[i], key_levels(rows[i][0], u, table), key_levels(rows[i][1], u, table),
                   key_levels(rows[i][0], v, table), key_levels(rows[i][1], v, table), q.w[0],
                   q.w[1]);
    }
  }

  // 2. Scales, mean, factor.
  const EighthScales scales(codes + cache::kBlockTokens * Row::kRowBytes, first, args.half_scales);
  float scale[kHalfTiles][2];
  TQ_UNROLL
  for (int i = 0; i < 2 * kHalfTiles; ++i) scale[i / 2][i % 2] = scales.at(i);
  Words2 factor;
  ptx::load_anew(factors + 2 * t, factor.w);
  TQ_UNROLL
  for (int i = 0; i < kHalfTiles; ++i) {
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      s[i][k] = fmaf(dot[i][k], scale[i][k / 2], mean[k % 2]) * ptx::float_of(factor.w[k % 2]);
    }
  }
}

// Value scales of half a page are brought below 2 by a power of two that only grows (by column),
// so that weight * scale fits fp16 whatever the values' size; outputs are kept in that unit.
//
// `shared` starts with the table, `page` holds the value part; s holds weights. partial: weights
// whose bit of `seen` (4 i + n for s[i][n]) is 0 are of tokens that are not seen or do not exist;
// their scales may be NaN.
template <class Traits>
TQ_DEVICE void half_outputs(const DecodeArgs& args, const std::byte* shared, const std::byte* page,
                            int half, bool partial, uint32_t seen, float (&s)[kHalfTiles][4],
                            WarpState<Traits::kSteps>& state) {
  using Row = typename Traits::Value;
  const int lane = ptx::lane_index_here();
  const int g = lane >> 2, t = lane & 3;
  const FixedLaneTable<Traits::kValueTableOffset> table{shared, static_cast<uint32_t>(4 * lane)};
  const EighthScales scales(page + cache::kBlockTokens * Row::kRowBytes,
                            half * kHalfTokens + tile_slot(g), args.half_scales);

  // 1. Scales, their unit, and weight * scale in place of the weights.
  {
    constexpr uint32_t kExponent = 0x7F800000u;
    constexpr uint32_t kLargestUnit = 253u << 23, kOne = 127u << 23;
    float scale[kHalfTiles][2];
    uint32_t largest[2] = {0, 0};
    TQ_UNROLL
    for (int i = 0; i < kHalfTiles; ++i) {
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) {
        scale[i][k] = scales.at(2 * i + k);
      }
    }
    if (partial) {
      TQ_UNROLL
      for (int n = 0; n < 4 * kHalfTiles; ++n) {
        const uint32_t bits = finite_magnitude(scale[n / 4][n / 2 % 2]);
        if ((seen >> n & 1u) != 0 && bits > largest[n % 2]) largest[n % 2] = bits;
      }
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        TQ_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) {
          const uint32_t other = ptx::bits_of(ptx::shuffle_xor(ptx::float_of(largest[c]), mask));
          largest[c] = largest[c] > other ? largest[c] : other;
        }
      }
    } else {
      TQ_UNROLL
      for (int n = 0; n < 2 * kHalfTiles; ++n) {
        const uint32_t bits = finite_magnitude(scale[n / 2][n % 2]);
        largest[0] = bits > largest[0] ? bits : largest[0];
      }
      largest[0] = largest[1] = ptx::reduce_max(largest[0]);
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      uint32_t unit = largest[c] & kExponent;
      unit = unit < kLargestUnit ? unit : kLargestUnit;
      largest[c] = unit > state.exponent[c] ? unit : state.exponent[c];
    }
    if (ptx::any(largest[0] != state.exponent[0] || largest[1] != state.exponent[1])) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        const uint32_t growth = largest[c] - state.exponent[c];
        state.scale_outputs(c, growth < kOne ? ptx::float_of(kOne - growth) : 0.0f);
        state.exponent[c] = largest[c];
      }
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float inverse = ptx::float_of((254u << 23) - state.exponent[c]);
      TQ_UNROLL
      for (int i = 0; i < kHalfTiles; ++i) {
        TQ_UNROLL
        for (int k = 0; k < 2; ++k) {
          s[i][2 * k + c] *= scale[i][k] * inverse;
        }
      }
    }
    if (partial) {
      TQ_UNROLL
      for (int n = 0; n < 4 * kHalfTiles; ++n) {
        if ((seen >> n & 1u) == 0) s[n / 4][n % 4] = 0.0f;
      }
    }
  }

  // 2. From rows of tokens to rows of queries: operand B.
  uint32_t p[kHalfTiles][2];
  TQ_UNROLL
  for (int i = 0; i < kHalfTiles; ++i) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      p[i][k] = ptx::move_transposed(ptx::pack_f16(s[i][2 * k], s[i][2 * k + 1]));
    }
  }

  // 3. Values of 16 tokens at a time.
  TQ_UNROLL
  for (int i = 0; i < kHalfTiles; ++i) {
    typename Traits::Pairs pairs[2];
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      Row first, second;
      const int start = half * kHalfTokens + i * kTileTokens + 8 * k;
      first.load(page, start + tile_slot(2 * t), g, t);
      second.load(page, start + tile_slot(2 * t + 1), g, t);
      pairs[k].take(first, second);
    }
    TQ_UNROLL
    for (int v = 0; v < Traits::kSteps; ++v) {
      uint32_t a[2][2];
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) value_levels(pairs[k], v, table, a[k]);
      ptx::mma_f16(state.out[v], a[0][0], a[0][1], a[1][0], a[1][1], p[i][0], p[i][1]);
    }
  }
}

}  // namespace turboquant::cuda::detail
