// The encode kernels for AVX2; src/CMakeLists.txt sets the instruction set.
#if defined(__x86_64__)
#define TQ_VECTOR_FLOATS 8
#define TQ_KERNEL_TABLE kAvx2EncodeKernels
#include "cpu/encode_kernels.inl"
#endif
