#include <cuda_runtime_api.h>

#include "encode_append.cuh"
#include "turboquant/cuda/encode_append.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {
namespace detail {
namespace {

__global__ void __launch_bounds__(FitBlock::kThreads)
    fit_smoothing_kernel(const __grid_constant__ EncodeArgs args) {
  extern __shared__ __align__(16) std::byte memory[];
  ptx::wait_dependencies();
  ptx::launch_dependents();
  FitBlock block(args, memory, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
  fit_steps(block, [&](auto step) {
    step(block);
    __syncthreads();
  });
}

int launch_fit(const EncodeArgs& args, cudaStream_t stream) {
  return launch_early(fit_smoothing_kernel,
                      dim3(static_cast<unsigned>(args.batch * args.num_heads)), FitBlock::kThreads,
                      FitBlock::bytes(args.dim), stream, args, true);
}

int launch_encode_by_dim(const EncodeArgs& args, bool after_fit, cudaStream_t stream) {
  switch (args.dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return launch_encode<dim>(args, after_fit, stream);
    TQ_CODEC_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace detail

int encode_append(const EncodeAppendParams& params, cudaStream_t stream) {
  try {
    check_encode_append(params);
  } catch (const InvalidArgument&) {
    return cudaErrorInvalidValue;
  }
  if (params.key_states.shape[0] == 0 || params.key_states.shape[2] == 0) return cudaSuccess;
  const detail::EncodeArgs args = detail::make_encode_args(params);
  const bool fits = params.spec.smooth_keys && params.may_fit_smoothing && params.num_jobs > 0;
  if (fits) {
    if (const int status = detail::launch_fit(args, stream); status != cudaSuccess) return status;
  }
  return detail::launch_encode_by_dim(args, fits, stream);
}

}  // namespace turboquant::cuda
