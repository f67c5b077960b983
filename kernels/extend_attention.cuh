// Extend attention: many query tokens over a packed past, in three kernels.
//
//   extend_prepare  queries (q' = R (q * s)) and exact tokens (sinks, ring, chunk: R (k / s), R v)
//                   as fp16 rows in the rotated basis; positions of page table entries
//   extend_attend   a thread block for each (row, KV head, tile of query rows, split): blocks of 64
//                   tokens, packed or exact, become fp16 tiles in shared memory that all query
//                   rows of the tile share; online softmax
//   extend_combine  merges splits in ascending order, adds the sink logit, rotates back, writes
//
// Inputs, shapes and what a query sees: include/turboquant/cuda/extend_attention.hpp. Scores are
// q.k = factor (scale (q'.c) + q'.m), in units of log2 unless there is a soft cap.
#pragma once

#include "extend_attention_combine.cuh"
#include "extend_attention_prepare.cuh"
#include "extend_attention_splits.cuh"
