// Problems for decode attention, and the accuracy asked of fp16 operands.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "attention.hpp"
#include "layer.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::testing_support {

struct DecodeProblem {
  cache::LayerSpec spec{.head_dim = 128, .num_kv_heads = 2};
  int group = 4;
  int64_t queries = 1;
  std::vector<int32_t> lengths = {300};
  bool with_chunk = true;
  std::vector<int32_t> new_tokens = {};  // of the chunk; default: all
  int64_t cropped = 0;                   // tokens appended and then cropped away
  float softcap = 0.0f;
  int64_t sliding_window = 0;
  bool sink_logits = false;
  bool gaps = false;  // strided queries and chunk
  cache::ElementType type = cache::ElementType::kBFloat16;
  float query_size = 1.0f;
  float value_size = 1.0f;
  uint32_t seed = 1;

  std::string text() const {
    std::string text =
        "d=" + std::to_string(spec.head_dim) + " bits=" + std::to_string(spec.k_bits) + "+" +
        std::to_string(spec.v_bits) + " " + std::string(quant::codebook_kind_name(spec.codebook)) +
        " heads=" + std::to_string(spec.num_kv_heads) + "x" + std::to_string(group) +
        " q=" + std::to_string(queries) + " type=" + std::to_string(static_cast<int>(type)) +
        " scale=" + std::to_string(static_cast<int>(spec.scale_type)) +
        " mean=" + std::to_string(spec.center_keys) +
        " window=" + std::to_string(spec.window_tokens) +
        " sinks=" + std::to_string(spec.sink_tokens) + " chunk=" + std::to_string(with_chunk) +
        " cropped=" + std::to_string(cropped) + " softcap=" + std::to_string(softcap) +
        " sliding=" + std::to_string(sliding_window) +
        " sink_logits=" + std::to_string(sink_logits) + " gaps=" + std::to_string(gaps) +
        " seed=" + std::to_string(seed) + " lengths=";
    for (const int32_t length : lengths) text += std::to_string(length) + ",";
    text += " new=";
    for (const int32_t n : new_tokens) text += std::to_string(n) + ",";
    return text;
  }
};

// The problem with contiguous queries and chunk, as models have them, and with strided ones:
// kernels may read them differently.
template <class F>
void in_both_layouts(DecodeProblem p, F f) {
  for (const bool gaps : {false, true}) {
    p.gaps = gaps;
    f(p);
  }
}

// A random problem for CUDA whose rows hold up to max_length tokens.
inline DecodeProblem random_decode_problem(int round, int max_length,
                                           int max_queries = cuda::kDecodeAttentionMaxQueries) {
  std::mt19937 random(7000 + round);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  DecodeProblem p;
  const auto config = cuda::kDecodeAttentionConfigs[pick(
      0, static_cast<int>(cuda::kDecodeAttentionConfigs.size()) - 1)];
  p.spec = {.head_dim = config.head_dim,
            .num_kv_heads = pick(1, 3),
            .k_bits = config.k_bits,
            .v_bits = config.v_bits,
            .k_rule = static_cast<quant::ScaleRule>(pick(0, 3)),
            .v_rule = static_cast<quant::ScaleRule>(pick(0, 3)),
            .scale_type = static_cast<cache::ScaleType>(pick(0, 1)),
            .center_keys = pick(0, 1) == 1,
            .smooth_keys = pick(0, 1) == 1,
            .sink_tokens = pick(0, 1) * pick(0, 70),
            .window_tokens = 64 * pick(1, 3),
            .seed = static_cast<uint64_t>(round),
            .layer = pick(0, 40),
            .codebook = config.codebook};
  if (pick(0, 3) == 0) {
    p.spec.window_tokens = 0;
    p.spec.center_keys = p.spec.smooth_keys = false;
  }
  p.group = pick(0, 2) ? pick(1, 9) : pick(10, 17);
  p.queries = pick(0, 2) ? pick(1, 3) : pick(4, max_queries);
  p.lengths.clear();
  for (int b = pick(1, 3); b > 0; --b) {
    p.lengths.push_back(pick(0, 3) ? pick(0, max_length) : pick(0, 5));
  }
  p.with_chunk = pick(0, 3) > 0;
  p.cropped = pick(0, 2) == 0 ? pick(1, 300) : 0;
  p.softcap = pick(0, 3) == 0 ? 2.0f : 0.0f;
  p.sliding_window = pick(0, 2) == 0 ? pick(1, max_length) : 0;
  p.sink_logits = pick(0, 3) == 0;
  p.gaps = pick(0, 1) == 1;
  p.type = static_cast<cache::ElementType>(pick(0, 2));
  p.seed = 1000 + round;
  for (size_t b = 0; p.with_chunk && b < p.lengths.size(); ++b) {
    p.new_tokens.push_back(pick(0, static_cast<int>(p.queries)));
  }
  return p;
}

// A problem with its tensors; unused memory is poisoned.
class BuiltDecode {
 public:
  explicit BuiltDecode(const DecodeProblem& p)
      : store(p.spec, static_cast<int>(p.lengths.size()), p.type),
        query(Tensor::random(p.type, shape(p, p.spec.num_kv_heads * p.group, p.queries), p.seed,
                             0.0f, p.gaps)),
        keys(Tensor::random(p.type, shape(p, p.spec.num_kv_heads, p.queries), p.seed + 1, 1.0f,
                            p.gaps)),
        values(Tensor::random(p.type, shape(p, p.spec.num_kv_heads, p.queries), p.seed + 2, 0.0f,
                              p.gaps)) {
    const int32_t longest = *std::max_element(p.lengths.begin(), p.lengths.end());
    std::vector<int32_t> counts = p.lengths;
    for (int32_t& count : counts) count += static_cast<int32_t>(p.cropped);
    const auto past_shape = shape(p, p.spec.num_kv_heads, longest + p.cropped);
    Tensor past_keys = Tensor::random(p.type, past_shape, p.seed + 3, 1.0f);
    Tensor past_values = Tensor::random(p.type, past_shape, p.seed + 4);
    resize(past_values, p.value_size);
    resize(values, p.value_size);
    resize(query, p.query_size);
    store.append(past_keys.view(), past_values.view(), counts, serial());
    if (p.cropped > 0) store.crop(p.cropped);
    poison_unused(store);

    test_case = {.store = &store, .query = &query};
    if (p.with_chunk) {
      test_case.keys = &keys;
      test_case.values = &values;
      test_case.new_tokens = p.new_tokens;
      if (p.new_tokens.empty()) {
        test_case.new_tokens.assign(p.lengths.size(), static_cast<int32_t>(p.queries));
      }
      for (size_t b = 0; b < p.lengths.size(); ++b) {
        for (int64_t t = 0; t < p.queries - test_case.new_tokens[b]; ++t) {
          for (int head = 0; head < p.spec.num_kv_heads; ++head) {
            keys.fill_row(b, head, t, kNan);
            values.fill_row(b, head, t, kNan);
          }
        }
      }
    }
    test_case.scaling = 1.0f / std::sqrt(static_cast<float>(p.spec.head_dim));
    test_case.softcap = p.softcap;
    test_case.sliding_window = p.sliding_window;
    for (int h = 0; p.sink_logits && h < p.spec.num_kv_heads * p.group; ++h) {
      test_case.sink_logits.push_back(static_cast<float>(h % 5) - 1.0f);
    }
  }
  BuiltDecode(const BuiltDecode&) = delete;

  cache::LayerStore store;
  Tensor query, keys, values;
  AttentionCase test_case;

 private:
  static std::array<int64_t, 4> shape(const DecodeProblem& p, int64_t heads, int64_t tokens) {
    return {static_cast<int64_t>(p.lengths.size()), heads, tokens, p.spec.head_dim};
  }
  static void resize(Tensor& tensor, float size) {
    if (size == 1.0f) return;
    const auto shape = tensor.view().shape;
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < shape[2]; ++t) {
          std::vector<float> row = tensor.row(b, h, t);
          for (float& x : row) x *= size;
          tensor.set_row(b, h, t, row);
        }
      }
    }
  }
};

// Absurd numbers in the entries of a page table [B, columns, 2] that no row uses.
inline void poison_unused_entries(std::vector<int32_t>& page_table, int64_t columns,
                                  const std::vector<int32_t>& rows) {
  for (size_t b = 0; b < rows.size() / cache::tables::kRowColumns; ++b) {
    const int64_t used = rows[b * cache::tables::kRowColumns + cache::tables::kRowEntries];
    for (int64_t e = used; e < columns; ++e) {
      page_table[(b * columns + e) * 2] = INT32_MAX - 7;
      page_table[(b * columns + e) * 2 + 1] = -77;
    }
  }
}

// Output and lse against fp64 over the same codes. Bound: fp16 operands round the rotated query and
// the levels to 2^-11 relatively, weights times scales to 2^-11. In a binade [1, 2) the error is
// uniform in +-2^-11, rms 2^-11 / sqrt(3); relative to a number x of it, with x spread evenly over
// the logarithm, the rms is that times sqrt((1 - 1/4) / (2 ln 2)): 0.42 2^-11.
//   score   the two roundings (rms 0.42 2^-11 each) are independent between the d coordinates, so
//           a score errs by sigma = 0.6 2^-11 scaling sqrt(sum (q'_i k'_i)^2), where the root is at
//           most sqrt(3 / d) |q'| |k'| (Gaussian coordinates, q' parallel to k'); four sigma, and
//           the fp32 bound of tests/support/attention.hpp in addition;
//   lse     as a score, by 2^-22 of every exponential (PTX ISA, ex2.approx), and by 2^-22 of
//   itself:
//           an ulp of the logarithm and the roundings of a sum and a product in fp32;
//   output  a weight errs by the score's error and its own rounding; errors of weights are
//           independent between tokens: times the 2-norm of the weights times the largest |v|, and
//           by the levels' rounding, 2^-11 |v|, likewise.
struct HalfComparison {
  double worst_output = 0;
  double worst_lse = 0;
  double worst_relative = 0;
  bool padding_is_zero = true;
};
inline HalfComparison compare_half_precision(const AttentionCase& c,
                                             const AttentionResult& result) {
  const CaseTables tables(c);
  const attention::DecodeAttentionParams params = params_of(c, tables);
  const attention::ReferenceAttention reference = attention::reference_attention(params);
  const auto codec = cache::LayerCodec::get(params.spec);
  const auto [batch, heads, queries, dim] = c.query->view().shape;
  const int64_t group = heads / params.spec.num_kv_heads;
  constexpr double kHalf = 0x1p-11;
  HalfComparison comparison;
  const auto raise = [](double& worst, double value) {
    if (!(value <= worst)) worst = std::isnan(value) ? INFINITY : value;
  };
  for (int64_t b = 0; b < batch; ++b) {
    const cache::RowState row = cache::row_state(tables.rows, b);
    for (int kv = 0; kv < params.spec.num_kv_heads; ++kv) {
      const auto dense = attention::detail::dense_row(params, *codec, b, kv);
      const ErrorBound fp32 = error_bound(c, dense, b, kv);
      const float* s = params.spec.smooth_keys
                           ? c.store->smoothing() + (b * params.spec.num_kv_heads + kv) * dim
                           : nullptr;
      double key = 0;
      const auto tokens = static_cast<int64_t>(dense.keys.size()) / dim;
      for (int64_t t = 0; t < tokens; ++t) {
        double squares = 0;
        for (int64_t i = 0; i < dim; ++i) {
          const double x = dense.keys[t * dim + i] / (s ? s[i] : 1.0f);
          squares += x * x;
        }
        key = std::max(key, std::sqrt(squares));
      }
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        for (int64_t j = 0; j < queries; ++j) {
          const int64_t at = (b * heads + h) * queries + j;
          const std::vector<float> out = result.out.row(b, h, j);
          if (attention::query_position(row, queries, j) < 0) {
            comparison.padding_is_zero = comparison.padding_is_zero &&
                                         result.lse[at] == -INFINITY &&
                                         out == std::vector<float>(dim, 0.0f);
            continue;
          }
          const std::vector<float> q = c.query->row(b, h, j);
          double query = 0;
          for (int64_t i = 0; i < dim; ++i) {
            const double x = double{q[i]} * (s ? s[i] : 1.0f);
            query += x * x;
          }
          const double score = 4 * 0.6 * std::abs(c.scaling) * std::sqrt(query) * key * kHalf *
                                   std::sqrt(3.0 / static_cast<double>(dim)) +
                               fp32.score;
          const double weight = score + 2 * kHalf;
          double squares = 0, norm = 0;
          for (int64_t i = 0; i < dim; ++i) {
            const double expected = reference.out[at * dim + i];
            squares += (out[i] - expected) * (out[i] - expected);
            norm += expected * expected;
          }
          norm = std::sqrt(norm);
          const double bound = weight * (fp32.value * reference.weight_norm[at] + norm) +
                               fp32.output(reference.weight_norm[at], norm);
          raise(comparison.worst_output, std::sqrt(squares) / bound);
          raise(comparison.worst_relative, std::sqrt(squares) / norm);
          const double rounding = 0x1p-22 * (1 + std::abs(reference.lse[at]));
          raise(comparison.worst_lse,
                std::abs(result.lse[at] - reference.lse[at]) / (score + fp32.score + rounding));
        }
      }
    }
  }
  return comparison;
}

inline void expect_half_precision(const AttentionCase& c, const AttentionResult& result) {
  const HalfComparison comparison = compare_half_precision(c, result);
  EXPECT_TRUE(comparison.padding_is_zero);
  EXPECT_LE(comparison.worst_output, 1.0)
      << "in units of the bound; relative " << comparison.worst_relative;
  EXPECT_LE(comparison.worst_lse, 1.0) << "in units of the bound";
}

// Error of all outputs, relative to the reference's norm.
inline double relative_error(const AttentionResult& result, const std::vector<double>& reference) {
  const auto [batch, heads, queries, dim] = result.out.view().shape;
  double squares = 0, norm = 0;
  for (int64_t at = 0; at < batch * heads * queries; ++at) {
    const std::vector<float> out =
        result.out.row(at / (heads * queries), at / queries % heads, at % queries);
    for (int64_t i = 0; i < dim; ++i) {
      const double expected = reference[at * dim + i];
      squares += (out[i] - expected) * (out[i] - expected);
      norm += expected * expected;
    }
  }
  return std::sqrt(squares / norm);
}

// The same of attention as half-precision kernels do it over a dequantised cache: keys, values,
// weights and outputs rounded to the type, sums exact. One query token that sees everything, no
// soft cap.
inline double half_precision_cache_error(const AttentionCase& c,
                                         const attention::DecodeAttentionParams& params,
                                         cache::ElementType type) {
  const auto codec = cache::LayerCodec::get(params.spec);
  const auto [batch, heads, queries, dim] = c.query->view().shape;
  const attention::ReferenceAttention reference = attention::reference_attention(params);
  const int64_t group = heads / params.spec.num_kv_heads;
  const auto round = [&](double x) -> double {
    const auto y = static_cast<float>(x);
    return type == cache::ElementType::kFloat16 ? math::fp32_from_fp16(math::fp16_from_fp32(y))
                                                : math::fp32_from_bf16(math::bf16_from_fp32(y));
  };
  double squares = 0, norm = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto dense =
          attention::detail::dense_row(params, *codec, b, static_cast<int>(h / group));
      const auto tokens = static_cast<int64_t>(dense.keys.size()) / dim;
      const std::vector<float> q = c.query->row(b, h, 0);
      std::vector<double> scores(tokens), out(dim);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < dim; ++i) scores[t] += q[i] * round(dense.keys[t * dim + i]);
        scores[t] *= c.scaling;
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const double weight = std::exp(scores[t] - max);
        sum += weight;
        for (int64_t i = 0; i < dim; ++i) {
          out[i] += round(weight) * round(dense.values[t * dim + i]);
        }
      }
      for (int64_t i = 0; i < dim; ++i) {
        const double expected = reference.out[((b * heads + h) * queries) * dim + i];
        const double error = round(out[i] / sum) - expected;
        squares += error * error;
        norm += expected * expected;
      }
    }
  }
  return std::sqrt(squares / norm);
}

// NaN in a page (a key and a value) and in the ring reaches the queries that see it and no others.
// attend(case) -> AttentionResult.
template <class Attend>
void expect_poison_reaches_who_sees_it(cache::ElementType type, int64_t queries, Attend attend) {
  const cache::LayerSpec spec{.head_dim = 64, .num_kv_heads = 1};
  const int64_t seen_from = queries / 2, poisoned = 300 - queries + seen_from;
  for (const auto& [with_chunk, gaps] :
       {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
    SCOPED_TRACE(std::string(with_chunk ? "chunk" : "no chunk") + (gaps ? ", gaps" : ""));
    const int64_t stored = with_chunk ? 300 - queries : 300;
    Tensor keys = Tensor::random(type, {1, 1, stored, 64}, 1);
    Tensor values = Tensor::random(type, {1, 1, stored, 64}, 2);
    Tensor chunk_keys = Tensor::random(type, {1, 1, queries, 64}, 4, 0.0f, gaps);
    Tensor chunk_values = Tensor::random(type, {1, 1, queries, 64}, 5, 0.0f, gaps);
    keys.fill_row(0, 0, 20, kNan);
    values.fill_row(0, 0, 30, kNan);
    if (with_chunk) {
      chunk_values.fill_row(0, 0, poisoned - stored, kNan);
    } else {
      values.fill_row(0, 0, poisoned, kNan);
    }
    cache::LayerStore store(spec, 1, type);
    store.append(keys.view(), values.view(), {}, serial());
    const Tensor query = Tensor::random(type, {1, 2, queries, 64}, 3, 0.0f, gaps);
    AttentionCase c{.store = &store, .query = &query};
    if (with_chunk) {
      c.keys = &chunk_keys;
      c.values = &chunk_values;
      c.new_tokens = {static_cast<int32_t>(queries)};
    }
    AttentionResult result = attend(c);
    for (int64_t j = 0; j < queries; ++j) EXPECT_TRUE(std::isnan(result.out.row(0, 0, j)[0]));
    c.sliding_window = 200;  // the page's are out of sight, the last one is seen from one query on
    result = attend(c);
    for (int64_t j = 0; j < queries; ++j) {
      EXPECT_EQ(std::isnan(result.out.row(0, 1, j)[0]), j >= seen_from) << j;
    }
  }
}

}  // namespace turboquant::testing_support
