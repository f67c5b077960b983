// Decode attention over packed codes: three kernels that the stream runs one after the other, each
// starting while the one before ends (programmatic dependent launch).
//
//   prepare_queries  q' = R (q * s) of every query row as fp16 operands; positions of page table
//                    entries for rows whose pages are not seen whole
//   attend_splits    partial attention: page splits and pieces of exact tokens
//   combine_splits   merges a row's partial results in a fixed order, rotates the pages' part
//                    back, merges the exact part and the sink logit, writes out and lse
//
// Of a call with few pages, attend_pages (decode_attention_shared_pages.cuh) does the work of the
// first two, with the same bits.
//
// Inputs, shapes and what a query sees: include/turboquant/cuda/decode_attention.hpp. Scores are
// q.k = q'.m + scale (q'.c), docs/cache_format.md ("What the numbers mean"), in units of log2;
// values are scale (V c), rotated back once per query.
#pragma once

#include "decode_attention_combine.cuh"
#include "decode_attention_prepare.cuh"
#include "decode_attention_shared_pages.cuh"
#include "decode_attention_splits.cuh"
