#include "turboquant/math/density.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "tanh_sinh.hpp"
#include "turboquant/error.hpp"

namespace turboquant::math {
namespace {

constexpr int kGaussian = 0;
const std::vector<int> kDims = {2, 3, 4, 5, 6, 7, 16, 63, 64, 80, 128, 1000, 4096, 1 << 20};
// Intervals in standard deviations, both sides of the switch between series and fraction.
const std::vector<std::pair<double, double>> kIntervals = {
    {0.0, 0.01}, {0.0, 1.0}, {0.3, 0.35}, {0.9, 1.4}, {1.3, 1.3001}, {1.7, 1.8},
    {1.0, 2.5},  {2.6, 2.7}, {3.5, 3.6},  {4.5, 4.6}, {6.0, 100.0},  {0.0, 100.0}};

double relative_difference(double actual, long double expected) {
  return static_cast<double>(std::abs((actual - expected) / expected));
}

// Differences of nearby values cost the closed forms a factor (tail mass / interval mass); the
// tightest interval above, 1e-4 wide, loses four digits of sixteen.
double allowed(double a, double b) { return 2e-14 / std::min(1.0, b - a); }

template <SymmetricDensity D>
void compare_with_quadrature(const D& density, int dim) {
  const reference::Density expected(dim);
  for (const auto& [a, wanted_b] : kIntervals) {
    const double b = std::min(wanted_b, density.support());
    if (a >= b) continue;
    SCOPED_TRACE("dim " + std::to_string(dim) + " [" + std::to_string(a) + ", " +
                 std::to_string(b) + "]");
    const auto mass = expected.integrate(a, b, [](long double) { return 1.0L; });
    const auto first = expected.integrate(a, b, [](long double x) { return x; });
    const auto second = expected.integrate(a, b, [](long double x) { return x * x; });
    const double level = 0.5 * (a + std::min(b, a + 1));
    const auto error =
        expected.integrate(a, b, [&](long double x) { return (x - level) * (x - level); });
    EXPECT_LT(relative_difference(density.mass(a, b), mass), allowed(a, b));
    EXPECT_LT(relative_difference(density.first_moment(a, b), first), allowed(a, b));
    // Near zero x^2 is small beside 1, which the closed form mass + edges starts from.
    EXPECT_NEAR(density.second_moment(a, b), static_cast<double>(second),
                allowed(a, b) * static_cast<double>(mass + second));
    EXPECT_LT(relative_difference(density.squared_error(a, b, level), error), allowed(a, b));
    // Mirror images.
    EXPECT_EQ(density.mass(-b, -a), density.mass(a, b));
    EXPECT_EQ(density.first_moment(-b, -a), -density.first_moment(a, b));
    EXPECT_EQ(density.squared_error(-b, -a, -level), density.squared_error(a, b, level));
  }
}

TEST(SphereMarginal, MomentsOfIntervalsMatchIndependentQuadrature) {
  for (const int dim : kDims) compare_with_quadrature(SphereMarginal(dim), dim);
}

TEST(Gaussian, MomentsOfIntervalsMatchIndependentQuadrature) {
  compare_with_quadrature(Gaussian(), kGaussian);
}

TEST(SphereMarginal, HasUnitMassAndVarianceAndNoMean) {
  for (const int dim : kDims) {
    const SphereMarginal density(dim);
    const double end = density.support();
    EXPECT_NEAR(density.mass(-end, end), 1.0, 2e-15) << dim;
    EXPECT_NEAR(density.second_moment(-end, end), 1.0, 2e-15) << dim;
    EXPECT_EQ(density.first_moment(-end, end), 0.0) << dim;
    EXPECT_NEAR(density.squared_error(-end, end, 0.0), 1.0, 1e-13) << dim;
    EXPECT_NEAR(density.mass(-end, 0.7) + density.mass(0.7, end), 1.0, 1e-14) << dim;
    EXPECT_EQ(density.mass(end, 2 * end), 0.0) << dim;
    EXPECT_EQ(density.pdf(1.001 * end), 0.0) << dim;
  }
}

TEST(SphereMarginal, DimTwoIsTheArcsineLaw) {
  const SphereMarginal density(2);
  const double root2 = std::numbers::sqrt2;
  EXPECT_TRUE(std::isinf(density.pdf(density.support())));
  for (const double x : {0.0, 0.2, 0.9, 1.2, 1.41}) {
    // 1 - x^2 / 2 is 0.006 at x = 1.41: rounding x costs a factor of 170.
    EXPECT_NEAR(density.pdf(x) * std::numbers::pi * std::sqrt(2 - x * x), 1.0, 5e-14) << x;
    EXPECT_NEAR(density.mass(x, root2), std::acos(x / root2) / std::numbers::pi, 1e-14) << x;
  }
}

TEST(SphereMarginal, DimThreeIsUniform) {
  const SphereMarginal density(3);
  for (const double x : {0.0, 0.5, 1.0, 1.5, 1.73}) {
    EXPECT_NEAR(density.pdf(x), 1 / (2 * std::sqrt(3.0)), 1e-15) << x;
    EXPECT_NEAR(density.mass(0, x), x / (2 * std::sqrt(3.0)), 1e-15) << x;
  }
}

TEST(SphereMarginal, FarTailsKeepRelativeAccuracy) {
  // d = 3 shows the last 1e-9 of the support; the Gaussian limit a mass of 1e-89.
  const SphereMarginal uniform(3);
  EXPECT_LT(
      relative_difference(uniform.mass(uniform.support() * (1 - 1e-9), uniform.support()), 0.5e-9L),
      1e-6);  // 1 - 1e-9 itself is rounded to 1e-16
  const reference::Density expected(4096);
  const auto tail = expected.integrate(20, 64, [](long double) { return 1.0L; });
  EXPECT_LT(relative_difference(SphereMarginal(4096).mass(20, 64), tail), 1e-12);
}

TEST(SphereMarginal, RefusesDimsBelowTwo) {
  for (const int dim : {1, 0, -5}) {
    try {
      SphereMarginal density(dim);
      FAIL() << "dim " << dim << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()), "dim: expected at least 2, got " + std::to_string(dim));
    }
  }
}

TEST(GammaHalfStepRatio, MatchesLgammaInLongDouble) {
  for (double z = 0.5; z < 3000; z *= 1.37) {
    const long double expected = std::exp(std::lgamma(z + 0.5L) - std::lgamma((long double)z));
    EXPECT_LT(relative_difference(detail::gamma_half_step_ratio(z), expected), 2e-14) << z;
  }
  EXPECT_NEAR(detail::gamma_half_step_ratio(0.5), 1 / std::sqrt(std::numbers::pi), 1e-15);
}

}  // namespace
}  // namespace turboquant::math
