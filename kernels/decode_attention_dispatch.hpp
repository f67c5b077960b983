// What kernels/decode_attention_d*.cu define and kernels/decode_attention.cu calls.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_attention_args.hpp"

namespace turboquant::cuda::detail {

// Enqueues the three kernels on a device with that many multiprocessors.
template <int kDim, int kKeyBits, int kValueBits>
cudaError_t launch_decode_attention(const DecodeArgs& args, int multiprocessors,
                                    cudaStream_t stream);

}  // namespace turboquant::cuda::detail
