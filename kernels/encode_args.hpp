// What the encode kernels are launched with: the params of cuda/encode_append.hpp, flattened.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "device_args.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/cuda/encode_append.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/codebook_kind.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::cuda::detail {

// Keys or values.
struct EncodeSideArgs {
  TensorArg chunk;  // [B, H, T, D]
  TensorArg exact;  // [B, H, C, D]
  SideTables tables;
  int bits;
  quant::ScaleRule rule;
  // In a block.
  int32_t codes_offset;
  int32_t scales_offset;
};

struct EncodeArgs {
  EncodeSideArgs sides[2];  // keys, values
  const int32_t* rows;      // [B, 4]
  const int32_t* jobs;      // [N, 6]
  float* smoothing;         // [B, H, D]; null without smooth_keys
  int64_t* counters;        // [2]
  cache::PagePoolView pages;
  cache::ExactLayout exact;
  cache::ElementType type;
  bool half_scales;
  bool center_keys;
  bool vector;  // codebooks
  float sqrt_dim;
  int32_t dim;
  int32_t batch;
  int32_t num_heads;
  int32_t chunk_tokens;
  int32_t num_jobs;
  int32_t workers;  // blocks that share the jobs of a head and side
  // Candidates per (row, head, side) of tokens that stay exact: the sinks and the newest.
  int32_t kept_sinks;
  int32_t kept_newest;
};

// Of params that check_encode_append has passed.
inline EncodeArgs make_encode_args(const EncodeAppendParams& p) {
  const cache::LayerSpec& spec = p.spec;
  const cache::BlockLayout layout = spec.block_layout();
  const int64_t dim = spec.head_dim;
  const auto tensor = [&](const cache::ConstTensorView& view) {
    return tensor_arg(view.data, view.type, view.strides, dim);
  };
  const cache::ExactLayout exact = spec.exact_layout();
  const int64_t chunk_tokens = p.key_states.shape[2];
  return {.sides = {{.chunk = tensor(p.key_states),
                     .exact = tensor(p.exact_keys),
                     .tables = p.tables.keys,
                     .bits = spec.k_bits,
                     .rule = spec.k_rule,
                     .codes_offset = static_cast<int32_t>(layout.k_codes_offset()),
                     .scales_offset = static_cast<int32_t>(layout.k_scales_offset())},
                    {.chunk = tensor(p.value_states),
                     .exact = tensor(p.exact_values),
                     .tables = p.tables.values,
                     .bits = spec.v_bits,
                     .rule = spec.v_rule,
                     .codes_offset = static_cast<int32_t>(layout.v_codes_offset()),
                     .scales_offset = static_cast<int32_t>(layout.v_scales_offset())}},
          .rows = p.rows,
          .jobs = p.jobs,
          .smoothing = spec.smooth_keys ? p.smoothing : nullptr,
          .counters = p.counters,
          .pages = p.pages,
          .exact = exact,
          .type = p.key_states.type,
          .half_scales = spec.scale_type == cache::ScaleType::kFloat16,
          .center_keys = spec.center_keys,
          .vector = spec.codebook == quant::CodebookKind::kVector,
          .sqrt_dim = static_cast<float>(std::sqrt(static_cast<double>(dim))),
          .dim = static_cast<int32_t>(dim),
          .batch = static_cast<int32_t>(p.key_states.shape[0]),
          .num_heads = spec.num_kv_heads,
          .chunk_tokens = static_cast<int32_t>(chunk_tokens),
          .num_jobs = static_cast<int32_t>(p.num_jobs),
          .workers = static_cast<int32_t>(p.num_jobs),
          .kept_sinks = static_cast<int32_t>(std::min<int64_t>(chunk_tokens, spec.sink_tokens)),
          .kept_newest = static_cast<int32_t>(std::min(chunk_tokens, exact.ring_tokens()))};
}

// Row b of `rows`, job n of `jobs`.
struct RowArg {
  int32_t length, exact_begin, new_tokens;
};
TQ_HOST_DEVICE inline RowArg row_arg(const EncodeArgs& args, int b) {
  const int32_t* const row = args.rows + int64_t{b} * cache::tables::kRowColumns;
  return {row[cache::tables::kRowLength], row[cache::tables::kRowExactBegin],
          row[cache::tables::kRowNewTokens]};
}
struct JobArg {
  int32_t row, first_token, tokens, page, page_offset, fit_smoothing;
};
TQ_HOST_DEVICE inline JobArg job_arg(const EncodeArgs& args, int n) {
  const int32_t* const job = args.jobs + int64_t{n} * cache::tables::kJobColumns;
  return {job[0], job[1], job[2], job[3], job[4], job[5]};
}

}  // namespace turboquant::cuda::detail
