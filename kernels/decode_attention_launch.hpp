// Host side of decode attention that needs no CUDA: from the public parameters to the kernels'
// arguments.
#pragma once

#include "decode_attention_args.hpp"
#include "turboquant/cuda/decode_attention.hpp"

namespace turboquant::cuda::detail {

template <class Data>
TensorArg tensor_arg(const cache::BasicTensorView<Data>& tensor) {
  return {static_cast<const std::byte*>(static_cast<const void*>(tensor.data)),
          tensor.strides[0],
          tensor.strides[1],
          tensor.strides[2],
          tensor.strides[3],
          static_cast<int>(cache::element_bytes(tensor.type))};
}

// Rows that 16-byte loads can read as they are, if there are any.
inline bool whole_rows(const TensorArg& tensor) {
  if (tensor.data == nullptr) return true;
  const int64_t elems = 16 / tensor.elem_bytes;
  return tensor.elem_stride == 1 && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
         tensor.batch_stride % elems == 0 && tensor.head_stride % elems == 0 &&
         tensor.token_stride % elems == 0;
}

// Arguments for rows [first, first + count) of the batch.
inline DecodeArgs make_decode_args(const DecodeAttentionParams& p, int64_t first, int64_t count) {
  const auto& [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t heads = p.spec.num_kv_heads;
  DecodeArgs a{};
  a.batch = static_cast<int>(count);
  a.num_kv_heads = static_cast<int>(heads);
  a.group = static_cast<int>(num_heads / heads);
  a.num_queries = static_cast<int>(num_queries);
  a.rows = a.group * a.num_queries;
  a.tiles = static_cast<int>(row_tiles(a.rows));
  for (int n = 1; n <= 2; ++n) {
    a.passes_of_tiles[n - 1] = static_cast<int>(ceil_div(a.rows, n * kTileRows));
  }
  a.chunk_tokens = static_cast<int>(p.key_states.shape[2]);
  a.page_columns = static_cast<int>(p.page_columns);
  a.exact = p.spec.exact_layout();
  a.page_slots = static_cast<int>(max_row_splits(heads, p.page_columns));
  a.exact_slots = static_cast<int>(max_exact_pieces(a.exact.capacity(), a.chunk_tokens));
  a.slots = a.page_slots + a.exact_slots;
  a.by_heads = Divider(a.num_kv_heads);
  a.by_group = Divider(a.group);
  a.by_rows = Divider(a.rows);
  a.by_tiles = Divider(a.tiles);
  for (int n = 0; n < 2; ++n) a.by_passes[n] = Divider(a.passes_of_tiles[n]);
  if (a.exact_slots > 0) a.by_exact_slots = Divider(a.exact_slots);
  if (a.exact.ring_tokens() > 0) a.by_ring = Divider(static_cast<int>(a.exact.ring_tokens()));
  a.plan = {heads, p.spec.sink_tokens, num_queries, p.sliding_window};
  a.may_mask = num_queries > 1 || p.sliding_window > 0;  // a lone query stands behind all pages
  const cache::BlockLayout layout = p.spec.block_layout();
  a.k_bits = layout.k_bits;
  a.v_bits = layout.v_bits;
  a.key_part_bytes = static_cast<uint32_t>(layout.v_codes_offset());
  a.value_part_bytes = static_cast<uint32_t>(layout.block_bytes() - layout.v_codes_offset());
  a.has_mean = layout.has_mean;
  a.half_scales = p.spec.scale_type == cache::ScaleType::kFloat16;
  a.type = p.query.type;
  a.out_type = p.out.type;
  a.smooth_keys = p.spec.smooth_keys;
  a.scaling = p.scaling;
  a.softcap = p.softcap;
  a.softcap_scale = p.softcap * kLog2E;
  a.softcap_rate = p.softcap > 0.0f ? 2.0f * kLog2E / p.softcap : 0.0f;
  a.pages_per_slab = static_cast<uint32_t>(min_of(p.pages.pages_per_slab, INT32_MAX));

  const auto from_row = [&](TensorArg tensor) {
    if (tensor.data != nullptr) tensor.data = tensor.row(first, 0, 0);
    return tensor;
  };
  a.query = from_row(tensor_arg(p.query));
  a.key_states = from_row(tensor_arg(p.key_states));
  a.value_states = from_row(tensor_arg(p.value_states));
  a.exact_keys = from_row(tensor_arg(p.exact_keys));
  a.exact_values = from_row(tensor_arg(p.exact_values));
  a.out = from_row(tensor_arg(p.out));
  a.plain_exact = a.type != cache::ElementType::kFloat32 && whole_rows(a.query) &&
                  whole_rows(a.key_states) && whole_rows(a.value_states) &&
                  whole_rows(a.exact_keys) && whole_rows(a.exact_values);
  a.smoothing = p.smoothing == nullptr ? nullptr : p.smoothing + first * heads * dim;
  a.key_signs = p.tables.keys.signs;
  a.key_turns = p.tables.keys.turns;
  a.value_signs = p.tables.values.signs;
  a.value_turns = p.tables.values.turns;
  a.key_levels = p.tables.keys.decode;
  a.value_levels = p.tables.values.decode;
  a.pages = p.pages;
  a.page_table = p.page_table == nullptr
                     ? nullptr
                     : p.page_table + first * p.page_columns * cache::tables::kPageColumns;
  a.row_table = p.rows + first * cache::tables::kRowColumns;
  a.sink_logits = p.sink_logits;
  a.lse = p.lse == nullptr ? nullptr : p.lse + first * num_heads * num_queries;

  const int64_t slots = max_slots(batch * heads, a.rows, heads, p.page_columns, a.exact_slots);
  const Workspace w =
      workspace_layout(batch, heads, a.tiles, static_cast<int>(dim), p.page_columns, slots);
  auto* const memory = static_cast<std::byte*>(p.workspace);
  const int64_t units = first * heads * a.tiles;
  a.query_operands = reinterpret_cast<uint32_t*>(memory + w.query_operands_offset) +
                     units * query_words(static_cast<int>(dim));
  a.query_factors = reinterpret_cast<float*>(memory + w.query_factors_offset) + units * kTileRows;
  a.entry_begins =
      reinterpret_cast<int32_t*>(memory + w.entry_begins_offset) + first * p.page_columns;
  a.partials = reinterpret_cast<float*>(memory + w.partials_offset) +
               units * slots * partial_floats(static_cast<int>(dim));
  return a;
}

// The same call by attend_pages; without blocks where it has too many pages, or queries that do not
// see all of them.
inline SharedPagesArgs share_pages(const DecodeArgs& call) {
  SharedPagesArgs a{call, {}, {}};
  if (call.may_mask) return a;
  const int units = call.batch * call.num_kv_heads;
  a.blocks = plan_page_blocks(units, call.rows, call.page_columns, call.exact_slots);
  if (a.blocks.pages == 0) return a;
  a.by_unit_blocks = Divider(a.blocks.pages / units);
  a.call.page_results = true;
  a.call.page_slots = static_cast<int>(page_result_slots(call.page_columns));
  a.call.slots = a.call.page_slots + kShortSplitPages * call.exact_slots;
  return a;
}

}  // namespace turboquant::cuda::detail
