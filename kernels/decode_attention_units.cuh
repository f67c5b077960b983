// Launches of the decode attention kernels for one head_dim; every unit instantiates a part.
#pragma once

#include "decode_attention.cuh"
#include "decode_attention_dispatch.hpp"
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

template <int kDim, int kRowWarps>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ DecodeArgs args) {
#if TQ_DECODE_ATTENTION_RUNS
  extern __shared__ __align__(1024) std::byte shared[];
  combine_splits<kDim, kRowWarps>(args, shared);
#endif
}

template <class Traits>
cudaError_t launch_attend(const DecodeArgs& args, int multiprocessors, cudaStream_t stream,
                          bool early) {
  // More groups than pieces of work would only wait.
  const int64_t pieces = int64_t{args.batch} * args.num_kv_heads *
                         args.passes<Traits::kRowTiles>() * (args.page_slots + args.exact_slots);
  const int grid = static_cast<int>(min_of(multiprocessors, pieces));
  return launch_early(attend_splits_kernel<Traits>, dim3(static_cast<unsigned>(grid)),
                      Traits::kThreads, Traits::kSharedBytes, stream, args, early);
}

template <int kDim, int kKeyBits, int kValueBits, quant::CodebookKind kCodebook>
cudaError_t launch_decode_attention(const DecodeArgs& args, int multiprocessors,
                                    cudaStream_t stream, unsigned stages) {
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
  // A warp for each query row where that fills the device.
  const auto combine = [&](auto* kernel, int row_warps) {
    return launch_early(kernel, dim3(static_cast<unsigned>(combine_blocks(args, row_warps))),
                        kCombineThreads, combine_bytes(args, kDim), stream, args,
                        (stages & kLateStages) == 0);
  };
  const bool many = int64_t{args.batch} * args.num_kv_heads * args.rows >= 8 * multiprocessors;
  return many ? combine(combine_splits_kernel<kDim, 1>, 1)
              : combine(combine_splits_kernel<kDim, kCombineTeams>, kCombineTeams);
}

}  // namespace turboquant::cuda::detail
