// Decode attention's kernels for AVX2 with FMA; src/CMakeLists.txt sets the instruction set.
#if defined(__x86_64__)
#define TQ_VECTOR_FLOATS 8
#define TQ_KERNEL_TABLE kAvx2AttentionKernels
#include "cpu/attention_kernels.inl"
#endif
