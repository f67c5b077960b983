#include "encode_append.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_ENCODE(128)
TQ_INSTANTIATE_ENCODE(160)
TQ_INSTANTIATE_ENCODE(192)
TQ_INSTANTIATE_ENCODE(256)
}  // namespace turboquant::cuda::detail
