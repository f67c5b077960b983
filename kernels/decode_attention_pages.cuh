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
template <int kDim, int kBits>
TQ_DEVICE void value_levels(const ValuePairs<kDim, kBits>& pairs, int v, const LaneTable& table,
                            uint32_t (&levels)[2]) {
  const auto even = pairs.index(v, false), odd = pairs.index(v, true);
  levels[0] = table.at_byte(even.word, even.byte);
  levels[1] = table.at_byte(odd.word, odd.byte);
}
template <int kDim, int kBits>
TQ_DEVICE void value_levels(const VectorValuePairs<kDim, kBits>& pairs, int v,
                            const LaneTable& table, uint32_t (&levels)[2]) {
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

// Page scores before any mask, in units of log2 (natural units under a soft cap):
//   s = (scale (q'.c) + q'.m) factor.
// `page` holds the key part of a block. The queries' operands are read anew for every page (from
// the L1: they are the same all along): held in registers they would not leave room for the
// outputs.
template <class Traits>
TQ_DEVICE void page_scores(const DecodeArgs& args, const std::byte* page, LaneTable table,
                           int64_t unit, float (&s)[kTilesPerPage][4]) {
  using Row = typename Traits::Key;
  const int lane = ptx::lane_index_here();
  const int g = lane >> 2, t = lane & 3;
  table.lane_bytes = static_cast<uint32_t>(4 * lane);

  uint32_t operands[Traits::kKeyPairs];
  {
    const uint32_t* const from = args.query_operands + unit * 32 * Traits::kKeyPairs;
    TQ_UNROLL
    for (int u = 0; u < Traits::kKeyPairs; u += 2) {
      const Words2 words =
          load_as<Words2>(reinterpret_cast<const std::byte*>(from + query_operand(u, lane)));
      operands[u] = words.w[0];
      operands[u + 1] = words.w[1];
    }
  }

  // 1. The mean in all 16 rows of A: every lane gets q'.m of its own columns.
  float mean[2] = {0.0f, 0.0f};
  if (args.has_mean) {
    float sum[2][4] = {};  // two chains: half the latency
    TQ_UNROLL
    for (int step = 0; step < Traits::kSteps; ++step) {
      uint32_t m[2];
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) {
        m[k] = load_as<uint32_t>(page +
                                 4 * key_pair_of<Traits::kDim, Traits::kKeyBits>(2 * step + k, t));
      }
      ptx::mma_f16(sum[step % 2], m[0], m[0], m[1], m[1], operands[2 * step],
                   operands[2 * step + 1]);
    }
    mean[0] = sum[0][0] + sum[1][0];
    mean[1] = sum[0][1] + sum[1][1];
  }

  // 2. q'.c of 16 tokens at a time.
  const float factor[2] = {args.query_factors[unit * kTileRows + 2 * t],
                           args.query_factors[unit * kTileRows + 2 * t + 1]};
  const std::byte* const codes = page + (args.has_mean ? 2 * Traits::kDim : 0);
  const std::byte* const scales = codes + cache::kBlockTokens * Row::kRowBytes;
  const bool half_scales = args.half_scales;
  TQ_UNROLL
  for (int i = 0; i < kTilesPerPage; ++i) {
    const int slot = i * kTileTokens + tile_slot(g);
    Row low, high;
    low.load(codes, slot, t);
    high.load(codes, slot + 8, t);
    float dot[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    TQ_UNROLL
    for (int step = 0; step < Traits::kSteps; ++step) {
      ptx::mma_f16(dot, key_levels(low, 2 * step, table), key_levels(high, 2 * step, table),
                   key_levels(low, 2 * step + 1, table), key_levels(high, 2 * step + 1, table),
                   operands[2 * step], operands[2 * step + 1]);
    }
    const float scale[2] = {load_scale(scales, slot, half_scales),
                            load_scale(scales, slot + 8, half_scales)};
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      s[i][k] = fmaf(dot[k], scale[k / 2], mean[k % 2]) * factor[k % 2];
    }
  }
}

// Value scales of a page are brought below 2 by a power of two that only grows (by column), so that
// weight * scale fits fp16 whatever the values' size; outputs are kept in that unit.
//
// `page` holds the value part; s holds weights. partial: weights whose bit of `seen` (4 i + n for
// s[i][n]) is 0 are of tokens that are not seen or do not exist; their scales may be NaN.
template <class Traits>
TQ_DEVICE void page_outputs(const DecodeArgs& args, const std::byte* page, LaneTable table,
                            bool partial, uint32_t seen, float (&s)[kTilesPerPage][4],
                            WarpState<Traits::kSteps>& state) {
  using Row = typename Traits::Value;
  const int lane = ptx::lane_index_here();
  const int g = lane >> 2, t = lane & 3;
  table.lane_bytes = static_cast<uint32_t>(4 * lane);
  const std::byte* const scales = page + cache::kBlockTokens * Row::kRowBytes;
  const bool half_scales = args.half_scales;

  // 1. Scales, their unit, and weight * scale in place of the weights.
  {
    constexpr uint32_t kExponent = 0x7F800000u;
    constexpr uint32_t kLargestUnit = 253u << 23, kOne = 127u << 23;
    float scale[kTilesPerPage][2];
    uint32_t largest[2] = {0, 0};
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) {
        scale[i][k] = load_scale(scales, i * kTileTokens + tile_slot(g) + 8 * k, half_scales);
      }
    }
    if (partial) {
      TQ_UNROLL
      for (int n = 0; n < 4 * kTilesPerPage; ++n) {
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
      for (int n = 0; n < 2 * kTilesPerPage; ++n) {
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
      for (int i = 0; i < kTilesPerPage; ++i) {
        TQ_UNROLL
        for (int k = 0; k < 2; ++k) {
          s[i][2 * k + c] *= scale[i][k] * inverse;
        }
      }
    }
    if (partial) {
      TQ_UNROLL
      for (int n = 0; n < 4 * kTilesPerPage; ++n) {
        if ((seen >> n & 1u) == 0) s[n / 4][n % 4] = 0.0f;
      }
    }
  }

  // 2. From rows of tokens to rows of queries: operand B.
  uint32_t p[kTilesPerPage][2];
  TQ_UNROLL
  for (int i = 0; i < kTilesPerPage; ++i) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      p[i][k] = ptx::move_transposed(ptx::pack_f16(s[i][2 * k], s[i][2 * k + 1]));
    }
  }

  // 3. Values of 16 tokens at a time.
  TQ_UNROLL
  for (int i = 0; i < kTilesPerPage; ++i) {
    typename Traits::Pairs pairs[2];
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      Row first, second;
      const int start = i * kTileTokens + 8 * k;
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
