#include "decode_attention_units.cuh"

namespace turboquant::cuda::detail {

template cudaError_t launch_decode_attention<96, 4, 4, quant::CodebookKind::kVector>(
    const DecodeArgs&, int, cudaStream_t, unsigned);
template cudaError_t launch_decode_attention<96, 3, 3, quant::CodebookKind::kVector>(
    const DecodeArgs&, int, cudaStream_t, unsigned);
template cudaError_t launch_decode_attention<96, 2, 2, quant::CodebookKind::kVector>(
    const DecodeArgs&, int, cudaStream_t, unsigned);

}  // namespace turboquant::cuda::detail
