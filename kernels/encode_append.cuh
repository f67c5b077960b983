// encode_append: the kernels around kernels/encode_block.hpp and kernels/exact_tokens.hpp.
//
// Inputs, numerics and order: include/turboquant/cuda/encode_append.hpp, cache/encode_append.hpp.
// Grid of encode_append_kernel: x workers that share the jobs of a head and side, as many as fit
// the device at once (or one for each job), then (with the keys, over y too) copies of exact
// tokens, kKeepCopies a block; y KV heads; z values, keys: blocks of keys may wait for the fit.
// Workers without a job end at once. Grid of fit_smoothing_kernel: one block per (row, KV head).
// Bound by instructions, not by memory (docs/experiments/cuda-encode.md).
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "encode_steps.hpp"
#include "exact_tokens.hpp"
#include "launch.cuh"
#include "ptx.cuh"

namespace turboquant::cuda::detail {

#if defined(__CUDA_ARCH__)
inline constexpr int kComputeCapability = __CUDA_ARCH__;
#else
inline constexpr int kComputeCapability = 900;
#endif

// Warps of a multiprocessor: what a row's floats and 30 to 50 registers more leave room for, as far
// as nothing spills. The search of a vector codebook takes more registers.
constexpr int encode_warps(int dim, int elems, bool trades, bool four_threads, bool vector) {
  const bool sm_90 = kComputeCapability == 900;
  if (trades && elems == 32) {
    return vector ? (four_threads ? 24 : 20) : sm_90 && four_threads ? 32 : 24;
  }
  if (elems > 80 || (elems > 64 && kComputeCapability < 900)) return 8;
  if (elems > 64) return sm_90 && dim == 80 && !vector ? 16 : 12;
  return sm_90 && dim == 96 ? 20 : 16;
}

template <int kDim, EncodeCodes kCodes>
struct EncodeTraits {
  using Plan = EncodePlan<kDim>;
  static constexpr bool kVector = kCodes == EncodeCodes::kVector;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kElems = RowShape<kDim>::kElems;
  static constexpr int kWarps =
      encode_warps(kDim, kElems, RowShape<kDim>::kTrades, RowShape<kDim>::kThreads == 4, kVector);
  static constexpr int kMinBlocks = kWarps * 32 / kThreads;
  static_assert(kMinBlocks * (Plan::bytes(4, false) + 1024) <= 228 * 1024,
                "shared memory of sm_90");
  static_assert(sizeof(EncodedRange) <= Plan::kState);
};

struct DeviceCopies {
  __device__ __forceinline__ static void copy16(std::byte* to, const std::byte* from) {
    __pipeline_memcpy_async(to, from, 16);
  }
  __device__ __forceinline__ static void wait() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
};

template <int kDim, EncodeCodes kCodes>
__global__ void __launch_bounds__(EncodeTraits<kDim, kCodes>::kThreads,
                                  EncodeTraits<kDim, kCodes>::kMinBlocks)
    encode_append_kernel(const __grid_constant__ EncodeArgs args) {
  extern __shared__ __align__(16) std::byte memory[];
  ptx::launch_dependents();
  const int item = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.y), side = 1 - static_cast<int>(blockIdx.z);
  if (item >= args.workers) {
    // With the keys: those before them would hold places while they wait for the fit.
    const int index = (item - args.workers) * args.num_heads + head;
    if (side != 0 || index >= args.batch * KeepBlock::blocks_per_row(args)) return;
    // Tokens of the fit may lie in slots of the ring that copies of exact keys take.
    ptx::wait_dependencies();
    KeepBlock block(args, reinterpret_cast<EncodedRange*>(memory), index, thread,
                    EncodeTraits<kDim, kCodes>::kThreads);
    keep_steps([&](auto step) {
      step(block);
      __syncthreads();
    });
    return;
  }
  EncodeBlock<kDim, kCodes> block(args, memory, {item, head, side}, thread);
  // Sooner or later each waits: whatever runs behind this kernel runs behind the fit too.
  if (block.empty() || block.smooths()) ptx::wait_dependencies();
  if (block.empty()) return;
  encode_steps<kDim>(
      block,
      [&](auto step) {
        step(block);
        __syncthreads();
      },
      [&](auto step) {
        step(block);
        __syncwarp();
      },
      DeviceCopies{});
  ptx::wait_dependencies();
}

// Enqueues encode_append_kernel<kDim>; a cudaError_t. After a fit it may start before that has
// ended.
template <int kDim>
int launch_encode(const EncodeArgs& args, bool after_fit, cudaStream_t stream);

template <int kDim, EncodeCodes kCodes>
int launch_encode_with(EncodeArgs args, bool after_fit, cudaStream_t stream) {
  using Traits = EncodeTraits<kDim, kCodes>;
  const int bytes =
      EncodePlan<kDim>::bytes(std::max(args.sides[0].bits, args.sides[1].bits), Traits::kVector);
  int multiprocessors = 0;
  const cudaError_t status = get_device_attribute(cudaDevAttrMultiProcessorCount, multiprocessors);
  if (status != cudaSuccess) return status;
  // Jobs of vector codebooks are so long that a last round which is not full costs more than blocks
  // do, and so are those of rows that are not powers of two (their code is more than the
  // instruction cache holds, too): they have a block each.
  if (args.num_jobs > 0 && !Traits::kVector && RowShape<kDim>::kFactor == 1) {
    args.workers = workers_of(args.num_jobs, multiprocessors * Traits::kMinBlocks / args.num_heads);
  }
  const int keep_blocks = args.batch * KeepBlock::blocks_per_row(args);
  const int columns = args.workers + (keep_blocks + args.num_heads - 1) / args.num_heads;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(args.num_heads), 2);
  return launch_early(encode_append_kernel<kDim, kCodes>, grid, Traits::kThreads, bytes, stream,
                      args, after_fit);
}

template <int kDim>
int launch_encode_of(const EncodeArgs& args, bool after_fit, cudaStream_t stream) {
  if (args.vector) {
    return launch_encode_with<kDim, EncodeCodes::kVector>(args, after_fit, stream);
  }
  if constexpr (kDim >= 64) {
    if (std::max(args.sides[0].bits, args.sides[1].bits) <= quant::kIndexedCellBits) {
      return launch_encode_with<kDim, EncodeCodes::kNarrow>(args, after_fit, stream);
    }
  }
  return launch_encode_with<kDim, EncodeCodes::kScalar>(args, after_fit, stream);
}

#define TQ_INSTANTIATE_ENCODE(dim)                                                      \
  template <>                                                                           \
  int launch_encode<dim>(const EncodeArgs& args, bool after_fit, cudaStream_t stream) { \
    return launch_encode_of<dim>(args, after_fit, stream);                              \
  }

}  // namespace turboquant::cuda::detail
