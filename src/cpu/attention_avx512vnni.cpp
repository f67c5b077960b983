// Decode attention's kernels for AVX-512 with VNNI and VBMI; src/CMakeLists.txt sets the
// instruction set.
#if defined(__x86_64__)
#define TQ_VECTOR_FLOATS 16
#define TQ_VNNI
#define TQ_KERNEL_TABLE kAvx512VnniAttentionKernels
#include "cpu/attention_kernels.inl"
#endif
