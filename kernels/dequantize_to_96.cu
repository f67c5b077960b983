#include "dequantize.cuh"

namespace turboquant::cuda::detail {
TQ_INSTANTIATE_DEQUANTIZE(64)
TQ_INSTANTIATE_DEQUANTIZE(80)
TQ_INSTANTIATE_DEQUANTIZE(96)
}  // namespace turboquant::cuda::detail
