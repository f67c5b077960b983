#include "extend_attention_units.cuh"

namespace turboquant::cuda::detail {

TQ_INSTANTIATE_EXTEND_ATTENTION(128);

}  // namespace turboquant::cuda::detail
