// What kernels/extend_attention_d*.cu define and kernels/extend_attention.cu calls.
#pragma once

#include <cuda_runtime_api.h>

#include "extend_attention_args.hpp"

namespace turboquant::cuda::detail {

// Enqueues the three kernels.
template <int kDim, ExtendSizes kSizes>
cudaError_t launch_extend_attention(const ExtendArgs& args, cudaStream_t stream);

}  // namespace turboquant::cuda::detail
