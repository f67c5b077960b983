// Normalised Hadamard transforms of orders 2^k, 12 * 2^k and 20 * 2^k.
//
//   H_d = (H_m (x) H_{2^k}) / sqrt(d),  m in {1, 12, 20},  d = m * 2^k,
//
// H_{2^k} is Sylvester's (natural order, symmetric); H_12 and H_20 are Paley's first construction
// for the primes 11 and 19, which is not symmetric, so the inverse is the transpose and not the
// transform itself.
//
// Numerics: every output is a fixed tree of additions (stages of stride 1, 2, 4, ... and then the
// m blocks summed in ascending order) and one multiplication at the end. Nothing can be contracted
// to an FMA before that multiplication, and vectorising does not reorder anything, so results are
// bit-identical at every instruction set.
//
// The kernels in `detail` take a tag type `Isa`: a unit compiled with -mavx512f passes a tag of its
// own, so its instantiations have their own symbols and never replace the portable ones.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "turboquant/error.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::math {

inline constexpr int kMaxHadamardDim = 1 << 20;

// The Paley factor m of a supported d: 1, 12 or 20; 0 when d is not supported.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int hadamard_factor(int d) {
  if (d < 1 || d > kMaxHadamardDim) return 0;
  int odd = d;
  while (odd % 2 == 0) odd /= 2;
  if (odd == 1) return 1;
  if ((odd == 3 || odd == 5) && d % 4 == 0) return 4 * odd;
  return 0;
}

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr bool hadamard_supported(int d) {
  return hadamard_factor(d) != 0;
}

// The supported set in words, for error messages.
inline std::string hadamard_supported_text() {
  return "2^k, 12*2^k or 20*2^k up to " + std::to_string(kMaxHadamardDim) +
         " (such as 64, 80, 96, 128, 160, 192, 256)";
}

// Entry (row, column) of the Paley matrix of order m = q + 1, +1 or -1: the identity plus the
// skew matrix bordered by ones whose core is chi(row - column), chi the Legendre symbol mod q.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int paley_sign(int order, int row, int column) {
  if (row == column || row == 0) return 1;
  if (column == 0) return -1;
  const int q = order - 1;
  const int difference = (row - column + q) % q;
  for (int i = 1; i < q; ++i) {
    if (i * i % q == difference) return 1;
  }
  return -1;
}

struct PortableIsa {};

namespace detail {

// In-place unnormalised H_{size} (x) I_{lanes}; x is [count][size][lanes], size a power of two.
// Two stages share a pass over memory; the additions are those of one stage after the other.
template <class Isa, class Float>
TQ_ALWAYS_INLINE void sylvester_stages(Float* x, int64_t count, int64_t size, int64_t lanes) {
  const int64_t total = count * size * lanes;
  int64_t stride = lanes;
  for (; 2 * stride < size * lanes; stride *= 4) {
    for (int64_t start = 0; start < total; start += 4 * stride) {
      Float* const block = x + start;
      TQ_NO_LOOP_DEPENDENCE
      for (int64_t i = 0; i < stride; ++i) {
        const Float sum01 = block[i] + block[stride + i];
        const Float difference01 = block[i] - block[stride + i];
        const Float sum23 = block[2 * stride + i] + block[3 * stride + i];
        const Float difference23 = block[2 * stride + i] - block[3 * stride + i];
        block[i] = sum01 + sum23;
        block[stride + i] = difference01 + difference23;
        block[2 * stride + i] = sum01 - sum23;
        block[3 * stride + i] = difference01 - difference23;
      }
    }
  }
  if (stride < size * lanes) {
    for (int64_t start = 0; start < total; start += 2 * stride) {
      Float* const block = x + start;
      TQ_NO_LOOP_DEPENDENCE
      for (int64_t i = 0; i < stride; ++i) {
        const Float sum = block[i] + block[stride + i];
        const Float difference = block[i] - block[stride + i];
        block[i] = sum;
        block[stride + i] = difference;
      }
    }
  }
}

template <int kOrder, bool kTranspose>
struct PaleySigns {
  std::array<std::array<bool, kOrder>, kOrder> positive{};

  constexpr PaleySigns() {
    for (int i = 0; i < kOrder; ++i) {
      for (int j = 0; j < kOrder; ++j) {
        positive[i][j] = (kTranspose ? paley_sign(kOrder, j, i) : paley_sign(kOrder, i, j)) > 0;
      }
    }
  }
};

template <int kOrder, bool kTranspose>
inline constexpr PaleySigns<kOrder, kTranspose> kPaleySigns{};

// Sum over j of sign(kRow, j) * column[j * kPitch], ascending. The signs are constants, so this is
// kOrder - 1 additions or subtractions (and a negation where the first sign is negative).
template <class Isa, int kOrder, bool kTranspose, int kRow, int kPitch, class Float,
          size_t... kColumn>
TQ_ALWAYS_INLINE Float paley_sum(const Float* column, std::index_sequence<kColumn...>) {
  constexpr const auto& positive = kPaleySigns<kOrder, kTranspose>.positive[kRow];
  Float sum = positive[0] ? column[0] : -column[0];
  ((sum = positive[kColumn + 1] ? sum + column[(kColumn + 1) * kPitch]
                                : sum - column[(kColumn + 1) * kPitch]),
   ...);
  return sum;
}

// Output rows kRow, kRow + 1, ... of kWidth columns of x, four rows in one pass over `in`: few
// enough sums for the registers of every instruction set.
template <class Isa, int kOrder, bool kTranspose, int kWidth, int kRow, class Float>
TQ_ALWAYS_INLINE void paley_rows(const Float* in, Float* x, int64_t stride) {
  if constexpr (kRow < kOrder) {
    constexpr auto rest = std::make_index_sequence<kOrder - 1>{};
    for (int l = 0; l < kWidth; ++l) {
      const Float* const column = in + l;
      Float* const out = x + kRow * stride + l;
      out[0] = paley_sum<Isa, kOrder, kTranspose, kRow, kWidth>(column, rest);
      out[stride] = paley_sum<Isa, kOrder, kTranspose, kRow + 1, kWidth>(column, rest);
      out[2 * stride] = paley_sum<Isa, kOrder, kTranspose, kRow + 2, kWidth>(column, rest);
      out[3 * stride] = paley_sum<Isa, kOrder, kTranspose, kRow + 3, kWidth>(column, rest);
    }
    paley_rows<Isa, kOrder, kTranspose, kWidth, kRow + 4>(in, x, stride);
  }
}

// In-place unnormalised H_kOrder (x) I on kWidth neighbouring columns of x [kOrder][stride].
template <class Isa, int kOrder, bool kTranspose, int kWidth, class Float>
TQ_ALWAYS_INLINE void paley_strip(Float* x, int64_t stride) {
  Float in[kOrder * kWidth];
  for (int j = 0; j < kOrder; ++j) {
    for (int l = 0; l < kWidth; ++l) in[j * kWidth + l] = x[j * stride + l];
  }
  paley_rows<Isa, kOrder, kTranspose, kWidth, 0>(in, x, stride);
}

// In-place unnormalised H_kOrder (x) I_stride (or its transpose); x is [kOrder][stride].
template <class Isa, int kOrder, bool kTranspose, class Float>
TQ_ALWAYS_INLINE void paley_stage(Float* x, int64_t stride) {
  int64_t i = 0;
  for (; i + 16 <= stride; i += 16) paley_strip<Isa, kOrder, kTranspose, 16>(x + i, stride);
  for (; i + 8 <= stride; i += 8) paley_strip<Isa, kOrder, kTranspose, 8>(x + i, stride);
  for (; i + 4 <= stride; i += 4) paley_strip<Isa, kOrder, kTranspose, 4>(x + i, stride);
  for (; i < stride; ++i) paley_strip<Isa, kOrder, kTranspose, 1>(x + i, stride);
}

// The normalised transform of `lanes` interleaved vectors in place: x is [d][lanes], element
// (i, l) at x[i * lanes + l]. lanes = 1 is one plain vector; lanes = 8 or 16 keeps every stage a
// run of whole SIMD registers without shuffles. A lane's result does not depend on `lanes`.
// d must be supported: unchecked here.
template <class Isa, bool kTranspose, class Float>
void hadamard_kernel(Float* x, int d, int64_t lanes) {
  const int factor = hadamard_factor(d);
  const int64_t size = d / factor;
  sylvester_stages<Isa>(x, factor, size, lanes);
  if (factor == 12) paley_stage<Isa, 12, kTranspose>(x, size * lanes);
  if (factor == 20) paley_stage<Isa, 20, kTranspose>(x, size * lanes);
  const Float normaliser = static_cast<Float>(1.0 / std::sqrt(static_cast<double>(d)));
  for (int64_t i = 0; i < d * lanes; ++i) x[i] *= normaliser;
}

inline void check_hadamard_dim(int d) {
  if (!hadamard_supported(d)) {
    turboquant::detail::throw_invalid("dim", hadamard_supported_text(), std::to_string(d));
  }
}

}  // namespace detail

// x <- H_d x in place. Throws InvalidArgument when d is not supported.
template <class Float>
void hadamard_transform(Float* x, int d) {
  detail::check_hadamard_dim(d);
  detail::hadamard_kernel<PortableIsa, false>(x, d, 1);
}

// x <- H_d^T x in place: the inverse of hadamard_transform.
template <class Float>
void hadamard_transform_transpose(Float* x, int d) {
  detail::check_hadamard_dim(d);
  detail::hadamard_kernel<PortableIsa, true>(x, d, 1);
}

}  // namespace turboquant::math
