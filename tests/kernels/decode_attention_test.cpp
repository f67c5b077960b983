// The CUDA kernels of decode attention, run on the CPU (simt_emulator.hpp): indices, masks, order
// of copies and merges. What only a GPU shows (speed, its roundings) is in
// tests/cuda/decode_attention_test.cpp.
#define TQ_SIMT_EMULATOR "../tests/kernels/simt_emulator.hpp"
#include <gtest/gtest.h>

#include <random>

#include "../../kernels/decode_attention.cuh"
#include "../../kernels/decode_attention_launch.hpp"
#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AttentionCase;
using testing_support::AttentionResult;
using testing_support::DecodeProblem;

template <int kDim, int kKeyBits, int kValueBits>
void run_kernels(const detail::DecodeArgs& args, int grid) {
  using Traits = detail::DecodeTraits<kDim, kKeyBits, kValueBits>;
  using Combine = detail::CombineTraits<kDim>;
  const int units = args.batch * args.num_kv_heads * args.tiles;
  simt::launch(units, detail::kPrepareThreads, detail::kTileRows * kDim * 4,
               [&](std::byte* shared) { detail::prepare_queries<kDim>(args, shared); });
  simt::launch(grid, Traits::kThreads, Traits::kSharedBytes,
               [&](std::byte* shared) { detail::SplitWorker<Traits>(args, shared).run(); });
  simt::launch(units, Combine::kThreads, Combine::kSharedBytes,
               [&](std::byte* shared) { detail::combine_splits<kDim>(args, shared); });
}

void run_kernels(const cache::LayerSpec& spec, const detail::DecodeArgs& args, int grid) {
#define TQ_CASE(dim, k, v)                                            \
  if (spec.head_dim == dim && spec.k_bits == k && spec.v_bits == v) { \
    return run_kernels<dim, k, v>(args, grid);                        \
  }
  TQ_DECODE_ATTENTION_CONFIGS(TQ_CASE)
#undef TQ_CASE
  FAIL() << "not built";
}

// The kernels' result for a problem whose memory is host memory.
AttentionResult attend_emulated(const AttentionCase& c, int grid, int extra_columns = 0) {
  testing_support::CaseTables tables(c);
  const int64_t columns = c.store->table().max_entries() + extra_columns;
  std::vector<int32_t> page_table = c.store->table().export_page_table(columns);
  testing_support::poison_unused_entries(page_table, columns, tables.rows);
  const attention::DecodeAttentionParams p = testing_support::params_of(c, tables);
  const auto& shape = c.query->view().shape;
  AttentionResult result{testing_support::Tensor(cache::ElementType::kFloat32, shape),
                         std::vector<float>(shape[0] * shape[1] * shape[2], testing_support::kNan)};
  std::vector<std::byte> codec_memory(codec_tables_bytes(p.spec) + 16);
  std::byte* const codec =
      codec_memory.data() + (16 - reinterpret_cast<uintptr_t>(codec_memory.data()) % 16) % 16;
  fill_codec_tables(*cache::LayerCodec::get(p.spec), {codec, codec_memory.size() - 16});
  DecodeAttentionParams params{.spec = p.spec,
                               .tables = codec_tables_at(p.spec, codec),
                               .query = p.query,
                               .key_states = p.key_states,
                               .value_states = p.value_states,
                               .exact_keys = p.exact_keys,
                               .exact_values = p.exact_values,
                               .smoothing = p.smoothing,
                               .pages = p.pages,
                               .page_table = columns > 0 ? page_table.data() : nullptr,
                               .page_columns = columns,
                               .rows = tables.rows.data(),
                               .sink_logits = p.sink_logits,
                               .scaling = p.scaling,
                               .softcap = p.softcap,
                               .sliding_window = p.sliding_window,
                               .out = result.out.view(),
                               .lse = result.lse.data()};
  params.workspace_bytes = decode_attention_workspace_bytes(params);
  struct alignas(16) Piece {
    unsigned char bytes[16];
  };
  std::vector<Piece> workspace(params.workspace_bytes / 16 + 1);
  std::memset(workspace.data(), 0xFF, workspace.size() * 16);
  params.workspace = workspace.data();
  check_decode_attention(params);
  run_kernels(p.spec, detail::make_decode_args(params, 0, shape[0]), grid);
  return result;
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
  for (const DecodeAttentionConfig config : kDecodeAttentionConfigs) {
    DecodeProblem p;
    p.spec.head_dim = config.head_dim;
    p.spec.num_kv_heads = 1;
    p.spec.k_bits = config.k_bits;
    p.spec.v_bits = config.v_bits;
    p.lengths = {300};
    p.spec.scale_type = (config.k_bits + config.head_dim / 16) % 2 ? cache::ScaleType::kFloat16
                                                                   : cache::ScaleType::kFloat32;
    p.seed = config.head_dim + config.k_bits;
    expect_matches_reference(p, 1);
  }
}

TEST(EmulatedDecodeAttention, RandomProblems) {
  for (int round = 0; round < 12 && !testing::Test::HasFailure(); ++round) {
    expect_matches_reference(testing_support::random_decode_problem(round, 900), 1 + round % 4);
  }
}

}  // namespace
}  // namespace turboquant::cuda
