// Macros that let one definition serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define TQ_HOST_DEVICE __host__ __device__
#else
#define TQ_HOST_DEVICE
#endif

// For code that units built for different instruction sets include: an inlined body leaves no
// weak symbol behind, so the linker cannot hand an AVX-512 copy to portable callers.
#if defined(_MSC_VER) && !defined(__clang__)
#define TQ_ALWAYS_INLINE __forceinline
#else
#define TQ_ALWAYS_INLINE inline __attribute__((always_inline))
#endif

// Before a loop whose iterations touch disjoint elements: lets it vectorise without overlap checks.
#if defined(__clang__)
#define TQ_NO_LOOP_DEPENDENCE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define TQ_NO_LOOP_DEPENDENCE _Pragma("GCC ivdep")
#else
#define TQ_NO_LOOP_DEPENDENCE
#endif

// Before a loop whose trip count is a constant and whose body indexes registers: on the device an
// array that is indexed by a variable would live in local memory.
#if defined(__CUDA_ARCH__)
#define TQ_UNROLL _Pragma("unroll")
#define TQ_NO_UNROLL _Pragma("unroll 1")
#else
#define TQ_UNROLL
#define TQ_NO_UNROLL
#endif
