// What launches of kernels have in common.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

namespace turboquant::cuda::detail {

// An attribute of the current device.
inline cudaError_t get_device_attribute(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : status;
}

// How many workers share that many items, at least one, if `most` run at once: as few rounds as
// these need, all rounds but the last full.
inline int workers_of(int items, int most) {
  most = std::max(1, most);
  const int rounds = (items + most - 1) / most;
  return (items + rounds - 1) / rounds;
}

// Enqueues a kernel that, `early`, may start before the one ahead of it in the stream has ended (it
// waits for it by itself), on devices that can do that. most_shared_bytes: of all its launches,
// where these differ (threads that launch it set the same limit).
template <class Args>
cudaError_t launch_early(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes,
                         cudaStream_t stream, const Args& args, bool early,
                         int most_shared_bytes = 0) {
  const int limit = std::max(shared_bytes, most_shared_bytes);
  if (limit > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (status != cudaSuccess) return status;
  }
  int major = 0;
  const cudaError_t status = get_device_attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace turboquant::cuda::detail
