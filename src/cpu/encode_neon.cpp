// The encode kernels for NEON, which every 64-bit Arm processor has.
#if defined(__aarch64__)
#define TQ_VECTOR_FLOATS 4
#define TQ_NEON
#define TQ_KERNEL_TABLE kNeonEncodeKernels
#include "cpu/encode_kernels.inl"
#endif
