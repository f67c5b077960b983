// A vector's scale as it is stored: fp32 or fp16. Host and device.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/math/half.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cache {

// x rounded to fp16; a finite x beyond the largest fp16 becomes that, and is counted, never inf.
// NaN stays NaN.
TQ_HOST_DEVICE inline uint16_t saturated_fp16(float x, int64_t& saturated) {
  constexpr uint16_t kInfinity = 0x7C00, kMagnitude = 0x7FFF, kLargest = 0x7BFF, kSign = 0x8000;
  const uint16_t bits = math::fp16_from_fp32(x);
  if ((bits & kMagnitude) != kInfinity) return bits;
  ++saturated;
  return static_cast<uint16_t>((bits & kSign) | kLargest);
}

TQ_HOST_DEVICE inline void store_scale(ScaleType type, float scale, std::byte* to,
                                       int64_t& saturated) {
  if (type == ScaleType::kFloat32) {
    std::memcpy(to, &scale, sizeof scale);
  } else {
    const uint16_t bits = saturated_fp16(scale, saturated);
    std::memcpy(to, &bits, sizeof bits);
  }
}

TQ_HOST_DEVICE inline float load_scale(ScaleType type, const std::byte* from) {
  if (type == ScaleType::kFloat32) {
    float scale;
    std::memcpy(&scale, from, sizeof scale);
    return scale;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return math::fp32_from_fp16(bits);
}

}  // namespace turboquant::cache
