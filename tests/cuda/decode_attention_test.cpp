// CUDA decode attention on a GPU: accuracy against fp64 over the same codes, bits that do not
// depend on anything but the row, memory that must not be read, graphs with growing lengths.
#include "turboquant/cuda/decode_attention.hpp"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "../../kernels/decode_attention_plan.hpp"
#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "device_attention.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using cache::ElementType;
using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::BuiltDecode;
using testing_support::check_cuda;
using testing_support::DecodeProblem;
using testing_support::Tensor;

class CudaDecodeAttention : public testing_support::GpuTest {};

using testing_support::DeviceOptions;

constexpr testing_support::DeviceAttention kDecode{decode_attention_workspace_bytes,
                                                   decode_attention};

class DeviceCase : public testing_support::DeviceCase {
 public:
  explicit DeviceCase(const AttentionCase& c, const DeviceOptions& options = {})
      : testing_support::DeviceCase(kDecode, c, options) {}
};

void expect_matches_reference(const DecodeProblem& p) {
  SCOPED_TRACE(p.text());
  const BuiltDecode built(p);
  DeviceCase on_device(built.test_case);
  testing_support::expect_half_precision(built.test_case, on_device.run());
}

TEST_F(CudaDecodeAttention, TheDefaultRecipe) {
  DecodeProblem p;
  p.lengths = {5000};
  p.spec.num_kv_heads = 8;
  in_both_layouts(p, expect_matches_reference);
}

TEST_F(CudaDecodeAttention, EveryConfig) {
  for (const DecodeAttentionConfig config : kDecodeAttentionConfigs) {
    for (const auto& [group, half_scales] :
         {std::pair{4, false}, {4, true}, {12, false}, {12, true}}) {
      DecodeProblem p;
      p.spec.head_dim = config.head_dim;
      p.spec.k_bits = config.k_bits;
      p.spec.v_bits = config.v_bits;
      p.spec.codebook = config.codebook;
      p.group = group;
      p.spec.scale_type = half_scales ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
      p.spec.center_keys = half_scales;
      p.lengths = {700, 90};
      p.queries = 1 + config.v_bits % 2;
      p.seed = config.head_dim + config.k_bits;
      in_both_layouts(p, expect_matches_reference);
    }
  }
}

TEST_F(CudaDecodeAttention, EveryGroupAndQueryLength) {
  for (const int group : {1, 2, 3, 4, 5, 7, 8, 12, 16}) {
    DecodeProblem p;
    p.group = group;
    p.queries = group % 3 + 1;
    p.lengths = {330};
    p.seed = static_cast<uint32_t>(group);
    in_both_layouts(p, expect_matches_reference);
  }
  for (int64_t queries = 1; queries <= kDecodeAttentionMaxQueries; ++queries) {
    DecodeProblem p;
    p.queries = queries;
    p.with_chunk = queries % 3 != 0;
    p.lengths = {333};
    p.seed = static_cast<uint32_t>(queries);
    in_both_layouts(p, expect_matches_reference);
  }
}

TEST_F(CudaDecodeAttention, RaggedAndEmptyRows) {
  for (const bool with_chunk : {true, false}) {
    DecodeProblem p;
    p.queries = 5;
    p.lengths = {700, 0, 3, 4, 5, 70, 131, 132};
    if (with_chunk) p.new_tokens = {5, 2, 0, 1, 5, 3, 4, 5};
    p.with_chunk = with_chunk;
    p.sink_logits = with_chunk;
    in_both_layouts(p, expect_matches_reference);
  }
  DecodeProblem empty;
  empty.lengths = {0, 0};
  empty.with_chunk = false;
  empty.sink_logits = true;
  in_both_layouts(empty, expect_matches_reference);
}

TEST_F(CudaDecodeAttention, SlidingWindowSoftcapAndSinkLogits) {
  for (const int64_t window : {1, 3, 64, 65, 130, 400, 5000}) {
    for (const int64_t queries : {1, 6}) {
      DecodeProblem p;
      p.queries = queries;
      p.sliding_window = window;
      p.lengths = {1690, 40};
      p.sink_logits = window % 2 == 0;
      p.softcap = window == 130 ? 1.5f : window == 3 ? 50.0f : 0.0f;
      in_both_layouts(p, expect_matches_reference);
    }
  }
}

// 2,000 random problems, in shares that processes can run side by side.
constexpr int kShares = 20, kRoundsOfAShare = 100;
class CudaDecodeAttentionRandom : public testing_support::GpuTest,
                                  public ::testing::WithParamInterface<int> {
 protected:
  static int first_round() { return GetParam() * kRoundsOfAShare; }
};
INSTANTIATE_TEST_SUITE_P(Shares, CudaDecodeAttentionRandom, ::testing::Range(0, kShares));

TEST_P(CudaDecodeAttentionRandom, MatchesTheReference) {
  for (int i = 0; i < kRoundsOfAShare && !HasFailure(); ++i) {
    const int round = first_round() + i;
    expect_matches_reference(
        testing_support::random_decode_problem(round, round % 4 == 0 ? 1500 : 400));
  }
}

// Of the same problems, as far as `half_precision_cache_error` knows them.
TEST_P(CudaDecodeAttentionRandom, ErrorIsAtMostTwiceThatOfAHalfPrecisionCache) {
  double worst = 0.0;
  for (int i = 0; i < kRoundsOfAShare; ++i) {
    const int round = first_round() + i;
    DecodeProblem p = testing_support::random_decode_problem(round, 400);
    p.queries = 1;
    p.with_chunk = true;
    p.new_tokens.clear();
    p.softcap = 0.0f;
    p.sliding_window = 0;
    p.sink_logits = false;
    if (p.type == ElementType::kFloat32) p.type = ElementType::kFloat16;
    // Codes, not exact tokens alone: those are read without an error.
    for (int32_t& length : p.lengths) length += 300;
    SCOPED_TRACE(p.text());
    const BuiltDecode built(p);
    const AttentionResult result = DeviceCase(built.test_case, {.out_type = p.type}).run();
    const testing_support::CaseTables tables(built.test_case);
    const auto params = testing_support::params_of(built.test_case, tables);
    const double ours =
        testing_support::relative_error(result, attention::reference_attention(params).out);
    const double theirs =
        testing_support::half_precision_cache_error(built.test_case, params, p.type);
    EXPECT_LE(ours, 2 * theirs);
    worst = std::max(worst, ours / theirs);
  }
  RecordProperty("worst_ratio", std::to_string(worst));
  std::printf("worst error: %.2f of a half-precision cache's\n", worst);
}

// Long rows: more than one round of pages a warp, splits of more than the least size.
TEST_F(CudaDecodeAttention, LongRows) {
  for (const int64_t window : {0, 3000}) {
    DecodeProblem p;
    p.spec.num_kv_heads = 1;
    p.spec.center_keys = window == 0;
    p.lengths = {60000, 17};
    p.sliding_window = window;
    in_both_layouts(p, expect_matches_reference);
  }
  DecodeProblem many_heads;  // one split takes a whole row: more pages a warp than it holds at hand
  many_heads.spec = {.head_dim = 64, .num_kv_heads = 256, .k_bits = 2, .v_bits = 2};
  many_heads.group = 1;
  many_heads.lengths = {9000};
  expect_matches_reference(many_heads);
}

// Queries and values of any size: operands stay in fp16's range.
TEST_F(CudaDecodeAttention, AnySizeOfQueriesAndValues) {
  for (const float size : {0.0f, 1e-30f, 1e-6f, 30.0f, 1e4f}) {
    for (const float value_size : {1e-20f, 1.0f, 1e20f}) {
      DecodeProblem p;
      p.lengths = {700};
      p.query_size = size;
      p.value_size = value_size;
      in_both_layouts(p, expect_matches_reference);
    }
  }
}

TEST_F(CudaDecodeAttention, PoisonedTokensReachOnlyTheQueriesThatSeeThem) {
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    testing_support::expect_poison_reaches_who_sees_it(
        type, 10, [](const AttentionCase& c) { return DeviceCase(c).run(); });
  }
}

TEST_F(CudaDecodeAttention, SameBitsEveryTimeAndWhereverThePagesLie) {
  for (const int64_t queries : {1, 3}) {
    DecodeProblem p;
    p.lengths = {9000, 3, 0, 4100};
    p.queries = queries;
    testing_support::expect_same_bits(kDecode, p, 20, 3);
  }
}

// A row alone, and beside others, left padded because another query is longer: same bits.
TEST_F(CudaDecodeAttention, BitsDoNotDependOnTheBatch) {
  struct Queries {
    int group;
    int64_t tokens;
  };
  // One tile of query rows, two; so many that each row gets one warp to combine.
  for (const auto [group, queries] : {Queries{1, 3}, {4, 3}, {7, 3}, {16, 1}, {64, 3}}) {
    for (const int64_t window : {0, 700}) {
      const int64_t length = 5234, pad = 2;
      const cache::LayerSpec spec{.head_dim = 128, .num_kv_heads = 2};
      const auto chunk = [&](int64_t heads, int64_t tokens, uint32_t seed) {
        return Tensor::random(ElementType::kBFloat16, {1, heads, tokens, 128}, seed, 1.0f);
      };
      const Tensor past_keys = chunk(2, length, 1), past_values = chunk(2, length, 2);
      const Tensor new_keys = chunk(2, queries, 3), new_values = chunk(2, queries, 4);
      const Tensor query = chunk(2 * group, queries, 5);
      cache::LayerStore alone(spec, 1, ElementType::kBFloat16);
      alone.append(past_keys.view(), past_values.view(), {}, serial());
      AttentionCase c{.store = &alone, .query = &query, .keys = &new_keys, .values = &new_values};
      c.scaling = 0.1f;
      c.sliding_window = window;
      const AttentionResult expected = DeviceCase(c).run();

      const auto in_batch = [&](const Tensor& row, uint32_t seed) {
        const std::array<int64_t, 4> shape = row.view().shape;
        Tensor batch =
            Tensor::random(ElementType::kBFloat16, {3, shape[1], shape[2] + pad, 128}, seed);
        for (int64_t h = 0; h < shape[1]; ++h) {
          for (int64_t t = 0; t < shape[2]; ++t) batch.set_row(1, h, t + pad, row.row(0, h, t));
        }
        return batch;
      };
      cache::LayerStore batch(spec, 3, ElementType::kBFloat16);
      const Tensor batch_keys = in_batch(past_keys, 6), batch_values = in_batch(past_values, 7);
      const int64_t half = length / 2;  // pages of the rows interleave
      batch.append(batch_keys.tokens(0, half + pad), batch_values.tokens(0, half + pad),
                   std::vector<int32_t>{600, static_cast<int32_t>(half), 2}, serial());
      batch.append(batch_keys.tokens(half + pad, length + pad),
                   batch_values.tokens(half + pad, length + pad), {}, serial());
      const Tensor batch_new_keys = in_batch(new_keys, 8),
                   batch_new_values = in_batch(new_values, 9);
      const Tensor batch_query = in_batch(query, 10);
      AttentionCase in{.store = &batch,
                       .query = &batch_query,
                       .keys = &batch_new_keys,
                       .values = &batch_new_values};
      in.new_tokens = {static_cast<int32_t>(queries + pad), static_cast<int32_t>(queries), 1};
      in.scaling = 0.1f;
      in.sliding_window = window;
      const AttentionResult result = DeviceCase(in).run();
      for (int64_t h = 0; h < 2 * group; ++h) {
        for (int64_t j = 0; j < queries; ++j) {
          EXPECT_EQ(result.out.row(1, h, j + pad), expected.out.row(0, h, j))
              << "window " << window << " group " << group << " head " << h << " query " << j;
          EXPECT_EQ(result.lse[(2 * group + h) * (queries + pad) + j + pad],
                    expected.lse[h * queries + j]);
        }
      }
    }
  }
}

// So many short rows that warps take whole splits, beside a long one whose splits groups take: the
// bits of rows alone.
TEST_F(CudaDecodeAttention, BitsDoNotDependOnWhoTakesASplit) {
  struct Shape {
    cache::LayerSpec spec;
    int group;
    int64_t rows, tokens, window = 0;
  };
  // With 132 multiprocessors of 16 warps: one round that is not full; two, of short rows; one and
  // splits that are left to groups.
  const Shape shapes[] = {
      {{.head_dim = 64, .num_kv_heads = 16, .scale_type = cache::ScaleType::kFloat32}, 4, 120, 520},
      {{.head_dim = 80, .num_kv_heads = 32, .k_bits = 3, .v_bits = 3}, 2, 122, 330},
      {{.head_dim = 128, .num_kv_heads = 32}, 2, 76, 330},
      {{.head_dim = 96, .num_kv_heads = 16, .k_bits = 2, .v_bits = 2}, 3, 120, 330},
      {{.head_dim = 128,
        .num_kv_heads = 16,
        .k_bits = 3,
        .v_bits = 3,
        .codebook = quant::CodebookKind::kVector},
       1,
       120,
       330},
      {{.head_dim = 64, .num_kv_heads = 16, .k_bits = 6, .v_bits = 4}, 1, 120, 330},
      {{.head_dim = 128, .num_kv_heads = 16}, 1, 120, 520, 300}};
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
  for (const Shape& problem : shapes) {
    constexpr int64_t kLongTokens = 9000;
    const cache::LayerSpec& spec = problem.spec;
    const int64_t group = problem.group, rows = problem.rows, tokens = problem.tokens;
    const int64_t window = problem.window;
    const int64_t heads = spec.num_kv_heads, queries = window > 0 ? 2 : 1;
    const int64_t head_dim = spec.head_dim;
    // Splits of 8 pages for rows this short, of one page or more: one for each row and KV head.
    EXPECT_GT(detail::whole_splits(static_cast<int>((rows - 1) * heads), 16 * multiprocessors), 0);
    const auto chunk = [&](int64_t of_rows, int64_t of_heads, int64_t of_tokens, uint32_t seed) {
      return Tensor::random(ElementType::kBFloat16, {of_rows, of_heads, of_tokens, head_dim}, seed,
                            1.0f);
    };
    cache::LayerStore batch(spec, rows, ElementType::kBFloat16);
    std::vector<int32_t> lengths(rows), of_long(rows, 0);
    for (int64_t b = 0; b < rows; ++b) lengths[b] = static_cast<int32_t>(tokens - 5 * (b % 31));
    of_long[7] = kLongTokens;
    const Tensor keys = chunk(rows, heads, tokens, 1), values = chunk(rows, heads, tokens, 2);
    batch.append(keys.view(), values.view(), lengths, serial());
    // One row's tokens, those of the others are padding.
    const Tensor long_keys = chunk(1, heads, kLongTokens, 3);
    const auto for_all_rows = [&](cache::ConstTensorView view) {
      view.shape[0] = rows;
      view.strides[0] = 0;
      return view;
    };
    batch.append(for_all_rows(long_keys.view()), for_all_rows(long_keys.view()), of_long, serial());
    const Tensor new_keys = chunk(rows, heads, queries, 4),
                 query = chunk(rows, heads * group, queries, 5);
    const auto attend = [&](const cache::LayerStore& store, const Tensor& of_query,
                            const Tensor& of_chunk) {
      return DeviceCase({.store = &store,
                         .query = &of_query,
                         .keys = &of_chunk,
                         .values = &of_chunk,
                         .scaling = 0.1f,
                         .sliding_window = window})
          .run();
    };
    const AttentionResult result = attend(batch, query, new_keys);
    for (const int64_t b :
         {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{30}, int64_t{62}, rows - 1}) {
      SCOPED_TRACE("d=" + std::to_string(head_dim) + " bits " + std::to_string(spec.k_bits) +
                   " row " + std::to_string(b));
      const auto last_tokens = [&](const Tensor& all) {
        cache::ConstTensorView row = all.batch_row(b);
        row.data = row.row(0, 0, tokens - lengths[b]);
        row.shape[2] = lengths[b];
        return row;
      };
      const auto row_of = [&](const Tensor& all) {
        const std::array<int64_t, 4> shape = all.view().shape;
        Tensor row(ElementType::kBFloat16, {1, shape[1], shape[2], shape[3]});
        for (int64_t h = 0; h < shape[1]; ++h) {
          for (int64_t t = 0; t < shape[2]; ++t) row.set_row(0, h, t, all.row(b, h, t));
        }
        return row;
      };
      cache::LayerStore alone(spec, 1, ElementType::kBFloat16);
      alone.append(last_tokens(keys), last_tokens(values), {}, serial());
      if (of_long[b] > 0) alone.append(long_keys.view(), long_keys.view(), {}, serial());
      const AttentionResult expected = attend(alone, row_of(query), row_of(new_keys));
      for (int64_t h = 0; h < heads * group; ++h) {
        for (int64_t j = 0; j < queries; ++j) {
          EXPECT_EQ(result.out.row(b, h, j), expected.out.row(0, h, j)) << "head " << h;
          EXPECT_EQ(result.lse[(b * heads * group + h) * queries + j],
                    expected.lse[h * queries + j]);
        }
      }
    }
  }
}

TEST_F(CudaDecodeAttention, GraphsReplayWithGrowingLengths) {
  testing_support::expect_replays_with_growing_lengths(kDecode, 1);
}

TEST_F(CudaDecodeAttention, HalfPrecisionOutputsAreTheFp32OutputsRounded) {
  DecodeProblem p;
  p.queries = 2;
  const BuiltDecode built(p);
  const AttentionResult full = DeviceCase(built.test_case).run();
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    const AttentionResult half = DeviceCase(built.test_case, {.out_type = type}).run();
    Tensor rounded(type, {1, 1, 1, 128});
    for (int64_t h = 0; h < 8; ++h) {
      rounded.set_row(0, 0, 0, full.out.row(0, h, 1));
      EXPECT_EQ(half.out.row(0, h, 1), rounded.row(0, 0, 0));
    }
  }
}

// Offsets in a pool are 64 bits wide: pages at both ends of one of more than 2^32 bytes.
TEST_F(CudaDecodeAttention, PoolsOfMoreThan4GiB) {
  size_t free_bytes = 0, total_bytes = 0;
  check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  if (free_bytes < size_t{6} << 30) GTEST_SKIP() << "NOT RUN: needs 6 GiB of free device memory";
  DecodeProblem p;
  p.lengths = {3000, 700};
  const BuiltDecode built(p);
  const AttentionResult near = DeviceCase(built.test_case).run();
  const DeviceOptions far{.pool_bytes = int64_t{5} << 30};
  const AttentionResult result = DeviceCase(built.test_case, far).run();
  testing_support::expect_half_precision(built.test_case, result);
  EXPECT_EQ(result.lse, near.lse);
}

// Not a GpuTest: arguments are checked on the host.
TEST(CudaDecodeAttentionArguments, RefusesWhatDoesNotFit) {
  DecodeProblem p;
  const BuiltDecode built(p);
  const testing_support::CaseTables tables(built.test_case);
  const auto host = testing_support::params_of(built.test_case, tables);
  alignas(16) static std::byte memory[16];
  DecodeAttentionParams good{.spec = host.spec};
  good.tables = codec_tables_at(host.spec, memory);
  good.query = host.query;
  good.key_states = host.key_states;
  good.value_states = host.value_states;
  good.exact_keys = host.exact_keys;
  good.exact_values = host.exact_values;
  good.smoothing = host.smoothing;
  good.pages = host.pages;
  good.page_table = tables.page_table.data();
  good.page_columns = static_cast<int64_t>(tables.page_table.size()) / 2;
  good.rows = tables.rows.data();
  Tensor out(ElementType::kBFloat16, host.query.shape);
  good.out = out.view();
  good.workspace = memory;
  good.workspace_bytes = decode_attention_workspace_bytes(good);
  check_decode_attention(good);
  const auto refuses = [&](auto change) {
    DecodeAttentionParams bad = good;
    change(bad);
    EXPECT_THROW(check_decode_attention(bad), InvalidArgument);
    EXPECT_EQ(decode_attention(bad, nullptr), cudaErrorInvalidValue);
  };
  refuses([](auto& b) { b.spec.head_dim = 32; });
  refuses([](auto& b) { b.spec.k_bits = 7; });
  refuses([](auto& b) { b.spec.v_bits = 8; });
  refuses([](auto& b) {
    b.spec.codebook = quant::CodebookKind::kVector;
    b.spec.v_bits = 2;
  });
  refuses([](auto& b) { b.query.shape[2] = 17; });
  refuses([](auto& b) { b.query.shape[1] = 9; });
  refuses([](auto& b) { b.query.type = ElementType::kFloat32; });
  refuses([](auto& b) { b.key_states.shape[2] = 2; });
  refuses([](auto& b) { b.out.shape[0] = 2; });
  refuses([](auto& b) { b.smoothing = nullptr; });
  refuses([](auto& b) { b.rows = nullptr; });
  refuses([](auto& b) { b.page_table = nullptr; });
  refuses([](auto& b) { b.page_columns = -1; });
  refuses([](auto& b) { b.workspace = nullptr; });
  refuses([](auto& b) { b.workspace_bytes -= 1; });
  refuses([](auto& b) { b.scaling = INFINITY; });
  refuses([](auto& b) { b.softcap = NAN; });
  refuses([](auto& b) { b.sliding_window = -1; });
}

}  // namespace
}  // namespace turboquant::cuda
