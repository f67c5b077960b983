// Macros that let one definition serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define TQ_HOST_DEVICE __host__ __device__
#else
#define TQ_HOST_DEVICE
#endif
