// Launches of the extend attention kernels for one head_dim; every unit instantiates one.
#pragma once

#include <cuda_runtime_api.h>

#include "extend_attention.cuh"
#include "extend_attention_dispatch.hpp"

namespace turboquant::cuda::detail {

// Large sizes need a compute capability of 9.x or 10.x, warpgroups 9.0; elsewhere their kernels are
// empty and never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 != 9 && __CUDA_ARCH__ / 100 != 10
inline constexpr bool kExtendLargeRuns = false;
#else
inline constexpr bool kExtendLargeRuns = true;
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kExtendWarpgroupRuns = false;
#else
inline constexpr bool kExtendWarpgroupRuns = true;
#endif
constexpr bool extend_runs(ExtendSizes sizes) {
  return sizes == ExtendSizes::kCompact ||
         (sizes == ExtendSizes::kLarge ? kExtendLargeRuns : kExtendWarpgroupRuns);
}

template <int kDim>
__global__ void __launch_bounds__(kPrepareThreads, 1)
    extend_prepare_kernel(const __grid_constant__ ExtendArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  extend_prepare<kDim>(args, shared);
}

template <int kDim, ExtendSizes kSizes>
__global__ void __launch_bounds__(ExtendTraits<kDim, kSizes>::kThreads, 1)
    extend_attend_kernel(const __grid_constant__ ExtendArgs args) {
  if constexpr (extend_runs(kSizes)) {
    extern __shared__ __align__(1024) std::byte shared[];
    ExtendWorker<ExtendTraits<kDim, kSizes>>(args, shared).run();
  }
}

template <int kDim>
__global__ void __launch_bounds__(32 * kExtendCombineWarps, 1)
    extend_combine_kernel(const __grid_constant__ ExtendArgs args) {
  extern __shared__ __align__(1024) std::byte shared[];
  extend_combine<kDim>(args, shared);
}

template <int kDim, ExtendSizes kSizes>
cudaError_t launch_extend_attention(const ExtendArgs& args, cudaStream_t stream) {
  using Traits = ExtendTraits<kDim, kSizes>;
  const auto grid = [](int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); };
  extend_prepare_kernel<kDim>
      <<<grid(extend_prepare_blocks(args)), kPrepareThreads, kExtendPrepareBytes<kDim>, stream>>>(
          args);
  cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(extend_attend_kernel<kDim, kSizes>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (status != cudaSuccess) return status;
  const int64_t blocks =
      int64_t{args.call.batch} * args.call.num_kv_heads * args.tiles * args.splits;
  extend_attend_kernel<kDim, kSizes>
      <<<grid(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  extend_combine_kernel<kDim><<<grid(extend_combine_blocks(args)), 32 * kExtendCombineWarps,
                                kExtendCombineBytes<kDim>, stream>>>(args);
  return cudaGetLastError();
}

#define TQ_INSTANTIATE_EXTEND_ATTENTION(dim)                                                    \
  template cudaError_t launch_extend_attention<dim, ExtendSizes::kWarpgroup>(const ExtendArgs&, \
                                                                             cudaStream_t);     \
  template cudaError_t launch_extend_attention<dim, ExtendSizes::kLarge>(const ExtendArgs&,     \
                                                                         cudaStream_t);         \
  template cudaError_t launch_extend_attention<dim, ExtendSizes::kCompact>(const ExtendArgs&,   \
                                                                           cudaStream_t)

}  // namespace turboquant::cuda::detail
