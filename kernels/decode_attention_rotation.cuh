// The rotation R of quant/rotation.hpp, or its transpose, of one row that a warp holds in shared
// memory. For queries and outputs: within rounding of the encoder's rotation, not its bits.
#pragma once

#include "ptx.cuh"
#include "turboquant/math/hadamard.hpp"

namespace turboquant::cuda::detail {

inline constexpr int kWarpLanes = 32;

// Entry (row, column) of the Paley matrix of math::paley_sign as +1 or -1, by the set of squares
// modulo 11 and 19.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE float paley_factor(int order, int row, int column) {
  if (row == column || row == 0) return 1.0f;
  if (column == 0) return -1.0f;
  constexpr uint32_t kSquares11 = 1u << 1 | 1u << 3 | 1u << 4 | 1u << 5 | 1u << 9;
  constexpr uint32_t kSquares19 =
      1u << 1 | 1u << 4 | 1u << 5 | 1u << 6 | 1u << 7 | 1u << 9 | 1u << 11 | 1u << 16 | 1u << 17;
  const int q = order - 1;
  const int difference = row >= column ? row - column : row - column + q;
  return ((order == 12 ? kSquares11 : kSquares19) >> difference & 1u) != 0 ? 1.0f : -1.0f;
}

// x [kDim] <- H x or H^T x.
template <int kDim, bool kTranspose>
TQ_DEVICE void hadamard_row(float* x, int lane, float normaliser) {
  constexpr int kFactor = math::hadamard_factor(kDim);
  constexpr int kSize = kDim / kFactor;
  TQ_UNROLL
  for (int stride = 1; stride < kSize; stride *= 2) {
    TQ_UNROLL
    for (int start = 0; start < kDim / 2; start += kWarpLanes) {
      const int n = start + lane;
      if (kDim / 2 % kWarpLanes == 0 || n < kDim / 2) {
        const int i = n / stride * 2 * stride + n % stride;
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
    ptx::sync_warp();
  }
  constexpr int kPerLane = (kDim + kWarpLanes - 1) / kWarpLanes;
  float y[kPerLane];
  TQ_UNROLL
  for (int k = 0; k < kPerLane; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes != 0 && i >= kDim) continue;
    if constexpr (kFactor == 1) {
      y[k] = x[i] * normaliser;
    } else {
      const int row = i / kSize, column = i % kSize;
      float sum = 0.0f;
      for (int j = 0; j < kFactor; ++j) {
        const float sign =
            kTranspose ? paley_factor(kFactor, j, row) : paley_factor(kFactor, row, j);
        sum += sign * x[j * kSize + column];
      }
      y[k] = sum * normaliser;
    }
  }
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kPerLane; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) x[i] = y[k];
  }
  ptx::sync_warp();
}

// x [kDim] <- R x (or R^T x); signs [3, kDim], turns [kDim / 2, 2]. R's rounds: signs, in the
// second round turns too, Hadamard.
template <int kDim, bool kTranspose>
TQ_DEVICE void rotate_row(float* x, const float* signs, const float* turns, int lane) {
  // 1 / sqrt(d) by Newton's iteration in double, at compile time.
  constexpr float normaliser = [] {
    double root = kDim;
    for (int i = 0; i < 64; ++i) root = 0.5 * (root + kDim / root);
    return static_cast<float>(1.0 / root);
  }();
  const auto multiply_signs = [&](int round) {
    for (int i = lane; i < kDim; i += kWarpLanes) x[i] *= signs[round * kDim + i];
    ptx::sync_warp();
  };
  const auto turn = [&] {
    for (int j = lane; j < kDim / 2; j += kWarpLanes) {
      const float c = turns[2 * j], s = kTranspose ? -turns[2 * j + 1] : turns[2 * j + 1];
      const float even = x[2 * j], odd = x[2 * j + 1];
      x[2 * j] = c * even - s * odd;
      x[2 * j + 1] = s * even + c * odd;
    }
    ptx::sync_warp();
  };
  ptx::sync_warp();
  TQ_NO_UNROLL
  for (int step = 0; step < 3; ++step) {
    const int round = kTranspose ? 2 - step : step;
    if constexpr (kTranspose) {
      hadamard_row<kDim, true>(x, lane, normaliser);
      if (round == 1) turn();
      multiply_signs(round);
    } else {
      multiply_signs(round);
      if (round == 1) turn();
      hadamard_row<kDim, false>(x, lane, normaliser);
    }
  }
}

}  // namespace turboquant::cuda::detail
