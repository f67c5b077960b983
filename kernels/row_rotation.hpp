// The rotation R of quant/rotation.hpp on a row that neighbouring threads hold in registers, in the
// order of additions of math/hadamard.hpp, so that its bits are the CPU's.
//
// Threads of a row part at neighbouring bits of the coordinate. A butterfly over such a bit needs a
// partner's numbers:
// - Powers of two from 64 on part at bits 5 (and 6) at first. A round's stage over a parting bit t
//   is a trade: both threads send half of their numbers, those that differ in bit t - 1, and
//   compute both outputs of what they keep and get. From then on they part at t - 1, so that three
//   rounds end at bits 2 (and 3): quads. Partners send the same registers, for the stage over bit
//   t - 1 before left the outputs of the thread whose bit t is 1 the other way round. That thread
//   takes its differences with the wrong sign, which the next factor mends (negated()). Only the
//   signs of zeros can differ from the CPU's.
// - Multiples of Paley's matrices part at bit 2 from 96 on, and exchange every number.
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
  static constexpr bool kTrades = kFactor == 1 && kDim >= 64;
  static constexpr int kPartBits = kTrades ? (kDim == 64 ? 1 : 2) : kDim > 80 ? 1 : 0;
  static constexpr int kThreads = 1 << kPartBits;          // per row
  static constexpr int kElems = kDim / kThreads;           // per thread
  static constexpr int kSize = kDim / kFactor / kThreads;  // Sylvester's order inside a thread
  static_assert(kPartBits == 0 || kSize >= 4, "quads are a thread's");
  // A thread's floats in shared memory: an odd number of 16-byte pieces, so that eight neighbouring
  // threads' 16-byte accesses hit all banks once.
  static constexpr int kPitch = (kElems / 4 | 1) * 4;

  // Where coordinates are held before round `layout` (from 0), or (3) after the last one: the
  // lowest bit at which threads part, and a thread's elements in ascending order of the others.
  TQ_HOST_DEVICE static constexpr int low_bit(int layout) { return kTrades ? 5 - layout : 2; }
  TQ_HOST_DEVICE static constexpr int part_of(int layout, int i) {
    return i >> low_bit(layout) & (kThreads - 1);
  }
  TQ_HOST_DEVICE static constexpr int elem_of(int layout, int i) {
    const int bit = low_bit(layout);
    return i >> (bit + kPartBits) << bit | (i & ((1 << bit) - 1));
  }
  TQ_HOST_DEVICE static constexpr int coordinate(int layout, int part, int e) {
    const int bit = low_bit(layout);
    return e >> bit << (bit + kPartBits) | part << bit | (e & ((1 << bit) - 1));
  }
  // Whether round `round` leaves coordinate i with the wrong sign.
  TQ_HOST_DEVICE static constexpr bool negated(int round, int i) {
    const int pairs = i & i << 1;  // bit t: bits t and t - 1
    return kTrades &&
           ((pairs >> low_bit(round) ^ (kPartBits == 2 ? pairs >> (low_bit(round) + 1) : 0)) & 1) !=
               0;
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

// f(i, i + kStride) for the stage of stride kStride.
template <int kStride, int kElems, class F>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void each_pair(F f) {
  TQ_UNROLL
  for (int start = 0; start < kElems; start += 2 * kStride) {
    TQ_UNROLL
    for (int i = start; i < start + kStride; ++i) f(i, i + kStride);
  }
}

// Butterflies of strides kStride, 2 kStride, ... below kEnd.
template <int kStride, int kEnd, int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void butterflies(float (&x)[kElems]) {
  if constexpr (kStride < kEnd) {
    each_pair<kStride, kElems>([&x](int i, int j) {
      const float a = x[i], b = x[j];
      x[i] = add_rn(a, b);
      x[j] = sub_rn(a, b);
    });
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

// The stage of stride kStride; kept the other way round, differences first, where sign is -1,
// not 1.
template <int kStride, int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void signed_butterflies(float sign, float (&x)[kElems]) {
  // Exact products: rounded once, as the sum or the difference is.
  each_pair<kStride, kElems>([&x, sign](int i, int j) {
    const float a = x[i], b = x[j];
    x[i] = fma_rn(b, sign, a);
    x[j] = fma_rn(b, -sign, a);
  });
}

// Round kRound's Hadamard transform without its normaliser, in parts: up to the stage over the
// lowest parting bit, the stage over the kNth parting bit, and the rest. sign(n) is -1 where the
// thread's part has bit n, else 1; partner(e) is element e of the thread whose part differs in bit
// kNth, before this stage.
template <int kDim, int kRound, class Sign>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hadamard_begin(Sign sign, float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    constexpr int kSlot = 1 << (Shape::low_bit(kRound) - 1);
    butterflies<1, kSlot>(x);
    signed_butterflies<kSlot>(sign(0), x);
  } else {
    butterflies<1, Shape::kThreads == 1 ? Shape::kSize : 4>(x);
  }
}
template <int kDim, int kRound, int kNth, class Sign, class Partner>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hadamard_cross(Sign sign, Partner partner,
                                                    float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    constexpr int kSlot = 1 << (Shape::low_bit(kRound) - 1);
    // The next trade sends what differs in this stage's bit.
    const float next = kNth + 1 < Shape::kPartBits ? sign(kNth + 1) : 1.0f;
    each_pair<kSlot, Shape::kElems>([&](int i, int j) {
      const float kept = x[i];
      const float other = partner(j);
      x[i] = kNth + 1 < Shape::kPartBits ? fma_rn(other, next, kept) : add_rn(kept, other);
      x[j] = kNth + 1 < Shape::kPartBits ? fma_rn(other, -next, kept) : sub_rn(kept, other);
    });
  } else {
    TQ_UNROLL
    for (int e = 0; e < Shape::kElems; ++e) {
      hold_loads(e);
      x[e] = fma_rn(x[e], sign(0), partner(e));
    }
  }
}
template <int kDim, int kRound, bool kTranspose>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void hadamard_end(float (&x)[RowShape<kDim>::kElems]) {
  using Shape = RowShape<kDim>;
  if constexpr (Shape::kTrades) {
    butterflies<1 << Shape::low_bit(kRound), Shape::kElems>(x);
  } else {
    if constexpr (Shape::kThreads == 2) butterflies<4, Shape::kSize>(x);
    paley_stage<kDim, kTranspose>(x);
  }
}

// Coordinate i becomes f(it, table[i]).
template <int kElems, class F>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void apply_table(const float* table, float (&x)[kElems], F f) {
  TQ_UNROLL
  for (int e = 0; e < kElems; e += 4) {
    hold_loads(e);
    const Four four = load_four(table + e);
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) x[e + i] = f(x[e + i], four.at[i]);
  }
}
template <int kElems>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void multiply(const float* table, float (&x)[kElems]) {
  apply_table(table, x, [](float a, float b) { return mul_rn(a, b); });
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
