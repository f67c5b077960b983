// Philox4x32-10, a counter-based random generator: Salmon, Moraes, Dror, Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011. Random access, no state, the same words on host and
// device.
#pragma once

#include <cstdint>

#include "turboquant/portability.hpp"

namespace turboquant::math {

// Four 32-bit words: a counter going in, random words coming out. A plain struct rather than
// std::array, whose members nvcc does not accept in device code.
struct PhiloxWords {
  uint32_t word[4];

  TQ_HOST_DEVICE friend constexpr bool operator==(const PhiloxWords& a, const PhiloxWords& b) {
    return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] &&
           a.word[3] == b.word[3];
  }
};

namespace detail {

// Multipliers and Weyl increments of the paper (section 3.3 and table 2).
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9;  // golden ratio
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85;  // sqrt(3) - 1
inline constexpr int kPhiloxRounds = 10;

}  // namespace detail

// The 128 random bits of `counter` under `key`; the key's low word is Random123's key word 0.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr PhiloxWords philox4x32(PhiloxWords counter,
                                                                 uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < detail::kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{detail::kPhiloxMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{detail::kPhiloxMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += detail::kPhiloxWeyl0;
    key1 += detail::kPhiloxWeyl1;
  }
  return counter;
}

// A double in (0, 1] from two words, 53 bits: never 0, so its logarithm is finite.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr double uniform_open_closed(uint32_t high, uint32_t low) {
  const uint64_t bits = (uint64_t{high} << 32 | low) >> 11;
  return static_cast<double>(bits + 1) * 0x1p-53;
}

}  // namespace turboquant::math
