// cache/encode_append.hpp on the device: the same contract, the same bytes.
#pragma once

#include <cstdint>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/cuda/codec_tables.hpp"

typedef struct CUstream_st* cudaStream_t;

namespace turboquant::cuda {

// B rows, H = spec.num_kv_heads, T chunk tokens, D = spec.head_dim, C = exact_layout().capacity().
// Everything that is pointed to is device memory. Tables and lengths are read on the device: a
// captured launch may be replayed after any of them has changed.
struct EncodeAppendParams {
  cache::LayerSpec spec;
  CodecTables tables;                   // of spec
  cache::ConstTensorView key_states;    // [B, H, T, D], any strides; row b's real tokens are the
  cache::ConstTensorView value_states;  //   last rows[b].new_tokens; the rest is never read
  cache::TensorView exact_keys;         // [B, H, C, D]
  cache::TensorView exact_values;       // [B, H, C, D]
  float* smoothing = nullptr;     // [B, H, D] contiguous; written by jobs with fit_smoothing; null
                                  //   without smooth_keys
  cache::PagePoolView pages;      // only_slab or array slabs on the device, 16 bytes aligned
  const int32_t* rows = nullptr;  // [B, 4]
  const int32_t* jobs = nullptr;  // [num_jobs, 6]; null when num_jobs is 0
  // Room for jobs; those behind the last have tokens = 0 (their other columns mean nothing).
  int64_t num_jobs = 0;
  // False promises that no job, now or in a replay, has fit_smoothing: it saves a launch.
  bool may_fit_smoothing = true;
  // [2], added to: fp16 numbers that saturated at 65504; key or value vectors with NaN or inf.
  int64_t* counters = nullptr;
};

// Throws InvalidArgument for a spec, shapes or pointers that do not fit together or that the
// kernels do not take (head_dim above 256). The device's tables are the caller's promise: they are
// not read. check_jobs and check_rows (cache/table_checks.hpp) hold them to it on the host.
void check_encode_append(const EncodeAppendParams& params);

// Enqueues the append and returns a cudaError_t (0: enqueued). cudaErrorInvalidValue where
// check_encode_append would throw. Neither allocates nor synchronises; no workspace.
//
// Two kernels: smoothing is fitted before any key of its row is encoded; then every job's blocks,
// and the tokens that stay exact. A ring slot that a job reads may be due to a new token: the
// thread block that has read the slot writes it, so no order between blocks is needed.
int encode_append(const EncodeAppendParams& params, cudaStream_t stream);

}  // namespace turboquant::cuda
