// CUDA decode attention of few pages, four warps a page
// (kernels/decode_attention_shared_pages.cuh), beside the kernel that many pages take: the same
// call with a wider page table, whose unused columns count as pages.
#include <gtest/gtest.h>

#include <algorithm>

#include "../../kernels/decode_attention_plan.hpp"
#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "device_attention.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AttentionResult;
using testing_support::DecodeProblem;

class CudaSharedPages : public testing_support::GpuTest {};

constexpr testing_support::DeviceAttention kDecode{decode_attention_workspace_bytes,
                                                   decode_attention};

// Whether a call with one query for each of these rows is small enough.
bool shares(const DecodeProblem& p, int64_t columns) {
  const int64_t pieces =
      detail::max_exact_pieces(p.spec.exact_layout().capacity(), p.with_chunk ? 1 : 0);
  return detail::plan_page_blocks(static_cast<int64_t>(p.lengths.size()) * p.spec.num_kv_heads,
                                  p.group, columns, pieces)
             .pages > 0;
}

void expect_same_bits(const DecodeProblem& p, int runs = 1) {
  constexpr int64_t kMany = 2000;
  SCOPED_TRACE(p.text());
  const testing_support::BuiltDecode built(p);
  const int64_t columns = built.test_case.store->table().max_entries();
  ASSERT_EQ(shares(p, columns), columns > 0);
  ASSERT_FALSE(shares(p, columns + kMany));
  testing_support::DeviceCase few(kDecode, built.test_case, {.extra_columns = 0});
  testing_support::DeviceCase many(kDecode, built.test_case, {.extra_columns = kMany});
  const AttentionResult expected = many.run();
  testing_support::expect_half_precision(built.test_case, expected);
  for (int run = 0; run < runs; ++run) {
    const AttentionResult result = few.run();
    EXPECT_EQ(result.out.bytes(), expected.out.bytes());
    EXPECT_EQ(result.lse, expected.lse);
  }
}

TEST_F(CudaSharedPages, EveryConfig) {
  for (const DecodeAttentionConfig config : kDecodeAttentionConfigs) {
    for (const int group : {3, 7}) {
      DecodeProblem p;
      p.spec.head_dim = config.head_dim;
      p.spec.k_bits = config.k_bits;
      p.spec.v_bits = config.v_bits;
      p.spec.codebook = config.codebook;
      p.spec.scale_type = group == 3 ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32;
      p.spec.center_keys = group == 3;
      p.group = group;
      p.lengths = {700, 90};
      p.seed = config.head_dim + config.k_bits;
      in_both_layouts(p, [](const DecodeProblem& of_layout) { expect_same_bits(of_layout); });
    }
  }
}

// Groups of 4 leave a team of warps to rotate the queries, groups of 8 do not.
TEST_F(CudaSharedPages, RaggedAndEmptyRows) {
  for (const int group : {4, 8}) {
    for (const bool with_chunk : {true, false}) {
      DecodeProblem p;
      p.group = group;
      p.lengths = {700, 0, 3, 4, 5, 70, 131, 132};
      p.with_chunk = with_chunk;
      if (with_chunk) p.new_tokens = {1, 1, 0, 1, 1, 0, 1, 1};
      p.cropped = 70;
      p.sink_logits = with_chunk;
      in_both_layouts(p, [](const DecodeProblem& of_layout) { expect_same_bits(of_layout); });
    }
  }
}

// As many pages as there may be, blocks of three teams and of four, pieces of exact tokens that
// share a block.
TEST_F(CudaSharedPages, LoneRowsOfAnyLength) {
  for (const int32_t length : {1, 40, 200, 1000, 2048, 2100, 3000, 4096}) {
    for (const int64_t window : {128, 320}) {
      DecodeProblem p;
      p.spec.num_kv_heads = 8;
      p.spec.window_tokens = window;
      p.lengths = {length};
      p.sink_logits = length % 3 == 0;
      p.softcap = length == 1000 ? 20.0f : 0.0f;
      p.type = static_cast<cache::ElementType>(length % 3);
      p.seed = static_cast<uint32_t>(length);
      if (!shares(p, (length + 63) / 64)) continue;
      in_both_layouts(p, [](const DecodeProblem& of_layout) { expect_same_bits(of_layout, 10); });
    }
  }
}

TEST_F(CudaSharedPages, RandomProblems) {
  int run = 0;
  for (int round = 0; run < 300 && !HasFailure(); ++round) {
    DecodeProblem p = testing_support::random_decode_problem(round, 700);
    p.queries = 1;
    p.sliding_window = 0;
    p.group = std::min(p.group, 8);
    for (int32_t& tokens : p.new_tokens) tokens = std::min(tokens, 1);
    if (!shares(p, 700 / 64 + 2)) continue;
    expect_same_bits(p);
    ++run;
  }
}

}  // namespace
}  // namespace turboquant::cuda
