// Attention over exact tokens: sinks, ring and the chunk that is not yet appended, in the model's
// own basis and element type.
//
// Of any type and stride: tensor cores take bf16 pairs, an fp16 or fp32 number is the sum of two
// bf16 numbers (fp16: exactly; fp32: to 2^-16), and a product of two such sums is three products
// (the fourth is below 2^-16). bf16 numbers need one. Weights are always a sum of two. Rows of bf16
// and fp16 that lie as they should have a path of their own (decode_attention_plain_exact.cuh).
#pragma once

#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// kCount elements as pairs of bf16: high + low.
template <int kCount>
struct SplitElems {
  uint32_t high[kCount / 2];
  uint32_t low[kCount / 2];
};

using cache::ElementType;

// kType: of both numbers of a pair.
template <ElementType kType = ElementType::kBFloat16>
TQ_DEVICE void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  if constexpr (kType == ElementType::kFloat16) {
    high = ptx::pack_f16(x, y);
    low = ptx::pack_f16(x - ptx::f32_from_f16(high & 0xFFFFu), y - ptx::f32_from_f16(high >> 16));
  } else {
    high = ptx::pack_bf16(x, y);
    low = ptx::pack_bf16(x - ptx::float_of(high << 16), y - ptx::float_of(high & 0xFFFF0000u));
  }
}
template <ElementType kType>
TQ_DEVICE void mma_pairs(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  if constexpr (kType == ElementType::kFloat16) {
    ptx::mma_f16(d, a0, a1, a2, a3, b0, b1);
  } else {
    ptx::mma_bf16(d, a0, a1, a2, a3, b0, b1);
  }
}

// Elements [first, first + kCount) of a row; a null row is zeros.
template <int kCount>
TQ_DEVICE void load_exact(const std::byte* row, int64_t elem_stride, int first, ElementType type,
                          SplitElems<kCount>& elems) {
  TQ_UNROLL
  for (int i = 0; i < kCount / 2; ++i) elems.high[i] = elems.low[i] = 0;
  if (row == nullptr) return;
  const bool whole = elem_stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  if (type == ElementType::kFloat32) {
    float x[kCount];
    if (whole && kCount % 4 == 0) {
      TQ_UNROLL
      for (int i = 0; i + 3 < kCount; i += 4) {
        const Words4 words = load_as<Words4>(row + (first + i) * 4);
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) x[i + k] = ptx::float_of(words.w[k]);
      }
    } else {
      TQ_UNROLL
      for (int i = 0; i < kCount; ++i) x[i] = load_as<float>(row + (first + i) * elem_stride * 4);
    }
    TQ_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      split_pair(x[2 * i], x[2 * i + 1], elems.high[i], elems.low[i]);
    }
    return;
  }
  if (whole) {
    const std::byte* const from = row + first * 2;
    if constexpr (kCount == 8) {
      const Words4 words = load_as<Words4>(from);
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) elems.high[k] = words.w[k];
    } else if constexpr (kCount == 4) {
      const Words2 words = load_as<Words2>(from);
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) elems.high[k] = words.w[k];
    } else {
      elems.high[0] = load_as<uint32_t>(from);
    }
  } else {
    TQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = load_as<uint16_t>(row + (first + i) * elem_stride * 2);
      elems.high[i / 2] |= bits << (16 * (i % 2));
    }
  }
  if (type == ElementType::kFloat16) {
    TQ_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const uint32_t pair = elems.high[i];
      split_pair(ptx::f32_from_f16(pair & 0xFFFFu), ptx::f32_from_f16(pair >> 16), elems.high[i],
                 elems.low[i]);
    }
  }
}

// Where an exact token of a row is found, of all heads alike.
struct ExactPlace {
  int slot;  // of the exact tokens' tensors, or of the chunk's
  int position;
  bool of_chunk;
};
// Token n of the row's exact tokens in the order of their positions.
TQ_DEVICE ExactPlace exact_place(const DecodeArgs& args, const ExactTokens& counts,
                                 const cache::RowState& row, int n) {
  const auto stored = static_cast<int>(counts.sinks + counts.ring);
  if (n >= stored) {
    return {args.chunk_tokens - static_cast<int>(row.new_tokens) + n - stored,
            static_cast<int>(row.length) + n - stored, true};
  }
  const auto position = static_cast<int>(n < counts.sinks ? n : row.exact_begin + n - counts.sinks);
  const auto sinks = static_cast<int>(args.exact.sink_tokens);
  return {position < sinks ? position : sinks + args.by_ring(position - sinks).remainder, position,
          false};
}

// One exact token of a row; null: there is none.
struct ExactToken {
  const std::byte* row;
  int position;
  bool of_chunk;

  TQ_DEVICE int64_t stride(const TensorArg& exact, const TensorArg& chunk) const {
    return of_chunk ? chunk.elem_stride : exact.elem_stride;
  }
};

// Token n, of keys or of values.
TQ_DEVICE ExactToken exact_token(const DecodeArgs& args, const TensorArg& exact,
                                 const TensorArg& chunk, const cache::RowState& row, int64_t b,
                                 int head, int n) {
  const ExactTokens counts = exact_tokens(args.plan.sink_tokens, row);
  if (n >= counts.count()) return {nullptr, 0, false};
  const ExactPlace place = exact_place(args, counts, row, n);
  return {(place.of_chunk ? chunk : exact).row(b, head, place.slot), place.position,
          place.of_chunk};
}

// Query row r of a KV head is query r / group of head `head * group + r % group`.
TQ_DEVICE const std::byte* query_row(const DecodeArgs& args, int64_t b, int head, int r) {
  if (r >= args.rows) return nullptr;
  const auto [query, of_group] = args.by_group(r);
  return args.query.row(b, head * args.group + of_group, query);
}

// What query row r of a KV head sees.
TQ_DEVICE attention::VisibleTokens visible_of_row(const DecodeArgs& args,
                                                  const cache::RowState& row, int r) {
  return attention::visible_tokens(
      attention::query_position(row, args.num_queries, args.by_group(r).quotient),
      args.plan.sliding_window);
}

// What the queries of this lane's two columns see.
struct ColumnRange {
  int64_t begin[2];
  int64_t end[2];
};
TQ_DEVICE ColumnRange column_range(const DecodeArgs& args, const cache::RowState& row, int tile,
                                   int t) {
  ColumnRange range;
  TQ_UNROLL
  for (int c = 0; c < 2; ++c) {
    const attention::VisibleTokens visible =
        visible_of_row(args, row, tile * kTileRows + 2 * t + c);
    range.begin[c] = visible.begin;
    range.end[c] = visible.end;
  }
  return range;
}

// One k-step (kCount = 8: two) of the first product over elements [first, first + kCount), for the
// queries of every row tile.
template <int kCount, int kRowTiles>
TQ_DEVICE void score_run(const DecodeArgs& args, const ExactToken (&token)[2],
                         const std::byte* const (&query)[kRowTiles], int first,
                         float (&s)[kRowTiles][1][4]) {
  SplitElems<kCount> a, b, q[kRowTiles];
  load_exact(token[0].row, token[0].stride(args.exact_keys, args.key_states), first, args.type, a);
  load_exact(token[1].row, token[1].stride(args.exact_keys, args.key_states), first, args.type, b);
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    load_exact(query[r], args.query.elem_stride, first, args.type, q[r]);
  }
  TQ_UNROLL
  for (int i = 0; i < kCount / 2; i += 2) {
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      const auto product = [&](const uint32_t(&x)[kCount / 2], const uint32_t(&y)[kCount / 2],
                               const uint32_t(&z)[kCount / 2]) {
        ptx::mma_bf16(s[r][0], x[i], y[i], x[i + 1], y[i + 1], z[i], z[i + 1]);
      };
      product(a.high, b.high, q[r].high);
      if (args.type != ElementType::kBFloat16) {
        product(a.low, b.low, q[r].high);
        product(a.high, b.high, q[r].low);
      }
    }
  }
}

template <ElementType kType = ElementType::kBFloat16>
TQ_DEVICE bool has_non_finite(uint32_t pair) {
  constexpr uint32_t kExponent = kType == ElementType::kFloat16 ? 0x7C00u : 0x7F80u;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// Scores of tokens g and g + 8 that are seen become NaN if their bit of `tokens` is 1.
template <int kRowTiles>
TQ_DEVICE void poison_scores(uint32_t tokens, int g, float (&s)[kRowTiles][1][4]) {
  TQ_UNROLL
  for (int n = 0; n < 4 * kRowTiles; ++n) {
    float& score = s[n / 4][0][n % 4];
    if ((tokens >> (g + n % 4 / 2 * 8) & 1u) != 0 && score != -INFINITY) score = NAN;
  }
}

// Of pairs of coordinates of two tokens, the first coordinate of both or the second.
TQ_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return ptx::permute_bytes(a, b, 0x5410); }
TQ_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return ptx::permute_bytes(a, b, 0x7632); }

// Weights of 16 tokens for every row tile as operand B: sums of two numbers of 16 bits.
template <int kRowTiles>
struct ExactWeights {
  uint32_t high[kRowTiles][2];
  uint32_t low[kRowTiles][2];
};

// Scores, -inf where a query does not see a token, become weights, from rows of tokens to rows of
// queries.
template <ElementType kType, int kSteps, int kRowTiles>
TQ_DEVICE void exact_weights(float (&s)[kRowTiles][1][4], WarpState<kSteps> (&state)[kRowTiles],
                             ExactWeights<kRowTiles>& weights) {
  constexpr float kInLog2[2] = {1.0f, 1.0f};
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    float top[2];
    state[r].largest_scores(s[r], kInLog2, top);
    if (ptx::any(state[r].is_passed_by(top))) {
      float factor[2];
      state[r].raise_maxima(top, factor);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) state[r].scale_outputs(c, factor[c]);
    }
    state[r].weigh(s[r], kInLog2);
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      uint32_t high, low;
      split_pair<kType>(s[r][0][2 * k], s[r][0][2 * k + 1], high, low);
      weights.high[r][k] = ptx::move_transposed(high);
      weights.low[r][k] = ptx::move_transposed(low);
    }
  }
}

// Coordinates 2 i and 2 i + 1 of 16 tokens, of four in each lane, times their weights.
template <ElementType kType, int kSteps, int kRowTiles>
TQ_DEVICE void add_values(const uint32_t (&v)[4], const uint32_t (&p)[kRowTiles][2], int step,
                          WarpState<kSteps> (&state)[kRowTiles]) {
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    mma_pairs<kType>(state[r].out[step], low_halves(v[0], v[1]), high_halves(v[0], v[1]),
                     low_halves(v[2], v[3]), high_halves(v[2], v[3]), p[r][0], p[r][1]);
  }
}

// The second product over a run of kCount coordinates: m-tiles kFirstStep, kFirstStep + 1, ...
template <int kCount, int kFirstStep, int kSteps, int kRowTiles>
TQ_DEVICE void value_run(const DecodeArgs& args, const ExactToken (&token)[4], int first,
                         bool drop_non_finite, const ExactWeights<kRowTiles>& weights,
                         WarpState<kSteps> (&state)[kRowTiles]) {
  SplitElems<kCount> v[4];
  TQ_UNROLL
  for (int n = 0; n < 4; ++n) {
    load_exact(token[n].row, token[n].stride(args.exact_values, args.value_states), first,
               args.type, v[n]);
    if (drop_non_finite) {
      TQ_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        if (has_non_finite(v[n].high[i])) v[n].high[i] = v[n].low[i] = 0;
      }
    }
  }
  TQ_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t highs[4] = {v[0].high[i], v[1].high[i], v[2].high[i], v[3].high[i]};
    add_values<ElementType::kBFloat16>(highs, weights.high, kFirstStep + i, state);
    add_values<ElementType::kBFloat16>(highs, weights.low, kFirstStep + i, state);
    if (args.type != ElementType::kBFloat16) {
      const uint32_t lows[4] = {v[0].low[i], v[1].low[i], v[2].low[i], v[3].low[i]};
      add_values<ElementType::kBFloat16>(lows, weights.high, kFirstStep + i, state);
    }
  }
}

template <int kRun, int kDim, int kRowTiles>
TQ_DEVICE void value_runs(const DecodeArgs& args, const ExactToken (&token)[4], int g,
                          bool drop_non_finite, const ExactWeights<kRowTiles>& weights,
                          WarpState<kDim / 16> (&state)[kRowTiles]) {
  using Values = ExactShare<kDim, 8, 4>;
  if constexpr (kRun < Values::kRuns) {
    value_run<4, 2 * kRun>(args, token, Values::first(kRun, g), drop_non_finite, weights, state);
    value_runs<kRun + 1, kDim>(args, token, g, drop_non_finite, weights, state);
  } else if constexpr (Values::kRest > 0) {
    value_run<Values::kRest, 2 * kRun>(args, token, Values::first(kRun, g), drop_non_finite,
                                       weights, state);
  }
}

// 16 exact tokens, first_token ..., one lane a row: keys of token n in lane n, values in lane 16 +
// n.
class ExactTile {
 public:
  TQ_DEVICE ExactTile(const DecodeArgs& args, const cache::RowState& row, int64_t b, int head,
                      int first_token, int lane)
      : is_value_(lane >= kTileTokens),
        own_(exact_token(args, is_value_ ? args.exact_values : args.exact_keys,
                         is_value_ ? args.value_states : args.key_states, row, b, head,
                         first_token + lane % kTileTokens)) {}

  TQ_DEVICE ExactToken key(int n) const { return of_lane(n); }
  TQ_DEVICE ExactToken value(int n) const { return of_lane(kTileTokens + n); }

  // Lines of the values' rows that are contiguous.
  template <int kDim>
  TQ_DEVICE void prefetch_values(const DecodeArgs& args) const {
    constexpr int kLine = 128;
    if (own_.row == nullptr || !is_value_) return;
    // The stride of keys is not needed here; where it is not computed, registers spill.
    const int64_t stride = is_value_ ? own_.stride(args.exact_values, args.value_states)
                                     : own_.stride(args.exact_keys, args.key_states);
    const int row_bytes = kDim * args.exact_keys.elem_bytes;
    for (int at = 0; stride == 1 && at < row_bytes; at += kLine) ptx::prefetch(own_.row + at);
  }

 private:
  TQ_DEVICE ExactToken of_lane(int lane) const {
    const uint64_t row = ptx::shuffle(reinterpret_cast<uint64_t>(own_.row), lane);
    return {reinterpret_cast<const std::byte*>(row), ptx::shuffle(own_.position, lane),
            ptx::shuffle(int{own_.of_chunk}, lane) != 0};
  }
  bool is_value_;
  ExactToken own_;
};

// 16 exact tokens, first_token ..., of a row and KV head into the states of row tiles tile, tile +
// 1, ..., from where they lie; values are on their way while the scores are found. Whole warp.
template <int kDim, int kRowTiles>
TQ_DEVICE void attend_exact_tokens(const DecodeArgs& args, const cache::RowState& row, int64_t b,
                                   int head, int tile, int first_token, int lane,
                                   WarpState<kDim / 16> (&state)[kRowTiles]) {
  using Keys = ExactShare<kDim, 4, 8>;
  const int g = lane >> 2, t = lane & 3;

  const ExactTile tokens(args, row, b, head, first_token, lane);
  tokens.prefetch_values<kDim>(args);

  // 1. Scores of the keys of tokens g and g + 8.
  const ExactToken key_token[2] = {tokens.key(g), tokens.key(g + 8)};
  const std::byte* query[kRowTiles];
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    query[r] = query_row(args, b, head, (tile + r) * kTileRows + g);
  }
  float s[kRowTiles][1][4] = {};
  TQ_UNROLL
  for (int run = 0; run < Keys::kRuns; ++run) {
    score_run<8>(args, key_token, query, Keys::first(run, t), s);
  }
  if constexpr (Keys::kRest > 0) {
    score_run<Keys::kRest>(args, key_token, query, Keys::first(Keys::kRuns, t), s);
  }

  // 2. Units of log2; -inf where a query does not see a token.
  bool sees_all = true, sees_none = true;
  TQ_UNROLL
  for (int r = 0; r < kRowTiles; ++r) {
    const ColumnRange range = column_range(args, row, tile + r, t);
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      const ExactToken& token = key_token[k / 2];
      const float score = s[r][0][k] * args.scaling;
      const bool visible = token.row != nullptr && token.position >= range.begin[k % 2] &&
                           token.position < range.end[k % 2];
      sees_all = sees_all && (visible || token.row == nullptr);
      sees_none = sees_none && !visible;
      s[r][0][k] = !visible ? -INFINITY
                   : args.softcap > 0.0f
                       ? capped_score(score, args.softcap_scale, args.softcap_rate)
                       : score * kLog2E;
    }
  }
  if (!ptx::any(!sees_none)) return;

  // 3. A value that is not a number must not reach queries that do not see its token: 0 * NaN in
  // their columns would. It becomes 0, and the weight of its token NaN where it is seen.
  const ExactToken value_token[4] = {tokens.value(2 * t), tokens.value(2 * t + 1),
                                     tokens.value(2 * t + 8), tokens.value(2 * t + 9)};
  const bool mixed = ptx::any(!sees_all);
  uint32_t poisoned = 0;
  if (mixed) {
    using Values = ExactShare<kDim, 8, 4>;
    TQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto look = [&](auto& elems, int first) {
        load_exact(value_token[n].row, value_token[n].stride(args.exact_values, args.value_states),
                   first, args.type, elems);
        for (const uint32_t pair : elems.high) {
          if (has_non_finite(pair)) poisoned |= 1u << (2 * t + n % 2 + n / 2 * 8);
        }
      };
      TQ_NO_UNROLL
      for (int run = 0; run < Values::kRuns; ++run) {
        SplitElems<4> elems;
        look(elems, Values::first(run, g));
      }
      if constexpr (Values::kRest > 0) {
        SplitElems<Values::kRest> elems;
        look(elems, Values::first(Values::kRuns, g));
      }
    }
    poisoned = ptx::reduce_or(poisoned);
    poison_scores(poisoned, g, s);
  }

  // 4. Weights and outputs.
  ExactWeights<kRowTiles> weights;
  exact_weights<ElementType::kBFloat16>(s, state, weights);
  value_runs<0, kDim>(args, value_token, g, poisoned != 0, weights, state);
}

}  // namespace turboquant::cuda::detail
