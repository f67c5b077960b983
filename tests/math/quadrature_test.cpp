#include "turboquant/math/quadrature.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace turboquant::math {
namespace {

TEST(Quadrature, SixteenPointsAreExactForEveryPolynomialUpToDegree31) {
  const GaussLegendreRule& rule = gauss_legendre_rule();
  for (int degree = 0; degree <= 31; ++degree) {
    double sum = 0.0;
    for (int i = 0; i < GaussLegendreRule::kPoints; ++i) {
      sum += rule.weights[i] * std::pow(rule.nodes[i], degree);
    }
    EXPECT_NEAR(sum, degree % 2 ? 0.0 : 2.0 / (degree + 1), 2e-15) << degree;
  }
}

TEST(Quadrature, IntegratesOutwardsToAFiniteOrInfiniteEnd) {
  const auto decay = [](double x) { return std::exp(-x); };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_NEAR(integrate_outwards(decay, 0.0, kInfinity, 1.0), 1.0, 1e-14);
  EXPECT_NEAR(integrate_outwards(decay, 0.0, 2.3, 1.0), -std::expm1(-2.3), 1e-15);
  EXPECT_NEAR(integrate_outwards(decay, 0.5, 0.5001, 1.0), std::exp(-0.5) * -std::expm1(-0.0001),
              1e-16);  // 0.5001 itself is rounded to 1e-16
  EXPECT_EQ(integrate_outwards(decay, 1.0, 1.0, 1.0), 0.0);
}

}  // namespace
}  // namespace turboquant::math
