// The codes of eight neighbouring coordinates from a packed row of kDim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/portability.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::cuda::detail {

// kBytes bytes at a multiple of kBytes from an address of as many bytes' alignment as is a power
// of two.
template <int kBytes>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint64_t load_word(const std::byte* from) {
  if constexpr (kBytes == 8) {
    return *reinterpret_cast<const uint64_t*>(from);
  } else if constexpr (kBytes == 4) {
    return *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kBytes % 2 == 0) {
    uint64_t word = 0;
    TQ_UNROLL
    for (int i = 0; i < kBytes / 2; ++i) {
      word |= uint64_t{reinterpret_cast<const uint16_t*>(from)[i]} << (16 * i);
    }
    return word;
  } else {
    uint64_t word = 0;
    TQ_UNROLL
    for (int i = 0; i < kBytes; ++i) {
      word |= uint64_t{static_cast<uint8_t>(from[i])} << (8 * i);
    }
    return word;
  }
}

// A group's bytes: the bit stream's, or at 3 bits a nibble a code.
template <int kDim, int kBits>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint64_t group_bytes(const std::byte* row, int group) {
  if constexpr (kBits == 3) {
    constexpr int kSegment = kDim / 8;
    if constexpr (kSegment % 4 == 0) {
      if (group * 4 < 3 * kSegment) return load_word<4>(row + group * 4);
      const std::byte* const spare = row + group * 4 - 3 * kSegment;
      return quant::spare_bits_word(load_word<4>(spare), load_word<4>(spare + kSegment),
                                    load_word<4>(spare + 2 * kSegment));
    } else {
      uint64_t word = 0;
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = group * 4 + i;
        const std::byte* const spare = row + at - 3 * kSegment;
        const uint64_t byte =
            at < 3 * kSegment
                ? load_word<1>(row + at)
                : quant::spare_bits_word(load_word<1>(spare), load_word<1>(spare + kSegment),
                                         load_word<1>(spare + 2 * kSegment)) &
                      0xFF;
        word |= byte << (8 * i);
      }
      return word;
    }
  } else {
    return load_word<kBits>(row + group * kBits);
  }
}

// Overlapping indices (quant/packing.hpp): those of a group's four pairs, four bits apart.
template <int kDim>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t overlapping_bytes(const std::byte* row, int group) {
  if constexpr (kDim % 16 == 0) {
    return static_cast<uint32_t>(load_word<4>(row + group / 2 * 4)) >> (16 * (group % 2));
  } else {
    auto word = static_cast<uint32_t>(load_word<2>(row + 2 * group));
    if (group % 2 == 0 && group + 1 < kDim / 8) {
      word |= static_cast<uint32_t>(load_word<2>(row + 2 * group + 2)) << 16;
    }
    return word;
  }
}

}  // namespace turboquant::cuda::detail
