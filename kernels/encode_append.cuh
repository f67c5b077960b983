// encode_append: the kernels around kernels/encode_block.hpp and kernels/exact_tokens.hpp.
//
// Inputs, numerics and order: include/turboquant/cuda/encode_append.hpp, cache/encode_append.hpp.
// Grid of encode_append_kernel: one thread block per (job, KV head, keys or values), job slowest,
// then kKeepCopies copies of exact tokens per block. Blocks of empty jobs end at once.
// Grid of fit_smoothing_kernel: one block per (row, KV head).
// Bound by instructions, not by memory: about 50 per element against 2.5 bytes (docs/kernels.md).
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "encode_steps.hpp"
#include "exact_tokens.hpp"

namespace turboquant::cuda::detail {

// Warps of a multiprocessor: what a row's floats and about 50 registers more leave room for.
template <int kDim>
struct EncodeTraits {
  using Plan = EncodePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kElems = RowShape<kDim>::kElems;
  static constexpr int kWarps = RowShape<kDim>::kTrades && kElems == 32 ? 32 : kElems <= 64 ? 16 : kElems <= 80 ? 12 : 8;
  static constexpr int kTogether = std::min(2, kWarps * 32 / kThreads);
  static constexpr int kMinBlocks = kWarps * 32 / (kThreads * kTogether);
  static_assert(kMinBlocks * (kTogether * Plan::bytes(4, false) + 1024) <= 228 * 1024,
                "shared memory of sm_90");
  static_assert(sizeof(EncodedRange) <= Plan::kState);
};

template <int kDim>
TQ_HOST_DEVICE int encode_block_bytes(const EncodeArgs& args) {
  const int bits = max_int(args.sides[0].bits, args.sides[1].bits);
  return (EncodePlan<kDim>::bytes(bits, args.vector) + 15) / 16 * 16;
}

template <int kDim>
__global__ void __launch_bounds__(EncodeTraits<kDim>::kThreads* EncodeTraits<kDim>::kTogether,
                                  EncodeTraits<kDim>::kMinBlocks)
    encode_append_kernel(const __grid_constant__ EncodeArgs args) {
  using Traits = EncodeTraits<kDim>;
  extern __shared__ __align__(16) std::byte memory[];
  const int index = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int together = threads / Traits::kThreads;
  const int encode_blocks = args.num_jobs * 2 * (args.num_heads / together);
  if (index >= encode_blocks) {
    KeepBlock block(args, reinterpret_cast<EncodedRange*>(memory), index - encode_blocks, thread,
                    threads);
    keep_steps([&](auto step) {
      step(block);
      __syncthreads();
    });
    return;
  }
  const int member = thread / Traits::kThreads;
  EncodeBlock<kDim> block(args, memory + member * encode_block_bytes<kDim>(args),
                          block_place(index, member, args.num_heads, together),
                          thread % Traits::kThreads);
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
      [](auto& self) {
        self.fetch(
            [](std::byte* to, const std::byte* from) { __pipeline_memcpy_async(to, from, 16); });
        __pipeline_commit();
        __pipeline_wait_prior(0);
      });
}

// Enqueues encode_append_kernel<kDim>; a cudaError_t.
template <int kDim>
int launch_encode(const EncodeArgs& args, cudaStream_t stream);

#define TQ_INSTANTIATE_ENCODE(dim)                                                             \
  template <>                                                                                  \
  int launch_encode<dim>(const EncodeArgs& args, cudaStream_t stream) {                        \
    using Traits = EncodeTraits<dim>;                                                          \
    const int together = heads_together(args.num_heads, Traits::kTogether);                    \
    const int bytes = together * encode_block_bytes<dim>(args);                                \
    const int blocks = args.num_jobs * 2 * (args.num_heads / together) +                       \
                       args.batch * KeepBlock::blocks_per_row(args);                           \
    const cudaError_t status = cudaFuncSetAttribute(                                           \
        encode_append_kernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);        \
    if (status != cudaSuccess) return status;                                                  \
    encode_append_kernel<dim><<<blocks, Traits::kThreads * together, bytes, stream>>>(args);   \
    return cudaGetLastError();                                                                 \
  }

}  // namespace turboquant::cuda::detail
