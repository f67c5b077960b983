// The CUDA kernels of extend attention, run on the CPU (simt_emulator.hpp), for every set of sizes.
// What only a GPU shows is in tests/cuda/extend_attention_test.cpp.
#define TQ_SIMT_EMULATOR "../tests/kernels/simt_emulator.hpp"
#include "../../kernels/extend_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "../../kernels/extend_attention_launch.hpp"
#include "attention_emulation.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using detail::ExtendSizes;
using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::DecodeProblem;

template <int kDim, ExtendSizes kSizes>
void run_kernels(const detail::ExtendArgs& args) {
  using Traits = detail::ExtendTraits<kDim, kSizes>;
  simt::launch(static_cast<int>(detail::extend_prepare_blocks(args)), detail::kPrepareThreads,
               detail::kExtendPrepareBytes<kDim>,
               [&](std::byte* shared) { detail::extend_prepare<kDim>(args, shared); });
  simt::launch(args.call.batch * args.call.num_kv_heads * args.tiles * args.splits,
               Traits::kThreads, Traits::kSharedBytes,
               [&](std::byte* shared) { detail::ExtendWorker<Traits>(args, shared).run(); });
  simt::launch(static_cast<int>(detail::extend_combine_blocks(args)),
               32 * detail::kExtendCombineWarps, detail::kExtendCombineBytes<kDim>,
               [&](std::byte* shared) { detail::extend_combine<kDim>(args, shared); });
}

template <ExtendSizes kSizes>
void run_kernels(int head_dim, const detail::ExtendArgs& args) {
  switch (head_dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return run_kernels<dim, kSizes>(args);
    TQ_ATTENTION_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
    default:
      FAIL() << "not built";
  }
}

class EmulatedExtendAttention : public ::testing::TestWithParam<ExtendSizes> {
 protected:
  static AttentionResult attend(const AttentionCase& c, int extra_columns = 2) {
    return testing_support::attend_on_host_memory(
        c, extra_columns, extend_attention_workspace_bytes,
        [&](const DecodeAttentionParams& params) {
          check_extend_attention(params);
          const int64_t batch = params.query.shape[0];
          const int64_t step = detail::extend_shape_of(params, GetParam()).launch_batch;
          for (int64_t first = 0; first < batch; first += step) {
            const detail::ExtendArgs args =
                detail::make_extend_args(params, GetParam(), first, std::min(step, batch - first));
            switch (GetParam()) {
              case ExtendSizes::kWarpgroup:
                run_kernels<ExtendSizes::kWarpgroup>(params.spec.head_dim, args);
                break;
              case ExtendSizes::kLarge:
                run_kernels<ExtendSizes::kLarge>(params.spec.head_dim, args);
                break;
              case ExtendSizes::kCompact:
                run_kernels<ExtendSizes::kCompact>(params.spec.head_dim, args);
                break;
            }
          }
        });
  }
  static void expect_matches_reference(const DecodeProblem& problem) {
    SCOPED_TRACE(problem.text());
    const testing_support::BuiltDecode built(problem);
    testing_support::expect_half_precision(built.test_case, attend(built.test_case));
  }
};

TEST_P(EmulatedExtendAttention, TheDefaultRecipe) {
  DecodeProblem p;
  p.queries = 40;
  p.lengths = {900};
  expect_matches_reference(p);
}

TEST_P(EmulatedExtendAttention, EveryDimAndWidth) {
  for (const DecodeAttentionConfig config : kDecodeAttentionConfigs) {
    // Keys and values are decoded independently: every decoder of either at every head_dim.
    if (config.k_bits != config.v_bits && config.v_bits != 4 - config.k_bits % 2) continue;
    DecodeProblem p;
    p.spec.head_dim = config.head_dim;
    p.spec.num_kv_heads = 1;
    p.spec.k_bits = config.k_bits;
    p.spec.v_bits = config.v_bits;
    p.spec.codebook = config.codebook;
    p.spec.scale_type =
        config.head_dim % 3 ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
    p.spec.center_keys = config.k_bits % 2 == 0;
    p.lengths = {260};
    p.queries = 17;
    p.group = 1;
    p.seed = config.head_dim + config.k_bits;
    expect_matches_reference(p);
  }
}

// More tiles than one, more splits than one, warps without a row.
TEST_P(EmulatedExtendAttention, ManyRows) {
  DecodeProblem p;
  p.spec.head_dim = 64;
  p.spec.num_kv_heads = 1;
  p.group = 3;
  p.queries = 111;
  p.lengths = {1900};
  expect_matches_reference(p);
}

TEST_P(EmulatedExtendAttention, RaggedAndEmptyRows) {
  for (const bool with_chunk : {true, false}) {
    DecodeProblem p;
    p.spec.head_dim = 64;
    p.group = 1;
    p.queries = 21;
    p.lengths = {700, 0, 3, 5, 70, 132};
    if (with_chunk) p.new_tokens = {21, 2, 0, 1, 21, 3};
    p.with_chunk = with_chunk;
    p.sink_logits = with_chunk;
    expect_matches_reference(p);
  }
}

TEST_P(EmulatedExtendAttention, SlidingWindowSoftcapAndSinkLogits) {
  for (const int64_t window : {1, 30, 64, 130, 400, 5000}) {
    DecodeProblem p;
    p.spec.head_dim = 64;
    p.group = 2;
    p.queries = 20;
    p.sliding_window = window;
    p.lengths = {690, 40};
    p.sink_logits = window % 4 == 0;
    p.softcap = window == 130 ? 1.5f : window == 30 ? 50.0f : 0.0f;
    expect_matches_reference(p);
  }
}

TEST_P(EmulatedExtendAttention, NegativeScaling) {
  DecodeProblem p;
  p.queries = 18;
  const testing_support::BuiltDecode built(p);
  AttentionCase c = built.test_case;
  c.scaling = -c.scaling;
  testing_support::expect_half_precision(c, attend(c));
}

TEST_P(EmulatedExtendAttention, RandomProblems) {
  for (int round = 0; round < 20 && !HasFailure(); ++round) {
    DecodeProblem p = testing_support::random_decode_problem(round, 600, 40);
    p.group = 1 + p.group % 3;
    expect_matches_reference(p);
  }
}

TEST_P(EmulatedExtendAttention, AnySizeOfQueriesAndValues) {
  for (const float size : {0.0f, 1e-30f, 30.0f, 1e4f}) {
    for (const float value_size : {1e-20f, 1e20f}) {
      DecodeProblem p;
      p.spec.head_dim = 64;
      p.spec.num_kv_heads = 1;
      p.queries = 17;
      p.group = 1;
      p.lengths = {500};
      p.query_size = size;
      p.value_size = value_size;
      expect_matches_reference(p);
    }
  }
}

TEST_P(EmulatedExtendAttention, ARowsBitsDependOnTheRow) {
  DecodeProblem p;
  p.spec.head_dim = 64;
  p.group = 2;
  p.queries = 20;
  p.lengths = {640};
  const testing_support::BuiltDecode alone(p);
  const AttentionResult expected = attend(alone.test_case, 0);
  EXPECT_EQ(attend(alone.test_case, 9).out.bytes(), expected.out.bytes());
  p.lengths = {640, 300, 0};
  const testing_support::BuiltDecode batch(p);
  const AttentionResult result = attend(batch.test_case, 3);
  // Another batch is other random numbers; the same row twice is the same bits.
  EXPECT_EQ(attend(batch.test_case, 1).out.bytes(), result.out.bytes());
  EXPECT_EQ(attend(batch.test_case, 1).lse, result.lse);
}

TEST_P(EmulatedExtendAttention, PoisonedTokensReachOnlyTheQueriesThatSeeThem) {
  for (const auto type : {cache::ElementType::kFloat32, cache::ElementType::kBFloat16}) {
    testing_support::expect_poison_reaches_who_sees_it(
        type, 20, [](const AttentionCase& c) { return attend(c); });
  }
}

TEST(ExtendAttentionArguments, RefusesWhatDoesNotFit) {
  DecodeProblem p;
  p.queries = 20;
  const testing_support::BuiltDecode built(p);
  testing_support::attend_on_host_memory(
      built.test_case, 0, extend_attention_workspace_bytes, [](const DecodeAttentionParams& good) {
        check_extend_attention(good);
        const auto refuses = [&](const char* message, auto change) {
          DecodeAttentionParams bad = good;
          change(bad);
          try {
            check_extend_attention(bad);
            ADD_FAILURE() << message;
          } catch (const InvalidArgument& error) {
            EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
          }
        };
        refuses("workspace_bytes: ", [](auto& bad) { bad.workspace_bytes -= 16; });
        refuses("workspace: ", [](auto& bad) { bad.workspace = nullptr; });
        refuses("query: ", [](auto& bad) { bad.query.shape[2] = 0; });
        refuses("key_states: ", [](auto& bad) { bad.key_states.shape[2] = 19; });
        refuses("spec: ", [](auto& bad) { bad.spec.k_bits = 7; });
        refuses("scaling: ", [](auto& bad) { bad.scaling = INFINITY; });
      });
}

// What a launch takes of memory does not grow with the batch for ever, nor with the past.
TEST(ExtendAttentionArguments, TheWorkspaceIsBounded) {
  DecodeAttentionParams p{};
  p.spec.head_dim = 128;
  p.spec.num_kv_heads = 8;
  const auto bytes = [&](int64_t batch, int64_t queries, int64_t page_columns) {
    p.query.shape = {batch, 32, queries, 128};
    p.key_states.shape = {batch, 8, queries, 128};
    p.page_columns = page_columns;
    return extend_attention_workspace_bytes(p);
  };
  EXPECT_EQ(bytes(64, 512, 512), bytes(4, 512, 512));
  EXPECT_EQ(bytes(1, 512, 2048) - bytes(1, 512, 0), 2048 * 4);  // positions of entries
  EXPECT_LT(bytes(1, 512, 512), 25e6);
}

INSTANTIATE_TEST_SUITE_P(Sizes, EmulatedExtendAttention,
                         ::testing::Values(ExtendSizes::kWarpgroup, ExtendSizes::kLarge,
                                           ExtendSizes::kCompact),
                         [](const auto& sizes) {
                           return sizes.param == ExtendSizes::kWarpgroup ? "Warpgroup"
                                  : sizes.param == ExtendSizes::kLarge   ? "Large"
                                                                         : "Compact";
                         });

}  // namespace
}  // namespace turboquant::cuda
