// Codes to bytes: in the tile of encode_append, and from there to a page. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// f(std::integral_constant<int, bits>); kNarrow: at most 4 bits.
template <bool kNarrow, class F>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void with_bits(int bits, F f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
  }
  if constexpr (!kNarrow) {
    switch (bits) {
      case 5:
        return f(std::integral_constant<int, 5>{});
      case 6:
        return f(std::integral_constant<int, 6>{});
      case 7:
        return f(std::integral_constant<int, 7>{});
      default:
        return f(std::integral_constant<int, 8>{});
    }
  }
}

// The low kBytes of a word, in the largest pieces that group * kBytes is aligned to.
template <int kBytes, class Word>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_bytes(Word word, std::byte* to) {
  if constexpr (kBytes == 8) {
    *reinterpret_cast<uint64_t*>(to) = word;
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(word);
  } else if constexpr (kBytes % 2 == 0) {
    TQ_UNROLL
    for (int i = 0; i < kBytes / 2; ++i) {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(word >> (16 * i));
    }
  } else {
    TQ_UNROLL
    for (int i = 0; i < kBytes; ++i) to[i] = static_cast<std::byte>(word >> (8 * i));
  }
}

// A group's bytes in the tile. At 3 bits the codes lie there as nibbles: store_rows moves the
// last quarter of the row into the spare bits.
template <int kBits>
inline constexpr int kGroupBytes = kBits == 3 ? 4 : kBits;
// Rows of groups in the tile: an odd number of 16-byte pieces apart.
template <int kBits>
TQ_HOST_DEVICE constexpr int group_row_pitch(int dim) {
  return ((dim / 8 * kGroupBytes<kBits> + 15) / 16 | 1) * 16;
}

// Codes of the halves of groups of eight to every kStep'th group of a row. Rows start on 16 bytes.
template <int kBits, int kStep, int kGroups>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void pack_groups(const uint32_t (&codes)[kGroups][2],
                                                 std::byte* to) {
  constexpr int kBytes = kGroupBytes<kBits>;
  if constexpr (kBits <= 4) {
    struct alignas(16) Words {
      uint32_t at[kGroups];
    } words;
    TQ_UNROLL
    for (int g = 0; g < kGroups; ++g) words.at[g] = codes[g][0] | codes[g][1] << (4 * kBytes);
    if constexpr (kBytes == 4 && kStep == 1 && kGroups % 4 == 0) {
      *reinterpret_cast<Words*>(to) = words;
    } else {
      TQ_UNROLL
      for (int g = 0; g < kGroups; ++g) store_bytes<kBytes>(words.at[g], to + g * kStep * kBytes);
    }
  } else {
    TQ_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      store_bytes<kBytes>(codes[g][0] | uint64_t{codes[g][1]} << (4 * kBits),
                          to + g * kStep * kBytes);
    }
  }
}

TQ_HOST_DEVICE constexpr int lowest_bit(int x) { return x & -x; }

template <int kUnit>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void copy_unit(const std::byte* from, std::byte* to) {
  struct alignas(kUnit) Unit {
    std::byte at[kUnit];
  };
  *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
}
// Nibbles with bit `segment` of the last quarter's codes in their spare bits.
template <int kUnit>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_planes(const std::byte* own, const std::byte* last,
                                                  int segment, std::byte* to) {
  if constexpr (kUnit % 4 == 0) {
    struct alignas(kUnit) Unit {
      uint32_t word[kUnit / 4];
    };
    Unit unit = *reinterpret_cast<const Unit*>(own);
    const Unit spare = *reinterpret_cast<const Unit*>(last);
    TQ_UNROLL
    for (int i = 0; i < kUnit / 4; ++i) {
      unit.word[i] |= (spare.word[i] >> segment & 0x11111111u) << 3;
    }
    *reinterpret_cast<Unit*>(to) = unit;
  } else {
    using Unit = std::conditional_t<kUnit == 2, uint16_t, uint8_t>;
    const uint32_t unit = *reinterpret_cast<const Unit*>(own);
    const uint32_t spare = *reinterpret_cast<const Unit*>(last);
    *reinterpret_cast<Unit*>(to) = static_cast<Unit>(unit | (spare >> segment & 0x1111u) << 3);
  }
}

}  // namespace turboquant::cuda::detail
