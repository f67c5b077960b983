// dequantize: the kernel around kernels/dequantize_block.hpp.
//
// Inputs and numerics: include/turboquant/cuda/dequantize.hpp, cache/dequantize.hpp.
// Grid: x page table columns, then ranges of UnpagedBlock::kPositions positions; y KV heads; z keys
// and values of every row. Blocks behind a row's entries end at once.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "dequantize_block.hpp"

namespace turboquant::cuda::detail {

template <int kDim>
struct DequantizeTraits {
  using Plan = DequantizePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kElems = RowShape<kDim>::kElems;
  static constexpr int kWarps = RowShape<kDim>::kTrades && kElems == 32 ? 32
                                : kElems <= 64                          ? 16
                                : kElems <= 80                          ? 12
                                                                        : 8;
  static constexpr int kMinBlocks = kWarps * 32 / kThreads;
  static_assert(kMinBlocks * (Plan::bytes(4) + 1024) <= 228 * 1024, "shared memory of sm_90");
};

template <int kDim>
__global__ void __launch_bounds__(DequantizeTraits<kDim>::kThreads,
                                  DequantizeTraits<kDim>::kMinBlocks)
    dequantize_kernel(const __grid_constant__ DequantizeArgs args) {
  extern __shared__ __align__(16) std::byte memory[];
  const int column = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.y), side = static_cast<int>(blockIdx.z % 2);
  const int row = static_cast<int>(blockIdx.z / 2);
  if (column >= args.page_columns) {
    UnpagedBlock(args, row, {column - args.page_columns, head, side}, thread,
                 DequantizeTraits<kDim>::kThreads)
        .run();
    return;
  }
  DequantizeBlock<kDim> block(args, memory, row, {column, head, side}, thread);
  if (block.empty()) return;
  dequantize_steps<kDim>(
      block,
      [&](auto step) {
        step(block);
        __syncthreads();
      },
      [&](auto step) {
        step(block);
        __syncwarp();
      },
      [](auto& self) {
        self.fetch(
            [](std::byte* to, const std::byte* from) { __pipeline_memcpy_async(to, from, 16); });
        __pipeline_commit();
        self.locate();
        __pipeline_wait_prior(0);
      });
}

// Enqueues dequantize_kernel<kDim>; a cudaError_t.
template <int kDim>
int launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);

#define TQ_INSTANTIATE_DEQUANTIZE(dim)                                                             \
  template <>                                                                                      \
  int launch_dequantize<dim>(const DequantizeArgs& args, cudaStream_t stream) {                    \
    using Plan = DequantizePlan<dim>;                                                              \
    const int bytes = std::max(Plan::bytes(args.sides[0].bits), Plan::bytes(args.sides[1].bits));  \
    const dim3 grid(static_cast<unsigned>(args.page_columns + UnpagedBlock::parts(args)),          \
                    static_cast<unsigned>(args.num_heads), static_cast<unsigned>(2 * args.batch)); \
    const cudaError_t status = cudaFuncSetAttribute(                                               \
        dequantize_kernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);               \
    if (status != cudaSuccess) return status;                                                      \
    dequantize_kernel<dim><<<grid, DequantizeTraits<dim>::kThreads, bytes, stream>>>(args);        \
    return cudaGetLastError();                                                                     \
  }

}  // namespace turboquant::cuda::detail
