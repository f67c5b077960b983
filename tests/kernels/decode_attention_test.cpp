// The CUDA kernels of decode attention, run on the CPU (simt_emulator.hpp): indices, masks, order
// of copies and merges. What only a GPU shows (speed, its roundings) is in
// tests/cuda/decode_attention_test.cpp.
#define TQ_SIMT_EMULATOR "../tests/kernels/simt_emulator.hpp"
#include "../../kernels/decode_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <iterator>

#include "../../kernels/decode_attention_launch.hpp"
#include "attention_emulation.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::DecodeProblem;

// Whether four warps share a page where there are few.
enum class Sharing { kAllowed, kNone };

template <class Traits>
void run_kernels(const detail::DecodeArgs& args, int grid, Sharing sharing) {
  constexpr int kDim = Traits::kDim;
  if constexpr (Traits::kSharesPages) {
    const detail::SharedPagesArgs shared_pages = detail::share_pages(args);
    if (sharing == Sharing::kAllowed && shared_pages.blocks.pages > 0) {
      simt::launch(shared_pages.blocks.exact + shared_pages.blocks.pages, Traits::kThreads,
                   Traits::kSharedBytes, [&](std::byte* shared) {
                     detail::PageTeams<Traits>(shared_pages, shared).run();
                   });
      constexpr int kParts = detail::kShortSplitPages, kTeams = detail::kCombineTeams;
      const detail::DecodeArgs& call = shared_pages.call;
      simt::launch(static_cast<int>(detail::combine_blocks(call, kTeams)), detail::kCombineThreads,
                   detail::combine_bytes(call, kDim), [&](std::byte* shared) {
                     detail::combine_splits<kDim, kTeams, kParts>(call, shared);
                   });
      return;
    }
  }
  simt::launch(static_cast<int>(detail::prepare_blocks(args)),
               detail::prepare_tiles(args) * detail::kPrepareThreads,
               detail::prepare_bytes(args, kDim),
               [&](std::byte* shared) { detail::prepare_queries<kDim>(args, shared); });
  simt::launch(grid, Traits::kThreads, Traits::kSharedBytes,
               [&](std::byte* shared) { detail::SplitWorker<Traits>(args, shared).run(); });
  // Either way to combine, whatever the number of rows.
  const int row_warps = grid % 2 == 0 ? 1 : detail::kCombineTeams;
  simt::launch(static_cast<int>(detail::combine_blocks(args, row_warps)), detail::kCombineThreads,
               detail::combine_bytes(args, kDim), [&](std::byte* shared) {
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

// one_tile: the kernel that takes one tile of query rows in a pass, however many there are.
void run_kernels(const cache::LayerSpec& spec, const detail::DecodeArgs& args, int grid,
                 bool one_tile, Sharing sharing) {
#define TQ_CASE(dim, k, v, codebook)                                                        \
  if (config_of(spec) == DecodeAttentionConfig{dim, k, v, quant::CodebookKind::codebook}) { \
    return detail::with_decode_traits<dim, k, v, quant::CodebookKind::codebook>(            \
        one_tile ? 1 : args.rows,                                                           \
        [&](auto traits) { run_kernels<decltype(traits)>(args, grid, sharing); });          \
  }
  TQ_EMULATED_CONFIGS(TQ_CASE)
#undef TQ_CASE
  FAIL() << "not built";
}

AttentionResult attend_emulated(const AttentionCase& c, int grid, int extra_columns = 0,
                                bool one_tile = false, Sharing sharing = Sharing::kNone) {
  return testing_support::attend_on_host_memory(
      c, extra_columns, decode_attention_workspace_bytes, [&](DecodeAttentionParams params) {
        // Either way to find a slab, whatever the case.
        if (grid % 2 == 1 && params.pages.num_slabs == 1) {
          params.pages.only_slab = params.pages.slabs[0];
          params.pages.slabs = nullptr;
        }
        check_decode_attention(params);
        run_kernels(params.spec, detail::make_decode_args(params, 0, params.query.shape[0]), grid,
                    one_tile, sharing);
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
  in_both_layouts(p, [](const DecodeProblem& of_layout) { expect_matches_reference(of_layout); });
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
    in_both_layouts(p,
                    [](const DecodeProblem& of_layout) { expect_matches_reference(of_layout, 1); });
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

// Two tiles of query rows in a pass over a page, and a last pass with one: what the reference says,
// and, where groups have as many warps, the bits of a pass for each tile.
TEST(EmulatedDecodeAttention, TwoTilesOfQueryRows) {
  struct Rows {
    int group;
    int64_t queries;
  };
  int run = 0;
  for (const auto [group, queries] : {Rows{9, 1},
                                      {12, 1},
                                      {16, 1},
                                      {17, 1},
                                      {24, 1},
                                      {33, 1},
                                      {4, 3},
                                      {4, 4},
                                      {7, 2},
                                      {8, 2},
                                      {3, 6},
                                      {16, 3}}) {
    for (const int64_t window : {0, 100}) {
      DecodeProblem p;
      p.spec.head_dim = std::array{64, 80, 96, 128}[run % 4];
      p.spec.num_kv_heads = 1 + run % 2;
      p.spec.k_bits = p.spec.v_bits = 2 + run % 3;
      p.spec.codebook = run % 5 == 0 ? quant::CodebookKind::kVector : quant::CodebookKind::kScalar;
      p.spec.scale_type = run % 3 == 0 ? cache::ScaleType::kFloat32 : cache::ScaleType::kFloat16;
      p.group = group;
      p.queries = queries;
      p.lengths = {700, 3, 0, 196};
      const auto whole = static_cast<int32_t>(queries);
      p.new_tokens = {whole, 0, whole, 1};
      p.cropped = run % 4 == 1 ? 70 : 0;
      p.sliding_window = window;
      p.softcap = run % 4 == 2 ? 2.0f : 0.0f;
      p.sink_logits = run % 2 == 0;
      p.type = static_cast<cache::ElementType>(run % 3);
      p.gaps = run / 2 % 2 == 1;  // with and without sink logits
      p.seed = static_cast<uint32_t>(100 + run++);
      SCOPED_TRACE(p.text());
      const testing_support::BuiltDecode built(p);
      const AttentionResult result = attend_emulated(built.test_case, 3);
      testing_support::expect_half_precision(built.test_case, result);
      if (p.spec.head_dim != 64) continue;
      const AttentionResult by_tile = attend_emulated(built.test_case, 5, 2, true);
      EXPECT_EQ(result.out.bytes(), by_tile.out.bytes());
      EXPECT_EQ(result.lse, by_tile.lse);
    }
  }
}

TEST(EmulatedDecodeAttention, AnySizeOfQueriesAndValues) {
  for (const float size : {0.0f, 1e-30f, 1e-6f, 30.0f, 1e4f}) {
    for (const float value_size : {1e-20f, 1.0f, 1e20f}) {
      DecodeProblem p;
      p.lengths = {700};
      p.query_size = size;
      p.value_size = value_size;
      in_both_layouts(p,
                      [](const DecodeProblem& of_layout) { expect_matches_reference(of_layout); });
    }
  }
}

TEST(DecodeAttentionPlan, WarpsTakeWholeSplitsInRoundsThatAreThreeQuartersFull) {
  for (const int warps : {16, 2112}) {
    const int least = warps - warps / 4;
    EXPECT_EQ(detail::whole_splits(0, warps), 0);
    EXPECT_EQ(detail::whole_splits(least - 1, warps), 0);
    EXPECT_EQ(detail::whole_splits(least, warps), least);
    EXPECT_EQ(detail::whole_splits(warps, warps), warps);
    EXPECT_EQ(detail::whole_splits(warps + least - 1, warps), warps);
    EXPECT_EQ(detail::whole_splits(warps + least, warps), warps + least);
    for (int splits = 0; splits < 5 * warps; splits += 7) {
      const int whole = detail::whole_splits(splits, warps);
      EXPECT_LE(whole, splits);
      EXPECT_LT(splits - whole, least) << splits;
    }
  }
}

TEST(DecodeAttentionPlan, BlocksWithTeamsCoverAllPagesAndPieces) {
  int shared = 0;
  for (const int64_t units : {1, 2, 7, 8, 16, 33, 64, 131, 140, 600}) {
    for (const int64_t rows : {1, 4, 5, 8, 9}) {
      for (const int64_t pieces : {0, 1, 3, 17}) {
        for (int64_t columns = 0; columns < 600; columns = columns * 5 / 4 + 1) {
          const detail::PageBlocks plan = detail::plan_page_blocks(units, rows, columns, pieces);
          const int64_t most = detail::kMultiprocessors;
          if (plan.pages == 0) {
            EXPECT_TRUE(rows > detail::kTileRows || columns == 0 ||
                        units * ((columns + 3) / 4) + (units * pieces + 1) / 2 > most);
            continue;
          }
          ++shared;
          EXPECT_LE(plan.exact + plan.pages, most);
          EXPECT_EQ(plan.pages % units, 0);
          EXPECT_GE(plan.pages / units * plan.teams, columns);
          EXPECT_LT((plan.pages / units - 1) * plan.teams, columns);
          EXPECT_GE(2 * plan.exact, units * pieces);
          EXPECT_LE(plan.exact, units * pieces);
          EXPECT_TRUE(plan.teams == 4 || (plan.teams == 3 && rows <= 4));
        }
      }
    }
  }
  EXPECT_GT(shared, 100);
}

TEST(EmulatedDecodeAttention, SameBitsOnAnyNumberOfMultiprocessors) {
  DecodeProblem short_splits;
  short_splits.lengths = {2000, 3, 1500};  // 14 splits: whole ones for 16 warps
  short_splits.queries = 2;
  DecodeProblem long_splits;  // and short ones
  long_splits.spec = {.head_dim = 64, .num_kv_heads = 32};
  long_splits.lengths = {4800, 900, 300};
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

TEST(EmulatedDecodeAttention, WarpsThatShareAPageGiveTheSameBits) {
  int run = 0;
  for (int round = 0; run < 24 && !testing::Test::HasFailure(); ++round) {
    DecodeProblem p = testing_support::random_decode_problem(round, 900);
    if (std::ranges::find(kConfigs, config_of(p.spec)) == std::end(kConfigs)) continue;
    p.group = std::min<int64_t>(p.group, 4);  // one tile of query rows
    p.queries = 1;
    p.sliding_window = 0;
    for (int32_t& tokens : p.new_tokens) tokens = std::min(tokens, 1);
    SCOPED_TRACE(p.text());
    const testing_support::BuiltDecode built(p);
    const AttentionResult expected = attend_emulated(built.test_case, 1 + round % 3, 2);
    for (const int grid : {2, 7, 40}) {
      const AttentionResult shared =
          attend_emulated(built.test_case, grid, grid % 4, false, Sharing::kAllowed);
      EXPECT_EQ(shared.out.bytes(), expected.out.bytes());
      EXPECT_EQ(shared.lse, expected.lse);
    }
    ++run;
  }
}

// One multiprocessor has sixteen warps, which take whole splits here; forty leave all of them to
// groups.
TEST(EmulatedDecodeAttention, RandomProblemsHaveTheSameBitsWhoeverTakesASplit) {
  int run = 0;
  for (int round = 0; run < 8 && !testing::Test::HasFailure(); ++round) {
    DecodeProblem p = testing_support::random_decode_problem(round, 900);
    if (std::ranges::find(kConfigs, config_of(p.spec)) == std::end(kConfigs)) continue;
    p.spec.num_kv_heads = 6;  // 12 splits or more
    p.lengths = {900, p.lengths[0], 700};
    p.group = std::min<int64_t>(p.group, 4);  // one tile of query rows
    p.queries = std::min<int64_t>(p.queries, 2);
    for (int32_t& tokens : p.new_tokens) tokens = std::min(tokens, static_cast<int32_t>(p.queries));
    if (p.with_chunk) p.new_tokens.resize(3, 1);
    SCOPED_TRACE(p.text());
    const testing_support::BuiltDecode built(p);
    const AttentionResult of_groups = attend_emulated(built.test_case, 40);
    const AttentionResult of_warps = attend_emulated(built.test_case, 1);
    EXPECT_EQ(of_warps.out.bytes(), of_groups.out.bytes());
    EXPECT_EQ(of_warps.lse, of_groups.lse);
    ++run;
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
