// dequantize: the kernel around kernels/dequantize_block.hpp.
//
// Inputs and numerics: include/turboquant/cuda/dequantize.hpp, cache/dequantize.hpp.
// Grid: one thread block per (row, page table column, KV head, keys or values), then one per (row,
// UnpagedBlock::kPositions positions, KV head, side). Blocks behind a row's entries end at once.
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
  static constexpr int kTogether = kWarps * 32 / kThreads % 2 == 0 ? 2 : 1;
  static constexpr int kMinBlocks = kWarps * 32 / (kThreads * kTogether);
  static_assert(kMinBlocks * (kTogether * Plan::bytes(4) + 1024) <= 228 * 1024,
                "shared memory of sm_90");
};

template <int kDim>
TQ_HOST_DEVICE int dequantize_block_bytes(const DequantizeArgs& args) {
  using Plan = DequantizePlan<kDim>;
  const int keys = Plan::bytes(args.sides[0].bits), values = Plan::bytes(args.sides[1].bits);
  return ((keys > values ? keys : values) + 15) / 16 * 16;
}

template <int kDim>
__global__ void __launch_bounds__(
    DequantizeTraits<kDim>::kThreads* DequantizeTraits<kDim>::kTogether,
    DequantizeTraits<kDim>::kMinBlocks)
    dequantize_kernel(const __grid_constant__ DequantizeArgs args) {
  using Traits = DequantizeTraits<kDim>;
  extern __shared__ __align__(16) std::byte memory[];
  const int index = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), member = static_cast<int>(threadIdx.y);
  const int together = static_cast<int>(blockDim.y);
  const int page_blocks = args.batch * args.page_columns * 2 * (args.num_heads / together);
  if (index >= page_blocks) {
    UnpagedBlock(args, index - page_blocks, member * Traits::kThreads + thread,
                 together * Traits::kThreads)
        .run();
    return;
  }
  DequantizeBlock<kDim> block(
      args, memory + member * dequantize_block_bytes<kDim>(args),
      block_place(index, member, args.batch * args.page_columns, args.num_heads, together), thread);
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

#define TQ_INSTANTIATE_DEQUANTIZE(dim)                                                         \
  template <>                                                                                  \
  int launch_dequantize<dim>(const DequantizeArgs& args, cudaStream_t stream) {                \
    using Traits = DequantizeTraits<dim>;                                                      \
    const int together = heads_together(args.num_heads, Traits::kTogether);                    \
    const int bytes = together * dequantize_block_bytes<dim>(args);                            \
    const int blocks = args.batch * args.page_columns * 2 * (args.num_heads / together) +      \
                       args.batch * args.num_heads * 2 * UnpagedBlock::blocks_per_row(args);   \
    const cudaError_t status = cudaFuncSetAttribute(                                           \
        dequantize_kernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);           \
    if (status != cudaSuccess) return status;                                                  \
    dequantize_kernel<dim><<<blocks, dim3(Traits::kThreads, together), bytes, stream>>>(args); \
    return cudaGetLastError();                                                                 \
  }

}  // namespace turboquant::cuda::detail
