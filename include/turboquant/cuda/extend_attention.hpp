// Attention of longer query chunks over packed codes on the device: chunked prefill, later turns,
// drafts to verify. The contract of decode_attention.hpp for any number of query tokens, on more
// devices.
#pragma once

#include <cstdint>

#include "turboquant/cuda/decode_attention.hpp"

namespace turboquant::cuda {

// Of a call with these shapes on any device (tables, data pointers and workspace are not looked
// at). With H KV heads, group * q query rows of each and n tokens in chunk, sinks and ring, about
// 4 + 2 / splits bytes for each of the splits * H * group * q * D partial outputs and 4 bytes for
// each of H * n * D exact numbers, of as many rows of the batch as one launch takes; splits is 1
// from H * group * q = 32768 rows on, and at most 128 / H below.
int64_t extend_attention_workspace_bytes(const DecodeAttentionParams& params);

// As check_decode_attention, for 1 query token or more.
void check_extend_attention(const DecodeAttentionParams& params);

// Enqueues the attention and returns a cudaError_t (0: enqueued): cudaErrorInvalidValue where
// check_extend_attention would throw, cudaErrorNotSupported on a device it does not run on. Neither
// allocates nor synchronises; a captured launch may be replayed as decode_attention's may.
//
// Operands are fp16 (the exact tokens' too, in the rotated basis), sums fp32. A row's bits depend
// on the row, on the shapes of the model, on q and on the kind of device (its shared memory), and
// on nothing else.
int extend_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace turboquant::cuda
