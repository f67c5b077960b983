// Checks and sizes of CUDA decode attention: what a machine without a GPU can run.
#include "turboquant/cuda/decode_attention.hpp"

#include <cmath>
#include <string>

#include "../../kernels/decode_attention_plan.hpp"
#include "attention_checks.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {

using turboquant::detail::throw_invalid;

int64_t decode_attention_workspace_bytes(const DecodeAttentionParams& p) {
  const auto& [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t heads = p.spec.num_kv_heads;
  const int64_t rows = num_heads / heads * num_queries, tiles = detail::row_tiles(rows);
  const int64_t pieces =
      detail::max_exact_pieces(p.spec.exact_layout().capacity(), p.key_states.shape[2]);
  const int64_t slots = detail::max_slots(batch * heads, rows, heads, p.page_columns, pieces);
  return detail::workspace_layout(batch, heads, tiles, static_cast<int>(dim), p.page_columns, slots)
      .bytes;
}

namespace detail {

void check_attention(const DecodeAttentionParams& p, int64_t max_queries,
                     int64_t (*workspace_bytes)(const DecodeAttentionParams&)) {
  p.spec.validate();
  const auto require_data = [](const void* data, const char* name) {
    if (data == nullptr) throw_invalid(name, "data", "a null pointer");
  };
  const cache::LayerSpec& spec = p.spec;
  if (!decode_attention_supported(spec)) {
    const auto [expected, actual] = decode_attention_support(spec);
    throw_invalid("spec", expected, actual);
  }
  const auto& [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t heads = spec.num_kv_heads;
  if (batch < 0) throw_invalid("query", "0 or more rows", std::to_string(batch));
  if (num_heads < 1 || num_heads % heads != 0) {
    throw_invalid("query", "a multiple of " + std::to_string(heads) + " heads",
                  std::to_string(num_heads));
  }
  if (num_queries < 1 || num_queries > max_queries) {
    throw_invalid("query", "1 to " + std::to_string(max_queries) + " tokens",
                  std::to_string(num_queries));
  }
  cache::check_shape("query", p.query, {batch, num_heads, num_queries, spec.head_dim});
  const int64_t chunk_tokens = p.key_states.shape[2];
  if (chunk_tokens != 0 && chunk_tokens != num_queries) {
    throw_invalid("key_states", "0 or " + std::to_string(num_queries) + " tokens, as the query",
                  std::to_string(chunk_tokens));
  }
  const auto require_type = [&](const cache::ConstTensorView& tensor, const char* name) {
    if (tensor.type != p.query.type) {
      throw_invalid(name,
                    "the query's element type " + std::to_string(static_cast<int>(p.query.type)),
                    std::to_string(static_cast<int>(tensor.type)));
    }
  };
  if (chunk_tokens > 0) {
    const std::array<int64_t, 4> chunk = {batch, heads, chunk_tokens, dim};
    cache::check_shape("key_states", p.key_states, chunk);
    cache::check_shape("value_states", p.value_states, chunk);
    require_type(p.key_states, "key_states");
    require_type(p.value_states, "value_states");
  }
  cache::check_shape("out", p.out, {batch, num_heads, num_queries, dim});
  cache::check_exact(spec, batch, p.exact_keys, p.exact_values);
  require_type(p.exact_keys, "exact_keys");
  require_type(p.exact_values, "exact_values");
  if (spec.smooth_keys && batch > 0) require_data(p.smoothing, "smoothing");
  cache::check_pages(spec, p.pages);
  if (p.page_columns < 0 || p.page_columns > INT32_MAX / 64) {
    throw_invalid("page_columns", "0 to " + std::to_string(INT32_MAX / 64),
                  std::to_string(p.page_columns));
  }
  if (batch > 0) {
    require_data(p.rows, "rows");
    if (p.page_columns > 0) require_data(p.page_table, "page_table");
    require_data(p.tables.keys.decode, "tables");
    require_data(p.workspace, "workspace");
  }
  const int64_t wanted = workspace_bytes(p);
  if (batch > 0 && p.workspace_bytes < wanted) {
    throw_invalid("workspace_bytes", std::to_string(wanted) + " or more",
                  std::to_string(p.workspace_bytes));
  }
  if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
    throw_invalid("workspace", "an address on 16 bytes", "another");
  }
  if (!std::isfinite(p.scaling)) {
    throw_invalid("scaling", "a finite number", std::to_string(p.scaling));
  }
  if (!(p.softcap >= 0.0f) || std::isinf(p.softcap)) {
    throw_invalid("softcap", "0 (none) or a positive number", std::to_string(p.softcap));
  }
  if (p.sliding_window < 0) {
    throw_invalid("sliding_window", "0 (none) or more", std::to_string(p.sliding_window));
  }
}

}  // namespace detail

void check_decode_attention(const DecodeAttentionParams& p) {
  detail::check_attention(p, kDecodeAttentionMaxQueries, &decode_attention_workspace_bytes);
}

}  // namespace turboquant::cuda
