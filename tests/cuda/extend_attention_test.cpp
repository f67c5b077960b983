// CUDA extend attention on a GPU, with the device's own sizes and with the others that it runs:
// accuracy against fp64 over the same codes, the same bits every time, memory that must not be
// read, graphs.
#include "turboquant/cuda/extend_attention.hpp"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "../../kernels/extend_attention_launch.hpp"
#include "device_attention.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using cache::ElementType;
using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::BuiltDecode;
using testing_support::DecodeProblem;
using testing_support::DeviceAttention;
using testing_support::DeviceCase;
using testing_support::Tensor;

template <detail::ExtendSizes kSizes>
int extend_with(const DecodeAttentionParams& params, cudaStream_t stream) {
  return detail::extend_attention(params, kSizes, stream);
}
constexpr DeviceAttention kOfDevice = {extend_attention_workspace_bytes, extend_attention};
// The device's own choice, and every set of sizes that it runs.
std::vector<DeviceAttention> all_sizes() {
  int shared_bytes = 0;
  testing_support::check_cuda(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
      "cudaDeviceGetAttribute");
  std::vector<DeviceAttention> all = {
      kOfDevice, {extend_attention_workspace_bytes, extend_with<detail::ExtendSizes::kCompact>}};
  if (shared_bytes >= detail::kExtendLargeSharedBytes) {
    all.push_back({extend_attention_workspace_bytes, extend_with<detail::ExtendSizes::kLarge>});
  }
  return all;
}

class CudaExtendAttention : public testing_support::GpuTest {};

void expect_matches_reference(const DecodeProblem& p) {
  SCOPED_TRACE(p.text());
  const BuiltDecode built(p);
  for (const DeviceAttention& attention : all_sizes()) {
    DeviceCase on_device(attention, built.test_case, {});
    testing_support::expect_half_precision(built.test_case, on_device.run());
  }
}

TEST_F(CudaExtendAttention, TheDefaultRecipe) {
  DecodeProblem p;
  p.lengths = {3000};
  p.queries = 200;
  expect_matches_reference(p);
}

TEST_F(CudaExtendAttention, EveryConfig) {
  bool half_scales = false;
  for (const DecodeAttentionConfig& config : kDecodeAttentionConfigs) {
    half_scales = !half_scales;
    DecodeProblem p;
    p.spec.head_dim = config.head_dim;
    p.spec.num_kv_heads = 1;
    p.spec.k_bits = config.k_bits;
    p.spec.v_bits = config.v_bits;
    p.spec.codebook = config.codebook;
    p.spec.scale_type = half_scales ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
    p.spec.center_keys = half_scales;
    p.lengths = {500, 90};
    p.group = 2;
    p.queries = 40;
    p.seed = config.head_dim + config.k_bits;
    expect_matches_reference(p);
  }
}

TEST_F(CudaExtendAttention, EveryGroupAndManyQueryLengths) {
  for (const int group : {1, 2, 3, 4, 5, 7, 8, 12, 16}) {
    DecodeProblem p;
    p.spec.head_dim = 64;
    p.spec.num_kv_heads = 1;
    p.group = group;
    p.queries = 10 + 5 * group;
    p.lengths = {330};
    p.seed = static_cast<uint32_t>(group);
    expect_matches_reference(p);
  }
  for (const int64_t queries : {1, 17, 63, 64, 65, 128, 129, 300}) {
    DecodeProblem p;
    p.spec.num_kv_heads = 1;
    p.queries = queries;
    p.with_chunk = queries % 2 != 0;
    p.lengths = {333};
    expect_matches_reference(p);
  }
}

TEST_F(CudaExtendAttention, RaggedAndEmptyRows) {
  for (const bool with_chunk : {true, false}) {
    DecodeProblem p;
    p.spec.num_kv_heads = 1;
    p.queries = 50;
    p.lengths = {700, 0, 3, 4, 5, 70, 131, 132};
    if (with_chunk) p.new_tokens = {50, 2, 0, 1, 50, 3, 49, 50};
    p.with_chunk = with_chunk;
    p.sink_logits = with_chunk;
    expect_matches_reference(p);
  }
}

TEST_F(CudaExtendAttention, SlidingWindowSoftcapAndSinkLogits) {
  for (const int64_t window : {1, 3, 64, 65, 130, 400, 5000}) {
    DecodeProblem p;
    p.spec.num_kv_heads = 1;
    p.queries = 60;
    p.sliding_window = window;
    p.lengths = {1690, 40};
    p.sink_logits = window % 2 == 0;
    p.softcap = window == 130 ? 1.5f : window == 3 ? 50.0f : 0.0f;
    expect_matches_reference(p);
  }
}

TEST_F(CudaExtendAttention, RandomProblems) {
  for (int round = 0; round < 60 && !HasFailure(); ++round) {
    expect_matches_reference(
        testing_support::random_decode_problem(round, round % 4 == 0 ? 1500 : 400, 60));
  }
}

TEST_F(CudaExtendAttention, AnySizeOfQueriesAndValues) {
  for (const float size : {0.0f, 1e-30f, 1e-6f, 30.0f, 1e4f}) {
    for (const float value_size : {1e-20f, 1.0f, 1e20f}) {
      DecodeProblem p;
      p.spec.num_kv_heads = 1;
      p.queries = 20;
      p.lengths = {700};
      p.query_size = size;
      p.value_size = value_size;
      expect_matches_reference(p);
    }
  }
}

TEST_F(CudaExtendAttention, PoisonedTokensReachOnlyTheQueriesThatSeeThem) {
  for (const DeviceAttention& attention : all_sizes()) {
    testing_support::expect_poison_reaches_who_sees_it(
        ElementType::kBFloat16, 20,
        [&](const AttentionCase& c) { return DeviceCase(attention, c, {}).run(); });
  }
}

TEST_F(CudaExtendAttention, SameBitsEveryTimeAndWhereverThePagesLie) {
  DecodeProblem p;
  p.lengths = {3000, 3, 0, 1100};
  p.queries = 70;
  for (const DeviceAttention& attention : all_sizes()) {
    testing_support::expect_same_bits(attention, p, 10, 2);
  }
}

// Rows of a batch that goes into several launches, each alone.
TEST_F(CudaExtendAttention, BitsDoNotDependOnTheBatch) {
  constexpr int64_t kRows = 9, kQueries = 33;
  const cache::LayerSpec spec{.head_dim = 64, .num_kv_heads = 2};
  const auto tensor = [&](int64_t heads, int64_t tokens, uint32_t seed) {
    return Tensor::random(ElementType::kBFloat16, {kRows, heads, tokens, 64}, seed, 1.0f);
  };
  const auto row_of = [&](const Tensor& batch, int64_t b) {
    std::array<int64_t, 4> shape = batch.view().shape;
    shape[0] = 1;
    Tensor row(ElementType::kBFloat16, shape);
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t t = 0; t < shape[2]; ++t) row.set_row(0, h, t, batch.row(b, h, t));
    }
    return row;
  };
  const Tensor past_keys = tensor(2, 1500, 1), past_values = tensor(2, 1500, 2);
  const Tensor keys = tensor(2, kQueries, 3), values = tensor(2, kQueries, 4);
  const Tensor query = tensor(6, kQueries, 5);
  cache::LayerStore store(spec, kRows, ElementType::kBFloat16);
  store.append(past_keys.view(), past_values.view(), {}, serial());
  AttentionCase c{.store = &store, .query = &query, .keys = &keys, .values = &values};
  c.scaling = 0.1f;
  const AttentionResult result = DeviceCase(kOfDevice, c, {}).run();
  for (const int64_t b : {0, 4, 8}) {
    const Tensor row_past_keys = row_of(past_keys, b), row_past_values = row_of(past_values, b);
    const Tensor row_keys = row_of(keys, b), row_values = row_of(values, b);
    const Tensor row_query = row_of(query, b);
    cache::LayerStore alone(spec, 1, ElementType::kBFloat16);
    alone.append(row_past_keys.view(), row_past_values.view(), {}, serial());
    AttentionCase of_row{
        .store = &alone, .query = &row_query, .keys = &row_keys, .values = &row_values};
    of_row.scaling = 0.1f;
    const AttentionResult expected = DeviceCase(kOfDevice, of_row, {}).run();
    for (int64_t h = 0; h < 6; ++h) {
      for (int64_t j = 0; j < kQueries; ++j) {
        ASSERT_EQ(result.out.row(b, h, j), expected.out.row(0, h, j)) << b << " " << h << " " << j;
      }
    }
  }
}

TEST_F(CudaExtendAttention, GraphsReplayWithGrowingLengths) {
  testing_support::expect_replays_with_growing_lengths(kOfDevice, 30);
}

TEST_F(CudaExtendAttention, ErrorIsAtMostTwiceThatOfAHalfPrecisionCache) {
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    DecodeProblem p;
    p.type = type;
    p.lengths = {4096};
    const BuiltDecode built(p);
    const testing_support::CaseTables tables(built.test_case);
    const auto params = testing_support::params_of(built.test_case, tables);
    const auto reference = attention::reference_attention(params);
    const double theirs =
        testing_support::half_precision_cache_error(built.test_case, params, type);
    for (const DeviceAttention& attention : all_sizes()) {
      const AttentionResult result = DeviceCase(attention, built.test_case, {}).run();
      const double ours = testing_support::relative_error(result, reference.out);
      std::printf("error %.3g, of a half-precision cache %.3g\n", ours, theirs);
      EXPECT_LE(ours, 2 * theirs);
    }
  }
}

}  // namespace
}  // namespace turboquant::cuda
