// Sizes of the decode attention kernel, and the state of one warp's online softmax.
#pragma once

#include <type_traits>

#include "decode_attention_args.hpp"
#include "decode_attention_operands.hpp"
#include "ptx.cuh"
#include "turboquant/quant/codebook_kind.hpp"

namespace turboquant::cuda::detail {

// Pages whose addresses a warp keeps at hand.
inline constexpr int kHeldPages = 16;

// Items that a warp holds, in a ring, and finds at once: one a lane, for it takes as long as one.
inline constexpr int kHeldItems = 8, kFoundItems = 4;
static_assert(kHeldItems == 2 * kFoundItems);

// A piece of work, as one of its warps sees it: a split of a group's, or one of this warp's alone.
struct SplitItem {
  int count;        // pages of this warp; -1: there is no such item
  int first_entry;  // of this warp: entries first_entry + stride * k, k < count
  int b, head;
  int tile, unit;  // the first of the pass
  int slot;        // of the partial result
  int16_t masked;
  int16_t stride;  // kGroupWarps; 1: the whole split is this warp's
};

// What a warp works on and what comes next. In shared memory: in registers it would push the
// accumulators out. kRows: query rows of a pass. kTakesWholeSplits: of LaunchItems.
template <int kRows, bool kTakesWholeSplits>
struct alignas(16) WarpWork {
  const std::byte* block[2][kHeldPages];  // of page k % kHeldPages, in this head
  int tokens[2][kHeldPages];
  int begin[2][kRows], end[2][kRows];  // what the query rows see, of masked items
  SplitItem item[kHeldItems];
  // Of WarpState, between pages.
  float max[kRows];
  uint32_t exponent[kRows];
  float sums[kTakesWholeSplits ? kShortSplitPages : 1][kRows];  // of the pages of a whole split
  int exact_id;    // the piece of exact tokens that is worked on
  int exact_tile;  // for which of the pass's row tiles
};

// A row's page splits, as row_splits finds them: what a warp needs to find its pages of one.
struct alignas(16) RowPlan {
  int first_begin;  // the entry that the first split begins with
  int first_entry;
  int end_entry;  // of masked rows its complement
  int split_pages;
};

// How the page splits of a launch are dealt out: short splits (kShortSplitPages) are numbered by
// row, the others behind them. Where there are many short ones, warps take the first of them whole
// and need no merge; groups take the rest. The bits are the same: a group's warps have one page
// each of a short split, and the group merges in the order in which one warp would.
template <bool kTakesWholeSplits>
struct alignas(16) LaunchItems {
  static constexpr int kKinds = kTakesWholeSplits ? 2 : 1;

  int whole;  // splits that warps take
  int all;    // splits
  // Short splits of the rows before each row, and of all, then the same for the others. Where warps
  // take none, both are one kind.
  int before[kKinds][kMaxLaunchRows + 1];
};

inline constexpr int kMaxSharedBytes = 227 * 1024;  // of a block, compute capability 9.0

// Shared memory of a block, in this order:
//   table     256 rows of 256 bytes: row `byte` holds, once for each of 32 lanes, the fp16 pair of
//             levels that the byte stands for in keys, then the same for values. A lane reads its
//             own copy: whatever the bytes, a look-up hits every bank once. Where keys and values
//             have the same 2-bit levels, the two pairs that the byte's halves stand for instead,
//             once for each lane.
//   stages    per warp: the key part of a block (mean, codes, scales), its value part.
//   barriers  per warp: key part landed, value part landed.
//   work      per warp: its items and pages.
//   plans     of every row.
//   items     how many page splits there are (LaunchItems).
template <int kDim_, int kKeyBits_, int kValueBits_,
          quant::CodebookKind kCodebook = quant::CodebookKind::kScalar, int kRowTiles_ = 1>
struct DecodeTraits {
  static constexpr int kDim = kDim_;
  static constexpr int kRowTiles = kRowTiles_;  // of a pass over a page: mma for each decoded code
  static constexpr int kKeyBits = kKeyBits_;
  static constexpr int kValueBits = kValueBits_;
  using Key = KeyRow<kDim, kKeyBits>;
  static constexpr bool kVector = kCodebook == quant::CodebookKind::kVector;
  using Value = ValueRow<kDim, kValueBits, kVector>;
  using Pairs =
      std::conditional_t<kVector, VectorValuePairs<kDim, kValueBits>, ValuePairs<kDim, kValueBits>>;
  static_assert(kDim % 16 == 0);

  static constexpr int kSteps = kDim / 16;    // k-steps of the first product, m-tiles of the second
  static constexpr int kKeyPairs = kDim / 8;  // of a lane
  static constexpr int kUnitWords = query_words(kDim);  // of a row tile's query operands
  // Two bits: a byte is two pairs, which one look-up of eight bytes finds.
  static constexpr bool kWideTable = kKeyBits == 2 && kValueBits == 2 && !kVector;
  static constexpr int kTableBytes = 256 * 256;
  static constexpr int kValueTableOffset = 128;

  static constexpr int kScalesMaxBytes = cache::kBlockTokens * 4;
  static constexpr int kKeyStageBytes =
      2 * kDim + cache::kBlockTokens * Key::kRowBytes + kScalesMaxBytes;
  // Between two splits the value stage carries the warp's states to the rest of its group.
  static constexpr int kStateBytes = (static_cast<int>(partial_floats(kDim)) + kTileRows) * 4;
  static constexpr int kStatesBytes = kRowTiles * kStateBytes;
  static constexpr int kValuePartMaxBytes =
      cache::kBlockTokens * Value::kRowBytes + kScalesMaxBytes;
  static constexpr int kValueStageBytes =
      kValuePartMaxBytes > kStatesBytes ? kValuePartMaxBytes : kStatesBytes;
  static constexpr int kWarpStageBytes = kKeyStageBytes + kValueStageBytes;
  static_assert(kKeyStageBytes % 16 == 0 && kValueStageBytes % 16 == 0);

  // A group of eight warps has a page for each in a short split, which a warp may take alone then.
  // With two row tiles there are no registers for a page's outputs beside the split's.
  static constexpr bool takes_whole_splits(int warps) { return warps == 16 && kRowTiles == 1; }
  template <bool kTakesWholeSplits>
  using WorkOf = WarpWork<kRowTiles * kTileRows, kTakesWholeSplits>;

  static constexpr int shared_bytes(int warps) {
    const bool whole = takes_whole_splits(warps);
    const size_t work = whole ? sizeof(WorkOf<true>) : sizeof(WorkOf<false>);
    const size_t items = whole ? sizeof(LaunchItems<true>) : sizeof(LaunchItems<false>);
    return kTableBytes + warps * (kWarpStageBytes + 2 * 8 + static_cast<int>(work)) +
           kMaxLaunchRows * static_cast<int>(sizeof(RowPlan)) + static_cast<int>(items);
  }
  // Accumulators and scores of 256 coordinates, or of two row tiles, take more than 128 registers.
  static constexpr int kWarps = kRowTiles * kDim <= 128 && shared_bytes(16) <= kMaxSharedBytes ? 16
                                : shared_bytes(8) <= kMaxSharedBytes                           ? 8
                                                                                               : 4;
  // Two groups where they fit: one merges its states while the other attends.
  static constexpr int kGroupWarps = kWarps == 16 ? 8 : 4;
  static constexpr int kGroups = kWarps / kGroupWarps;
  static constexpr bool kTakesWholeSplits = takes_whole_splits(kWarps);
  static_assert(!kTakesWholeSplits || kGroupWarps == kShortSplitPages);
  // A page of a short split is a state of its own there, whoever makes it: attend_pages may.
  static constexpr bool kSharesPages = kTakesWholeSplits;
  using Work = WorkOf<kTakesWholeSplits>;
  using Items = LaunchItems<kTakesWholeSplits>;
  // Half the warps have the registers for what 16 warps read anew, and attend exact tokens for all
  // row tiles at once.
  static constexpr bool kHoldsQueries = kWarps <= 8;
  static constexpr int kExactTiles = kWarps <= 8 ? kRowTiles : 1;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(shared_bytes(kWarps) <= kMaxSharedBytes);
  static_assert(kShortSplitPages % kGroupWarps == 0);

  static constexpr int kStagesOffset = kTableBytes;
  static constexpr int kBarriersOffset = kStagesOffset + kWarps * kWarpStageBytes;
  static constexpr int kWorkOffset = kBarriersOffset + kWarps * 2 * 8;
  static constexpr int kPlansOffset = kWorkOffset + kWarps * static_cast<int>(sizeof(Work));
  static_assert(kPlansOffset % alignof(RowPlan) == 0);
  static constexpr int kItemsOffset =
      kPlansOffset + kMaxLaunchRows * static_cast<int>(sizeof(RowPlan));
  static constexpr int kSharedBytes = shared_bytes(kWarps);
};

// The traits of a call with that many query rows of a KV head, given to f.
template <int kDim, int kKeyBits, int kValueBits, quant::CodebookKind kCodebook, class F>
auto with_decode_traits(int rows, F f) {
  if constexpr (pass_tiles(kDim, kKeyBits) == 2) {
    if (rows > kTileRows) return f(DecodeTraits<kDim, kKeyBits, kValueBits, kCodebook, 2>{});
  }
  return f(DecodeTraits<kDim, kKeyBits, kValueBits, kCodebook>{});
}

// A finite stand-in for the maximum over no token: s - kNoScore is defined for s = -inf too.
inline constexpr float kNoScore = -3.402823466e+38f;

// The running maximum follows a score only when it is passed by more than this (in log2), so most
// pages need no rescaling; weights are then at most 2^(kLazyMargin + kWeightBias) = 2^14, which
// leaves the factor 2 of the value scales (below) and a bit below fp16's 65504. The bias keeps
// small weights normal numbers: fp16 loses precision below 2^-14 and everything below 2^-25, that
// is, for tokens whose weight is less than 2^-21 (2^-32) of the largest.
inline constexpr float kLazyMargin = 6.0f;
inline constexpr float kWeightBias = 8.0f;

// Columns 2t and 2t + 1 of eight queries, as lane 4 g + t of a warp holds them.
template <int kSteps>
struct WarpState {
  float max[2];
  float sum[2];          // of this lane's tokens
  uint32_t exponent[2];  // of the value scales' unit: outputs are in units of 2^exponent, as the
                         //   exponent bits of a float; 0: no value yet
  float out[kSteps][4];

  TQ_DEVICE void clear() {
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      max[c] = kNoScore;
      sum[c] = 0.0f;
      exponent[c] = 0;
    }
    TQ_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) out[i][k] = 0.0f;
    }
  }

  // Maxima and units from and to shared memory, where they are while registers are dear.
  template <class Work>
  TQ_DEVICE void load_columns(const Work& work, int tile) {
    const int t = ptx::lane_index_here() & 3;
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      max[c] = work.max[tile * kTileRows + 2 * t + c];
      exponent[c] = work.exponent[tile * kTileRows + 2 * t + c];
    }
  }
  template <class Work>
  TQ_DEVICE void store_columns(Work& work, int tile) const {
    const int lane = ptx::lane_index_here();
    if (lane < kTileRows / 2) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        work.max[tile * kTileRows + 2 * lane + c] = max[c];
        work.exponent[tile * kTileRows + 2 * lane + c] = exponent[c];
      }
    }
    ptx::sync_warp();
  }

  // Sums of this lane's tokens become sums of all.
  TQ_DEVICE void reduce_sums() {
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      TQ_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum[c] += ptx::shuffle_xor(sum[c], mask);
    }
  }

  TQ_DEVICE void scale_outputs(int c, float factor) {
    TQ_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      out[i][c] *= factor;
      out[i][c + 2] *= factor;
    }
  }

  // This lane's largest scores by column. Scores are s * factor in log2, -inf where a token is not
  // seen; a column depends on its own scores alone.
  template <int kTiles>
  TQ_DEVICE static void largest_scores(const float (&s)[kTiles][4], const float (&factor)[2],
                                       float (&top)[2]) {
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      top[c] = s[0][c];
      TQ_UNROLL
      for (int i = 0; i < kTiles; ++i) top[c] = fmaxf(top[c], fmaxf(s[i][c], s[i][2 + c]));
      top[c] *= factor[c];
    }
  }
  // Whether one of them passes the running maximum.
  TQ_DEVICE bool is_passed_by(const float (&top)[2]) const {
    return top[0] > max[0] + kLazyMargin || top[1] > max[1] + kLazyMargin;
  }
  // The running maximum follows where it is passed, in whole steps (decode_attention_merge.cuh says
  // what for); the outputs are then to be multiplied by `factor`. Whole warp.
  TQ_DEVICE void raise_maxima(float (&top)[2], float (&factor)[2]) {
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      TQ_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        top[c] = fmaxf(top[c], ptx::shuffle_xor(top[c], mask));
      }
      const float raised = top[c] > max[c] + kLazyMargin ? ceilf(top[c]) : max[c];
      factor[c] = ptx::exp2_fast(max[c] - raised);
      max[c] = raised;
      sum[c] *= factor[c];
    }
  }
  // Scores become weights 2^(score - max + bias).
  template <int kTiles>
  TQ_DEVICE void weigh(float (&s)[kTiles][4], const float (&factor)[2]) {
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float reference = max[c] - kWeightBias;
      TQ_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        TQ_UNROLL
        for (int k = c; k < 4; k += 2) {
          s[i][k] = ptx::exp2_fast(fmaf(s[i][k], factor[c], -reference));
        }
        sum[c] += s[i][c] + s[i][c + 2];
      }
    }
  }
};

// Scores, then weights, of a page.
template <class Traits>
using PageScores = float[Traits::kRowTiles][kTilesPerPage][4];
template <class Traits>
using PassState = WarpState<Traits::kSteps>[Traits::kRowTiles];

// Natural units to log2, through the soft cap if there is one. tanh within 2^-22 absolutely.
// scale: softcap log2(e); rate: 2 log2(e) / softcap.
TQ_DEVICE float capped_score(float score, float scale, float rate) {
  const float e = ptx::exp2_fast(rate * score);
  return scale * (1.0f - 2.0f * ptx::reciprocal_fast(1.0f + e));
}

}  // namespace turboquant::cuda::detail
