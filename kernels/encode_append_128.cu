#include "encode_append.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_ENCODE(128)
}  // namespace turboquant::cuda::detail
