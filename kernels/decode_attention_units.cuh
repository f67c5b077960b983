// Launches of the decode attention kernels for one head_dim; every unit instantiates a part.
#pragma once

#include "decode_attention.cuh"
#include "decode_attention_dispatch.hpp"
#include "decode_attention_launch.hpp"
#include "launch.cuh"

// Where decode_attention_runs_on says so; other architectures get empty kernels, which the launcher
// never starts. Compiled for 10.0 and 12.0 the kernels need registers that they do not have.
#define TQ_DECODE_ATTENTION_RUNS (__CUDA_ARCH__ / 100 == 9)

namespace turboquant::cuda::detail {

template <int kDim>
__global__ void __launch_bounds__(kMaxPrepareTiles* kPrepareThreads, 1)
    prepare_queries_kernel(const __grid_constant__ DecodeArgs args) {
#if TQ_DECODE_ATTENTION_RUNS
  extern __shared__ __align__(1024) std::byte shared[];
  prepare_queries<kDim>(args, shared);
#endif
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_splits_kernel(const __grid_constant__ DecodeArgs args) {
#if TQ_DECODE_ATTENTION_RUNS
  extern __shared__ __align__(1024) std::byte shared[];
  SplitWorker<Traits>(args, shared).run();
#endif
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_pages_kernel(const __grid_constant__ SharedPagesArgs args) {
#if TQ_DECODE_ATTENTION_RUNS
  extern __shared__ __align__(1024) std::byte shared[];
  PageTeams<Traits>(args, shared).run();
#endif
}

template <int kDim, int kRowWarps, int kParts>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ DecodeArgs args) {
#if TQ_DECODE_ATTENTION_RUNS
  extern __shared__ __align__(1024) std::byte shared[];
  combine_splits<kDim, kRowWarps, kParts>(args, shared);
#endif
}

template <int kDim, int kRowWarps, int kParts = 1>
cudaError_t launch_combine(const DecodeArgs& args, int multiprocessors, cudaStream_t stream,
                           unsigned stages) {
  const int64_t blocks = combine_blocks(args, kRowWarps);
  const int bytes = static_cast<int>(
      max_of(combine_bytes(args, kDim), combine_spread_bytes(blocks, multiprocessors)));
  return launch_early(combine_splits_kernel<kDim, kRowWarps, kParts>,
                      dim3(static_cast<unsigned>(blocks)), kCombineThreads, bytes, stream, args,
                      (stages & kLateStages) == 0, kMaxSharedBytes);
}

template <class Traits>
cudaError_t launch_attend(const DecodeArgs& args, int multiprocessors, cudaStream_t stream,
                          bool early) {
  // More groups than pieces of work would only wait.
  const int64_t pieces =
      int64_t{args.batch} * args.num_kv_heads * args.passes<Traits::kRowTiles>() * args.slots;
  const int grid = static_cast<int>(min_of(multiprocessors, pieces));
  return launch_early(attend_splits_kernel<Traits>, dim3(static_cast<unsigned>(grid)),
                      Traits::kThreads, Traits::kSharedBytes, stream, args, early);
}

// Two kernels instead of three, of a call with few pages.
template <class Traits>
cudaError_t launch_shared_pages(const SharedPagesArgs& args, int multiprocessors,
                                cudaStream_t stream, unsigned stages) {
  cudaError_t status = cudaSuccess;
  if ((stages & kAttendStage) != 0) {
    const int blocks = args.blocks.exact + args.blocks.pages;
    status = launch_early(attend_pages_kernel<Traits>, dim3(static_cast<unsigned>(blocks)),
                          Traits::kThreads, Traits::kSharedBytes, stream, args,
                          (stages & (kLatePrepare | kLateStages)) == 0);
  }
  if (status != cudaSuccess || (stages & kCombineStage) == 0) return status;
  return launch_combine<Traits::kDim, kCombineTeams, kShortSplitPages>(args.call, multiprocessors,
                                                                       stream, stages);
}

template <int kDim, int kKeyBits, int kValueBits, quant::CodebookKind kCodebook>
cudaError_t launch_decode_attention(const DecodeArgs& args, int multiprocessors,
                                    cudaStream_t stream, unsigned stages) {
  using OneTile = DecodeTraits<kDim, kKeyBits, kValueBits, kCodebook>;
  if constexpr (OneTile::kSharesPages) {
    const SharedPagesArgs shared = share_pages(args);
    if (shared.blocks.pages > 0) {
      return launch_shared_pages<OneTile>(shared, multiprocessors, stream, stages);
    }
  }
  cudaError_t status = cudaSuccess;
  if ((stages & kPrepareStage) != 0) {
    status = launch_early(prepare_queries_kernel<kDim>,
                          dim3(static_cast<unsigned>(prepare_blocks(args))),
                          prepare_tiles(args) * kPrepareThreads, prepare_bytes(args, kDim), stream,
                          args, (stages & (kLatePrepare | kLateStages)) == 0);
    if (status != cudaSuccess) return status;
  }
  if ((stages & kAttendStage) != 0) {
    status = with_decode_traits<kDim, kKeyBits, kValueBits, kCodebook>(args.rows, [&](auto traits) {
      return launch_attend<decltype(traits)>(args, multiprocessors, stream,
                                             (stages & kLateStages) == 0);
    });
    if (status != cudaSuccess) return status;
  }
  if ((stages & kCombineStage) == 0) return status;
  // A warp for each query row where the device does not hold a block for each at once.
  constexpr int kHeldBlocks = kDim <= 128 ? 5 : 3;  // of a multiprocessor, by registers
  return query_rows(args) > kHeldBlocks * multiprocessors
             ? launch_combine<kDim, 1>(args, multiprocessors, stream, stages)
             : launch_combine<kDim, kCombineTeams>(args, multiprocessors, stream, stages);
}

}  // namespace turboquant::cuda::detail
