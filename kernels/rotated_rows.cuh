// Rows of the model's tensors (queries, exact keys and values) in the rotated basis, as fp16
// operands.
#pragma once

#include "decode_attention_prepare.cuh"
#include "decode_attention_rotation.cuh"

namespace turboquant::cuda::detail {

// R of one KV head of keys or values.
struct HeadRotation {
  const float* signs;  // [3, D]
  const float* turns;  // [D / 2, 2]
};

// R (x * smoothing) or, with kDivide, R (x / smoothing) of a row x in a warp's registers
// (coordinates lane, lane + 32, ...), brought into [1, 2) by a power of two; null: no smoothing.
// Returns what the result has to be multiplied by to be that row. A row of zeros stays one; a row
// with NaN or infinity becomes NaN all over.
//
// The powers of two before and after the rotation keep every finite row in range, and the result is
// ready for fp16: that keeps 2^-11 of a coordinate, 2^-25 of the row's largest where it is small.
// scratch: kDim floats in shared memory.
template <int kDim, bool kDivide>
TQ_DEVICE float rotate_scaled(float (&x)[kRowShare<kDim>], const HeadRotation& rotation,
                              const float* smoothing, float* scratch) {
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
  return inverse_power(before) * inverse_power(after);
}

// Coordinates lane, lane + 32, ... of a row of the caller's; null: zeros.
template <int kDim>
TQ_DEVICE void load_row_share(const std::byte* row, int64_t elem_stride, cache::ElementType type,
                              float (&x)[kRowShare<kDim>]) {
  const int lane = ptx::lane_index();
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    x[k] = row != nullptr && (kDim % kWarpLanes == 0 || i < kDim)
               ? load_element(row, i * elem_stride, type)
               : 0.0f;
  }
}

}  // namespace turboquant::cuda::detail
