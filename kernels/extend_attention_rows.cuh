// Extend attention: one warp's query rows over a tile of 64 tokens, with their online softmax.
//
// S = Q' K'^T and O += P V' with fp16 operands. mma.sync: m16n8k16, operands loaded from shared
// memory; 32 tokens at a time, for registers. wgmma: m64n64k16 of four warps, which have 16 rows
// each; operands in shared memory but for P.
#pragma once

#include "decode_attention_pages.cuh"
#include "extend_attention_traits.cuh"

namespace turboquant::cuda::detail {

// Which slots of a tile hold tokens, and where those are: slot i is at position i + first where
// i < pivot, at i + second from there on.
struct TileTokens {
  int count;
  int pivot, first, second;
  TQ_DEVICE int position(int slot) const { return slot + (slot < pivot ? first : second); }
};

// A warp's query rows, and a tile of tokens in shared memory: fp16 rows and the numbers they have
// to be multiplied by.
struct Tile {
  ptx::SharedAddress queries;         // of the warps that multiply together
  TileRow* rows;                      // of this warp
  float softcap_scale, softcap_rate;  // 0: no cap
  ptx::SharedAddress keys, values;
  const float* scales;  // keys [64], values [64]
  const float* means;  // of this warp's rows [rows, kMeanBlocks], at the block's column; null: none
  bool plain;          // 64 tokens, all seen by every query of the thread block; no soft cap
  float unit;          // of all values of the tile
};

// Range of the power of two that stands for the values' size (below): weights of fp32 sums stay in
// range, 2^-90 ... 2^104 for 2^20 tokens.
inline constexpr float kLeastUnit = -90.0f;
inline constexpr float kLargestUnit = 127.0f;

// The unit that brings values with scales up to this one below 2.
TQ_DEVICE float unit_of(uint32_t largest_scale) {
  const int exponent = static_cast<int>(largest_scale >> 23) - 127;
  return fminf(fmaxf(static_cast<float>(exponent), kLeastUnit), kLargestUnit);
}

// Weights are 2^(score - reference) with reference = max - kWeightBias + unit. 2^unit is the size
// of the largest value scale seen (it only grows): a weight times its value scale is at most
// 2^(kLazyMargin + kWeightBias + 1) = 2^15 in fp16, whatever the values' size. Outputs and sums are
// in units of 2^reference both. A query's numbers depend on nothing of other queries.
template <class Traits>
class QueryRows {
  static constexpr int kDim = Traits::kDim;
  static constexpr int kRowTiles = Traits::kRowTiles;
  static constexpr int kSteps = Traits::kSteps;
  static constexpr int kTokenTiles = Traits::kScoreTokens / 8;
  static constexpr int kRows = 2 * kRowTiles;  // of a lane: row i is g + 8 i of the warp's

 public:
  using Scores = float[kRowTiles][kTokenTiles][4];
  using Weights = uint32_t[kRowTiles][kTokenTiles][2];  // fp16, times value scales

  TQ_DEVICE QueryRows() {
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) sum_[i] = 0.0f;
    TQ_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      TQ_UNROLL
      for (int n = 0; n < 2 * kSteps; ++n) {
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) out_[i][n][k] = 0.0f;
      }
    }
  }

  // tokens() is the tile's TileTokens, asked for tiles that not all see.
  template <class Tokens>
  TQ_DEVICE void attend(const Tile& tile, Tokens tokens) {
    TQ_NO_UNROLL
    for (int start = 0; start < cache::kBlockTokens; start += Traits::kScoreTokens) {
      Scores s;
      Weights p;
      multiply_keys(tile, start, s);
      weigh(tile, start, tokens, s, p);
      multiply_values(tile, start, p);
    }
  }

  // The same in steps for wgmma, whose products run until they are waited for (settle).
  TQ_DEVICE static void start_scores(const Tile& tile, Scores& s) {
    const ptx::SharedMatrix queries = ptx::shared_matrix(ptx::uniform(tile.queries));
    const ptx::SharedMatrix keys = ptx::shared_matrix(ptx::uniform(tile.keys));
    ptx::wgmma_fence();
    TQ_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_f16(
          s[0], ptx::matrix_part(queries, Traits::operand_at(Traits::kTileRows, 0, 32 * step)),
          ptx::matrix_part(keys, Traits::operand_at(cache::kBlockTokens, 0, 32 * step)), step > 0);
    }
    ptx::wgmma_commit();
  }
  TQ_DEVICE void start_outputs(const Tile& tile, Weights& p) {
    constexpr int kColumnTiles = 8;  // 8 coordinates each, of a column of 128 bytes
    constexpr int kRest = kDim % 64 == 0 ? 64 : kDim % 64;
    const ptx::SharedMatrix values = ptx::shared_matrix(ptx::uniform(tile.values));
    ptx::keep_order(p);
    ptx::keep_order(out_);
    ptx::wgmma_fence();
    TQ_UNROLL
    for (int k = 0; k < cache::kBlockTokens / 16; ++k) {
      const uint32_t a[4] = {p[0][2 * k][0], p[0][2 * k][1], p[0][2 * k + 1][0],
                             p[0][2 * k + 1][1]};
      TQ_UNROLL
      for (int n = 0; n < 2 * kSteps; n += kColumnTiles) {
        const ptx::SharedMatrix b =
            ptx::matrix_part(values, Traits::operand_at(cache::kBlockTokens, 16 * k, 16 * n));
        if (2 * kSteps - n >= kColumnTiles) {
          ptx::wgmma_f16_transposed<8 * kColumnTiles>(out_[0] + n, a, b);
        } else {
          ptx::wgmma_f16_transposed<kRest>(out_[0] + n, a, b);
        }
      }
    }
    ptx::wgmma_commit();
  }
  // Waits for products but the newest kPending groups of them.
  template <int kPending = 0>
  TQ_DEVICE static void settle(Scores& s) {
    ptx::wgmma_wait<kPending>();
    ptx::keep_order(s);
  }
  TQ_DEVICE void settle_outputs() {
    ptx::wgmma_wait();
    ptx::keep_order(out_);
  }

  // Scores to weights times value scales.
  template <class Tokens>
  TQ_DEVICE void weigh(const Tile& tile, int start, Tokens tokens, Scores& s, Weights& p) {
    // 1. Scores before their factor. Under a soft cap or a mask, the scores themselves.
    const int t = ptx::lane_index_here() & 3;
    float mean[kRows];
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      mean[i] = tile.means == nullptr ? 0.0f : tile.means[lane_row(i) * kMeanBlocks];
    }
    TQ_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) {
      const float* const scales = tile.scales + start + 8 * n + 2 * t;
      const float scale[2] = {scales[0], scales[1]};
      TQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& x = score(s, i, n, c);
          x = fmaf(x, scale[c], mean[i]);
        }
      }
    }

    // 2. Weights.
    float factor[kRows], unit[kRows];
    if (tile.plain) {
      TQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        factor[i] = tile.rows[lane_row(i)].factor;
        unit[i] = tile.unit;
      }
      weigh_finished<true>(tile, start, factor, unit, s, p);
    } else {
      finish_scores(tile, tokens(), start, s, unit);
      TQ_UNROLL
      for (int i = 0; i < kRows; ++i) factor[i] = 1.0f;
      weigh_finished<false>(tile, start, factor, unit, s, p);
    }
  }

  // What this lane gives to products with the means of kMeanBlocks blocks: stored pairs 8 step + t
  // and 8 step + 4 + t of the mean of block lane / 4.
  using Means = uint32_t[kSteps][2];
  // q'.m to `to` [rows, kMeanBlocks].
  TQ_DEVICE static void multiply_means(ptx::SharedAddress queries, const Means& means, float* to) {
    float sum[kRowTiles][4] = {};
    TQ_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      TQ_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        load_queries(queries, i, step, a);
        ptx::mma_f16(sum[i], a[0], a[1], a[2], a[3], means[step][0], means[step][1]);
      }
    }
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float* const row = to + lane_row(i) * kMeanBlocks + 2 * (ptx::lane_index_here() & 3);
      row[0] = sum[i / 2][2 * (i % 2)];
      row[1] = sum[i / 2][2 * (i % 2) + 1];
    }
  }

  // Outputs [rows, row_stride] in stored order and {reference, sum} [rows, stats_stride] of the
  // rows below `count`.
  TQ_DEVICE void store(const TileRow* rows, float* out, int64_t row_stride, float* stats,
                       int64_t stats_stride, int count) {
    const int t = ptx::lane_index_here() & 3;
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float sum = sum_[i];
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      const int64_t row = lane_row(i);
      if (row >= count) continue;
      if (t == 0) {
        stats[row * stats_stride] = rows[row].reference;
        stats[row * stats_stride + 1] = sum;
      }
      TQ_UNROLL
      for (int n = 0; n < 2 * kSteps; ++n) {
        const float* const pair = &out_[i / 2][n][2 * (i % 2)];
        *reinterpret_cast<Words2*>(out + row * row_stride + 8 * n + 2 * t) =
            Words2{{ptx::bits_of(pair[0]), ptx::bits_of(pair[1])}};
      }
    }
  }

 private:
  // Under kPlain no score is -inf.
  template <bool kPlain>
  TQ_DEVICE void weigh_finished(const Tile& tile, int start, const float (&factor)[kRows],
                                const float (&unit)[kRows], Scores& s, Weights& p) {
    const int t = ptx::lane_index_here() & 3;
    float top[kRows], reference[kRows];
    bool moves = false;
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const TileRow& row = tile.rows[lane_row(i)];
      reference[i] = row.reference;
      float even = score(s, i, 0, 0), odd = score(s, i, 0, 1);
      TQ_UNROLL
      for (int n = 1; n < kTokenTiles; ++n) {
        even = fmaxf(even, score(s, i, n, 0));
        odd = fmaxf(odd, score(s, i, n, 1));
      }
      top[i] = fmaxf(even, odd) * factor[i];
      moves = moves || top[i] > max(row) + kLazyMargin || unit[i] > row.unit;
    }
    if (ptx::any(moves)) raise_references(tile.rows, top, unit, reference);
    TQ_UNROLL
    for (int n = 0; n < kTokenTiles; ++n) {
      const float* const scales = tile.scales + cache::kBlockTokens + start + 8 * n + 2 * t;
      const float scale[2] = {scales[0], scales[1]};
      TQ_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float weight[2];
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
          const float x = score(s, i, n, c);
          weight[c] = ptx::exp2_fast(fmaf(x, factor[i], -reference[i]));
          sum_[i] += weight[c];
          weight[c] *= scale[c];
          // A token that is not seen may have a scale of NaN.
          if (!kPlain && x == -INFINITY) weight[c] = 0.0f;
        }
        p[i / 2][n][i % 2] = ptx::pack_f16(weight[0], weight[1]);
      }
    }
  }

  TQ_DEVICE static int lane_row(int i) { return (ptx::lane_index_here() >> 2) + 8 * i; }
  TQ_DEVICE static float max(const TileRow& row) {
    return row.reference + (kWeightBias - row.unit);
  }

  TQ_DEVICE static void load_queries(ptx::SharedAddress queries, int row_tile, int step,
                                     uint32_t (&a)[4]) {
    const int first =
        ptx::warp_index_here() % Traits::kGroupWarps * Traits::kWarpRows + 16 * row_tile;
    const int lane = ptx::lane_index_here();
    ptx::load_matrices(queries + Traits::operand_at(Traits::kTileRows, first + lane % 16,
                                                    32 * step + lane / 16 * 16),
                       a);
  }

  // q'.c
  TQ_DEVICE static void multiply_keys(const Tile& tile, int start, Scores& s) {
    clear(s);
    const int lane = ptx::lane_index_here();
    const ptx::SharedAddress keys =
        tile.keys + Traits::operand_at(cache::kBlockTokens, start + lane % 8 + lane / 16 * 8,
                                       lane / 8 % 2 * 16);
    TQ_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRowTiles][4];
      TQ_UNROLL
      for (int i = 0; i < kRowTiles; ++i) load_queries(tile.queries, i, step, a[i]);
      TQ_UNROLL
      for (int n = 0; n < kTokenTiles; n += 2) {
        uint32_t b[4];
        ptx::load_matrices(keys + Traits::operand_at(cache::kBlockTokens, 8 * n, 32 * step), b);
        TQ_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_f16(s[i][n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          ptx::mma_f16(s[i][n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }
  }

  TQ_DEVICE void multiply_values(const Tile& tile, int start, const Weights& p) {
    const int lane = ptx::lane_index_here();
    const ptx::SharedAddress values =
        tile.values + Traits::operand_at(cache::kBlockTokens, start + lane % 16, lane / 16 * 16);
    TQ_UNROLL
    for (int k = 0; k < Traits::kScoreTokens / 16; ++k) {
      TQ_UNROLL
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ptx::load_matrices_transposed(
            values + Traits::operand_at(cache::kBlockTokens, 16 * k, 32 * n), b);
        TQ_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_f16(out_[i][2 * n], p[i][2 * k][0], p[i][2 * k][1], p[i][2 * k + 1][0],
                       p[i][2 * k + 1][1], b[0], b[1]);
          ptx::mma_f16(out_[i][2 * n + 1], p[i][2 * k][0], p[i][2 * k][1], p[i][2 * k + 1][0],
                       p[i][2 * k + 1][1], b[2], b[3]);
        }
      }
    }
  }

  TQ_DEVICE static void clear(Scores& s) {
    TQ_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      TQ_UNROLL
      for (int n = 0; n < kTokenTiles; ++n) {
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) s[i][n][k] = 0.0f;
      }
    }
  }

  // Number of row i of this lane, token 8 n + 2 t + c.
  TQ_DEVICE static float& score(Scores& s, int i, int n, int c) {
    return s[i / 2][n][2 * (i % 2) + c];
  }

  // Factor, soft cap, and -inf for slots without a token and tokens that a query does not see; the
  // unit of the values that each row sees.
  TQ_DEVICE static void finish_scores(const Tile& tile, const TileTokens& tokens, int start,
                                      Scores& s, float (&unit)[kRows]) {
    const int t = ptx::lane_index_here() & 3;
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const TileRow row = tile.rows[lane_row(i)];
      uint32_t largest = 0, are_seen = 0;  // bit 2 n + c: token 8 n + 2 t + c is seen
      TQ_NO_UNROLL
      for (int k = 2 * kTokenTiles - 1; k >= 0; --k) {
        const int slot = start + 8 * (k / 2) + 2 * t + k % 2;
        const int position = tokens.position(slot);
        are_seen <<= 1;
        if (slot >= tokens.count || position < row.begin || position >= row.end) continue;
        are_seen |= 1;
        const uint32_t bits = finite_magnitude(tile.scales[cache::kBlockTokens + slot]);
        largest = bits > largest ? bits : largest;
      }
      TQ_UNROLL
      for (int k = 0; k < 2 * kTokenTiles; ++k) {
        float& x = score(s, i, k / 2, k % 2);
        x *= row.factor;
        if (tile.softcap_scale > 0.0f) x = capped_score(x, tile.softcap_scale, tile.softcap_rate);
        if ((are_seen >> k & 1u) == 0) x = -INFINITY;
      }
      TQ_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        const uint32_t other = ptx::bits_of(ptx::shuffle_xor(ptx::float_of(largest), mask));
        largest = largest > other ? largest : other;
      }
      unit[i] = unit_of(largest);
    }
  }

  TQ_DEVICE void raise_references(TileRow* rows, float (&top)[kRows], const float (&unit)[kRows],
                                  float (&reference)[kRows]) {
    TQ_UNROLL
    for (int i = 0; i < kRows; ++i) {
      top[i] = fmaxf(top[i], ptx::shuffle_xor(top[i], 1));
      top[i] = fmaxf(top[i], ptx::shuffle_xor(top[i], 2));
      TileRow& row = rows[lane_row(i)];
      const float largest = max(row);
      const float raised = top[i] > largest + kLazyMargin ? top[i] : largest;
      const float new_unit = unit[i] > row.unit ? unit[i] : row.unit;
      reference[i] = raised - (kWeightBias - new_unit);
      const float factor = ptx::exp2_fast(row.reference - reference[i]);
      ptx::sync_warp();  // all four lanes of the row have read
      if ((ptx::lane_index_here() & 3) == 0) {
        row.reference = reference[i];
        row.unit = new_unit;
      }
      sum_[i] *= factor;
      TQ_UNROLL
      for (int n = 0; n < 2 * kSteps; ++n) {
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) out_[i / 2][n][2 * (i % 2) + c] *= factor;
      }
    }
    ptx::sync_warp();
  }

  float sum_[kRows];
  float out_[kRowTiles][2 * kSteps][4];
};

}  // namespace turboquant::cuda::detail
