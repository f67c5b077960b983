#include "encode_append.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_ENCODE(64)
TQ_INSTANTIATE_ENCODE(80)
TQ_INSTANTIATE_ENCODE(96)
}  // namespace turboquant::cuda::detail
