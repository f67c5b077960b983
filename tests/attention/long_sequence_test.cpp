// Drift over long sequences and many layers: every layer's output stays within rounding of the fp64
// reference over the same codes (the bounds of tests/support/attention.hpp).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>

#include "../support/attention.hpp"
#include "turboquant/cache/compressed_dynamic_cache.hpp"

namespace turboquant::attention {
namespace {

using cache::ElementType;
using cache::LayerSpec;
using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::Tensor;

constexpr int kHeads = 8, kGroup = 4, kDim = 128;

std::vector<LayerSpec> layers(int count, cache::ScaleType scale_type) {
  std::vector<LayerSpec> specs(count, {.head_dim = kDim, .num_kv_heads = kHeads});
  for (int layer = 0; layer < count; ++layer) {
    specs[layer].layer = layer;
    specs[layer].scale_type = scale_type;
  }
  return specs;
}

// Every layer is given the same tokens: rotations, and so codes, differ between layers.
struct Sequence {
  Sequence(int64_t prefill, int64_t steps)
      : prefill_tokens(prefill),
        decode_steps(steps),
        keys(Tensor::random(ElementType::kFloat32, {1, kHeads, prefill + steps, kDim}, 1, 1.0f)),
        values(Tensor::random(ElementType::kFloat32, {1, kHeads, prefill + steps, kDim}, 2)),
        queries(Tensor::random(ElementType::kFloat32, {1, kHeads * kGroup, steps, kDim}, 3)) {}

  int64_t prefill_tokens, decode_steps;
  Tensor keys, values, queries;
};

// Decodes step by step as a model does: attend over the past and the new token, then append it.
// The last step is compared with the reference, layer by layer.
void expect_no_drift(const std::vector<LayerSpec>& specs, const Sequence& sequence) {
  CompressedDynamicCache cache(specs, 1, ElementType::kFloat32, threads(2));
  double worst = 0;
  for (int layer = 0; layer < cache.num_layers(); ++layer) {
    cache.update(layer, sequence.keys.tokens(0, sequence.prefill_tokens),
                 sequence.values.tokens(0, sequence.prefill_tokens));
  }
  const float scaling = 1.0f / std::sqrt(static_cast<float>(kDim));
  for (int64_t step = 0; step < sequence.decode_steps; ++step) {
    const int64_t token = sequence.prefill_tokens + step;
    Tensor query(ElementType::kFloat32, {1, kHeads * kGroup, 1, kDim});
    Tensor key(ElementType::kFloat32, {1, kHeads, 1, kDim}), value = key;
    for (int64_t h = 0; h < kHeads * kGroup; ++h) {
      query.set_row(0, h, 0, sequence.queries.row(0, h, step));
    }
    for (int64_t h = 0; h < kHeads; ++h) {
      key.set_row(0, h, 0, sequence.keys.row(0, h, token));
      value.set_row(0, h, 0, sequence.values.row(0, h, token));
    }
    for (int layer = 0; layer < cache.num_layers(); ++layer) {
      AttentionResult result{Tensor(ElementType::kFloat32, query.view().shape),
                             std::vector<float>(kHeads * kGroup)};
      cache.attend(layer, {.query = query.view(),
                           .key_states = key.view(),
                           .value_states = value.view(),
                           .scaling = scaling,
                           .out = result.out.view(),
                           .lse = result.lse.data()});
      if (step + 1 == sequence.decode_steps) {
        AttentionCase c{
            .store = &cache.store(layer), .query = &query, .keys = &key, .values = &value};
        c.scaling = scaling;
        const auto comparison = testing_support::compare(c, testing_support::CaseTables(c), result);
        EXPECT_LE(comparison.worst_output, 1.0) << "layer " << layer;
        EXPECT_LE(comparison.worst_lse, 1.0) << "layer " << layer;
        // Between the layers nothing may grow either: ten times the usual 5e-7 is no rounding, nor
        // is five times the usual 4e-4 where products are of integers.
        EXPECT_LE(comparison.worst_relative, testing_support::integer_products() ? 2e-3 : 5e-6)
            << "layer " << layer;
        worst = std::max(worst, comparison.worst_relative);
      }
      cache.update(layer, key.view(), value.view());
    }
  }
  testing::Test::RecordProperty("worst_relative_error_1e9", static_cast<int>(worst * 1e9));
}

TEST(LongSequence, ThirtySixLayersOfOneThousandTokens) {
  expect_no_drift(layers(36, cache::ScaleType::kFloat32), Sequence(1024, 32));
}

// Three layers a scale type: the reference dequantises in double, about a second a layer. Set
// TURBOQUANT_SLOW_TESTS=1 for all 36.
TEST(LongSequence, ElevenThousandTokensWithBothScaleTypes) {
  const char* const slow = std::getenv("TURBOQUANT_SLOW_TESTS");
  const int count = slow != nullptr && std::string(slow) == "1" ? 36 : 3;
  const Sequence sequence(11 * 1024, 2);
  for (const auto scale_type : {cache::ScaleType::kFloat32, cache::ScaleType::kFloat16}) {
    expect_no_drift(layers(count, scale_type), sequence);
  }
}

}  // namespace
}  // namespace turboquant::attention
