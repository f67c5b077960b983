// The rotation R of quant/rotation.hpp, or its transpose, of one row that a warp holds in
// registers. For queries and outputs: within rounding of the encoder's rotation, not its bits.
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

// A row in a warp: lane l holds coordinates l, l + 32, ...
template <int kDim>
inline constexpr int kRowShare = (kDim + kWarpLanes - 1) / kWarpLanes;

// y <- H y or H^T y. x: kDim floats of scratch in shared memory, for orders with a Paley factor.
template <int kDim, bool kTranspose>
TQ_DEVICE void hadamard_row(float (&y)[kRowShare<kDim>], float* x, int lane, float normaliser) {
  constexpr int kFactor = math::hadamard_factor(kDim);
  constexpr int kSize = kDim / kFactor;
  constexpr int kShare = kRowShare<kDim>;
  if constexpr (kFactor == 1) {
    TQ_UNROLL
    for (int mask = 1; mask < kWarpLanes; mask *= 2) {
      TQ_UNROLL
      for (int k = 0; k < kShare; ++k) {
        const float other = ptx::shuffle_xor(y[k], mask);
        y[k] = (lane & mask) != 0 ? other - y[k] : y[k] + other;
      }
    }
    TQ_UNROLL
    for (int stride = 1; stride < kShare; stride *= 2) {
      TQ_UNROLL
      for (int k = 0; k < kShare; ++k) {
        if ((k & stride) != 0) continue;
        const float a = y[k], b = y[k + stride];
        y[k] = a + b;
        y[k + stride] = a - b;
      }
    }
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) y[k] *= normaliser;
    return;
  }
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) x[i] = y[k];
  }
  ptx::sync_warp();
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
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes != 0 && i >= kDim) continue;
    const int row = i / kSize, column = i % kSize;
    float sum = 0.0f;
    for (int j = 0; j < kFactor; ++j) {
      const float sign = kTranspose ? paley_factor(kFactor, j, row) : paley_factor(kFactor, row, j);
      sum += sign * x[j * kSize + column];
    }
    y[k] = sum * normaliser;
  }
}

// A lane's share of the factors of R: signs [3, kDim], turns [kDim / 2, 2] (cosine, sine). Loaded
// all at once, ahead of what they multiply: one latency instead of four.
template <int kDim>
struct RotationFactors {
  float signs[3][kRowShare<kDim>];
  float cosine[kRowShare<kDim>], sine[kRowShare<kDim>];

  TQ_DEVICE RotationFactors(const float* sign_table, const float* turns, int lane) {
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const int i = k * kWarpLanes + lane;
      const bool exists = kDim % kWarpLanes == 0 || i < kDim;
      TQ_UNROLL
      for (int round = 0; round < 3; ++round) {
        signs[round][k] = exists ? sign_table[round * kDim + i] : 0.0f;
      }
      cosine[k] = exists ? turns[i / 2 * 2] : 0.0f;
      sine[k] = exists ? turns[i / 2 * 2 + 1] : 0.0f;
    }
  }
};

// y <- R y (or R^T y). R's rounds: signs, in the second round turns too, Hadamard. x: kDim floats
// of scratch in shared memory.
template <int kDim, bool kTranspose>
TQ_DEVICE void rotate_row(float (&y)[kRowShare<kDim>], float* x,
                          const RotationFactors<kDim>& factors, int lane) {
  // 1 / sqrt(d) by Newton's iteration in double, at compile time.
  constexpr float normaliser = [] {
    double root = kDim;
    for (int i = 0; i < 64; ++i) root = 0.5 * (root + kDim / root);
    return static_cast<float>(1.0 / root);
  }();
  const auto multiply_signs = [&](int round) {
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      y[k] *= round == 0   ? factors.signs[0][k]
              : round == 1 ? factors.signs[1][k]
                           : factors.signs[2][k];
    }
  };
  // (even, odd) <- (c even - s odd, s even + c odd): partners are neighbouring lanes.
  const auto turn = [&] {
    const bool subtracts = (lane % 2 == 0) != kTranspose;
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const float partner = factors.sine[k] * ptx::shuffle_xor(y[k], 1);
      y[k] = factors.cosine[k] * y[k] + (subtracts ? -partner : partner);
    }
  };
  // Rolled: code that runs once is paid for by the instruction.
  TQ_NO_UNROLL
  for (int step = 0; step < 3; ++step) {
    const int round = kTranspose ? 2 - step : step;
    if constexpr (kTranspose) {
      hadamard_row<kDim, true>(y, x, lane, normaliser);
      if (round == 1) turn();
      multiply_signs(round);
    } else {
      multiply_signs(round);
      if (round == 1) turn();
      hadamard_row<kDim, false>(y, x, lane, normaliser);
    }
  }
}

}  // namespace turboquant::cuda::detail
