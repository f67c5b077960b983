#include "decode_attention_units.cuh"

namespace turboquant::cuda::detail {

template cudaError_t launch_decode_attention<80, 4, 4>(const DecodeArgs&, int, cudaStream_t,
                                                       unsigned);
template cudaError_t launch_decode_attention<80, 4, 3>(const DecodeArgs&, int, cudaStream_t,
                                                       unsigned);
template cudaError_t launch_decode_attention<80, 4, 2>(const DecodeArgs&, int, cudaStream_t,
                                                       unsigned);

}  // namespace turboquant::cuda::detail
