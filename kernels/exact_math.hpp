// fp32 operations that no compiler may fuse or reorder: what the encoder computes is part of the
// cache format, to the bit. On the host they are the plain operators; host units that include this
// are compiled with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>

#include "turboquant/math/half.hpp"
#include "turboquant/portability.hpp"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace turboquant::cuda::detail {

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float sqrt_rn(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
#endif

TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t float_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
TQ_HOST_DEVICE TQ_ALWAYS_INLINE float bits_float(uint32_t x) {
  return __builtin_bit_cast(float, x);
}

// Exact, as every fp16 is an fp32; one instruction on the device.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE float half_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  return math::fp32_from_fp16(half);
#endif
}

// a / b, correctly rounded, from the correctly rounded reciprocal of b: one Newton step on the
// quotient with an exact remainder. Right for every a of at most 11 significant bits (fp16 and bf16
// numbers) and every b whose quotient and remainder are normal numbers: all 2^10 x 2^23 pairs of
// significands were compared with division (docs/experiments/cuda-encode.md). For |b| in
// [2^-4, 2^8] that is |a| in [2^-100, 2^120].
TQ_HOST_DEVICE TQ_ALWAYS_INLINE float short_quotient(float a, float b, float reciprocal) {
  const float quotient = mul_rn(a, reciprocal);
  return fma_rn(fma_rn(-quotient, b, a), reciprocal, quotient);
}
inline constexpr uint32_t kShortQuotientMin = (127u - 100u) << 7;  // bits of bf16 2^-100
inline constexpr uint32_t kShortQuotientMax = (127u + 100u) << 7;  // of 2^100

}  // namespace turboquant::cuda::detail
