// Decode attention's kernels for any CPU that the compiler's vector extensions serve.
#define TQ_VECTOR_FLOATS 4
#define TQ_KERNEL_TABLE kPortableAttentionKernels
#include "cpu/attention_kernels.inl"
