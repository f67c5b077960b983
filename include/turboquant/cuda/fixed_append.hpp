// cache/fixed_append.hpp on the device: the same tables by the same rule.
#pragma once

#include <cstdint>

#include "turboquant/cache/fixed_append.hpp"

typedef struct CUstream_st* cudaStream_t;

namespace turboquant::cuda {

// Device memory throughout. The tables are the caller's promise (cache::FixedTables); they are read
// on the device, so a captured launch may be replayed as rows grow. A row never takes more than
// max_tokens tokens: what comes beyond is refused and counted (positions), so that no replay leads
// an append out of its buffers.
struct FixedAppendParams {
  cache::FixedTables tables;
  int32_t* planned = nullptr;  // [B, 4]; written by plan_append, read by commit_append
  int32_t* jobs = nullptr;     // [B * cache::max_append_pieces, 6]; plan_append only
};

// Throws InvalidArgument for sizes or pointers that do not fit; `jobs` is looked at for a plan.
void check_fixed_append(const FixedAppendParams& params, bool is_plan);

// Each enqueues one small kernel, a thread a row, and returns a cudaError_t (0: enqueued):
// cudaErrorInvalidValue where check_fixed_append would throw. Neither allocates nor synchronises.
int plan_append(const FixedAppendParams& params, cudaStream_t stream);
int commit_append(const FixedAppendParams& params, cudaStream_t stream);

}  // namespace turboquant::cuda
