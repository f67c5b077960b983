#include "turboquant/math/half.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace turboquant::math {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(fp16_from_fp32(1.0f) == 0x3C00 && fp32_from_fp16(0x3C00) == 1.0f);
static_assert(bf16_from_fp32(1.0f) == 0x3F80 && fp32_from_bf16(0x3F80) == 1.0f);

// What a format's bits mean, written with ldexp: 1 sign, `exponent_bits`, then the mantissa.
double decode(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

struct Format {
  int exponent_bits;
  uint16_t (*encode)(float);
  float (*decode)(uint16_t);
};
constexpr Format kFp16{5, [](float x) { return fp16_from_fp32(x); },
                       [](uint16_t h) { return fp32_from_fp16(h); }};
constexpr Format kBf16{8, [](float x) { return bf16_from_fp32(x); },
                       [](uint16_t h) { return fp32_from_bf16(h); }};

class HalfFormat : public testing::TestWithParam<Format> {};

TEST_P(HalfFormat, EveryBitPatternDecodesExactlyAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const float value = GetParam().decode(pattern);
    const double expected = decode(pattern, GetParam().exponent_bits);
    const uint16_t back = GetParam().encode(value);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_TRUE(std::isnan(decode(back, GetParam().exponent_bits))) << bits;
      EXPECT_EQ(back & 0x8000, pattern & 0x8000) << bits;
    } else {
      EXPECT_EQ(value, expected) << bits;
      EXPECT_EQ(back, pattern);  // also the sign of zero
    }
  }
}

TEST_P(HalfFormat, RoundsToNearestEvenBetweenAllNeighbours) {
  const auto infinity = static_cast<uint16_t>(((1 << GetParam().exponent_bits) - 1)
                                              << (15 - GetParam().exponent_bits));
  for (uint16_t low = 0; low + 1 < infinity; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    // Both neighbours have at most 11 bits, so their midpoint is exact in fp32.
    const float middle = static_cast<float>(
        0.5 * (decode(low, GetParam().exponent_bits) + decode(high, GetParam().exponent_bits)));
    for (const float sign : {1.0f, -1.0f}) {
      const uint16_t mark = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(GetParam().encode(sign * middle), mark | (low % 2 ? high : low)) << low;
      ASSERT_EQ(GetParam().encode(sign * std::nextafter(middle, 0.0f)), mark | low) << low;
      ASSERT_EQ(GetParam().encode(sign * std::nextafter(middle, kInfinity)), mark | high) << low;
    }
  }
}

std::string format_name(const testing::TestParamInfo<Format>& tested) {
  return tested.param.exponent_bits == 5 ? "Fp16" : "Bf16";
}

INSTANTIATE_TEST_SUITE_P(Formats, HalfFormat, testing::Values(kFp16, kBf16), format_name);

TEST(Fp16, OverflowsToInfinityHalfWayPastTheLargest) {
  EXPECT_EQ(fp16_from_fp32(kMaxFp16), 0x7BFF);
  EXPECT_EQ(fp16_from_fp32(std::nextafter(65520.0f, 0.0f)), 0x7BFF);
  EXPECT_EQ(fp16_from_fp32(65520.0f), 0x7C00);
  EXPECT_EQ(fp16_from_fp32(-1e30f), 0xFC00);
  EXPECT_EQ(fp16_from_fp32(kInfinity), 0x7C00);
}

TEST(Fp16, UnderflowsToSignedZero) {
  EXPECT_EQ(fp16_from_fp32(0x1p-25f), 0x0000);  // a tie, to even
  EXPECT_EQ(fp16_from_fp32(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(fp16_from_fp32(-0x1p-30f), 0x8000);
  EXPECT_EQ(fp16_from_fp32(std::numeric_limits<float>::denorm_min()), 0x0000);
  EXPECT_EQ(fp16_from_fp32(-0.0f), 0x8000);
}

TEST(Bf16, OverflowsToInfinityAndKeepsSubnormals) {
  EXPECT_EQ(bf16_from_fp32(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(bf16_from_fp32(std::numeric_limits<float>::lowest()), 0xFF80);
  EXPECT_EQ(bf16_from_fp32(0x1p-133f), 0x0001);
  EXPECT_EQ(bf16_from_fp32(0x1p-134f), 0x0000);
}

TEST(Half, NansWithOnlyLowPayloadBitsStayNan) {
  for (const uint32_t bits : {0x7F800001u, 0xFF800001u, 0x7FFFFFFFu, 0x7FC00000u}) {
    const float nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(fp32_from_fp16(fp16_from_fp32(nan))));
    EXPECT_TRUE(std::isnan(fp32_from_bf16(bf16_from_fp32(nan))));
  }
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) uint16_t fp16_of_the_processor(float value) {
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

__attribute__((target("f16c"))) float fp32_of_the_processor(uint16_t half) {
  return _cvtsh_ss(half);
}

TEST(Fp16, EqualsTheProcessorsConversion) {
  // Every processor with AVX2 has F16C, which clang 14 cannot ask for by name.
  if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "the processor has no F16C";
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const auto pattern = static_cast<uint16_t>(half);
    ASSERT_EQ(std::bit_cast<uint32_t>(fp32_from_fp16(pattern)),
              std::bit_cast<uint32_t>(fp32_of_the_processor(pattern)));
  }
  // Every 997th of all fp32 patterns: every exponent, both signs, NaNs and subnormals.
  for (uint64_t bits = 0; bits <= 0xFFFFFFFFu; bits += 997) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    ASSERT_EQ(fp16_from_fp32(value), fp16_of_the_processor(value)) << std::hex << bits;
  }
}
#endif

// g++ 12 for Arm has the macro, but not the type.
#if defined(__FLT16_MANT_DIG__) && !defined(__aarch64__)
TEST(Fp16, EqualsTheCompilersType) {
  for (uint64_t bits = 0; bits <= 0xFFFFFFFFu; bits += 9973) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(fp16_from_fp32(value), std::bit_cast<uint16_t>(static_cast<_Float16>(value)));
  }
}
#endif

}  // namespace
}  // namespace turboquant::math
