#include "turboquant/math/codebook.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::math {
namespace {

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no InvalidArgument";
}

TEST(Codebook, RoundsTheSolutionToFp32) {
  for (int bits = 1; bits <= 8; ++bits) {
    const Codebook& codebook = Codebook::sphere(96, bits);
    const LloydMaxSolution solution = solve_lloyd_max(SphereMarginal(96), bits);
    ASSERT_EQ(codebook.levels().size(), size_t{1} << bits);
    ASSERT_EQ(codebook.boundaries().size(), (size_t{1} << bits) - 1);
    EXPECT_EQ(codebook.dim(), 96);
    EXPECT_EQ(codebook.bits(), bits);
    EXPECT_EQ(codebook.distortion(), solution.distortion);
    for (size_t i = 0; i < solution.levels.size(); ++i) {
      EXPECT_EQ(codebook.levels()[i], static_cast<float>(solution.levels[i]));
      EXPECT_EQ(codebook.levels()[i], -codebook.levels()[solution.levels.size() - 1 - i]);
    }
    for (size_t i = 0; i < solution.boundaries.size(); ++i) {
      EXPECT_EQ(codebook.boundaries()[i], static_cast<float>(solution.boundaries[i]));
      EXPECT_LT(codebook.levels()[i], codebook.boundaries()[i]);
      EXPECT_LT(codebook.boundaries()[i], codebook.levels()[i + 1]);
    }
  }
}

TEST(Codebook, IsSolvedOnceAndSharedByAllThreads) {
  std::vector<const Codebook*> seen(16);
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < seen.size(); ++i) {
      threads.emplace_back([&seen, i] { seen[i] = &Codebook::sphere(333, 5); });
    }
  }
  for (const Codebook* codebook : seen) EXPECT_EQ(codebook, seen[0]);
  EXPECT_NE(&Codebook::sphere(333, 4), seen[0]);
  EXPECT_NE(&Codebook::sphere(334, 5), seen[0]);
}

TEST(Codebook, GaussianIsTheLimit) {
  const Codebook& gaussian = Codebook::gaussian(4);
  EXPECT_EQ(gaussian.dim(), Codebook::kGaussianDim);
  EXPECT_NEAR(gaussian.distortion(), 0.00950100801, 1e-10);
  for (size_t i = 0; i < 16; ++i) {
    EXPECT_NEAR(gaussian.levels()[i], Codebook::sphere(1 << 20, 4).levels()[i], 2e-5);
  }
}

TEST(Codebook, AcceptsExplicitLevels) {
  // The optimal levels given explicitly reproduce the solved codebook, but for their rounding.
  const Codebook& solved = Codebook::sphere(64, 3);
  const Codebook copy(64, solved.levels());
  EXPECT_EQ(copy.bits(), 3);
  for (size_t i = 0; i < solved.boundaries().size(); ++i) {
    EXPECT_FLOAT_EQ(copy.boundaries()[i], solved.boundaries()[i]);
  }
  EXPECT_NEAR(copy.distortion(), solved.distortion(), 1e-12);

  // E (x - c)^2 over each half = 1 - 2 c E|x| + c^2 with one level a side, here 0.5 and -1.
  const float levels[] = {-1.0f, 0.5f};
  const Codebook skewed(Codebook::kGaussianDim, levels);
  EXPECT_EQ(skewed.boundaries()[0], -0.25f);
  const Gaussian density;
  const double infinity = density.support();
  const auto second = [&](double low, double high, double level) {
    return density.second_moment(low, high) - 2 * level * density.first_moment(low, high) +
           level * level * density.mass(low, high);
  };
  EXPECT_NEAR(skewed.distortion(), second(-infinity, -0.25, -1) + second(-0.25, infinity, 0.5),
              1e-13);
}

TEST(Codebook, RefusesWrongArguments) {
  EXPECT_EQ(message_of([] { Codebook::sphere(1, 4); }), "dim: expected at least 2, got 1");
  EXPECT_EQ(message_of([] { Codebook::sphere(0, 4); }), "dim: expected at least 2, got 0");
  EXPECT_EQ(message_of([] { Codebook::sphere(-8, 4); }), "dim: expected at least 2, got -8");
  EXPECT_EQ(message_of([] { Codebook::sphere(64, 0); }), "bits: expected 1 to 8, got 0");
  EXPECT_EQ(message_of([] { Codebook::gaussian(9); }), "bits: expected 1 to 8, got 9");
  const auto with = [](std::vector<float> levels) {
    return message_of([&] { Codebook(64, levels); });
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(with({}), "levels: expected 2, 4, 8, ..., 256 of them, got 0");
  EXPECT_EQ(with({1.0f}), "levels: expected 2, 4, 8, ..., 256 of them, got 1");
  EXPECT_EQ(with({1, 2, 3}), "levels: expected 2, 4, 8, ..., 256 of them, got 3");
  EXPECT_EQ(with(std::vector<float>(512)), "levels: expected 2, 4, 8, ..., 256 of them, got 512");
  EXPECT_EQ(with({1.0f, 1.0f}),
            "levels: expected finite numbers in ascending order, got 1.000000 at index 1");
  EXPECT_EQ(with({-1.0f, nan}),
            "levels: expected finite numbers in ascending order, got nan at index 1");
  EXPECT_EQ(message_of([] {
              Codebook(1, std::vector<float>{-1.0f, 1.0f});
            }),
            "dim: expected at least 2, got 1");
}

}  // namespace
}  // namespace turboquant::math
