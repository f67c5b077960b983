#include "turboquant/math/lloyd_max.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "tanh_sinh.hpp"
#include "turboquant/error.hpp"

namespace turboquant::math {
namespace {

constexpr int kGaussian = 0;

LloydMaxSolution solve(int dim, int bits) {
  return dim == kGaussian ? solve_lloyd_max(Gaussian(), bits)
                          : solve_lloyd_max(SphereMarginal(dim), bits);
}

// Reference data: the published figures of the exact sphere marginal (nine significant digits).
struct DistortionFigure {
  int dim, bits;
  double distortion;
};
constexpr DistortionFigure kDistortionFigures[] = {
    {64, 1, 0.358387361},          {64, 2, 0.114525757},          {64, 3, 0.0333908341},
    {64, 4, 0.00913151760},        {64, 5, 0.00239922715},        {64, 6, 6.15962891e-4},
    {64, 8, 3.93167870e-5},        {128, 1, 0.360888594},         {128, 2, 0.116000070},
    {128, 3, 0.0339659258},        {128, 4, 0.00931478795},       {128, 5, 0.00245146016},
    {128, 6, 6.29960781e-4},       {128, 8, 4.02411555e-5},       {256, 1, 0.362135618},
    {256, 2, 0.116740039},         {256, 3, 0.0342560036},        {256, 4, 0.00940752943},
    {256, 5, 0.00247794224},       {256, 6, 6.37065050e-4},       {256, 8, 4.07106713e-5},
    {kGaussian, 1, 0.363380228},   {kGaussian, 2, 0.117481848},   {kGaussian, 3, 0.0345477608},
    {kGaussian, 4, 0.00950100801}, {kGaussian, 5, 0.00250466836}, {kGaussian, 6, 6.44239665e-4},
    {kGaussian, 8, 4.11850829e-5}};

TEST(LloydMax, DistortionsEqualThePublishedFigures) {
  for (const auto& [dim, bits, distortion] : kDistortionFigures) {
    EXPECT_NEAR(solve(dim, bits).distortion / distortion, 1.0, 1e-8) << dim << " bits " << bits;
  }
}

TEST(LloydMax, LevelsEqualThePublishedFigures) {
  const std::vector<std::vector<double>> figures = {
      {0.45245325, 1.50519298},
      {0.24442487, 0.75333016, 1.33659889, 2.13147084},
      {0.12787315, 0.38638092, 0.65361895, 0.93709702, 1.24777046, 1.60434266, 2.04592538,
       2.68885926}};
  for (int bits = 2; bits <= 4; ++bits) {
    const LloydMaxSolution solution = solve(128, bits);
    const std::vector<double>& positive = figures[bits - 2];
    for (size_t i = 0; i < positive.size(); ++i) {  // eight decimals
      EXPECT_NEAR(solution.levels[positive.size() + i], positive[i], 0.5000001e-8);
    }
  }
}

// Every level the centroid of its cell, and the distortion the integral of the squared error, both
// by quadrature that shares nothing with the solver.
void expect_optimal(int dim, int bits) {
  SCOPED_TRACE("dim " + std::to_string(dim) + " bits " + std::to_string(bits));
  const LloydMaxSolution solution = solve(dim, bits);
  const size_t count = solution.levels.size();
  ASSERT_EQ(count, size_t{1} << bits);
  ASSERT_EQ(solution.boundaries.size(), count - 1);
  EXPECT_LT(solution.residual, 1e-11);
  for (size_t i = 0; i < count; ++i) {
    ASSERT_EQ(solution.levels[i], -solution.levels[count - 1 - i]);
    if (i + 1 < count) {
      ASSERT_EQ(solution.boundaries[i], 0.5 * (solution.levels[i] + solution.levels[i + 1]));
      ASSERT_LT(solution.levels[i], solution.levels[i + 1]);
    }
  }
  const reference::Density density(dim);
  long double distortion = 0;
  for (size_t i = count / 2; i < count; ++i) {
    const long double low = solution.boundaries[i - 1];
    const long double high = i + 1 < count ? solution.boundaries[i] : density.support();
    const long double level = solution.levels[i];
    const auto mass = density.integrate(low, high, [](long double) { return 1.0L; });
    // The mean distance from the level: no cancellation of two large moments.
    const auto offset = density.integrate(low, high, [&](long double x) { return x - level; });
    distortion +=
        2 * density.integrate(low, high, [&](long double x) { return (x - level) * (x - level); });
    EXPECT_LT(std::abs(offset / mass), 1e-10L) << "level " << i;
  }
  EXPECT_NEAR(solution.distortion / static_cast<double>(distortion), 1.0, 1e-10);
}

TEST(LloydMax, SatisfiesStationarityForSmallLargeAndCommonDims) {
  for (const int dim : {kGaussian, 2, 3, 4, 5, 6, 7, 8, 80, 128, 4095, 4096, 1 << 20}) {
    for (int bits = 1; bits <= 8; ++bits) expect_optimal(dim, bits);
  }
}

TEST(LloydMax, SatisfiesStationarityForRandomDims) {
  std::mt19937 random(20240428);
  for (int trial = 0; trial < 24; ++trial) {
    // Half uniform, half log-uniform, so that small dims are met too.
    const int dim =
        trial % 2
            ? std::uniform_int_distribution<int>(2, 4096)(random)
            : static_cast<int>(std::exp2(std::uniform_real_distribution<double>(1, 12)(random)));
    expect_optimal(dim, 1 + trial % 8);
    expect_optimal(dim, 8);
  }
}

TEST(LloydMax, ConvergesForEveryDimAndWidth) {
  double worst = 0.0;
  int most_iterations = 0;
  for (int dim = 2; dim <= 4096; dim += dim < 300 ? 1 : 61) {
    for (int bits = 1; bits <= 7; ++bits) {
      const LloydMaxSolution solution = solve(dim, bits);  // throws when it does not converge
      worst = std::max(worst, solution.residual);
      most_iterations = std::max(most_iterations, solution.iterations);
    }
  }
  EXPECT_LT(worst, 1e-11);
  EXPECT_LE(most_iterations, 30);
}

TEST(LloydMax, UniformDensityHasEquidistantLevelsAndDistortionFourToTheMinusBits) {
  for (int bits = 1; bits <= 8; ++bits) {
    const LloydMaxSolution solution = solve(3, bits);
    EXPECT_NEAR(solution.distortion * std::exp2(2 * bits), 1.0, 1e-11);
    const double step = 2 * std::sqrt(3.0) / std::exp2(bits);
    for (size_t i = 0; i < solution.levels.size(); ++i) {
      EXPECT_NEAR(solution.levels[i], (i + 0.5) * step - std::sqrt(3.0), 1e-11);
    }
  }
}

TEST(LloydMax, OneBitLevelIsTheMeanOfTheHalfLine) {
  // Known in closed form: E|x| = sqrt(2/pi), 2 sqrt(2)/pi and sqrt(3)/2.
  EXPECT_NEAR(solve(kGaussian, 1).levels[1], std::sqrt(2 / std::numbers::pi), 1e-15);
  EXPECT_NEAR(solve(2, 1).levels[1], 2 * std::sqrt(2.0) / std::numbers::pi, 1e-15);
  EXPECT_NEAR(solve(3, 1).levels[1], std::sqrt(3.0) / 2, 1e-15);
  EXPECT_NEAR(solve(2, 1).distortion, 1 - 8 / (std::numbers::pi * std::numbers::pi), 1e-14);
}

TEST(LloydMax, StaysBelowThePapersBoundAndFallsTowardsTheGaussianLimit) {
  for (int bits = 1; bits <= 8; ++bits) {
    const double limit = solve(kGaussian, bits).distortion;
    EXPECT_LT(limit, std::sqrt(3.0) * std::numbers::pi / 2 * std::exp2(-2 * bits));
    EXPECT_LT(solve(64, bits).distortion, solve(128, bits).distortion);
    EXPECT_LT(solve(128, bits).distortion, limit);
    EXPECT_NEAR(solve(1 << 20, bits).distortion / limit, 1.0, 1e-5);
  }
}

TEST(LloydMax, RefusesOtherWidths) {
  for (const int bits : {-1, 0, 9}) {
    try {
      solve(64, bits);
      FAIL() << "bits " << bits << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()), "bits: expected 1 to 8, got " + std::to_string(bits));
    }
  }
}

// A density whose moments contradict each other: every centroid lies outside its cell, so that no
// level can be stationary.
class BrokenDensity : public Gaussian {
 public:
  double first_moment(double a, double b) const { return -mass(a, b); }
};

// A density that is not a number anywhere.
class NanDensity : public Gaussian {
 public:
  double mass(double, double) const { return std::numeric_limits<double>::quiet_NaN(); }
};

TEST(LloydMax, ReportsFailureInsteadOfReturningAWrongCodebook) {
  for (int bits = 1; bits <= 8; ++bits) {
    EXPECT_THROW(solve_lloyd_max(BrokenDensity(), bits), std::runtime_error);
    EXPECT_THROW(solve_lloyd_max(NanDensity(), bits), std::runtime_error);
  }
}

}  // namespace
}  // namespace turboquant::math
