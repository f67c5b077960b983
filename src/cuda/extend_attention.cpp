// Checks and sizes of CUDA extend attention: what a machine without a GPU can run.
#include "turboquant/cuda/extend_attention.hpp"

#include <algorithm>
#include <cstdint>

#include "../../kernels/extend_attention_launch.hpp"
#include "attention_checks.hpp"

namespace turboquant::cuda {
namespace {

// Query rows of all heads are counted in 32 bits on the device, tiles of several tokens included.
constexpr int64_t kMaxQueries = int64_t{1} << 20;

}  // namespace

int64_t extend_attention_workspace_bytes(const DecodeAttentionParams& params) {
  int64_t most = 0;
  for (const auto sizes : {detail::ExtendSizes::kWarpgroup, detail::ExtendSizes::kLarge,
                           detail::ExtendSizes::kCompact}) {
    const detail::ExtendShape shape = detail::extend_shape_of(params, sizes);
    most = std::max(most, detail::extend_workspace(shape, static_cast<int>(params.query.shape[3]),
                                                   params.page_columns)
                              .bytes);
  }
  return most;
}

void check_extend_attention(const DecodeAttentionParams& params) {
  detail::check_attention(params, kMaxQueries, &extend_attention_workspace_bytes);
}

}  // namespace turboquant::cuda
