#include "turboquant/attention/decode_attention.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::attention {
namespace {

using cache::ElementType;
using cache::LayerSpec;
using cache::LayerStore;
using testing_support::attend;
using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::kNan;
using testing_support::Tensor;

// Small, and in fp32: what is looked at here is the kernels' own error.
struct Problem : testing_support::DecodeProblem {
  Problem() {
    spec.head_dim = 64;
    group = 2;
    type = ElementType::kFloat32;
  }
};
using Built = testing_support::BuiltDecode;

// Output and lse within the bounds of tests/support/attention.hpp; padding queries exactly 0, -inf.
testing_support::Comparison expect_matches_reference(const Built& built,
                                                     const ParallelFor& parallel_for = serial()) {
  const AttentionResult result = attend(built.test_case, parallel_for);
  const testing_support::CaseTables tables(built.test_case);
  const testing_support::Comparison comparison =
      testing_support::compare(built.test_case, tables, result);
  EXPECT_TRUE(comparison.padding_is_zero);
  EXPECT_LE(comparison.worst_output, 1.0) << "in units of the bound";
  EXPECT_LE(comparison.worst_lse, 1.0) << "in units of the bound";
  return comparison;
}

void expect_matches_reference(const Problem& p, const ParallelFor& parallel_for = serial()) {
  SCOPED_TRACE(p.text());
  expect_matches_reference(Built(p), parallel_for);
}

TEST(DecodeAttention, EveryWidthOfKeysAndValues) {
  for (int k_bits = 1; k_bits <= 8; ++k_bits) {
    for (int v_bits = 1; v_bits <= 8; ++v_bits) {
      Problem p;
      p.spec = {.head_dim = 32, .num_kv_heads = 1, .k_bits = k_bits, .v_bits = v_bits};
      p.spec.scale_type =
          (k_bits + v_bits) % 2 ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
      p.seed = k_bits * 10 + v_bits;
      expect_matches_reference(p);
    }
  }
}

TEST(DecodeAttention, VectorCodebooks) {
  for (const int head_dim : {24, 40, 64, 128}) {
    for (int k_bits = 2; k_bits <= 4; ++k_bits) {
      for (const int queries : {1, 9}) {
        Problem p;
        p.spec = {.head_dim = head_dim, .num_kv_heads = 1, .k_bits = k_bits, .v_bits = 6 - k_bits};
        p.spec.codebook = quant::CodebookKind::kVector;
        p.queries = queries;
        p.seed = head_dim + k_bits;
        expect_matches_reference(p);
      }
    }
  }
}

TEST(DecodeAttention, EveryDimAndGroup) {
  for (const int head_dim : {8, 16, 24, 40, 64, 80, 96, 128, 256}) {
    for (const int group : {1, 3, 4, 7, 8, 16}) {
      Problem p;
      p.spec.head_dim = head_dim;
      p.spec.k_bits = 3;
      p.group = group;
      p.lengths = {230};
      p.seed = head_dim + group;
      expect_matches_reference(p);
    }
  }
}

TEST(DecodeAttention, EveryQueryLength) {
  for (const bool with_chunk : {true, false}) {
    for (int64_t queries = 1; queries <= 17; ++queries) {
      Problem p;
      p.spec.head_dim = 16;
      p.queries = queries == 17 ? 70 : queries;
      p.group = 3;
      p.with_chunk = with_chunk;
      p.lengths = {233};
      p.seed = static_cast<uint32_t>(queries);
      expect_matches_reference(p);
    }
  }
}

TEST(DecodeAttention, RaggedAndEmptyRows) {
  for (const bool with_chunk : {true, false}) {
    Problem p;
    p.spec.head_dim = 32;
    p.queries = 5;
    p.lengths = {700, 0, 3, 4, 5, 70, 131, 132};
    if (with_chunk) p.new_tokens = {5, 2, 0, 1, 5, 3, 4, 5};
    p.with_chunk = with_chunk;
    expect_matches_reference(p);
    p.sink_logits = true;
    expect_matches_reference(p);
  }
}

TEST(DecodeAttention, AnEmptyCacheWithoutChunkIsZero) {
  Problem p;
  p.lengths = {0, 0};
  p.with_chunk = false;
  p.sink_logits = true;
  expect_matches_reference(p);
}

TEST(DecodeAttention, EveryPartOfTheRecipeCanBeOff) {
  for (int mask = 0; mask < 16; ++mask) {
    Problem p;
    p.spec.head_dim = 32;
    p.spec.window_tokens = mask & 1 ? 128 : 0;
    p.spec.center_keys = (mask & 2) && (mask & 1);
    p.spec.smooth_keys = (mask & 4) && (mask & 1);
    p.spec.sink_tokens = mask & 8 ? 5 : 0;
    p.lengths = {600, 77};
    p.queries = 2;
    expect_matches_reference(p);
    p.cropped = 50;  // leaves partly filled pages
    expect_matches_reference(p);
    p.cropped = 300;
    expect_matches_reference(p);
  }
}

TEST(DecodeAttention, SlidingWindowSoftcapAndSinkLogits) {
  for (const int64_t window : {1, 3, 64, 65, 130, 400, 5000}) {
    for (const int64_t queries : {1, 6}) {
      Problem p;
      p.spec.head_dim = 16;
      p.queries = queries;
      p.sliding_window = window;
      p.lengths = {690, 40};
      p.sink_logits = window % 2 == 0;
      p.softcap = window == 130 ? 1.5f : window == 3 ? 50.0f : 0.0f;
      expect_matches_reference(p);
    }
  }
}

TEST(DecodeAttention, RandomProblems) {
  std::mt19937 random(2026);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int round = 0; round < 60 && !testing::Test::HasFailure(); ++round) {
    Problem p;
    constexpr int kDims[] = {16, 64, 80, 96, 128};
    p.spec = {.head_dim = kDims[pick(0, 4)],
              .num_kv_heads = pick(1, 3),
              .k_bits = pick(1, 8),
              .v_bits = pick(1, 8),
              .k_rule = static_cast<quant::ScaleRule>(pick(0, 3)),
              .v_rule = static_cast<quant::ScaleRule>(pick(0, 3)),
              .scale_type = static_cast<cache::ScaleType>(pick(0, 1)),
              .center_keys = pick(0, 1) == 1,
              .smooth_keys = pick(0, 1) == 1,
              .sink_tokens = pick(0, 1) * pick(0, 70),
              .window_tokens = 64 * pick(1, 3),
              .seed = static_cast<uint64_t>(round),
              .layer = pick(0, 40)};
    if (pick(0, 3) == 0) {
      p.spec.window_tokens = 0;
      p.spec.center_keys = p.spec.smooth_keys = false;
    }
    if (pick(0, 3) == 0) {
      p.spec.codebook = quant::CodebookKind::kVector;
      p.spec.k_bits = pick(2, 4);
      p.spec.v_bits = pick(2, 4);
    }
    p.group = pick(1, 5);
    p.queries = pick(0, 3) ? pick(1, 4) : pick(5, 20);
    p.lengths.clear();
    for (int b = pick(1, 3); b > 0; --b) {
      p.lengths.push_back(pick(0, 3) ? pick(0, 700) : pick(0, 5));
    }
    p.with_chunk = pick(0, 3) > 0;
    p.cropped = pick(0, 2) == 0 ? pick(1, 300) : 0;
    p.softcap = pick(0, 4) == 0 ? 2.0f : 0.0f;
    p.sliding_window = pick(0, 3) == 0 ? pick(1, 500) : 0;
    p.sink_logits = pick(0, 3) == 0;
    p.seed = 1000 + round;
    for (size_t b = 0; p.with_chunk && b < p.lengths.size(); ++b) {
      p.new_tokens.push_back(pick(0, static_cast<int>(p.queries)));
    }
    expect_matches_reference(p, threads(2));
  }
}

TEST(DecodeAttention, EverySimdLevelMeetsTheBound) {
  const quant::SimdLevel before = quant::active_simd_level();
  for (const quant::SimdLevel level : quant::available_simd_levels()) {
    quant::set_simd_level(level);
    SCOPED_TRACE(quant::simd_level_name(level));
    for (const int head_dim : {8, 40, 64, 80, 96, 128, 192, 256}) {
      for (const auto& [k_bits, v_bits] :
           {std::pair(4, 4), std::pair(3, 2), std::pair(2, 3), std::pair(8, 4), std::pair(5, 8)}) {
        Problem p;
        p.spec.head_dim = head_dim;
        p.spec.k_bits = k_bits;
        p.spec.v_bits = v_bits;
        p.lengths = {700, 90};
        p.queries = 1 + head_dim % 5;
        p.group = 4;
        p.softcap = head_dim == 40 ? 3.0f : 0.0f;
        SCOPED_TRACE(p.text());
        const Built built(p);
        EXPECT_LE(expect_matches_reference(built).worst_relative, 2e-3);
      }
    }
  }
  quant::set_simd_level(before);
}

// Threads, and the queries beside a query.
TEST(DecodeAttention, EverySimdLevelGivesTheSameBitsAgain) {
  const quant::SimdLevel before = quant::active_simd_level();
  Problem p;
  p.spec.head_dim = 128;
  p.lengths = {1400};
  p.group = 7;
  p.queries = 9;
  p.with_chunk = false;
  const Built built(p);
  Tensor last(ElementType::kFloat32, {1, 14, 1, 128});
  for (int64_t h = 0; h < 14; ++h) last.set_row(0, h, 0, built.query.row(0, h, 8));
  for (const quant::SimdLevel level : quant::available_simd_levels()) {
    quant::set_simd_level(level);
    SCOPED_TRACE(quant::simd_level_name(level));
    const AttentionResult together = attend(built.test_case);
    EXPECT_EQ(attend(built.test_case, threads(3)).out.bytes(), together.out.bytes());
    AttentionCase alone = built.test_case;
    alone.query = &last;
    const AttentionResult result = attend(alone);
    for (int64_t h = 0; h < 14; ++h) {
      EXPECT_EQ(result.out.row(0, h, 0), together.out.row(0, h, 8));
    }
  }
  quant::set_simd_level(before);
}

// Half-precision queries, chunks and exact tokens are read exactly; a half-precision output is the
// fp32 output rounded once.
TEST(DecodeAttention, HalfPrecisionTensors) {
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    Problem p;
    p.type = type;
    p.queries = 4;
    const Built built(p);
    expect_matches_reference(built);
    const AttentionResult full = attend(built.test_case);
    const AttentionResult half = attend(built.test_case, serial(), type);
    Tensor rounded(type, {1, 1, 1, 64});
    for (int64_t h = 0; h < 4; ++h) {
      rounded.set_row(0, 0, 0, full.out.row(0, h, 3));
      EXPECT_EQ(half.out.row(0, h, 3), rounded.row(0, 0, 0));
    }
  }
}

TEST(DecodeAttention, BitsDoNotDependOnThreads) {
  Problem p;
  p.lengths = {1500, 3, 0, 800};
  p.queries = 3;
  const Built built(p);
  const AttentionResult expected = attend(built.test_case);
  for (const int num_threads : {2, 3, 16}) {
    const AttentionResult result = attend(built.test_case, threads(num_threads));
    EXPECT_EQ(result.out.bytes(), expected.out.bytes());
    EXPECT_EQ(result.lse, expected.lse);
  }
}

// A row alone, and beside others (with a longer query, so that it is left padded): same bits. The
// other rows also take pages first, so the row's pages are other pages.
TEST(DecodeAttention, BitsDoNotDependOnTheBatchOrThePages) {
  const int64_t length = 1234, queries = 3;
  for (const int group : {1, 4, 7}) {
    const LayerSpec spec{.head_dim = 80, .num_kv_heads = 2};
    const auto chunk = [&](int64_t heads, int64_t tokens, uint32_t seed) {
      return Tensor::random(ElementType::kFloat32, {1, heads, tokens, 80}, seed, 1.0f);
    };
    const Tensor past_keys = chunk(2, length, 1), past_values = chunk(2, length, 2);
    const Tensor new_keys = chunk(2, queries, 3), new_values = chunk(2, queries, 4);
    const Tensor query = chunk(2 * group, queries, 5);
    LayerStore alone(spec, 1, ElementType::kFloat32);
    alone.append(past_keys.view(), past_values.view(), {}, serial());
    AttentionCase c{.store = &alone, .query = &query, .keys = &new_keys, .values = &new_values};
    c.scaling = 0.1f;
    const AttentionResult expected = attend(c);

    constexpr int64_t kPad = 2;
    const auto in_batch = [&](const Tensor& row, uint32_t seed) {
      const std::array<int64_t, 4> shape = row.view().shape;
      Tensor batch =
          Tensor::random(ElementType::kFloat32, {3, shape[1], shape[2] + kPad, 80}, seed);
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t t = 0; t < shape[2]; ++t) batch.set_row(1, h, t + kPad, row.row(0, h, t));
      }
      return batch;
    };
    LayerStore batch(spec, 3, ElementType::kFloat32);
    const Tensor batch_keys = in_batch(past_keys, 6), batch_values = in_batch(past_values, 7);
    const int64_t half = length / 2;  // pages of the rows interleave
    batch.append(batch_keys.tokens(0, half + kPad), batch_values.tokens(0, half + kPad),
                 std::vector<int32_t>{600, static_cast<int32_t>(half), 2}, serial());
    batch.append(batch_keys.tokens(half + kPad, length + kPad),
                 batch_values.tokens(half + kPad, length + kPad), {}, serial());
    ASSERT_NE(batch.table().entries(1)[0].page, alone.table().entries(0)[0].page);
    const Tensor batch_new_keys = in_batch(new_keys, 8), batch_new_values = in_batch(new_values, 9);
    const Tensor batch_query = in_batch(query, 10);
    AttentionCase in{.store = &batch,
                     .query = &batch_query,
                     .keys = &batch_new_keys,
                     .values = &batch_new_values};
    in.new_tokens = {5, 3, 1};
    in.scaling = 0.1f;
    const AttentionResult result = attend(in, threads(2));
    for (int64_t h = 0; h < 2 * group; ++h) {
      for (int64_t j = 0; j < queries; ++j) {
        EXPECT_EQ(result.out.row(1, h, j + kPad), expected.out.row(0, h, j));
        EXPECT_EQ(result.lse[(2 * group + h) * (queries + kPad) + j + kPad],
                  expected.lse[h * queries + j]);
      }
    }
  }
}

// A query's bits do not depend on the queries beside it.
TEST(DecodeAttention, BitsDoNotDependOnTheOtherQueries) {
  Problem p;
  p.with_chunk = false;
  p.queries = 9;
  p.group = 3;
  p.lengths = {777};
  p.sliding_window = 500;
  const Built built(p);
  const AttentionResult together = attend(built.test_case);
  for (int64_t first = 1; first < 9; ++first) {
    Tensor fewer(ElementType::kFloat32, {1, 6, 9 - first, 64});
    for (int64_t h = 0; h < 6; ++h) {
      for (int64_t j = first; j < 9; ++j) fewer.set_row(0, h, j - first, built.query.row(0, h, j));
    }
    AttentionCase c = built.test_case;
    c.query = &fewer;
    const AttentionResult result = attend(c);
    for (int64_t h = 0; h < 6; ++h) {
      for (int64_t j = first; j < 9; ++j) {
        EXPECT_EQ(result.out.row(0, h, j - first), together.out.row(0, h, j)) << first << " " << j;
      }
    }
  }
}

TEST(DecodeAttention, PoisonedTokensReachOnlyTheQueriesThatSeeThem) {
  const LayerSpec spec{.head_dim = 32, .num_kv_heads = 1};
  Tensor keys = Tensor::random(ElementType::kFloat32, {1, 1, 300, 32}, 1);
  Tensor values = Tensor::random(ElementType::kFloat32, {1, 1, 300, 32}, 2);
  keys.fill_row(0, 0, 20, kNan);     // in a page
  values.fill_row(0, 0, 295, kNan);  // in the ring
  LayerStore store(spec, 1, ElementType::kFloat32);
  store.append(keys.view(), values.view(), {}, serial());
  const Tensor query = Tensor::random(ElementType::kFloat32, {1, 1, 10, 32}, 3);
  AttentionCase c{.store = &store, .query = &query};
  AttentionResult result = attend(c);
  for (int64_t j = 0; j < 10; ++j) EXPECT_TRUE(std::isnan(result.out.row(0, 0, j)[0]));
  c.sliding_window = 200;  // token 20 is out of sight; 295 is seen from query 5 on
  result = attend(c);
  for (int64_t j = 0; j < 10; ++j) {
    EXPECT_EQ(std::isnan(result.out.row(0, 0, j)[0]), j >= 5) << j;
  }
}

// Scores all equal, and so far apart that one token takes everything.
TEST(DecodeAttention, ExtremeScores) {
  for (const float size : {0.0f, 1e-20f, 30.0f}) {
    Problem p;
    p.lengths = {700};
    p.query_size = size;
    expect_matches_reference(p);
  }
}

TEST(DecodeAttention, RefusesWhatDoesNotFit) {
  Problem p;
  p.queries = 2;
  const Built built(p);
  const auto refuses = [&](auto change) {
    AttentionCase c = built.test_case;
    change(c);
    EXPECT_THROW(attend(c), InvalidArgument);
  };
  const auto other = [](std::array<int64_t, 4> shape) {
    return Tensor(ElementType::kFloat32, shape);
  };
  const Tensor odd_heads = other({1, 3, 2, 64}), wrong_dim = other({1, 4, 2, 32}),
               two_rows = other({2, 4, 2, 64}), one_token = other({1, 2, 1, 64}),
               no_tokens = other({1, 4, 0, 64});
  refuses([&](AttentionCase& c) { c.query = &odd_heads; });
  refuses([&](AttentionCase& c) { c.query = &wrong_dim; });
  refuses([&](AttentionCase& c) { c.query = &two_rows; });
  refuses([&](AttentionCase& c) { c.query = &no_tokens; });
  refuses([&](AttentionCase& c) { c.keys = &one_token; });
  refuses([&](AttentionCase& c) { c.values = &one_token; });
  refuses([&](AttentionCase& c) { c.new_tokens = {3}; });
  refuses([&](AttentionCase& c) { c.new_tokens = {1, 1}; });
  refuses([&](AttentionCase& c) { c.softcap = -1.0f; });
  refuses([&](AttentionCase& c) { c.softcap = NAN; });
  refuses([&](AttentionCase& c) { c.scaling = INFINITY; });
  refuses([&](AttentionCase& c) { c.sliding_window = -1; });
}

}  // namespace
}  // namespace turboquant::attention
