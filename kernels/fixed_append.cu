// plan_append and commit_append: cache/fixed_append.hpp with a thread for every row.
// Grid: rows / 64 blocks. Bound by the launch: a row reads and writes some dozens of integers. So
// both start while the kernel before them ends, and let the next one do so.
#include <cuda_runtime_api.h>

#include "launch.cuh"
#include "ptx.cuh"
#include "turboquant/cuda/fixed_append.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {
namespace {

constexpr int kThreads = 64;

// This thread's row, when what the kernels before have written is there.
__device__ int begin_row() {
  ptx::wait_dependencies();
  ptx::launch_dependents();
  return static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    plan_append_kernel(const __grid_constant__ FixedAppendParams params) {
  const int b = begin_row();
  if (b < params.tables.batch) {
    cache::plan_append_row(params.tables, b, params.planned, params.jobs);
  }
}

__global__ void __launch_bounds__(kThreads)
    commit_append_kernel(const __grid_constant__ FixedAppendParams params) {
  const int b = begin_row();
  if (b < params.tables.batch) cache::commit_append_row(params.tables, b, params.planned);
}

using Kernel = void (*)(FixedAppendParams);

int launch(Kernel kernel, const FixedAppendParams& params, bool is_plan, cudaStream_t stream) {
  try {
    check_fixed_append(params, is_plan);
  } catch (const InvalidArgument&) {
    return cudaErrorInvalidValue;
  }
  if (params.tables.batch == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((params.tables.batch + kThreads - 1) / kThreads);
  return detail::launch_early(kernel, dim3(blocks), kThreads, 0, stream, params, true);
}

}  // namespace

int plan_append(const FixedAppendParams& params, cudaStream_t stream) {
  return launch(plan_append_kernel, params, true, stream);
}

int commit_append(const FixedAppendParams& params, cudaStream_t stream) {
  return launch(commit_append_kernel, params, false, stream);
}

}  // namespace turboquant::cuda
