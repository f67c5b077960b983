#include "dequantize.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_DEQUANTIZE(128)
TQ_INSTANTIATE_DEQUANTIZE(160)
TQ_INSTANTIATE_DEQUANTIZE(192)
TQ_INSTANTIATE_DEQUANTIZE(256)
}  // namespace turboquant::cuda::detail
