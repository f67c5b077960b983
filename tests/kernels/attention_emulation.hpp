// The device's attention over memory of the host, for units that run its kernels in the emulator.
#pragma once

#include <cstring>
#include <vector>

#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/cuda/decode_attention.hpp"

namespace turboquant::testing_support {

// Runs `run(params)` for a case. The page table has extra_columns of absurd entries, output and
// workspace are poisoned.
template <class WorkspaceBytes, class Run>
AttentionResult attend_on_host_memory(const AttentionCase& c, int extra_columns,
                                      WorkspaceBytes workspace_bytes, Run run) {
  CaseTables tables(c);
  const int64_t columns = c.store->table().max_entries() + extra_columns;
  std::vector<int32_t> page_table = c.store->table().export_page_table(columns);
  poison_unused_entries(page_table, columns, tables.rows);
  const attention::DecodeAttentionParams p = params_of(c, tables);
  const auto& shape = c.query->view().shape;
  AttentionResult result{Tensor(cache::ElementType::kFloat32, shape),
                         std::vector<float>(shape[0] * shape[1] * shape[2], kNan)};
  struct alignas(16) Piece {
    unsigned char bytes[16];
  };
  const int64_t codec_bytes = cuda::codec_tables_bytes(p.spec);
  std::vector<Piece> codec(codec_bytes / 16 + 1);
  cuda::fill_codec_tables(
      *cache::LayerCodec::get(p.spec),
      {reinterpret_cast<std::byte*>(codec.data()), static_cast<size_t>(codec_bytes)});
  cuda::DecodeAttentionParams params{.spec = p.spec,
                                     .tables = cuda::codec_tables_at(p.spec, codec.data()),
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
  params.workspace_bytes = workspace_bytes(params);
  std::vector<Piece> workspace(params.workspace_bytes / 16 + 1);
  std::memset(workspace.data(), 0xFF, workspace.size() * 16);
  params.workspace = workspace.data();
  run(params);
  return result;
}

}  // namespace turboquant::testing_support
