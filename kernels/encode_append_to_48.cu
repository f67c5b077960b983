#include "encode_append.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_ENCODE(8)
TQ_INSTANTIATE_ENCODE(16)
TQ_INSTANTIATE_ENCODE(24)
TQ_INSTANTIATE_ENCODE(32)
TQ_INSTANTIATE_ENCODE(40)
TQ_INSTANTIATE_ENCODE(48)
}  // namespace turboquant::cuda::detail
