// Dispatch of extend attention. The kernels are in extend_attention_d*.cu, by head_dim.
#include <cuda_runtime_api.h>

#include "extend_attention_dispatch.hpp"
#include "extend_attention_launch.hpp"
#include "launch.cuh"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {
namespace detail {
namespace {

using Launch = cudaError_t (*)(const ExtendArgs&, cudaStream_t);

template <ExtendSizes kSizes>
Launch find_launch(int head_dim) {
  switch (head_dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return &launch_extend_attention<dim, kSizes>;
    TQ_ATTENTION_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
    default:
      return nullptr;
  }
}

}  // namespace

int extend_attention(const DecodeAttentionParams& params, ExtendSizes sizes, cudaStream_t stream) {
  try {
    check_extend_attention(params);
  } catch (const InvalidArgument&) {
    return cudaErrorInvalidValue;
  }
  const int64_t batch = params.query.shape[0];
  if (batch == 0) return cudaSuccess;
  const int head_dim = params.spec.head_dim;
  const Launch launch =
      sizes == ExtendSizes::kWarpgroup ? find_launch<ExtendSizes::kWarpgroup>(head_dim)
      : sizes == ExtendSizes::kLarge   ? find_launch<ExtendSizes::kLarge>(head_dim)
                                       : find_launch<ExtendSizes::kCompact>(head_dim);
  const int64_t step = extend_shape_of(params, sizes).launch_batch;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < batch && status == cudaSuccess; first += step) {
    status = launch(make_extend_args(params, sizes, first, min_of(step, batch - first)), stream);
  }
  return status;
}

}  // namespace detail

int extend_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  int major = 0, shared_bytes = 0;
  cudaError_t status = detail::get_device_attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (status == cudaSuccess) {
    status = detail::get_device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes);
  }
  if (status != cudaSuccess) return status;
  if (!extend_attention_runs_on(major)) return cudaErrorNotSupported;
  const bool is_large = shared_bytes >= detail::kExtendLargeSharedBytes;
  return detail::extend_attention(params,
                                  is_large && major == 9 ? detail::ExtendSizes::kWarpgroup
                                  : is_large             ? detail::ExtendSizes::kLarge
                                                         : detail::ExtendSizes::kCompact,
                                  stream);
}

}  // namespace turboquant::cuda
