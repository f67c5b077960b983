#include "turboquant/attention/reference.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "../support/attention.hpp"

namespace turboquant::attention {
namespace {

using cache::ElementType;
using cache::LayerSpec;
using cache::LayerStore;
using testing_support::AttentionCase;
using testing_support::Tensor;

// The reference against plain dense attention over what dequantize() returns: two separate ways
// from the stored bytes to keys, values and output.
TEST(ReferenceAttention, IsDenseAttentionOverDequantisedTokens) {
  for (const int head_dim : {24, 64, 80}) {
    for (const int bits : {2, 3, 4, 7}) {
      const LayerSpec spec{
          .head_dim = head_dim, .num_kv_heads = 2, .k_bits = bits, .v_bits = 9 - bits};
      const std::array<int64_t, 4> shape = {2, 2, 350, head_dim};
      const Tensor keys = Tensor::random(ElementType::kFloat32, shape, 1, 1.0f);
      const Tensor values = Tensor::random(ElementType::kFloat32, shape, 2);
      LayerStore store(spec, 2, ElementType::kFloat32);
      const std::vector<int32_t> counts = {350, 150};
      store.append(keys.view(), values.view(), counts, serial());
      const int64_t queries = 3, group = 2, heads = 4;
      const Tensor query = Tensor::random(ElementType::kFloat32, {2, heads, queries, head_dim}, 3);
      AttentionCase c{.store = &store, .query = &query};
      c.scaling = 1.0f / std::sqrt(static_cast<float>(head_dim));
      c.softcap = bits == 3 ? 2.0f : 0.0f;
      c.sliding_window = bits == 4 ? 200 : 0;
      if (bits == 7) c.sink_logits = {0.5f, -1.0f, 3.0f, 0.0f};
      const testing_support::CaseTables tables(c);
      const ReferenceAttention reference = reference_attention(params_of(c, tables));

      Tensor dense_keys(ElementType::kFloat32, shape), dense_values(ElementType::kFloat32, shape);
      store.dequantize(dense_keys.view(), dense_values.view(), serial());
      for (int b = 0; b < 2; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t j = 0; j < queries; ++j) {
            const std::vector<float> q = query.row(b, h, j);
            std::vector<double> out(head_dim, 0.0);
            double sum = c.sink_logits.empty() ? 0.0 : std::exp(double{c.sink_logits[h]});
            const int64_t position = counts[b] - queries + j;
            double largest_value = 0;
            for (int64_t t = 0; t <= position; ++t) {
              if (c.sliding_window > 0 && t <= position - c.sliding_window) continue;
              const std::vector<float> k = dense_keys.row(b, h / group, 350 - counts[b] + t);
              const std::vector<float> v = dense_values.row(b, h / group, 350 - counts[b] + t);
              double score = 0;
              for (int i = 0; i < head_dim; ++i) score += double{q[i]} * k[i];
              score *= c.scaling;
              if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
              sum += std::exp(score);
              for (int i = 0; i < head_dim; ++i) {
                out[i] += std::exp(score) * v[i];
                largest_value = std::max(largest_value, std::abs(double{v[i]}));
              }
            }
            const int64_t at = (b * heads + h) * queries + j;
            // dequantize() works in fp32: scores of size 10 with relative errors of about 1e-6.
            EXPECT_NEAR(reference.lse[at], std::log(sum), 1e-5);
            for (int i = 0; i < head_dim; ++i) {
              EXPECT_NEAR(reference.out[at * head_dim + i], out[i] / sum, 1e-5 * largest_value);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace turboquant::attention
