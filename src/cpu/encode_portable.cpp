// The encode kernels for any CPU that the compiler's vector extensions serve.
#define TQ_VECTOR_FLOATS 4
#define TQ_KERNEL_TABLE kPortableEncodeKernels
#include "cpu/encode_kernels.inl"
