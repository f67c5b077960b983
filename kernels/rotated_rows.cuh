// Rows of the model's tensors (queries, exact keys and values) in the rotated basis, as fp16
// operands.
#pragma once

#include "decode_attention_rotation.cuh"
#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// Largest magnitude's exponent as a power of two 2^-e that brings the row into [1, 2); 1 for rows
// of zeros and rows with NaN or infinity, which stay what they are.
TQ_DEVICE float normalising_factor(float magnitude) {
  const uint32_t exponent = ptx::bits_of(magnitude) & 0x7F800000u;
  if (exponent == 0 || exponent == 0x7F800000u) return 1.0f;
  return ptx::float_of((254u << 23) - (exponent < (253u << 23) ? exponent : 253u << 23));
}

// 1 / x for a power of two in [2^-126, 2^126].
TQ_DEVICE float inverse_power(float x) { return ptx::float_of((254u << 23) - ptx::bits_of(x)); }

// Over a warp.
template <int kCount>
TQ_DEVICE float row_magnitude(const float (&y)[kCount]) {
  float largest = 0.0f;
  TQ_UNROLL
  for (int k = 0; k < kCount; ++k) {
    const float magnitude = fabsf(y[k]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  TQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = ptx::shuffle_xor(largest, mask);
    largest = other > largest || other != other ? other : largest;
  }
  return largest;
}

// R of one KV head of keys or values.
struct HeadRotation {
  const float* signs;  // [3, D]
  const float* turns;  // [D / 2, 2]
};

// R (x * smoothing) or, with kDivide, R (x / smoothing) of a row x in a warp's registers
// (coordinates lane, lane + 32, ...), brought into [1, 2) by a power of two; null: no smoothing.
// Returns `factor` times what the result has to be multiplied by to be that row. A row of zeros
// stays one; a row with NaN or infinity becomes NaN all over.
//
// The powers of two before and after the rotation keep every finite row in range, and the result is
// ready for fp16: that keeps 2^-11 of a coordinate, 2^-25 of the row's largest where it is small.
// scratch: kDim floats in shared memory.
template <int kDim, bool kDivide>
TQ_DEVICE float rotate_scaled(float (&x)[kRowShare<kDim>], float factor,
                              const HeadRotation& rotation, const float* smoothing,
                              float* scratch) {
  const int lane = ptx::lane_index();
  const RotationFactors<kDim> factors(rotation.signs, rotation.turns, lane);
  float s[kRowShare<kDim>];
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    s[k] = (kDim % kWarpLanes == 0 || i < kDim) && smoothing != nullptr ? smoothing[i] : 1.0f;
  }
  const float before = normalising_factor(row_magnitude(x));
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    x[k] = kDivide ? x[k] * before / s[k] : x[k] * before * s[k];
  }
  rotate_row<kDim, false>(x, scratch, factors, lane);
  const float after = normalising_factor(row_magnitude(x));
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) x[k] *= after;
  return factor * inverse_power(before) * inverse_power(after);
}

// Coordinates lane, lane + 32, ... of a row of the caller's; null: zeros. All are on their way
// before the first is used: one latency, whatever the type.
template <int kDim>
TQ_DEVICE void load_row_share(const std::byte* row, int64_t elem_stride, cache::ElementType type,
                              float (&x)[kRowShare<kDim>]) {
  const int lane = ptx::lane_index();
  const bool wide = type == cache::ElementType::kFloat32;
  uint32_t bits[kRowShare<kDim>];
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) bits[k] = 0;
  if (row != nullptr) {
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const int i = k * kWarpLanes + lane;
      if (kDim % kWarpLanes != 0 && i >= kDim) continue;
      if (wide) {
        bits[k] = load_as<uint32_t>(row + 4 * i * elem_stride);
      } else {
        bits[k] = load_as<uint16_t>(row + 2 * i * elem_stride);
      }
    }
  }
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    x[k] = ptx::float_of(wide ? bits[k] : bits[k] << 16);
    if (type == cache::ElementType::kFloat16) x[k] = ptx::f32_from_f16(bits[k]);
  }
}

}  // namespace turboquant::cuda::detail
