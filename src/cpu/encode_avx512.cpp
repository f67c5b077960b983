// The encode kernels for AVX-512; src/CMakeLists.txt sets the instruction set.
#if defined(__x86_64__)
#define TQ_VECTOR_FLOATS 16
#define TQ_KERNEL_TABLE kAvx512EncodeKernels
#include "cpu/encode_kernels.inl"
#endif
