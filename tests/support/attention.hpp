// Attention problems for tests, and the error that fp32 may make in them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "layer.hpp"
#include "tensor.hpp"
#include "turboquant/attention/decode_attention.hpp"
#include "turboquant/attention/reference.hpp"
#include "turboquant/cache/layer_store.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::testing_support {

// One call of decode attention: a store, a query, perhaps a chunk.
struct AttentionCase {
  const cache::LayerStore* store;
  const Tensor* query;
  const Tensor* keys = nullptr;  // the chunk; null: T = 0
  const Tensor* values = nullptr;
  std::vector<int32_t> new_tokens{};
  float scaling = 1.0f;
  float softcap = 0.0f;
  int64_t sliding_window = 0;
  std::vector<float> sink_logits{};
};

struct AttentionResult {
  Tensor out;
  std::vector<float> lse;
};

inline AttentionResult attend(const AttentionCase& c, const ParallelFor& parallel_for = serial(),
                              cache::ElementType out_type = cache::ElementType::kFloat32) {
  const auto& shape = c.query->view().shape;
  AttentionResult result{Tensor(out_type, shape),
                         std::vector<float>(shape[0] * shape[1] * shape[2], kNan)};
  c.store->attend({.query = c.query->view(),
                   .key_states = c.keys ? c.keys->view() : cache::ConstTensorView{},
                   .value_states = c.values ? c.values->view() : cache::ConstTensorView{},
                   .new_tokens = c.new_tokens,
                   .scaling = c.scaling,
                   .softcap = c.softcap,
                   .sliding_window = c.sliding_window,
                   .sink_logits = c.sink_logits.empty() ? nullptr : c.sink_logits.data(),
                   .out = result.out.view(),
                   .lse = result.lse.data()},
                  parallel_for);
  return result;
}

// The tables must outlive the params.
struct CaseTables {
  explicit CaseTables(const AttentionCase& c) {
    const cache::PageTable& table = c.store->table();
    std::vector<int32_t> counts = c.new_tokens;
    if (counts.empty()) {
      counts.assign(table.batch_size(), c.keys ? static_cast<int32_t>(c.keys->view().shape[2]) : 0);
    }
    rows = table.export_rows(counts);
    page_table = table.export_page_table(table.max_entries());
  }
  std::vector<int32_t> rows, page_table;
};

inline attention::DecodeAttentionParams params_of(const AttentionCase& c,
                                                  const CaseTables& tables) {
  return {.spec = c.store->spec(),
          .query = c.query->view(),
          .key_states = c.keys ? c.keys->view() : cache::ConstTensorView{},
          .value_states = c.values ? c.values->view() : cache::ConstTensorView{},
          .exact_keys = c.store->exact_keys(),
          .exact_values = c.store->exact_values(),
          .smoothing = c.store->smoothing(),
          .pages = c.store->pages(),
          .page_table = tables.page_table,
          .rows = tables.rows,
          .sink_logits = c.sink_logits.empty() ? nullptr : c.sink_logits.data(),
          .scaling = c.scaling,
          .softcap = c.softcap,
          .sliding_window = c.sliding_window,
          .out = {},
          .lse = nullptr};
}

// Bounds of the fp32 error against the reference, for one (row, KV head) with head_dim d.
//
// u = 2^-24. Rounding errors of a chain of n operations behave as random signs: their sum is below
// lambda sqrt(n) u times the size of the terms with overwhelming probability (Higham and Mary, "A
// new approach to probabilistic rounding error analysis", 2019); lambda = 2 (the sums below
// are of hundreds of independent parts each).
//   score  three rotations of log2 d stages (and an order-20 factor), a dot product of at most d/4
//          additions in sequence (4 lanes, the least), scale, mean and scaling:
//          n = 3 (log2 d + 20) + d/4 + 8, terms of the size |q s| (|m| + |scale c|) scaling / sqrt
//          d (a sum of d terms of random sign), bounded through the largest dequantised |k / s|,
//          and |m| <= that, by 3 |q s| |k / s| scaling / sqrt d; the score itself is rounded as
//          well.
//   output a weight errs by the score's error (derivative of exp), its own rounding and that of the
//          chain of sums (64 in a page, 8 pages, the splits). The weights' errors are independent
//          between tokens, so the mean of the v_t errs by that times the 2-norm w of the weights
//          times the largest |v_t|, and by the same share of |o| through the denominator; the
//          rotation back adds its own share of |o|.
struct ErrorBound {
  double score;     // also of lse
  double weight;    // relative, of a softmax weight
  double rotation;  // relative, of a rotated vector
  double value;     // largest |v_t|
  double size;      // largest |q s| |k / s| scaling

  // 2-norm of the output's error.
  double output(double weight_norm, double output_norm) const {
    return weight * (value * weight_norm + output_norm) + rotation * output_norm;
  }
};

inline ErrorBound error_bound(const AttentionCase& c, const attention::detail::DenseRow& dense,
                              int64_t row, int64_t kv_head) {
  constexpr double kUnit = 0x1p-24, kLambda = 2.0;
  const cache::LayerSpec& spec = c.store->spec();
  const int64_t dim = spec.head_dim;
  const auto tokens = static_cast<int64_t>(dense.keys.size()) / dim;
  const float* s =
      spec.smooth_keys ? c.store->smoothing() + (row * spec.num_kv_heads + kv_head) * dim : nullptr;
  const auto norm = [&](auto value_at) {
    double squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += value_at(i) * value_at(i);
    return std::sqrt(squares);
  };
  double key = 0, value = 0, query = 0, exact_key = 0, exact_query = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    key =
        std::max(key, norm([&](int64_t i) { return dense.keys[t * dim + i] / (s ? s[i] : 1.0); }));
    exact_key = std::max(exact_key, norm([&](int64_t i) { return dense.keys[t * dim + i]; }));
    value = std::max(value, norm([&](int64_t i) { return dense.values[t * dim + i]; }));
  }
  const auto& shape = c.query->view().shape;
  const int64_t group = shape[1] / spec.num_kv_heads;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int64_t j = 0; j < shape[2]; ++j) {
      const std::vector<float> q = c.query->row(row, h, j);
      query = std::max(query, norm([&](int64_t i) { return double{q[i]} * (s ? s[i] : 1.0); }));
      exact_query = std::max(exact_query, norm([&](int64_t i) { return double{q[i]}; }));
    }
  }
  const double d = static_cast<double>(dim);
  const double rotation = kLambda * std::sqrt(3 * (std::log2(d) + 20)) * kUnit;
  const double chain = kLambda * std::sqrt(3 * (std::log2(d) + 20) + d / 4 + 8) * kUnit;
  const double size = std::abs(c.scaling) * std::max(1.5 * query * key, exact_query * exact_key);
  const double largest_score = std::abs(c.scaling) * exact_query * exact_key;
  const double score = chain * size / std::sqrt(d) + 4 * kUnit * (1 + largest_score);
  const double splits = 1.0 + static_cast<double>(tokens) / 512;
  const double sums = kLambda * std::sqrt(64 + 8 + splits) * kUnit;
  return {.score = score + sums,
          .weight = score + sums + 4 * kUnit,
          .rotation = rotation,
          .value = value,
          .size = std::abs(c.scaling) * query * key};
}

// Whether products with pages are of integers.
inline bool integer_products() {
  return quant::active_simd_level() == quant::SimdLevel::kAvx512Vnni;
}

// The same where products with pages are of integers (src/cpu/attention_int16.inl): two standard
// deviations of what rounding adds, in the constants of that file. d = dim, L = largest level.
//   score   coordinates of q' = R (q s) are multiples of |q'| / 32700, levels of L sqrt(d) / 2^16:
//           off by 12^-1/2 of that, independently, and by half of that at most, times coordinates
//           of k' (|k'| as above) and of scale q' (scale sqrt(d) is about |k'|).
//   output  levels of values are multiples of L / 2^13; the weights of a page are multiples of
//           their maximum / (2^15 - 1) or of their sum / 2^18, whichever is larger, and either is
//           at most their 2-norm / 2^15 or so, for the 64 of them together 8 times that.
inline ErrorBound with_integer_products(ErrorBound bound, const cache::LayerCodec& codec) {
  const auto largest = [](const cache::LayerCodec::Side& side) -> double {
    return *std::max_element(side.table.levels.begin(), side.table.levels.end());
  };
  const double uniform = 1 / std::sqrt(12.0);
  const double score =
      2 * 1.5 * bound.size * std::hypot(uniform / 32700, largest(codec.keys()) / 2 / 65536);
  bound.score += score;
  bound.weight += score + 2 * 8 * uniform / 32767 + 2 * 1.25 * largest(codec.values()) / 2 / 8192;
  return bound;
}

// How far a result is from the reference, in units of the bound.
struct Comparison {
  double worst_output = 0;
  double worst_lse = 0;
  double worst_relative = 0;    // |error| / |output|, 2-norms
  bool padding_is_zero = true;  // output 0 and lse -inf of padding queries
};

inline Comparison compare(const AttentionCase& c, const CaseTables& tables,
                          const AttentionResult& result) {
  const attention::DecodeAttentionParams params = params_of(c, tables);
  const attention::ReferenceAttention reference = attention::reference_attention(params);
  const auto codec = cache::LayerCodec::get(params.spec);
  const auto [batch, heads, queries, dim] = c.query->view().shape;
  const int64_t group = heads / params.spec.num_kv_heads;
  Comparison comparison;
  for (int64_t b = 0; b < batch; ++b) {
    const cache::RowState row = cache::row_state(tables.rows, b);
    for (int kv = 0; kv < params.spec.num_kv_heads; ++kv) {
      const auto dense = attention::detail::dense_row(params, *codec, b, kv);
      const ErrorBound fp32 = error_bound(c, dense, b, kv);
      const ErrorBound bound = integer_products() ? with_integer_products(fp32, *codec) : fp32;
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
          double squares = 0, norm = 0;
          for (int64_t i = 0; i < dim; ++i) {
            const double expected = reference.out[at * dim + i];
            squares += (out[i] - expected) * (out[i] - expected);
            norm += expected * expected;
          }
          // Written so that NaN becomes the worst.
          const auto raise = [](double& worst, double value) {
            if (!(value <= worst)) worst = std::isnan(value) ? INFINITY : value;
          };
          raise(comparison.worst_output,
                std::sqrt(squares) / bound.output(reference.weight_norm[at], std::sqrt(norm)));
          raise(comparison.worst_relative, std::sqrt(squares / norm));
          raise(comparison.worst_lse, std::abs(result.lse[at] - reference.lse[at]) / bound.score);
        }
      }
    }
  }
  return comparison;
}

}  // namespace turboquant::testing_support
