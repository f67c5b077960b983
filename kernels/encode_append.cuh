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
#include "ptx.cuh"

namespace turboquant::cuda::detail {

// Warps of a multiprocessor: what a row's floats and about 50 registers more leave room for.
template <int kDim>
struct EncodeTraits {
  using Plan = EncodePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kElems = RowShape<kDim>::kElems;
  static constexpr int kWarps = RowShape<kDim>::kTrades && kElems == 32 ? 24
                                : kElems <= 64                          ? 16
                                : kElems <= 80                          ? 12
                                                                        : 8;
  static constexpr int kTogether = kWarps * 32 / kThreads % 2 == 0 ? 2 : 1;
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
  const int thread = static_cast<int>(threadIdx.x), member = static_cast<int>(threadIdx.y);
  const int together = static_cast<int>(blockDim.y);
  const int encode_blocks = args.num_jobs * 2 * (args.num_heads / together);
  // Tokens of the fit may lie in slots of the ring that copies of exact keys take.
  if (index >= encode_blocks) {
    ptx::wait_dependencies();
    KeepBlock block(args, reinterpret_cast<EncodedRange*>(memory), index - encode_blocks,
                    member * Traits::kThreads + thread, together * Traits::kThreads);
    keep_steps([&](auto step) {
      step(block);
      __syncthreads();
    });
    return;
  }
  EncodeBlock<kDim> block(args, memory + member * encode_block_bytes<kDim>(args),
                          block_place(index, member, args.num_jobs, args.num_heads, together),
                          thread);
  if (block.empty()) return;
  if (block.smooths()) ptx::wait_dependencies();
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

// Enqueues encode_append_kernel<kDim>; a cudaError_t. After a fit it may start before that has
// ended.
template <int kDim>
int launch_encode(const EncodeArgs& args, bool after_fit, cudaStream_t stream);

#define TQ_INSTANTIATE_ENCODE(dim)                                                      \
  template <>                                                                           \
  int launch_encode<dim>(const EncodeArgs& args, bool after_fit, cudaStream_t stream) { \
    using Traits = EncodeTraits<dim>;                                                   \
    const int together = heads_together(args.num_heads, Traits::kTogether);             \
    const int bytes = together * encode_block_bytes<dim>(args);                         \
    const int blocks = args.num_jobs * 2 * (args.num_heads / together) +                \
                       args.batch * KeepBlock::blocks_per_row(args);                    \
    const cudaError_t status = cudaFuncSetAttribute(                                    \
        encode_append_kernel<dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes); \
    if (status != cudaSuccess) return status;                                           \
    cudaLaunchAttribute early{};                                                        \
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;                      \
    early.val.programmaticStreamSerializationAllowed = 1;                               \
    cudaLaunchConfig_t config{};                                                        \
    config.gridDim = dim3(static_cast<unsigned>(blocks));                               \
    config.blockDim = dim3(Traits::kThreads, static_cast<unsigned>(together));          \
    config.dynamicSmemBytes = static_cast<size_t>(bytes);                               \
    config.stream = stream;                                                             \
    config.attrs = &early;                                                              \
    config.numAttrs = after_fit ? 1 : 0;                                                \
    return cudaLaunchKernelEx(&config, encode_append_kernel<dim>, args);                \
  }

}  // namespace turboquant::cuda::detail
