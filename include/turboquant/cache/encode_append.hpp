// Carries out an append: encodes the tokens that leave the exact ring and keeps the new ones.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::cache {

// B rows, H = spec.num_kv_heads, T chunk tokens, D = spec.head_dim, C = exact_layout().capacity().
// The tables are a PageTable's before commit: rows = export_rows(new_tokens), jobs = plan.jobs; the
// plan's copies must have been made.
struct EncodeAppendParams {
  LayerSpec spec;
  ConstTensorView key_states;    // [B, H, T, D], any strides; row b's real tokens are the last
  ConstTensorView value_states;  //   rows[b].new_tokens of the T; the rest is never read
  TensorView exact_keys;         // [B, H, C, D]
  TensorView exact_values;       // [B, H, C, D]
  float* smoothing = nullptr;    // [B, H, D] contiguous; written by jobs with fit_smoothing
  PagePoolView pages;
  std::span<const int32_t> rows;  // [B, 4]
  // [N, 6], rows ascending, tokens ascending within a row; jobs of 0 tokens are room for more
  std::span<const int32_t> jobs;
  // [2], added to: fp16 numbers (scales, entries of means) that saturated at 65504; key or value
  // vectors with NaN or inf.
  int64_t* counters = nullptr;
};

// Numerics, equal bits on every backend: fp32, no FMA, additions in the order written here.
//   smoothing  over the block's finite keys, per channel c: mean and rms of (k - mean), tokens
//              ascending; s_c from it and the median channel's (cache/smoothing_rule.hpp).
//              Without smooth_keys: not applied.
//   keys       z = R (k / s); m = fp16(mean of finite z, tokens ascending), saturating;
//              codes and scale of z - m (quant/quantize_rows.hpp). A page of a cache without
//              window has no mean.
//   values     codes and scale of R v.
//   scales     fp32, or fp16 rounded to nearest, saturating at 65504.
// A key or value with NaN or inf stores scale NaN: it poisons its own token only.
//
// Jobs run first, then the chunk's tokens that stay exact are written to exact_keys/exact_values,
// so a call that throws has changed nothing that the tables before the append can see.
// Throws InvalidArgument for shapes, tables or spec that do not fit together.
void encode_append(const EncodeAppendParams& params, const ParallelFor& parallel_for);

}  // namespace turboquant::cache
