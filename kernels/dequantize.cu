#include <cuda_runtime_api.h>

#include "dequantize.cuh"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {
namespace {

int launch(const detail::DequantizeArgs& args, cudaStream_t stream) {
  switch (args.dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return detail::launch_dequantize<dim>(args, stream);
    TQ_CODEC_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int dequantize(const DequantizeParams& params, cudaStream_t stream) {
  try {
    check_dequantize(params);
  } catch (const InvalidArgument&) {
    return cudaErrorInvalidValue;
  }
  if (params.out_keys.shape[0] == 0 || params.out_keys.shape[2] == 0) return cudaSuccess;
  return launch(detail::make_dequantize_args(params), stream);
}

}  // namespace turboquant::cuda
