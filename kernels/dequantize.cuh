// dequantize: the kernel around kernels/dequantize_block.hpp.
//
// Inputs and numerics: include/turboquant/cuda/dequantize.hpp, cache/dequantize.hpp.
// Grid: x workers that share the page table columns of a row, head and side, as many as fit the
// device at once (or one for each column), then ranges of UnpagedBlock::kPositions positions; y KV
// heads; z keys and values of every row. Workers without an entry end at once.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "dequantize_block.hpp"
#include "launch.cuh"

namespace turboquant::cuda::detail {

template <int kDim>
struct DequantizeTraits {
  using Plan = DequantizePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kElems = RowShape<kDim>::kElems;
  static constexpr int kWarps = RowShape<kDim>::kTrades && kElems == 32
                                    ? (RowShape<kDim>::kThreads == 4 ? 32 : 28)
                                : kElems <= 64 ? 16
                                : kElems <= 80 ? 12
                                               : 8;
  static constexpr int kMinBlocks = kWarps * 32 / kThreads;
  static_assert(kMinBlocks * (Plan::bytes(4, 2) + 1024) <= 228 * 1024, "shared memory of sm_90");
};

struct DequantizeCopies {
  __device__ __forceinline__ static void copy16(std::byte* to, const std::byte* from) {
    __pipeline_memcpy_async(to, from, 16);
  }
  __device__ __forceinline__ static void commit() { __pipeline_commit(); }
  __device__ __forceinline__ static void wait() { __pipeline_wait_prior(1); }
};

template <int kDim>
__global__ void __launch_bounds__(DequantizeTraits<kDim>::kThreads,
                                  DequantizeTraits<kDim>::kMinBlocks)
    dequantize_kernel(const __grid_constant__ DequantizeArgs args) {
  extern __shared__ __align__(16) std::byte memory[];
  const int column = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.y), side = static_cast<int>(blockIdx.z % 2);
  const int row = static_cast<int>(blockIdx.z / 2);
  if (column >= args.workers) {
    UnpagedBlock(args, row, {column - args.workers, head, side}, thread,
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
      DequantizeCopies{});
}

// Enqueues dequantize_kernel<kDim>; a cudaError_t.
template <int kDim>
int launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);

template <int kDim>
int launch_dequantize_of(DequantizeArgs args, cudaStream_t stream) {
  using Plan = DequantizePlan<kDim>;
  using Traits = DequantizeTraits<kDim>;
  const auto bytes_of = [](const DequantizeSideArgs& side) {
    return Plan::bytes(side.bits, static_cast<int>(cache::element_bytes(side.out_type)));
  };
  const int bytes = std::max(bytes_of(args.sides[0]), bytes_of(args.sides[1]));
  int multiprocessors = 0;
  cudaError_t status = get_device_attribute(cudaDevAttrMultiProcessorCount, multiprocessors);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(dequantize_kernel<kDim>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status != cudaSuccess) return status;
  // Rows that are not powers of two: a block for each entry, as encode_append.
  if (args.page_columns > 0 && RowShape<kDim>::kFactor == 1) {
    args.workers = workers_of(args.page_columns, multiprocessors * Traits::kMinBlocks /
                                                     (2 * args.batch * args.num_heads));
  }
  const dim3 grid(static_cast<unsigned>(args.workers + UnpagedBlock::parts(args)),
                  static_cast<unsigned>(args.num_heads), static_cast<unsigned>(2 * args.batch));
  dequantize_kernel<kDim><<<grid, Traits::kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

#define TQ_INSTANTIATE_DEQUANTIZE(dim)                                          \
  template <>                                                                   \
  int launch_dequantize<dim>(const DequantizeArgs& args, cudaStream_t stream) { \
    return launch_dequantize_of<dim>(args, stream);                             \
  }

}  // namespace turboquant::cuda::detail
