// attention/decode_attention.hpp on the device: the same contract over the same bytes.
#pragma once

#include <cstdint>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/cuda/codec_tables.hpp"

typedef struct CUstream_st* cudaStream_t;

namespace turboquant::cuda {

// B rows, Hq query heads in groups of Hq / H, H = spec.num_kv_heads, q query tokens (1 to 16),
// T = q or 0 chunk tokens, D = spec.head_dim, C = exact_layout().capacity(). What a query sees and
// where its tokens lie: attention/decode_attention.hpp.
//
// Everything that is pointed to is device memory. Lengths, page table and slab addresses are read
// on the device, and the grid follows from shapes and page_columns alone: a captured launch may be
// replayed after any of them has changed.
struct DecodeAttentionParams {
  cache::LayerSpec spec{};
  CodecTables tables{};                   // of spec
  cache::ConstTensorView query{};         // [B, Hq, q, D], any strides
  cache::ConstTensorView key_states{};    // [B, H, T, D], any strides; data may be null when T = 0
  cache::ConstTensorView value_states{};  // [B, H, T, D]; chunk and exact tokens have query's type
  cache::ConstTensorView exact_keys{};    // [B, H, C, D]
  cache::ConstTensorView exact_values{};  // [B, H, C, D]
  const float* smoothing = nullptr;       // [B, H, D] contiguous; null without smooth_keys
  cache::PagePoolView pages{};          // only_slab or array slabs on the device, 16 bytes aligned
  const int32_t* page_table = nullptr;  // [B, page_columns, 2]; null when page_columns is 0
  int64_t page_columns = 0;             // room of the table, not the pages in use
  const int32_t* rows = nullptr;        // [B, 4]
  const float* sink_logits = nullptr;   // [Hq] or null
  float scaling = 1.0f;
  float softcap = 0.0f;
  int64_t sliding_window = 0;
  cache::TensorView out{};  // [B, Hq, q, D], any strides and element type
  float* lse = nullptr;     // [B, Hq, q] contiguous or null
  // decode_attention_workspace_bytes(), 16 bytes aligned; its contents mean nothing between calls.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Of a call with these shapes (tables, data pointers and workspace are not looked at).
int64_t decode_attention_workspace_bytes(const DecodeAttentionParams& params);

// Throws InvalidArgument for a spec, shapes or pointers that do not fit together, or a combination
// that supported.hpp does not list. Device tables are the caller's promise: they are not read.
// check_rows and check_page_table (cache/table_checks.hpp) hold them to it on the host.
void check_decode_attention(const DecodeAttentionParams& params);

// Enqueues the attention and returns a cudaError_t (0: enqueued): cudaErrorInvalidValue where
// check_decode_attention would throw, cudaErrorNotSupported on a device it does not run on. Neither
// allocates nor synchronises.
//
// Operands are fp16, sums fp32. A row's bits depend on the row, on the shapes of the model, on
// whether Hq / H * q is more than 8, on whether queries, chunk and exact tokens all are bf16 or
// fp16 with rows that are contiguous and on 16 bytes, and on nothing else: not on the batch, the
// pages it lies in, page_columns or the device's size. (What tokens contribute whose scores are
// more than 87 below the row's greatest, less than e^-87, may be there or not; values are less than
// 1e35 in size.)
int decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace turboquant::cuda
