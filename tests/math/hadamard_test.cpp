#include "turboquant/math/hadamard.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::math {
namespace {

std::vector<int> supported_dims(int limit) {
  std::vector<int> dims;
  for (int d = 1; d <= limit; ++d) {
    if (hadamard_supported(d)) dims.push_back(d);
  }
  return dims;
}

template <class Float>
std::vector<Float> gaussian_vector(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<Float> x(count);
  for (Float& value : x) value = static_cast<Float>(static_cast<float>(normal(random)));
  return x;
}

// The sign of entry (row, column) of the unnormalised matrix, from the definitions: Euler's
// criterion for the Legendre symbol, parity of the common bits for Sylvester's matrix.
int expected_sign(int d, int row, int column) {
  int order = 1;
  if (d % 3 == 0) order = 12;
  if (d % 5 == 0) order = 20;
  const int size = d / order;
  const int sylvester =
      std::popcount(static_cast<unsigned>((row % size) & (column % size))) % 2 ? -1 : 1;
  const int i = row / size;
  const int j = column / size;
  if (order == 1 || i == j || i == 0) return sylvester;
  if (j == 0) return -sylvester;
  const int q = order - 1;
  int power = 1;
  for (int k = 0; k < (q - 1) / 2; ++k) power = power * ((i - j + q) % q) % q;
  return power == 1 ? sylvester : -sylvester;
}

TEST(Hadamard, SupportsExactlyTheThreeFamilies) {
  for (int d = -3; d <= 5000; ++d) {
    bool expected = false;
    for (const int factor : {1, 12, 20}) {
      for (int size = 1; size <= 8192; size *= 2) expected |= factor * size == d;
    }
    EXPECT_EQ(hadamard_supported(d), expected) << d;
  }
  EXPECT_TRUE(hadamard_supported(1 << 20));
  EXPECT_TRUE(hadamard_supported(12 << 16));
  EXPECT_TRUE(hadamard_supported(20 << 15));
  EXPECT_FALSE(hadamard_supported(1 << 21));
  EXPECT_FALSE(hadamard_supported(12 << 17));
}

TEST(Hadamard, ColumnsAreThoseOfTheDefinition) {
  for (const int d : supported_dims(320)) {
    const double unit = 1.0 / std::sqrt(static_cast<double>(d));
    for (int column = 0; column < d; ++column) {
      std::vector<double> x(d, 0.0), y(d, 0.0);
      x[column] = y[column] = 1.0;
      hadamard_transform(x.data(), d);
      hadamard_transform_transpose(y.data(), d);
      for (int row = 0; row < d; ++row) {
        ASSERT_EQ(x[row], expected_sign(d, row, column) * unit) << d;
        ASSERT_EQ(y[row], expected_sign(d, column, row) * unit) << d;
      }
    }
  }
}

// H H^T = d I, from the matrix itself: a sum of +1 and -1 is exact.
TEST(Hadamard, DistinctColumnsAreOrthogonal) {
  for (const int d : supported_dims(192)) {
    std::vector<std::vector<int>> columns(d, std::vector<int>(d));
    for (int column = 0; column < d; ++column) {
      std::vector<float> x(d, 0.0f);
      x[column] = 1.0f;
      hadamard_transform(x.data(), d);
      for (int row = 0; row < d; ++row) columns[column][row] = x[row] > 0 ? 1 : -1;
    }
    for (int a = 0; a < d; ++a) {
      for (int b = 0; b < a; ++b) {
        const auto& left = columns[a];
        ASSERT_EQ(std::inner_product(left.begin(), left.end(), columns[b].begin(), 0), 0) << d;
      }
    }
  }
}

// Every stage rounds each of its sums by at most half an ulp of its size, and sums of one stage
// have the norm of the vector: log2(size) stages, order - 1 additions of the Paley factor, the
// product and the rounding of 1/sqrt(d) itself.
double rounding_bound(int d, double epsilon) {
  const int factor = hadamard_factor(d);
  return (std::log2(d / factor) + factor + 1) * epsilon;
}

template <class Float>
void expect_transpose_inverts(int d) {
  const std::vector<Float> x = gaussian_vector<Float>(d, d);
  std::vector<Float> y = x;
  hadamard_transform(y.data(), d);
  long double before = 0, after = 0, error = 0;
  for (int i = 0; i < d; ++i) {
    before += static_cast<long double>(x[i]) * x[i];
    after += static_cast<long double>(y[i]) * y[i];
  }
  hadamard_transform_transpose(y.data(), d);
  for (int i = 0; i < d; ++i) error += std::pow(static_cast<long double>(y[i]) - x[i], 2);
  const double bound = 2 * rounding_bound(d, std::numeric_limits<Float>::epsilon());
  EXPECT_NEAR(static_cast<double>(after / before), 1.0, bound) << d;
  EXPECT_LT(static_cast<double>(std::sqrt(error / before)), bound) << d;
}

TEST(Hadamard, TransposeIsTheInverseAndNormsAreKept) {
  for (const int d : supported_dims(kMaxHadamardDim)) {
    expect_transpose_inverts<float>(d);
    expect_transpose_inverts<double>(d);
  }
}

TEST(Hadamard, SinglePrecisionFollowsDouble) {
  for (const int d : supported_dims(4096)) {
    std::vector<float> x = gaussian_vector<float>(d, 7);
    std::vector<double> exact(x.begin(), x.end());
    double norm = 0;
    for (const double value : exact) norm += value * value;
    hadamard_transform(x.data(), d);
    hadamard_transform(exact.data(), d);
    double error = 0;
    for (int i = 0; i < d; ++i) error += std::pow(x[i] - exact[i], 2);
    EXPECT_LT(std::sqrt(error / norm), rounding_bound(d, 0x1p-24)) << d;
  }
}

// The order of additions is part of the format: stored codes depend on it.
TEST(Hadamard, AddsInTheDocumentedOrder) {
  for (const int d : supported_dims(1280)) {
    const std::vector<float> input = gaussian_vector<float>(d, 11);
    const int factor = hadamard_factor(d);
    const int size = d / factor;
    std::vector<float> expected = input;
    for (int stride = 1; stride < size; stride *= 2) {
      for (int i = 0; i < d; ++i) {
        if (i % size & stride) continue;
        const float a = expected[i];
        const float b = expected[i + stride];
        expected[i] = a + b;
        expected[i + stride] = a - b;
      }
    }
    if (factor > 1) {
      const std::vector<float> blocks = expected;
      for (int i = 0; i < factor; ++i) {
        for (int c = 0; c < size; ++c) {
          float sum = blocks[c] * static_cast<float>(paley_sign(factor, i, 0));
          for (int j = 1; j < factor; ++j) {
            const float term = blocks[j * size + c];
            sum = paley_sign(factor, i, j) > 0 ? sum + term : sum - term;
          }
          expected[i * size + c] = sum;
        }
      }
    }
    const float normaliser = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
    std::vector<float> actual = input;
    hadamard_transform(actual.data(), d);
    for (int i = 0; i < d; ++i) ASSERT_EQ(actual[i], expected[i] * normaliser) << d << " " << i;
  }
}

TEST(Hadamard, InterleavedLanesEqualSingleVectorsBitForBit) {
  for (const int d : {1, 2, 8, 12, 20, 40, 64, 80, 96, 128, 160, 192, 256, 1280}) {
    for (const int64_t lanes : {1, 3, 8, 16, 17}) {
      std::vector<float> interleaved = gaussian_vector<float>(d * lanes, 3);
      std::vector<float> transposed = interleaved;
      std::vector<std::vector<float>> single(lanes, std::vector<float>(d));
      for (int i = 0; i < d; ++i) {
        for (int64_t l = 0; l < lanes; ++l) single[l][i] = interleaved[i * lanes + l];
      }
      detail::hadamard_kernel<PortableIsa, false>(interleaved.data(), d, lanes);
      detail::hadamard_kernel<PortableIsa, true>(transposed.data(), d, lanes);
      for (int64_t l = 0; l < lanes; ++l) {
        std::vector<float> back = single[l];
        hadamard_transform(single[l].data(), d);
        hadamard_transform_transpose(back.data(), d);
        for (int i = 0; i < d; ++i) {
          ASSERT_EQ(interleaved[i * lanes + l], single[l][i]) << d << " " << lanes;
          ASSERT_EQ(transposed[i * lanes + l], back[i]) << d << " " << lanes;
        }
      }
    }
  }
}

TEST(Hadamard, RefusesOtherDims) {
  float x[64] = {};
  for (const int d : {0, -4, 3, 6, 10, 14, 24 + 1, 60, 112, 2 << 20}) {
    for (const auto transform :
         {&hadamard_transform<float>, &hadamard_transform_transpose<float>}) {
      try {
        transform(x, d);
        FAIL() << d << " was accepted";
      } catch (const InvalidArgument& error) {
        EXPECT_EQ(std::string(error.what()),
                  "dim: expected 2^k, 12*2^k or 20*2^k up to 1048576 (such as 64, 80, 96, 128, "
                  "160, 192, 256), got " +
                      std::to_string(d));
      }
    }
  }
}

}  // namespace
}  // namespace turboquant::math
