#include "turboquant/cache/smoothing_rule.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

namespace turboquant::cache {
namespace {

TEST(SmoothingRule, OrdinaryChannelsGetTheSquareRootOfTheirSpread) {
  for (const float ratio : {0.01f, 0.1f, 0.5f}) {
    const float share = smoothing_of(3.0f * ratio, 3.0f) / std::sqrt(ratio);
    EXPECT_NEAR(share, std::sqrt(1 + ratio / kSmoothingKnee), 1e-6f);
  }
  EXPECT_FLOAT_EQ(smoothing_of(5.0f, 5.0f), std::sqrt(1.25f));
}

TEST(SmoothingRule, FarAboveTheMedianItIsProportional) {
  // From here on s = r / sqrt(knee) but for knee / 2r.
  for (const float ratio : {50.0f, 400.0f}) {
    EXPECT_NEAR(smoothing_of(ratio, 1.0f) / (ratio / 2), 1, 1.01f * kSmoothingKnee / (2 * ratio));
  }
}

TEST(SmoothingRule, BoundsAndWhatIsNoNumber) {
  EXPECT_EQ(smoothing_of(0.0f, 1.0f), kMinSmoothing);
  EXPECT_EQ(smoothing_of(1e30f, 1.0f), kMaxSmoothing);
  EXPECT_EQ(smoothing_of(1.0f, 0.0f), kMaxSmoothing);
  EXPECT_EQ(smoothing_of(0.0f, 0.0f), 1.0f);
  EXPECT_EQ(smoothing_of(NAN, 1.0f), 1.0f);
  EXPECT_EQ(smoothing_of(1.0f, NAN), 1.0f);
  EXPECT_EQ(smoothing_of(INFINITY, INFINITY), 1.0f);
}

TEST(SmoothingRule, RanksAreAPermutationEvenWithTies) {
  const std::array<float, 8> rms = {2, 1, 2, 0, 5, 2, 0, 7};
  std::array<int, 8> ranks;
  for (int c = 0; c < 8; ++c) ranks[c] = smoothing_rank(rms.data(), 8, c);
  EXPECT_EQ(ranks, (std::array<int, 8>{3, 2, 4, 0, 6, 5, 1, 7}));
}

TEST(SmoothingRule, NansTakeNoRankFromNumbers) {
  const std::array<float, 4> rms = {3, NAN, 1, 2};
  EXPECT_EQ(smoothing_rank(rms.data(), 4, 0), 2);
  EXPECT_EQ(smoothing_rank(rms.data(), 4, 2), 0);
  EXPECT_EQ(smoothing_rank(rms.data(), 4, 3), 1);
}

}  // namespace
}  // namespace turboquant::cache
