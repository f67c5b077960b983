// Host side of extend attention that needs no CUDA: from the public parameters to the kernels'
// arguments.
#pragma once

#include "decode_attention_launch.hpp"
#include "extend_attention_args.hpp"
#include "turboquant/cuda/extend_attention.hpp"

namespace turboquant::cuda::detail {

inline ExtendShape extend_shape_of(const DecodeAttentionParams& p, ExtendSizes sizes) {
  const auto& [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t heads = p.spec.num_kv_heads;
  return extend_shape(batch, heads, num_heads / heads, num_queries,
                      p.spec.exact_layout().capacity() + p.key_states.shape[2],
                      static_cast<int>(dim), sizes);
}

// Arguments for rows [first, first + count) of the batch; count <= extend_shape_of().launch_batch.
inline ExtendArgs make_extend_args(const DecodeAttentionParams& p, ExtendSizes sizes, int64_t first,
                                   int64_t count) {
  const ExtendShape shape = extend_shape_of(p, sizes);
  const ExtendWorkspace w = extend_workspace(shape, p.spec.head_dim, p.page_columns);
  auto* const memory = static_cast<std::byte*>(p.workspace);
  ExtendArgs a{};
  a.call = make_decode_args(p, first, count);
  a.call.entry_begins = reinterpret_cast<int32_t*>(memory + w.entry_begins_offset);
  a.tiles = static_cast<int>(shape.tiles);
  a.splits = static_cast<int>(shape.splits);
  a.exact_slots = static_cast<int>(shape.exact_slots);
  a.vector_codebook = p.spec.codebook == quant::CodebookKind::kVector;
  a.queries = reinterpret_cast<uint16_t*>(memory + w.queries_offset);
  a.query_factors = reinterpret_cast<float*>(memory + w.query_factors_offset);
  a.exact_keys = reinterpret_cast<uint16_t*>(memory + w.exact_keys_offset);
  a.exact_values = reinterpret_cast<uint16_t*>(memory + w.exact_values_offset);
  a.exact_scales = reinterpret_cast<float*>(memory + w.exact_scales_offset);
  a.partials = reinterpret_cast<float*>(memory + w.partials_offset);
  a.stats = reinterpret_cast<float*>(memory + w.stats_offset);
  return a;
}

// extend_attention with these sizes, on any device that has room for them.
int extend_attention(const DecodeAttentionParams& params, ExtendSizes sizes, cudaStream_t stream);

}  // namespace turboquant::cuda::detail
