#include "turboquant/math/philox.hpp"

#include <gtest/gtest.h>

#include <bit>

namespace turboquant::math {
namespace {

// The known answers that Random123 publishes for philox4x32 with 10 rounds.
static_assert(philox4x32({{0, 0, 0, 0}}, 0) ==
              PhiloxWords{{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
static_assert(philox4x32({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, 0xffffffffffffffff) ==
              PhiloxWords{{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
static_assert(philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822) ==
              PhiloxWords{{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});

TEST(Philox, RunTimeEqualsCompileTime) {
  volatile uint32_t pi = 0x243f6a88;
  EXPECT_EQ(philox4x32({{pi, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822),
            (PhiloxWords{{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST(Philox, EveryInputBitChangesAboutHalfTheOutput) {
  const PhiloxWords base = philox4x32({{1, 2, 3, 4}}, 5);
  const auto changed_bits = [&](const PhiloxWords& other) {
    int count = 0;
    for (int w = 0; w < 4; ++w) count += std::popcount(base.word[w] ^ other.word[w]);
    return count;
  };
  for (int bit = 0; bit < 192; ++bit) {
    PhiloxWords counter{{1, 2, 3, 4}};
    uint64_t key = 5;
    if (bit < 128) {
      counter.word[bit / 32] ^= 1u << bit % 32;
    } else {
      key ^= uint64_t{1} << (bit - 128);
    }
    // 128 fair coins: mean 64, standard deviation 5.7; six of them are 34.
    EXPECT_NEAR(changed_bits(philox4x32(counter, key)), 64, 34) << bit;
  }
}

TEST(Philox, UniformCoversTheHalfOpenInterval) {
  EXPECT_EQ(uniform_open_closed(0, 0), 0x1p-53);
  EXPECT_EQ(uniform_open_closed(0xffffffff, 0xffffffff), 1.0);
  double sum = 0;
  double squares = 0;
  constexpr int kCount = 20000;
  for (uint32_t i = 0; i < kCount; ++i) {
    const PhiloxWords words = philox4x32({{i, 0, 0, 0}}, 42);
    const double u = uniform_open_closed(words.word[0], words.word[1]);
    sum += u;
    squares += u * u;
  }
  // Five standard errors: sqrt(1/12) and sqrt(4/45) over sqrt(20000).
  EXPECT_NEAR(sum / kCount, 0.5, 5 * 0.2887 / 141.4);
  EXPECT_NEAR(squares / kCount, 1.0 / 3, 5 * 0.2982 / 141.4);
}

}  // namespace
}  // namespace turboquant::math
