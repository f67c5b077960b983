// fp16 (IEEE binary16) and bf16 as bit patterns, converted to and from fp32 with integer code that
// gives the same bits on every host and device. Rounding is to nearest, ties to even; overflow
// becomes infinity; subnormals are kept; a NaN stays a (quiet) NaN with its sign.
#pragma once

#include <cstdint>

#include "turboquant/portability.hpp"

namespace turboquant::math {

inline constexpr float kMaxFp16 = 65504.0f;

namespace detail {

inline constexpr uint32_t kFp32SignMask = 0x80000000u;
inline constexpr uint32_t kFp32Infinity = 0x7F800000u;
inline constexpr uint32_t kFp16QuietNan = 0x7E00u;
inline constexpr uint32_t kBf16QuietBit = 0x0040u;

}  // namespace detail

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr uint16_t fp16_from_fp32(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (bits & detail::kFp32SignMask) >> 16;
  uint32_t magnitude = bits & ~detail::kFp32SignMask;
  if (magnitude > detail::kFp32Infinity) {
    return static_cast<uint16_t>(sign | detail::kFp16QuietNan | ((magnitude >> 13) & 0x1FFu));
  }
  // 65520 = 0x477FF000 is half-way between the largest fp16 and 2^16; ties round away to infinity.
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal fp16
    const uint32_t odd = (magnitude >> 13) & 1u;
    magnitude += 0xFFFu + odd - (uint32_t{127 - 15} << 23);
    return static_cast<uint16_t>(sign | (magnitude >> 13));
  }
  if (magnitude <= 0x33000000u) return static_cast<uint16_t>(sign);  // at most 2^-25: tie to zero
  // Subnormal: the significand 1.m counts in units of 2^-24, so it is shifted by 126 - exponent.
  const uint32_t shift = 126u - (magnitude >> 23);
  const uint32_t significand = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t half_unit = 1u << (shift - 1);
  const uint32_t odd = (significand >> shift) & 1u;
  return static_cast<uint16_t>(sign | ((significand + half_unit - 1 + odd) >> shift));
}

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr float fp32_from_fp16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  const uint32_t mantissa = half & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | sign);
  }
  if (exponent == 0x1Fu) {
    const uint32_t quiet = mantissa ? 0x400000u : 0u;
    return __builtin_bit_cast(float, sign | detail::kFp32Infinity | quiet | (mantissa << 13));
  }
  return __builtin_bit_cast(float, sign | ((exponent + (127 - 15)) << 23) | (mantissa << 13));
}

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr uint16_t bf16_from_fp32(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & ~detail::kFp32SignMask) > detail::kFp32Infinity) {
    return static_cast<uint16_t>((bits >> 16) | detail::kBf16QuietBit);
  }
  const uint32_t odd = (bits >> 16) & 1u;
  return static_cast<uint16_t>((bits + 0x7FFFu + odd) >> 16);  // the carry overflows to infinity
}

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr float fp32_from_bf16(uint16_t bfloat) {
  return __builtin_bit_cast(float, uint32_t{bfloat} << 16);
}

}  // namespace turboquant::math
