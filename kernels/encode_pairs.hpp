// The indices of a vector codebook for one row of encode_append: every index is tried, in the order
// and with the roundings of quant/quantize_rows.hpp. Host and device.
//
// The threads of a row share its work: pairs in fours at 4 bits, bytes of the four segments at 3
// bits, words at 2 bits. All threads of a warp read the same codeword at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exact_math.hpp"
#include "row_rotation.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cuda::detail {

// Two neighbouring coordinates.
struct alignas(8) Pair {
  float at[2];
};

// The least cost so far and its index.
struct Cheapest {
  float cost;
  int index;

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void consider(float other_cost, int other) {
    const bool less = other_cost < cost;
    index = less ? other : index;
    cost = less ? other_cost : cost;
  }
};
// Costs of finite rows are less.
inline constexpr Cheapest kNoIndex = {3.402823466e+38f, 0};

template <int kDim>
struct PairSearch {
  using Shape = RowShape<kDim>;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kPairs = kDim / 2;
  static constexpr int kEntries = math::VectorCodebook::kEntries;
  static constexpr int kStates = 16;  // of the trellis at 2 bits: values of a nibble

  const Codeword* codewords;  // [256], shared
  const float* tile;          // the row, as its threads hold it, Shape::kPitch apart
  float factor;
  int part;          // of the row's threads
  uint8_t* indices;  // [kPairs] of the row, shared

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find(int bits) const {
    if (bits == 4) {
      find_bytes();
    } else if (bits == 3) {
      find_planes();
    } else {
      find_words();
    }
  }
  // A row without a direction.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void clear() const {
    TQ_NO_UNROLL
    for (int n = part; n < kPairs; n += kThreads) indices[n] = 0;
  }
  // Levels of the row's pairs n and n + 1, n even.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void levels(int n, float* level) const {
    const uint32_t two = *reinterpret_cast<const uint16_t*>(indices + n);
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      const auto pair = *reinterpret_cast<const Pair*>(codewords[two >> (8 * k) & 0xFF].level);
      level[2 * k] = pair.at[0];
      level[2 * k + 1] = pair.at[1];
    }
  }

 private:
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE Pair pair(int n) const {
    constexpr int kEnd = quant::SignHadamardRotation::kRounds;
    const float* const from =
        tile + Shape::part_of(kEnd, 2 * n) * Shape::kPitch + Shape::elem_of(kEnd, 2 * n);
    const Pair y = *reinterpret_cast<const Pair*>(from);
    return {{mul_rn(y.at[0], factor), mul_rn(y.at[1], factor)}};
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static float cost(const Pair& x, const Codeword& c) {
    return sub_rn(sub_rn(c.half_square, mul_rn(x.at[0], c.level[0])), mul_rn(x.at[1], c.level[1]));
  }

  // 4 bits: four pairs at a time, so that a codeword is loaded once for them.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_bytes() const {
    TQ_NO_UNROLL
    for (int n = 4 * part; n < kPairs; n += 4 * kThreads) {
      Pair x[4];
      Cheapest best[4] = {kNoIndex, kNoIndex, kNoIndex, kNoIndex};
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) x[k] = pair(n + k);
      TQ_NO_UNROLL
      for (int start = 0; start < kEntries; start += 4) {
        TQ_UNROLL
        for (int e = start; e < start + 4; ++e) {
          const Codeword codeword = codewords[e];
          TQ_UNROLL
          for (int k = 0; k < 4; ++k) best[k].consider(cost(x[k], codeword), e);
        }
      }
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) indices[n + k] = static_cast<uint8_t>(best[k].index);
    }
  }

  // 3 bits: byte i of the three segments and what bits 3 and 7 of them make. Indices are
  // low + 16 high + their spare bits, low and high below 8.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_planes() const {
    constexpr int kSegment = kDim / 8;
    constexpr int kSpares = 4;  // values of a byte's spare bits
    TQ_NO_UNROLL
    for (int i = part; i < kSegment; i += kThreads) {
      Pair x[3];
      Cheapest own[3][kSpares];
      TQ_UNROLL
      for (int j = 0; j < 3; ++j) {
        x[j] = pair(j * kSegment + i);
        TQ_UNROLL
        for (int spare = 0; spare < kSpares; ++spare) own[j][spare] = kNoIndex;
      }
      TQ_NO_UNROLL
      for (int high = 0; high < 8; ++high) {
        TQ_NO_UNROLL
        for (int low = 0; low < 8; ++low) {
          TQ_UNROLL
          for (int spare = 0; spare < kSpares; ++spare) {
            const int e = low + 16 * high + (spare & 1) * 8 + (spare & 2) * 64;
            const Codeword codeword = codewords[e];
            TQ_UNROLL
            for (int j = 0; j < 3; ++j) own[j][spare].consider(cost(x[j], codeword), e);
          }
        }
      }
      const Pair last = pair(3 * kSegment + i);
      Cheapest best = kNoIndex;
      TQ_NO_UNROLL
      for (int high = 0; high < 8; ++high) {
        float given_low[3][2];  // by bit j of low; bit j of high is given
        TQ_UNROLL
        for (int j = 0; j < 3; ++j) {
          TQ_UNROLL
          for (int bit = 0; bit < 2; ++bit) {
            given_low[j][bit] = (high >> j & 1) != 0 ? own[j][bit + 2].cost : own[j][bit].cost;
          }
        }
        TQ_UNROLL
        for (int low = 0; low < 8; ++low) {
          const int e = low + 16 * high;
          float sum = cost(last, codewords[e]);
          TQ_UNROLL
          for (int j = 0; j < 3; ++j) sum = add_rn(sum, given_low[j][low >> j & 1]);
          best.consider(sum, e);
        }
      }
      indices[3 * kSegment + i] = static_cast<uint8_t>(best.index);
      TQ_UNROLL
      for (int j = 0; j < 3; ++j) {
        const int low = best.index >> j & 1;
        const int given_high[2] = {low != 0 ? own[j][1].index : own[j][0].index,
                                   low != 0 ? own[j][3].index : own[j][2].index};
        indices[j * kSegment + i] =
            static_cast<uint8_t>((best.index >> (4 + j) & 1) != 0 ? given_high[1] : given_high[0]);
      }
    }
  }

  // 2 bits: Viterbi's algorithm over a word's nibbles. Arrays are shifted, not indexed, by the
  // steps of a loop that is not unrolled, so that they stay in registers.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_words() const {
    constexpr int kWords = (kPairs + quant::kWordPairs - 1) / quant::kWordPairs;
    TQ_NO_UNROLL
    for (int word = part; word < kWords; word += kThreads) {
      const int first = word * quant::kWordPairs;
      const int count = kPairs - first < quant::kWordPairs ? kPairs - first : quant::kWordPairs;
      float best[kStates];  // of the pairs so far, by the next pair's low nibble
      // from[j]: the low nibble of the pair j before the latest one, on the best way to each low
      // nibble of the pair behind it, 4 bits each.
      uint64_t from[quant::kWordPairs];
      TQ_UNROLL
      for (int n = 0; n < kStates; ++n) best[n] = 0.0f;
      TQ_UNROLL
      for (int j = 0; j < quant::kWordPairs; ++j) from[j] = 0;
      TQ_NO_UNROLL
      for (int k = 0; k < count; ++k) {
        const Pair x = pair(first + k);
        float next_best[kStates];
        uint64_t nibbles = 0;
        TQ_UNROLL
        for (int n = 0; n < kStates; ++n) next_best[n] = 0.0f;
        TQ_NO_UNROLL
        for (int next = 0; next < kStates; ++next) {
          Cheapest way = kNoIndex;
          TQ_UNROLL
          for (int n = 0; n < kStates; ++n) {
            way.consider(add_rn(best[n], cost(x, codewords[n + next * kStates])), n);
          }
          TQ_UNROLL
          for (int n = 0; n + 1 < kStates; ++n) next_best[n] = next_best[n + 1];
          next_best[kStates - 1] = way.cost;
          nibbles = nibbles >> 4 | static_cast<uint64_t>(way.index) << 60;
        }
        TQ_UNROLL
        for (int n = 0; n < kStates; ++n) best[n] = next_best[n];
        TQ_UNROLL
        for (int j = quant::kWordPairs - 1; j > 0; --j) from[j] = from[j - 1];
        from[0] = nibbles;
      }
      int next = 0;  // behind the last pair
      TQ_UNROLL
      for (int j = 0; j < quant::kWordPairs; ++j) {
        if (j < count) {
          const int nibble = static_cast<int>(from[j] >> (4 * next)) & 15;
          indices[first + count - 1 - j] = static_cast<uint8_t>(nibble + next * kStates);
          next = nibble;
        }
      }
    }
  }
};

}  // namespace turboquant::cuda::detail
