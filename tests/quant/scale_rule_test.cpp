#include "turboquant/quant/scale_rule.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace turboquant::quant {
namespace {

TEST(ScaleRule, FormulasByHand) {
  // y = (3, 4), c = (1, 1): n = 5, <y,c> = 7, <c,c> = 2, d = 2.
  const RowSums sums = {25.0f, 7.0f, 2.0f};
  const float sqrt_dim = std::sqrt(2.0f);
  EXPECT_FLOAT_EQ(scale_from_sums(ScaleRule::kNorm, sums, sqrt_dim), 5.0f / sqrt_dim);
  EXPECT_FLOAT_EQ(scale_from_sums(ScaleRule::kNormPreserving, sums, sqrt_dim),
                  5.0f / std::sqrt(2.0f));
  EXPECT_FLOAT_EQ(scale_from_sums(ScaleRule::kLeastSquares, sums, sqrt_dim), 3.5f);
  EXPECT_FLOAT_EQ(scale_from_sums(ScaleRule::kUnbiased, sums, sqrt_dim), 25.0f / 7.0f);
}

TEST(ScaleRule, NamesRoundTrip) {
  for (const ScaleRule rule : kScaleRules) {
    EXPECT_EQ(parse_scale_rule(scale_rule_name(rule)), rule);
  }
}

TEST(ScaleRule, UnknownNameListsTheRules) {
  try {
    parse_scale_rule("mean");
    ADD_FAILURE();
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()),
              "scale rule: expected one of norm, norm_preserving, least_squares, unbiased, got "
              "mean");
  }
}

}  // namespace
}  // namespace turboquant::quant
