#include "turboquant/attention/softmax_state.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>
#include <vector>

namespace turboquant::attention {
namespace {

constexpr int kDim = 5;

struct Partial {
  SoftmaxState<double> state;
  std::array<double, kDim> output{};
};

Partial of_tokens(const std::vector<double>& scores,
                  const std::vector<std::array<double, kDim>>& values, size_t begin, size_t end) {
  Partial partial;
  for (size_t t = begin; t < end; ++t) {
    merge(partial.state, partial.output.data(), {scores[t], 1.0}, values[t].data(), kDim);
  }
  return partial;
}

TEST(SoftmaxState, AnyOrderOfMergesIsTheSoftmax) {
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  std::vector<double> scores(40);
  std::vector<std::array<double, kDim>> values(scores.size());
  for (size_t t = 0; t < scores.size(); ++t) {
    scores[t] = 30 * normal(generator);
    for (double& v : values[t]) v = normal(generator);
  }
  double sum = 0;
  std::array<double, kDim> expected{};
  for (size_t t = 0; t < scores.size(); ++t) {
    sum += std::exp(scores[t]);
    for (int i = 0; i < kDim; ++i) expected[i] += std::exp(scores[t]) * values[t][i];
  }
  for (const auto& cuts : {std::array<size_t, 2>{10, 20}, {0, 40}, {1, 39}, {20, 20}}) {
    const Partial a = of_tokens(scores, values, 0, cuts[0]);
    Partial b = of_tokens(scores, values, cuts[0], cuts[1]);
    const Partial c = of_tokens(scores, values, cuts[1], scores.size());
    merge(b.state, b.output.data(), c.state, c.output.data(), kDim);
    merge(b.state, b.output.data(), a.state, a.output.data(), kDim);
    EXPECT_NEAR(b.state.log_sum_exp(), std::log(sum), 1e-12 * std::abs(std::log(sum)));
    for (int i = 0; i < kDim; ++i) {
      EXPECT_NEAR(b.output[i] / b.state.sum, expected[i] / sum, 1e-12);
    }
  }
}

TEST(SoftmaxState, TheEmptyStateIsNeutralAndItsMemoryIsNotRead) {
  const SoftmaxState<float> empty;
  EXPECT_TRUE(empty.empty());
  EXPECT_EQ(empty.log_sum_exp(), -INFINITY);
  SoftmaxState<float> state{1.5f, 3.0f};
  std::array<float, 2> output{0.1f, -7.0f};
  const std::array<float, 2> poison{NAN, NAN};
  merge(state, output.data(), empty, poison.data(), 2);
  EXPECT_EQ(state.max, 1.5f);
  EXPECT_EQ(state.sum, 3.0f);
  EXPECT_EQ(output, (std::array<float, 2>{0.1f, -7.0f}));
  SoftmaxState<float> start;
  std::array<float, 2> target = poison;
  merge(start, target.data(), state, output.data(), 2);
  EXPECT_EQ(target, output);
  EXPECT_EQ(start.sum, 3.0f);
}

TEST(SoftmaxState, NanSpreads) {
  SoftmaxState<float> state{1.0f, 2.0f};
  merge(state, SoftmaxState<float>{-INFINITY, NAN});
  EXPECT_TRUE(std::isnan(state.sum));
}

}  // namespace
}  // namespace turboquant::attention
