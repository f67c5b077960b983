// Writes a layer's committed tokens, or a range of them, back as dense keys and values.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::cache {

// B rows, H = spec.num_kv_heads, D = spec.head_dim, C = exact_layout().capacity().
struct DequantizeParams {
  LayerSpec spec;
  ConstTensorView exact_keys;        // [B, H, C, D]
  ConstTensorView exact_values;      // [B, H, C, D]
  const float* smoothing = nullptr;  // [B, H, D] contiguous; unused without smooth_keys
  PagePoolView pages;
  std::span<const int32_t> page_table;  // [B, P, 2]
  std::span<const int32_t> rows;        // [B, 4]
  // Rows end together: of past_tokens positions, token t of row b is at
  // past_tokens - rows[b].length + t, zeros are before. past_tokens >= every row's length.
  int64_t past_tokens = 0;
  int64_t first_position = 0;  // of out
  // [B, H, n, D], any strides: positions [first_position, first_position + n), at most past_tokens.
  TensorView out_keys;
  TensorView out_values;
};

// k = s * R^T (m + scale * c), v = R^T (scale * c); sinks and ring are copied. fp32, rounded once
// to the element type of the output. Throws InvalidArgument for shapes or tables that do not fit.
void dequantize(const DequantizeParams& params, const ParallelFor& parallel_for);

}  // namespace turboquant::cache
