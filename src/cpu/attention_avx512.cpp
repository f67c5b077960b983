// Decode attention's kernels for AVX-512; src/CMakeLists.txt sets the instruction set.
#if defined(__x86_64__)
#define TQ_VECTOR_FLOATS 16
#define TQ_KERNEL_TABLE kAvx512AttentionKernels
#include "cpu/attention_kernels.inl"
#endif
