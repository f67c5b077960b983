// Attention over exact tokens where all tensors are bf16 or fp16, contiguous along D, with rows on
// 16 bytes (DecodeArgs::plain_exact): what a model's cache is. A short row waits for one warp's way
// through its exact tokens, so what counts here is how many instructions that is, and that
// everything is on its way at once: no element is asked whether it exists.
#pragma once

#include "decode_attention_exact.cuh"

namespace turboquant::cuda::detail {

// Eight elements of a row at a time, for every run of a lane's share, and the rest.
template <int kDim>
struct PlainRow {
  using Share = ExactShare<kDim, 4, 8>;
  static_assert(Share::kRest == 0 || Share::kRest == 4);

  TQ_DEVICE void load(const std::byte* row, int t) {
    TQ_UNROLL
    for (int run = 0; run < Share::kRuns; ++run) {
      runs[run] = load_as<Words4>(row + 2 * Share::first(run, t));
    }
    if constexpr (Share::kRest > 0) rest = load_as<Words2>(row + 2 * Share::first(Share::kRuns, t));
  }
  // Two registers of k-step `step`.
  TQ_DEVICE uint32_t word(int step, int k) const {
    return step < 2 * Share::kRuns ? runs[step / 2].w[step % 2 * 2 + k] : rest.w[k];
  }

  Words4 runs[Share::kRuns];
  Words2 rest;
};

// Of values in a warp's stage: eight neighbouring rows start in other banks.
template <int kDim>
inline constexpr int kPlainRowBytes = 2 * kDim + 16;

// 16 rows of values, row n's address in lane n, start on their way to the stage; rows from `count`
// on become zeros. They are there behind wait_async_copies.
template <int kDim>
TQ_DEVICE void copy_plain_values(const std::byte* own_row, int count, std::byte* stage) {
  constexpr int kPieces = 2 * kDim / 16;
  const int lane = ptx::lane_index_here();
  TQ_UNROLL
  for (int i = 0; i < kTileTokens * kPieces / kWarpLanes; ++i) {
    const int row = (i * kWarpLanes + lane) / kPieces, piece = (i * kWarpLanes + lane) % kPieces;
    const uint64_t from = ptx::shuffle(reinterpret_cast<uint64_t>(own_row), row);
    ptx::copy_async_16(stage + row * kPlainRowBytes<kDim> + piece * 16,
                       reinterpret_cast<const std::byte*>(from) + piece * 16, row < count);
  }
}

// Values that are not numbers become zeros; bit n: row n has one. Whole warp.
template <int kDim, ElementType kType>
TQ_DEVICE uint32_t drop_non_finite(std::byte* stage) {
  uint32_t rows = 0;
  TQ_NO_UNROLL
  for (int row = 0; row < kTileTokens; ++row) {
    for (int i = ptx::lane_index_here(); i < kDim / 2; i += kWarpLanes) {
      auto& pair = *reinterpret_cast<uint32_t*>(stage + row * kPlainRowBytes<kDim> + 4 * i);
      if (!has_non_finite<kType>(pair)) continue;
      pair = 0;
      rows |= 1u << row;
    }
  }
  ptx::sync_warp();
  return ptx::reduce_or(rows);
}

// Exact tokens first ... end - 1 of a row, 16 at most (end may be further), and of a KV head, into
// the states of row tiles tile, tile + 1, ...; whole warp, with its stage.
template <int kDim, ElementType kType, int kRowTiles>
TQ_DEVICE void attend_plain_tokens(const DecodeArgs& args, const cache::RowState& row, int64_t b,
                                   int head, int tile, int first, int end, std::byte* stage,
                                   WarpState<kDim / 16> (&state)[kRowTiles]) {
  const int lane = ptx::lane_index_here(), g = lane >> 2, t = lane & 3;

  // 1. Everything on its way. Of tokens and queries that do not exist, the last one's.
  const ExactPlace own = exact_place(args, exact_tokens(args.plan.sink_tokens, row), row,
                                     static_cast<int>(min_of(first + lane % kTileTokens, end - 1)));
  const auto row_of = [&](const TensorArg& exact, const TensorArg& chunk) {
    return (own.of_chunk ? chunk : exact).row(b, head, own.slot);
  };
  const auto key_row = reinterpret_cast<uint64_t>(row_of(args.exact_keys, args.key_states));
  PlainRow<kDim> keys[2], queries[kRowTiles];
  TQ_UNROLL
  for (int k = 0; k < 2; ++k) {
    keys[k].load(reinterpret_cast<const std::byte*>(ptx::shuffle(key_row, 8 * k + g)), t);
  }
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    const auto query = static_cast<int>(min_of((tile + r) * kTileRows + g, args.rows - 1));
    queries[r].load(query_row(args, b, head, query), t);
  }
  copy_plain_values<kDim>(row_of(args.exact_values, args.value_states), end - first, stage);

  // 2. Scores, in units of log2; -inf where a query does not see a token.
  float s[kRowTiles][1][4] = {};
  TQ_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      mma_pairs<kType>(s[r][0], keys[0].word(step, 0), keys[1].word(step, 0), keys[0].word(step, 1),
                       keys[1].word(step, 1), queries[r].word(step, 0), queries[r].word(step, 1));
    }
  }
  const bool capped = args.softcap > 0.0f;
  const float scaling = args.scaling * (capped ? 1.0f : kLog2E);
  bool sees_all = true;
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    TQ_UNROLL
    for (float& score : s[r][0]) score *= scaling;
    if (capped) {
      TQ_UNROLL
      for (float& score : s[r][0]) {
        score = capped_score(score, args.softcap_scale, args.softcap_rate);
      }
    }
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (first + k / 2 * 8 + g >= end) s[r][0][k] = -INFINITY;
    }
    if (!args.may_mask) continue;
    const ColumnRange range = column_range(args, row, tile + r, t);
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int position = ptx::shuffle(own.position, k / 2 * 8 + g);
      if (position >= range.begin[k % 2] && position < range.end[k % 2]) continue;
      s[r][0][k] = -INFINITY;
      sees_all = false;
    }
  }
  ptx::wait_async_copies();
  ptx::sync_warp();

  // 3. A value that is not a number must not reach queries that do not see its token: 0 * NaN in
  // their columns would. It becomes 0, and the weight of its token NaN where it is seen.
  if (ptx::any(!sees_all)) poison_scores(drop_non_finite<kDim, kType>(stage), g, s);

  // 4. Weights and outputs.
  ExactWeights<kRowTiles> weights;
  exact_weights<kType>(s, state, weights);
  using Values = ExactShare<kDim, 8, 4>;
  static_assert(Values::kRest == 0 || Values::kRest == 2);
  TQ_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    const int run = step / 2;
    uint32_t pairs[4];
    TQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int token = 2 * t + n % 2 + n / 2 * 8;
      pairs[n] = load_as<uint32_t>(stage + token * kPlainRowBytes<kDim> +
                                   2 * Values::first(run, g) + step % 2 * 4);
    }
    add_values<kType>(pairs, weights.high, step, state);
    add_values<kType>(pairs, weights.low, step, state);
  }
  ptx::sync_warp();  // the stage is free
}

// A warp's share of the piece of exact tokens that starts with token `begin`; whole warp, with its
// stage and clear states.
template <class Traits, int kRowTiles>
TQ_DEVICE void attend_exact_piece(const DecodeArgs& args, int64_t b, int head, int tile, int begin,
                                  int count, int member, std::byte* stage,
                                  WarpState<Traits::kSteps> (&state)[kRowTiles]) {
  static_assert(kTileTokens * kPlainRowBytes<Traits::kDim> <= Traits::kWarpStageBytes);
  const auto end = static_cast<int>(min_of(count, begin + kExactPieceTokens));
  TQ_NO_UNROLL
  for (int first = begin + member * kTileTokens; first < end;
       first += Traits::kGroupWarps * kTileTokens) {
    const cache::RowState row = load_row_state(args.row_table, b);  // not held: registers
    constexpr int kDim = Traits::kDim;
    if (!args.plain_exact) {
      attend_exact_tokens<kDim>(args, row, b, head, tile, first, ptx::lane_index(), state);
    } else if (args.type == ElementType::kFloat16) {
      attend_plain_tokens<kDim, ElementType::kFloat16>(args, row, b, head, tile, first, end, stage,
                                                       state);
    } else {
      attend_plain_tokens<kDim, ElementType::kBFloat16>(args, row, b, head, tile, first, end, stage,
                                                        state);
    }
  }
}

}  // namespace turboquant::cuda::detail
