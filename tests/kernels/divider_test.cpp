#include "divider.hpp"

#include <gtest/gtest.h>

#include <cstdint>

#include "turboquant/math/philox.hpp"

namespace turboquant::cuda::detail {
namespace {

constexpr int kLargest = INT32_MAX;

void expect_division(int n, int divisor) {
  const auto [quotient, remainder] = Divider(divisor)(n);
  ASSERT_EQ(quotient, n / divisor) << n << " / " << divisor;
  ASSERT_EQ(remainder, n % divisor) << n << " / " << divisor;
}

// Where a quotient that is one too large or too small would show.
void expect_divisions(int divisor) {
  const int most = kLargest / divisor;
  for (const int quotient : {0, 1, 2, most / 2, most - 1, most}) {
    if (quotient < 0 || quotient > most) continue;
    const int multiple = quotient * divisor;
    expect_division(multiple, divisor);
    if (multiple > 0) expect_division(multiple - 1, divisor);
    if (multiple < kLargest) expect_division(multiple + 1, divisor);
  }
  expect_division(kLargest, divisor);
}

TEST(Divider, DividesAroundEveryMultiple) {
  for (int divisor = 1; divisor <= 4096; ++divisor) expect_divisions(divisor);
  for (int shift = 1; shift < 31; ++shift) {
    const int power = 1 << shift;
    expect_divisions(power - 1);
    expect_divisions(power);
    expect_divisions(power + 1);
  }
  expect_divisions(kLargest - 1);
  expect_divisions(kLargest);
}

TEST(Divider, DividesRandomNumbers) {
  for (uint32_t i = 0; i < 200'000 && !testing::Test::HasFatalFailure(); ++i) {
    const auto [random] = math::philox4x32({{i, 0, 0, 0}}, 7);
    const int divisor = static_cast<int>(random[0] >> (1 + random[1] % 31));
    if (divisor > 0) expect_division(static_cast<int>(random[2] >> 1), divisor);
  }
}

TEST(Divider, IsAConstant) {
  static_assert(Divider(7)(52).quotient == 7 && Divider(7)(52).remainder == 3);
  static_assert(Divider()(52).quotient == 52);
}

}  // namespace
}  // namespace turboquant::cuda::detail
