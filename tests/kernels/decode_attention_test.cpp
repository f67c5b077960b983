// The CUDA kernels of decode attention, run on the CPU (simt_emulator.hpp): indices, masks, order
// of copies and merges. What only a GPU shows (speed, its roundings) is in
// tests/cuda/decode_attention_test.cpp.
#define TQ_SIMT_EMULATOR "../tests/kernels/simt_emulator.hpp"
#include "../../kernels/decode_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>

#include "../../kernels/decode_attention_launch.hpp"
#include "attention_emulation.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::DecodeProblem;

template <class Traits>
void run_kernels(const detail::DecodeArgs& args, int grid) {
  constexpr int kDim = Traits::kDim;
  const int units = args.batch * args.num_kv_heads * args.tiles;
  simt::launch(units, detail::kPrepareThreads, detail::kTileRows * kDim * 4,
               [&](std::byte* shared) { detail::prepare_queries<kDim>(args, shared); });
  simt::launch(grid, Traits::kThreads, Traits::kSharedBytes,
               [&](std::byte* shared) { detail::SplitWorker<Traits>(args, shared).run(); });
  // Either way to combine, whatever the number of rows.
  const int row_warps = grid % 2 == 0 ? 1 : detail::kCombineTeams;
  simt::launch(static_cast<int>(detail::combine_blocks(args, row_warps)), detail::kCombineThreads,
               detail::kCombineBytes<kDim>, [&](std::byte* shared) {
                 if (row_warps == 1) {
                   detail::combine_splits<kDim, 1>(args, shared);
                 } else {
                   detail::combine_splits<kDim, detail::kCombineTeams>(args, shared);
                 }
               });
}

// Keys and values are decoded independently, so these hold every decoder of either at every
// head_dim; all of supported.hpp would compile for minutes.
// clang-format off
#define TQ_EMULATED_WIDTHS(X, dim)                                          \
  X(dim, 4, 4, kScalar) X(dim, 3, 3, kScalar) X(dim, 2, 2, kScalar)         \
  X(dim, 5, 4, kScalar) X(dim, 6, 3, kScalar) X(dim, 8, 4, kScalar)         \
  X(dim, 4, 4, kVector) X(dim, 3, 3, kVector) X(dim, 2, 2, kVector)
// clang-format on
#define TQ_EMULATED_CONFIGS(X) \
  TQ_EMULATED_WIDTHS(X, 64)    \
  TQ_EMULATED_WIDTHS(X, 80)    \
  TQ_EMULATED_WIDTHS(X, 96)    \
  TQ_EMULATED_WIDTHS(X, 128)   \
  TQ_EMULATED_WIDTHS(X, 256)

constexpr DecodeAttentionConfig kConfigs[] = {
#define TQ_ITEM(dim, k, v, codebook) {dim, k, v, quant::CodebookKind::codebook},
    TQ_EMULATED_CONFIGS(TQ_ITEM)
#undef TQ_ITEM
};

DecodeAttentionConfig config_of(const cache::LayerSpec& spec) {
  return {spec.head_dim, spec.k_bits, spec.v_bits, spec.codebook};
}

void run_kernels(const cache::LayerSpec& spec, const detail::DecodeArgs& args, int grid) {
#define TQ_CASE(dim, k, v, codebook)                                                          \
  if (config_of(spec) == DecodeAttentionConfig{dim, k, v, quant::CodebookKind::codebook}) {   \
    return run_kernels<detail::DecodeTraits<dim, k, v, quant::CodebookKind::codebook>>(args,  \
                                                                                       grid); \
  }
  TQ_EMULATED_CONFIGS(TQ_CASE)
#undef TQ_CASE
  FAIL() << "not built";
}

AttentionResult attend_emulated(const AttentionCase& c, int grid, int extra_columns = 0) {
  return testing_support::attend_on_host_memory(
      c, extra_columns, decode_attention_workspace_bytes, [&](DecodeAttentionParams params) {
        // Either way to find a slab, whatever the case.
        if (grid % 2 == 1 && params.pages.num_slabs == 1) {
          params.pages.only_slab = params.pages.slabs[0];
          params.pages.slabs = nullptr;
        }
        check_decode_attention(params);
        run_kernels(params.spec, detail::make_decode_args(params, 0, params.query.shape[0]), grid);
      });
}

void expect_matches_reference(const DecodeProblem& problem, int grid = 3) {
  SCOPED_TRACE(problem.text());
  const testing_support::BuiltDecode built(problem);
  testing_support::expect_half_precision(built.test_case,
                                         attend_emulated(built.test_case, grid, 2));
}

TEST(EmulatedDecodeAttention, TheDefaultRecipe) {
  DecodeProblem p;
  p.lengths = {1500};
  expect_matches_reference(p);
}

TEST(EmulatedDecodeAttention, EveryDimAndWidth) {
  for (const DecodeAttentionConfig config : kConfigs) {
    DecodeProblem p;
    p.spec.head_dim = config.head_dim;
    p.spec.num_kv_heads = 1;
    p.spec.k_bits = config.k_bits;
    p.spec.v_bits = config.v_bits;
    p.spec.codebook = config.codebook;
    p.lengths = {300};
    p.spec.scale_type = (config.k_bits + config.head_dim / 16) % 2 ? cache::ScaleType::kFloat16
                                                                   : cache::ScaleType::kFloat32;
    p.seed = config.head_dim + config.k_bits;
    expect_matches_reference(p, 1);
  }
}

TEST(EmulatedDecodeAttention, RandomProblems) {
  int run = 0;
  for (int round = 0; run < 40 && !testing::Test::HasFailure(); ++round) {
    const DecodeProblem p = testing_support::random_decode_problem(round, 900);
    const bool built = std::ranges::find(kConfigs, config_of(p.spec)) != std::end(kConfigs);
    if (!built) continue;
    expect_matches_reference(p, 1 + round % 4);
    ++run;
  }
}

TEST(EmulatedDecodeAttention, AnySizeOfQueriesAndValues) {
  for (const float size : {0.0f, 1e-30f, 1e-6f, 30.0f, 1e4f}) {
    for (const float value_size : {1e-20f, 1.0f, 1e20f}) {
      DecodeProblem p;
      p.lengths = {700};
      p.query_size = size;
      p.value_size = value_size;
      expect_matches_reference(p);
    }
  }
}

TEST(EmulatedDecodeAttention, SameBitsOnAnyNumberOfMultiprocessors) {
  DecodeProblem short_splits;
  short_splits.lengths = {2000, 3, 900};
  short_splits.queries = 2;
  DecodeProblem long_splits;
  long_splits.spec = {.head_dim = 64, .num_kv_heads = 32};
  long_splits.lengths = {4800};
  for (const DecodeProblem& p : {short_splits, long_splits}) {
    SCOPED_TRACE(p.text());
    const testing_support::BuiltDecode built(p);
    const AttentionResult expected = attend_emulated(built.test_case, 1);
    testing_support::expect_half_precision(built.test_case, expected);
    for (const int grid : {2, 5, 34, 131}) {
      const AttentionResult result = attend_emulated(built.test_case, grid, grid % 8);
      EXPECT_EQ(result.out.bytes(), expected.out.bytes());
      EXPECT_EQ(result.lse, expected.lse);
    }
  }
}

TEST(EmulatedDecodeAttention, PoisonedTokensReachOnlyTheQueriesThatSeeThem) {
  for (const auto type : {cache::ElementType::kFloat32, cache::ElementType::kFloat16,
                          cache::ElementType::kBFloat16}) {
    testing_support::expect_poison_reaches_who_sees_it(
        type, 10, [](const AttentionCase& c) { return attend_emulated(c, 1); });
  }
}

}  // namespace
}  // namespace turboquant::cuda
