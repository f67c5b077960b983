// What kernels/decode_attention_d*.cu define and kernels/decode_attention.cu calls.
#pragma once

#include <cuda_runtime_api.h>

#include "decode_attention_args.hpp"
#include "turboquant/quant/codebook_kind.hpp"

namespace turboquant::cuda::detail {

// Kernels of a launch: all of them but where one is timed alone.
inline constexpr unsigned kPrepareStage = 1, kAttendStage = 2, kCombineStage = 4, kAllStages = 7;
// For the benchmark too: prepare_queries (all kernels) starts when the kernel before has ended.
inline constexpr unsigned kLatePrepare = 8, kLateStages = 16;

// Enqueues the kernels on a device with that many multiprocessors.
template <int kDim, int kKeyBits, int kValueBits,
          quant::CodebookKind kCodebook = quant::CodebookKind::kScalar>
cudaError_t launch_decode_attention(const DecodeArgs& args, int multiprocessors,
                                    cudaStream_t stream, unsigned stages);

}  // namespace turboquant::cuda::detail
