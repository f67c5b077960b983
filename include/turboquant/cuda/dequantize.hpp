// cache/dequantize.hpp on the device: the same contract, the same numbers (a NaN's payload and a
// zero's sign are the device's).
#pragma once

#include <cstdint>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/cuda/codec_tables.hpp"

typedef struct CUstream_st* cudaStream_t;

namespace turboquant::cuda {

// B rows, H = spec.num_kv_heads, D = spec.head_dim, C = exact_layout().capacity(), P page table
// columns. Everything that is pointed to is device memory; tables are read on the device.
struct DequantizeParams {
  cache::LayerSpec spec;
  CodecTables tables;                   // of spec
  cache::ConstTensorView exact_keys;    // [B, H, C, D]
  cache::ConstTensorView exact_values;  // [B, H, C, D]
  const float* smoothing = nullptr;     // [B, H, D] contiguous; null without smooth_keys
  cache::PagePoolView pages;            // only_slab or array slabs on the device
  const int32_t* page_table = nullptr;  // [B, P, 2]; null when P is 0
  int64_t page_columns = 0;             // P: at least every row's entries
  const int32_t* rows = nullptr;        // [B, 4]
  // As in cache::DequantizeParams.
  int64_t past_tokens = 0;
  int64_t first_position = 0;
  cache::TensorView out_keys;    // [B, H, n, D], any strides
  cache::TensorView out_values;  // [B, H, n, D]
};

// Throws InvalidArgument for a spec, shapes or pointers that do not fit together or that the
// kernels do not take (head_dim above 256). Tables are the caller's promise.
void check_dequantize(const DequantizeParams& params);

// Enqueues one kernel and returns a cudaError_t (0: enqueued). cudaErrorInvalidValue where
// check_dequantize would throw. Neither allocates nor synchronises; no workspace.
int dequantize(const DequantizeParams& params, cudaStream_t stream);

}  // namespace turboquant::cuda
