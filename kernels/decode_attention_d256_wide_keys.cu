#include "decode_attention_units.cuh"

namespace turboquant::cuda::detail {

template cudaError_t launch_decode_attention<256, 5, 4>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);
template cudaError_t launch_decode_attention<256, 5, 3>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);
template cudaError_t launch_decode_attention<256, 6, 4>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);
template cudaError_t launch_decode_attention<256, 6, 3>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);
template cudaError_t launch_decode_attention<256, 8, 4>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);
template cudaError_t launch_decode_attention<256, 8, 3>(const DecodeArgs&, int, cudaStream_t,
                                                        unsigned);

}  // namespace turboquant::cuda::detail
