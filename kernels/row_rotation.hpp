// The rotation R of quant/rotation.hpp on a row that one or two threads hold in registers, in the
// order of additions of math/hadamard.hpp, so that its bits are the CPU's.
//
// One thread holds rows of up to 80 coordinates. Longer rows are held by two neighbouring threads
// (part 0 and 1), which part at one bit of the coordinate. A butterfly over that bit needs the
// partner's numbers:
// - Powers of two part at bit 6 at first. A round's stage over the parting bit t is a trade: each
//   thread sends half of its row, the part that differs in bit t - 1, and computes both outputs of
//   what it keeps and gets. From then on they part at t - 1, so that three rounds end at bit 3:
//   whole groups of eight, as they are packed. The halves lie where both threads send the same
//   registers: the stage before (over bit t - 1) leaves thread 1's outputs the other way round, and
//   thread 1 takes its differences with the wrong sign, which the next factor mends (negated()).
//   Only the signs of zeros can differ from the CPU's.
// - Multiples of Paley's matrices part at bit 2: cross_rows() exchanges every number, and after the
//   last round regroup() moves to bit 3.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "exact_math.hpp"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

template <int kDim>
struct RowShape {
  static constexpr int kFactor = math::hadamard_factor(kDim);  // 1, 12 or 20
  static_assert(kFactor != 0 && kDim % 8 == 0 && kDim <= 256);
  static constexpr int kThreads = kDim > 80 ? 2 : 1;       // per row
  static constexpr int kElems = kDim / kThreads;           // per thread
  static constexpr int kSize = kDim / kFactor / kThreads;  // Sylvester's order inside a thread
  static_assert(kThreads == 1 || kSize >= 4, "strides 1 and 2 come before the crossing stage");
  // A thread's floats in shared memory: an odd number of 16-byte pieces, so that eight neighbouring
  // threads' 16-byte accesses hit all banks once.
  static constexpr int kPitch = (kElems / 4 | 1) * 4;

  static constexpr bool kTrades = kThreads == 2 && kFactor == 1;

  // Where coordinates are held before round `layout` (from 0), or (3) after the last one: the bit
  // at which two threads part, and a thread's elements in ascending order of the others.
  TQ_HOST_DEVICE static constexpr int part_bit(int layout) {
    return kTrades ? 6 - layout : layout < 3 ? 2 : 3;
  }
  TQ_HOST_DEVICE static constexpr int part_of(int layout, int i) {
    return kThreads == 1 ? 0 : i >> part_bit(layout) & 1;
  }
  TQ_HOST_DEVICE static constexpr int elem_of(int layout, int i) {
    const int bit = part_bit(layout);
    return kThreads == 1 ? i : i >> (bit + 1) << bit | (i & ((1 << bit) - 1));
  }
  TQ_HOST_DEVICE static constexpr int coordinate(int layout, int part, int e) {
    const int bit = part_bit(layout);
    return kThreads == 1 ? e : e >> bit << (bit + 1) | part << bit | (e & ((1 << bit) - 1));
  }
  // Whether round `round` leaves coordinate i with the wrong sign.
  TQ_HOST_DEVICE static constexpr bool negated(int round, int i) {
    return kTrades && (i >> part_bit(round) & i >> part_bit(round + 1) & 1) != 0;
  }
  // Place of coordinate i in a table that threads read 16 bytes at a time.
  TQ_HOST_DEVICE static constexpr int table_slot(int layout, int i) {
    return part_of(layout, i) * kPitch + elem_of(layout, i);
  }
  static constexpr int kTableFloats = kThreads * kPitch;
};

// Four floats that are read and written together.
struct alignas(16) Four {
  float at[4];
};
TQ_HOST_DEVICE TQ_ALWAYS_INLINE Four load_four(const float* from) {
  return *reinterpret_cast<const Four*>(from);
}
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_four(float* to, const float* from) {
  *reinterpret_cast<Four*>(to) = Four{{from[0], from[1], from[2], from[3]}};
}

// Loads of a table do not pass this: left alone, ptxas moves all of them to the front of a loop and
// spills something else. Whole warps only.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hold_loads(int elem) {
#if defined(__CUDA_ARCH__)
  if (elem % 16 == 0) __syncwarp();
#else
  (void)elem;
#endif
}

template <int kCount>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_row(const float* from, float (&x)[kCount]) {
  TQ_UNROLL
  for (int e = 0; e < kCount; e += 4) {
    const Four four = load_four(from + e);
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) x[e + i] = four.at[i];
  }
}
template <int kCount>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_row(float* to, const float (&x)[kCount]) {
  TQ_UNROLL
  for (int e = 0; e < kCount; e += 4) store_four(to + e, x + e);
}

// Butterflies of strides kStride, 2 kStride, ... below kEnd.
template <int kStride, int kEnd, int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void butterflies(float (&x)[kElems]) {
  if constexpr (kStride < kEnd) {
    TQ_UNROLL
    for (int start = 0; start < kElems; start += 2 * kStride) {
      TQ_UNROLL
      for (int i = start; i < start + kStride; ++i) {
        const float a = x[i];
        const float b = x[i + kStride];
        x[i] = add_rn(a, b);
        x[i + kStride] = sub_rn(a, b);
      }
    }
    butterflies<2 * kStride, kEnd>(x);
  }
}

// Row kRow of the Paley matrix times a column, ascending.
template <int kOrder, bool kTranspose, int kRow, size_t... kColumn>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE float paley_sum(const float (&in)[kOrder],
                                                std::index_sequence<kColumn...>) {
  constexpr auto positive = [](int column) {
    return (kTranspose ? math::paley_sign(kOrder, column, kRow)
                       : math::paley_sign(kOrder, kRow, column)) > 0;
  };
  constexpr bool kFirst = positive(0);
  float sum = kFirst ? in[0] : -in[0];
  (
      [&] {
        constexpr bool kPositive = positive(static_cast<int>(kColumn) + 1);
        sum = kPositive ? add_rn(sum, in[kColumn + 1]) : sub_rn(sum, in[kColumn + 1]);
      }(),
      ...);
  return sum;
}

template <int kOrder, bool kTranspose, int kStride, int kElems, size_t... kRow>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void paley_column(float (&x)[kElems], int column,
                                                  std::index_sequence<kRow...>) {
  float in[kOrder];
  TQ_UNROLL
  for (int j = 0; j < kOrder; ++j) in[j] = x[j * kStride + column];
  ((x[kRow * kStride + column] =
        paley_sum<kOrder, kTranspose, kRow>(in, std::make_index_sequence<kOrder - 1>{})),
   ...);
}

template <int kDim, bool kTranspose>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void paley_stage(float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kFactor > 1) {
    TQ_UNROLL
    for (int column = 0; column < Shape::kSize; ++column) {
      paley_column<Shape::kFactor, kTranspose, Shape::kSize>(
          x, column, std::make_index_sequence<Shape::kFactor>{});
    }
  }
}

// The stage of stride kStride; kept the other way round where sign is -1, not 1: differences first.
template <int kStride, int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void signed_butterflies(float sign, float (&x)[kElems]) {
  TQ_UNROLL
  for (int start = 0; start < kElems; start += 2 * kStride) {
    TQ_UNROLL
    for (int i = start; i < start + kStride; ++i) {
      // Exact products: rounded once, as the sum or the difference is.
      const float a = x[i];
      const float b = x[i + kStride];
      x[i] = fma_rn(b, sign, a);
      x[i + kStride] = fma_rn(b, -sign, a);
    }
  }
}

// Round kRound's Hadamard transform without its normaliser, in three parts: up to the stage over
// the parting bit, that stage (two threads a row only), and the rest. `sign` is 1 for part 0, -1
// for part 1; partner(e) is the partner's element e as hadamard_begin() left it.
template <int kDim, int kRound>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hadamard_begin(float sign,
                                                    float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    constexpr int kNext = 1 << Shape::part_bit(kRound + 1);
    butterflies<1, kNext>(x);
    signed_butterflies<kNext>(sign, x);
  } else {
    butterflies<1, Shape::kThreads == 1 ? Shape::kSize : 4>(x);
  }
}
template <int kDim, int kRound, class Partner>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void cross_rows(float sign, Partner partner,
                                                float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    constexpr int kNext = 1 << Shape::part_bit(kRound + 1);
    TQ_UNROLL
    for (int start = 0; start < Shape::kElems; start += 2 * kNext) {
      TQ_UNROLL
      for (int i = start; i < start + kNext; ++i) {
        const float kept = x[i];
        const float other = partner(i + kNext);
        x[i] = add_rn(kept, other);
        x[i + kNext] = sub_rn(kept, other);
      }
    }
  } else {
    TQ_UNROLL
    for (int e = 0; e < Shape::kElems; ++e) x[e] = fma_rn(x[e], sign, partner(e));
  }
}
template <int kDim, int kRound, bool kTranspose>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hadamard_end(float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    butterflies<1 << Shape::part_bit(kRound), Shape::kElems>(x);
  } else {
    if constexpr (Shape::kThreads == 2) butterflies<4, Shape::kSize>(x);
    paley_stage<kDim, kTranspose>(x);
  }
}
// From parting at bit 2 to bit 3. partner(a, b): the partner's element a, b of part 1's.
template <int kElems, class Partner>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void regroup(int part, Partner partner, float (&x)[kElems]) {
  TQ_UNROLL
  for (int start = 0; start < kElems; start += 8) {
    TQ_UNROLL
    for (int i = start; i < start + 4; ++i) {
      const float other = partner(i + 4, i);
      x[i] = part == 0 ? x[i] : other;
      x[i + 4] = part == 0 ? other : x[i + 4];
    }
  }
}

// Coordinate i times table[i].
template <int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void multiply(const float* table, float (&x)[kElems]) {
  TQ_UNROLL
  for (int e = 0; e < kElems; e += 4) {
    hold_loads(e);
    const Four factor = load_four(table + e);
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) x[e + i] = mul_rn(x[e + i], factor.at[i]);
  }
}

// Turns of neighbouring coordinates by the table's {c, s}.
template <int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void turn_pairs(const float* turns, float (&x)[kElems]) {
  TQ_UNROLL
  for (int e = 0; e < kElems; e += 4) {
    hold_loads(e);
    const Four four = load_four(turns + e);
    TQ_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const float c = four.at[i], s = four.at[i + 1];
      const float even = x[e + i], odd = x[e + i + 1];
      x[e + i] = sub_rn(mul_rn(c, even), mul_rn(s, odd));
      x[e + i + 1] = add_rn(mul_rn(s, even), mul_rn(c, odd));
    }
  }
}

// Their inverses, and signs behind them: the table has {c, s} times the sign of each coordinate.
template <int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void turn_pairs_back(const float* turns, float (&x)[kElems]) {
  TQ_UNROLL
  for (int e = 0; e < kElems; e += 2) {
    hold_loads(2 * e);
    const Four four = load_four(turns + 2 * e);
    const float even = x[e], odd = x[e + 1];
    x[e] = add_rn(mul_rn(four.at[0], even), mul_rn(four.at[1], odd));
    x[e + 1] = sub_rn(mul_rn(four.at[2], odd), mul_rn(four.at[3], even));
  }
}

// 1 / sqrt(d) as the transform multiplies by it.
template <int kDim>
inline constexpr float kNormaliser = [] {
  // Newton's iteration in double; tests compare with std::sqrt.
  double root = kDim;
  for (int i = 0; i < 64; ++i) root = 0.5 * (root + kDim / root);
  return static_cast<float>(1.0 / root);
}();

}  // namespace turboquant::cuda::detail
