// Dispatch of decode attention. The kernels are in decode_attention_d*.cu, by head_dim and key
// width.
#include <cuda_runtime_api.h>

#include "decode_attention_dispatch.hpp"
#include "decode_attention_launch.hpp"
#include "launch.cuh"
#include "turboquant/cuda/decode_attention.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {
namespace {

using detail::DecodeArgs;
using Launch = cudaError_t (*)(const DecodeArgs&, int, cudaStream_t, unsigned);

Launch find_launch(const DecodeAttentionConfig& config) {
#define TQ_CASE(dim, k, v, codebook)                                                  \
  if (config == DecodeAttentionConfig{dim, k, v, quant::CodebookKind::codebook}) {    \
    return detail::launch_decode_attention<dim, k, v, quant::CodebookKind::codebook>; \
  }
  TQ_DECODE_ATTENTION_CONFIGS(TQ_CASE)
#undef TQ_CASE
  return nullptr;
}

}  // namespace

int decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  try {
    check_decode_attention(params);
  } catch (const InvalidArgument&) {
    return cudaErrorInvalidValue;
  }
  const int64_t batch = params.query.shape[0];
  if (batch == 0) return cudaSuccess;
  int major = 0, multiprocessors = 0;
  cudaError_t status = detail::get_device_attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (status == cudaSuccess) {
    status = detail::get_device_attribute(cudaDevAttrMultiProcessorCount, multiprocessors);
  }
  if (status != cudaSuccess) return status;
  if (!decode_attention_runs_on(major)) return cudaErrorNotSupported;
  const Launch launch = find_launch(
      {params.spec.head_dim, params.spec.k_bits, params.spec.v_bits, params.spec.codebook});
  for (int64_t first = 0; first < batch && status == cudaSuccess; first += detail::kMaxLaunchRows) {
    const int64_t count = detail::min_of(detail::kMaxLaunchRows, batch - first);
    status = launch(detail::make_decode_args(params, first, count), multiprocessors, stream,
                    detail::kAllStages);
  }
  return status;
}

}  // namespace turboquant::cuda
