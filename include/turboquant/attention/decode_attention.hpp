// Attention of a few queries over packed codes, the exact tokens and the current chunk (CPU, fp32).
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::attention {

// B rows, Hq query heads in groups of Hq / H, H = spec.num_kv_heads, q query tokens, T = q or 0
// chunk tokens, D = spec.head_dim, C = exact_layout().capacity().
//
// Query j of row b sits at position rows[b].length + rows[b].new_tokens - q + j; a negative
// position is a padding query: output 0, lse -inf. It sees the tokens t of its row with
// t <= position, and t > position - sliding_window if that is set. Token t is
//   t < min(length, sinks)        slot t of exact_keys / exact_values
//   t < exact_begin               the pages, in order
//   t < length                    the ring, slot exact_layout().slot(t)
//   t < length + new_tokens       the chunk's token T - new_tokens + (t - length), not yet appended
// Memory that holds none of these tokens has no effect, whatever it contains (NaN too).
struct DecodeAttentionParams {
  cache::LayerSpec spec;
  cache::ConstTensorView query;         // [B, Hq, q, D], any strides
  cache::ConstTensorView key_states;    // [B, H, T, D], any strides; data may be null when T = 0
  cache::ConstTensorView value_states;  // [B, H, T, D]
  cache::ConstTensorView exact_keys;    // [B, H, C, D]
  cache::ConstTensorView exact_values;  // [B, H, C, D]
  const float* smoothing = nullptr;     // [B, H, D] contiguous; unused without smooth_keys
  cache::PagePoolView pages;
  std::span<const int32_t> page_table;  // [B, P, 2]
  std::span<const int32_t> rows;        // [B, 4]
  const float* sink_logits = nullptr;   // [Hq] or null: a learned logit that only takes probability
  float scaling = 1.0f;                 // of q.k, before softcap
  float softcap = 0.0f;                 // > 0: score = softcap * tanh(score / softcap)
  int64_t sliding_window = 0;           // > 0: tokens a query sees, itself included
  cache::TensorView out;                // [B, Hq, q, D], any strides
  float* lse = nullptr;                 // [B, Hq, q] contiguous or null: log of the sum of exp of
                                        //   all scores seen and of the sink logit
};

// fp32, but for products with pages at SimdLevel::kAvx512Vnni: those are of 16-bit integers, which
// costs up to 4e-4 of the output (docs/experiments/cpu-decode-attention.md). Results do not depend
// on the threads, on the other rows of the batch or on which pages hold a row; they may differ in
// rounding between instruction sets (TURBOQUANT_SIMD).
// Throws InvalidArgument for shapes or tables that do not fit together.
void decode_attention(const DecodeAttentionParams& params, const ParallelFor& parallel_for);

}  // namespace turboquant::attention
