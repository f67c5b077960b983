#include "turboquant/quant/rotation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../support/at_simd_level.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/math/philox.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::quant {
namespace {

constexpr int kDims[] = {1, 2, 4, 8, 12, 16, 20, 24, 40, 64, 80, 96, 128, 160, 192, 256, 512};

std::vector<float> random_rows(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& value : rows) value = normal(generator);
  return rows;
}

template <class Rotation>
std::vector<double> dense_matrix(const Rotation& rotation) {  // column j = R e_j, stored as row j
  const int64_t d = rotation.dim();
  std::vector<double> columns(d * d, 0.0);
  for (int64_t j = 0; j < d; ++j) columns[j * d + j] = 1.0;
  rotation.apply(columns.data(), d);
  return columns;
}

void expect_orthogonal(const std::vector<double>& columns, int64_t d) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double dot = 0.0;
      for (int64_t k = 0; k < d; ++k) dot += columns[i * d + k] * columns[j * d + k];
      ASSERT_NEAR(dot, i == j ? 1.0 : 0.0, 1e-13 * static_cast<double>(d));
    }
  }
}

TEST(RotationStream, DiffersByLayerHeadAndPurpose) {
  std::set<uint64_t> streams;
  for (uint32_t layer : {0u, 1u, 79u}) {
    for (uint32_t head : {0u, 1u, 255u, 256u}) {
      for (const auto purpose : {StreamPurpose::kKeys, StreamPurpose::kValues,
                                 StreamPurpose::kVectors, StreamPurpose::kProjection}) {
        streams.insert(rotation_stream(layer, head, purpose));
      }
    }
  }
  EXPECT_EQ(streams.size(), 3u * 4u * 4u);
}

TEST(SignHadamardRotation, SignsAreThePhiloxBitsOfTheHeader) {
  const int dim = 160;
  const uint64_t seed = 0x123456789ABCDEF0u, stream = 0x0FEDCBA987654321u;
  const SignHadamardRotation rotation(dim, seed, stream);
  int negative = 0;
  for (uint32_t round = 0; round < 3; ++round) {
    for (uint32_t i = 0; i < dim; ++i) {
      const math::PhiloxWords random =
          math::philox4x32({{i / 128, round, 0x87654321u, 0x0FEDCBA9u}}, seed);
      const bool minus = random.word[i / 32 % 4] >> (i % 32) & 1;
      ASSERT_EQ(rotation.signs()[round * dim + i], minus ? -1.0f : 1.0f);
      negative += minus;
    }
  }
  EXPECT_NEAR(negative, 1.5 * dim, 5 * std::sqrt(0.75 * dim));  // 5 standard deviations
}

TEST(SignHadamardRotation, TurnsAreThePhiloxWordsOfTheHeader) {
  const int dim = 80;
  const uint64_t seed = 0x123456789ABCDEF0u, stream = 0x0FEDCBA987654321u;
  const SignHadamardRotation rotation(dim, seed, stream);
  ASSERT_EQ(rotation.turns().size(), static_cast<size_t>(dim));
  for (uint32_t j = 0; j < dim / 2; ++j) {
    const math::PhiloxWords random = math::philox4x32(
        {{j / 4, SignHadamardRotation::kTurnCounter, 0x87654321u, 0x0FEDCBA9u}}, seed);
    const double half_angle = std::atan((random.word[j % 4] >> 8) * 0x1p-24);
    // Three fp32 roundings of numbers up to 1.
    EXPECT_NEAR(rotation.turns()[2 * j], std::cos(2 * half_angle), 2e-7);
    EXPECT_NEAR(rotation.turns()[2 * j + 1], std::sin(2 * half_angle), 2e-7);
  }
}

TEST(SignHadamardRotation, IsOrthogonalAndTransposeInverts) {
  for (const int dim : kDims) {
    const SignHadamardRotation rotation(dim, 7, 3);
    expect_orthogonal(dense_matrix(rotation), dim);
    const std::vector<float> rows = random_rows(5 * dim, dim);
    std::vector<float> there_and_back = rows;
    rotation.apply(there_and_back.data(), 5);
    if (dim > 2) {
      EXPECT_NE(there_and_back, rows);
    }
    rotation.apply_transpose(there_and_back.data(), 5);
    std::vector<double> exact(rows.begin(), rows.end());
    rotation.apply(exact.data(), 5);
    rotation.apply_transpose(exact.data(), 5);
    for (size_t i = 0; i < rows.size(); ++i) {
      // 6 transforms of log2(d) additions: the error grows like its square root.
      ASSERT_NEAR(there_and_back[i], rows[i], 2e-6) << "dim " << dim;
      ASSERT_NEAR(exact[i], rows[i], 1e-14) << "dim " << dim;
    }
  }
}

TEST(SignHadamardRotation, RejectsOtherDimsAndNamesTheSupported) {
  for (const int dim : {-1, 0, 3, 60 + 1, 100, 112}) {
    try {
      SignHadamardRotation(dim, 0, 0);
      ADD_FAILURE() << "accepted " << dim;
    } catch (const InvalidArgument& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("2^k, 12*2^k or 20*2^k"), std::string::npos) << message;
      EXPECT_NE(message.find("got " + std::to_string(dim)), std::string::npos) << message;
    }
  }
}

class RotationAtSimdLevel : public testing_support::AtSimdLevel {};

// Bit for bit the composition of signs and math::hadamard_transform, whatever the number of rows
// and whatever is in them.
TEST_P(RotationAtSimdLevel, IsTheProductOfTheHeader) {
  for (const int dim : kDims) {
    const SignHadamardRotation rotation(dim, 42, rotation_stream(3, 1, StreamPurpose::kKeys));
    for (const int num_rows : {1, 2, 3, 4, 5, 15, 16, 17, 33}) {
      const int64_t stride = dim + num_rows % 3;
      std::vector<float> rows = random_rows(num_rows * stride, 100 * dim + num_rows);
      rows[0] = 1e-42f;
      rows[(num_rows / 2) * stride] = 1e30f;
      if (num_rows > 4) rows[4 * stride] = std::numeric_limits<float>::infinity();
      std::vector<float> expected = rows, expected_back = rows, actual = rows, actual_back = rows;
      const float* const signs = rotation.signs().data();
      const auto turn = [&](float* row, float direction) {
        for (int i = 0; i + 1 < dim; i += 2) {
          const float c = rotation.turns()[i], s = direction * rotation.turns()[i + 1];
          const float x = row[i], y = row[i + 1];
          row[i] = c * x - s * y;
          row[i + 1] = s * x + c * y;
        }
      };
      for (int r = 0; r < num_rows; ++r) {
        float* const forward = expected.data() + r * stride;
        float* const back = expected_back.data() + r * stride;
        for (int round = 0; round < 3; ++round) {
          for (int i = 0; i < dim; ++i) forward[i] *= signs[round * dim + i];
          if (round == 1) turn(forward, 1.0f);
          math::hadamard_transform(forward, dim);
        }
        for (int round = 2; round >= 0; --round) {
          math::hadamard_transform_transpose(back, dim);
          if (round == 1) turn(back, -1.0f);
          for (int i = 0; i < dim; ++i) back[i] *= signs[round * dim + i];
        }
      }
      rotation.apply(actual.data(), num_rows, stride);
      rotation.apply_transpose(actual_back.data(), num_rows, stride);
      auto expect_same = [&](const std::vector<float>& a, const std::vector<float>& b) {
        for (size_t i = 0; i < a.size(); ++i) {  // a NaN's sign and payload are not specified
          if (std::isnan(a[i]) && std::isnan(b[i])) continue;
          ASSERT_EQ(0, std::memcmp(&a[i], &b[i], sizeof(float)))
              << "dim " << dim << " rows " << num_rows << " element " << i;
        }
      };
      expect_same(actual, expected);
      expect_same(actual_back, expected_back);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SignHadamardRotation, RotationAtSimdLevel,
                         ::testing::ValuesIn(available_simd_levels()),
                         testing_support::simd_level_of);

TEST(HaarRotation, IsOrthogonalInAnyDimension) {
  for (const int dim : {2, 3, 7, 100, 128}) {
    const HaarRotation rotation(dim, 11);
    expect_orthogonal(dense_matrix(rotation), dim);
    const std::vector<float> rows = random_rows(3 * dim, dim);
    std::vector<float> there_and_back = rows;
    rotation.apply(there_and_back.data(), 3);
    rotation.apply_transpose(there_and_back.data(), 3);
    for (size_t i = 0; i < rows.size(); ++i) ASSERT_NEAR(there_and_back[i], rows[i], 1e-6);
  }
  EXPECT_THROW(HaarRotation(1, 0), InvalidArgument);
}

// Haar in R^2: rotations and reflections equally often, and every entry's moments those of a
// coordinate of a random unit vector: E q = 0, E q^2 = 1/2, E q^4 = 3/8.
TEST(HaarRotation, HasTheHaarMoments) {
  const int samples = 20000;
  double mean[4] = {}, square[4] = {}, fourth[4] = {};
  int reflections = 0;
  for (int seed = 0; seed < samples; ++seed) {
    const HaarRotation rotation(2, seed);
    const auto& q = rotation.matrix();
    for (int i = 0; i < 4; ++i) {
      mean[i] += q[i] / samples;
      square[i] += q[i] * q[i] / samples;
      fourth[i] += std::pow(q[i], 4) / samples;
    }
    reflections += q[0] * q[3] - q[1] * q[2] < 0.0;
  }
  const double error = 4.5 / std::sqrt(samples);  // 4.5 standard errors of a unit variable
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(mean[i], 0.0, error * std::sqrt(0.5));
    EXPECT_NEAR(square[i], 0.5, error * std::sqrt(0.125));
    EXPECT_NEAR(fourth[i], 0.375, error * std::sqrt(35.0 / 128 - 9.0 / 64));
  }
  EXPECT_NEAR(reflections / static_cast<double>(samples), 0.5, error * 0.5);
}

TEST(GaussianNumbers, HaveTheNormalMoments) {
  const int64_t count = 200001;
  const std::vector<double> numbers = gaussian_numbers(count, 5, 6);
  double moments[5] = {};
  for (const double x : numbers) {
    for (int p = 1; p <= 4; ++p) moments[p] += std::pow(x, p) / static_cast<double>(count);
  }
  const double error = 4.5 / std::sqrt(static_cast<double>(count));
  EXPECT_NEAR(moments[1], 0.0, error);
  EXPECT_NEAR(moments[2], 1.0, error * std::sqrt(2.0));
  EXPECT_NEAR(moments[3], 0.0, error * std::sqrt(15.0));
  EXPECT_NEAR(moments[4], 3.0, error * std::sqrt(96.0));
  EXPECT_NE(numbers, gaussian_numbers(count, 5, 7));
}

}  // namespace
}  // namespace turboquant::quant
