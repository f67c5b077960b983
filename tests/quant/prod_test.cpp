#include "turboquant/quant/prod.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <tuple>
#include <vector>

#include "test_vectors.hpp"
#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

struct Batch {
  std::vector<uint8_t> rows;
  std::vector<float> scales, residual_norms;
};

Batch encode(const TurboQuantProd& quantizer, const std::vector<float>& vectors,
             const ParallelFor& parallel = threads()) {
  const auto n = static_cast<int64_t>(vectors.size()) / quantizer.dim();
  Batch batch{std::vector<uint8_t>(n * quantizer.row_bytes()), std::vector<float>(n),
              std::vector<float>(n)};
  quantizer.encode(vectors, batch.rows, batch.scales, batch.residual_norms, parallel);
  return batch;
}

std::vector<float> decode(const TurboQuantProd& quantizer, const Batch& batch) {
  std::vector<float> vectors(batch.scales.size() * quantizer.dim());
  quantizer.decode(batch.rows, batch.scales, batch.residual_norms, vectors);
  return vectors;
}

struct ErrorStatistics {
  double mean, variance, standard_error;
};

// Of <q_i, decoded_i - x_i> over the pairs.
ErrorStatistics inner_product_errors(const std::vector<float>& queries,
                                     const std::vector<float>& decoded,
                                     const std::vector<float>& vectors, int dim) {
  const auto n = static_cast<int64_t>(vectors.size()) / dim;
  double sum = 0.0, squares = 0.0;
  for (int64_t r = 0; r < n; ++r) {
    double error = 0.0;
    for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
      error += queries[i] * (static_cast<double>(decoded[i]) - vectors[i]);
    }
    sum += error;
    squares += error * error;
  }
  const double mean = sum / n, variance = squares / n - mean * mean;
  return {mean, variance, std::sqrt(variance / n)};
}

class ProdErrors : public ::testing::TestWithParam<std::tuple<Projection, int>> {};

TEST_P(ProdErrors, MeanIsZeroAndVarianceIsTheory) {
  const auto [projection, dim] = GetParam();
  const int64_t n = 50000;
  const std::vector<float> vectors = random_unit_vectors(n, dim, 10 + dim);
  const std::vector<float> queries = random_unit_vectors(n, dim, 20 + dim);
  for (int bits = 1; bits <= 5; ++bits) {
    const TurboQuantProd quantizer(dim, bits, 42, projection);
    const std::vector<float> decoded = decode(quantizer, encode(quantizer, vectors));
    const ErrorStatistics independent = inner_product_errors(queries, decoded, vectors, dim);
    EXPECT_LT(std::abs(independent.mean), 4 * independent.standard_error) << "bits " << bits;
    EXPECT_NEAR(independent.variance / quantizer.expected_variance(), 1.0, 0.05) << "bits " << bits;
  }
}

// A query along the vector is where a wrong constant shows: shrinking by 1 % is no longer hidden
// by symmetry. The average runs over projections too: unbiasedness holds over their choice.
TEST_P(ProdErrors, QueriesAlongTheVectorAreUnbiased) {
  const auto [projection, dim] = GetParam();
  for (int bits = 1; bits <= 3; ++bits) {
    double sum = 0.0, squares = 0.0;
    const int seeds = 40;
    for (int seed = 0; seed < seeds; ++seed) {
      const TurboQuantProd quantizer(dim, bits, seed, projection);
      const std::vector<float> vectors = random_unit_vectors(500, dim, 77 + seed);
      const double mean =
          inner_product_errors(vectors, decode(quantizer, encode(quantizer, vectors)), vectors, dim)
              .mean;
      sum += mean;
      squares += mean * mean;
    }
    const double mean = sum / seeds;
    const double standard_error = std::sqrt((squares / seeds - mean * mean) / (seeds - 1));
    EXPECT_LT(std::abs(mean), 4 * standard_error) << "bits " << bits;
  }
}

INSTANTIATE_TEST_SUITE_P(Prod, ProdErrors,
                         ::testing::Combine(::testing::Values(Projection::kOrthogonal,
                                                              Projection::kGaussian),
                                            ::testing::Values(64, 96, 128)),
                         [](const auto& param) {
                           return std::string(projection_name(std::get<0>(param.param))) +
                                  std::to_string(std::get<1>(param.param));
                         });

TEST(Prod, ExpectedVarianceIsTheKnownOne) {
  const double orthogonal[] = {0.5647, 0.2038, 0.0655, 0.0192};  // over d, d = 128, b = 1..4
  for (int bits = 1; bits <= 4; ++bits) {
    EXPECT_NEAR(TurboQuantProd(128, bits).expected_variance() * 128, orthogonal[bits - 1], 6e-5);
  }
  const TurboQuantProd gaussian(128, 3, 42, Projection::kGaussian);
  EXPECT_NEAR(gaussian.expected_variance(), (std::numbers::pi / 2 - 1.0 / 128) * 0.116000070 / 128,
              1e-9);
  // Theorem 2 of the paper bounds it.
  EXPECT_LT(gaussian.expected_variance(),
            std::sqrt(3.0) * std::numbers::pi * std::numbers::pi / 128 * std::pow(4.0, -3));
}

TEST(Prod, HaarRotationAndProjectionMeetTheSameTheory) {
  const int dim = 50;
  const int64_t n = 40000;
  const std::vector<float> vectors = random_unit_vectors(n, dim, 1);
  const std::vector<float> queries = random_unit_vectors(n, dim, 2);
  const TurboQuantProd quantizer(dim, 3, 1, Projection::kOrthogonal, RotationKind::kHaar);
  const ErrorStatistics errors =
      inner_product_errors(queries, decode(quantizer, encode(quantizer, vectors)), vectors, dim);
  EXPECT_LT(std::abs(errors.mean), 4 * errors.standard_error);
  EXPECT_NEAR(errors.variance / quantizer.expected_variance(), 1.0, 0.05);
}

TEST(Prod, ScoreIsTheInnerProductWithTheDecodedVector) {
  for (const auto projection : {Projection::kOrthogonal, Projection::kGaussian}) {
    for (const int dim : {20, 96, 128}) {
      for (int bits = 1; bits <= 9; ++bits) {
        const TurboQuantProd quantizer(dim, bits, 9, projection);
        const int64_t n = 70, m = 3;
        const std::vector<float> queries = random_unit_vectors(m, dim, 6);
        const Batch batch = encode(quantizer, random_unit_vectors(n, dim, 5));
        const std::vector<float> decoded = decode(quantizer, batch);
        std::vector<float> scores(m * n);
        quantizer.score(queries, batch.rows, batch.scales, batch.residual_norms, scores);
        for (int64_t q = 0; q < m; ++q) {
          for (int64_t r = 0; r < n; ++r) {
            double expected = 0.0;
            for (int i = 0; i < dim; ++i) expected += queries[q * dim + i] * decoded[r * dim + i];
            ASSERT_NEAR(scores[q * n + r], expected, 4e-6);
          }
        }
      }
    }
  }
}

TEST(Prod, ResultsDoNotDependOnThreads) {
  const TurboQuantProd quantizer(80, 4, 3, Projection::kGaussian);
  const std::vector<float> vectors = random_unit_vectors(333, 80, 7);
  const Batch alone = encode(quantizer, vectors, serial());
  const Batch spread = encode(quantizer, vectors, threads(5));
  EXPECT_EQ(alone.rows, spread.rows);
  EXPECT_EQ(alone.scales, spread.scales);
  EXPECT_EQ(alone.residual_norms, spread.residual_norms);
}

TEST(Prod, ZeroAndNonFiniteVectors) {
  const int dim = 64;
  for (const int bits : {1, 4}) {
    const TurboQuantProd quantizer(dim, bits);
    std::vector<float> vectors = random_unit_vectors(3, dim, 9);
    std::fill_n(vectors.begin(), dim, 0.0f);
    vectors[dim + 3] = std::numeric_limits<float>::quiet_NaN();
    Batch batch{std::vector<uint8_t>(3 * quantizer.row_bytes()), std::vector<float>(3),
                std::vector<float>(3)};
    EXPECT_EQ(quantizer.encode(vectors, batch.rows, batch.scales, batch.residual_norms), 1);
    const std::vector<float> decoded = decode(quantizer, batch);
    for (int i = 0; i < dim; ++i) {
      EXPECT_EQ(decoded[i], 0.0f);
      EXPECT_TRUE(std::isnan(decoded[dim + i]));
      EXPECT_TRUE(std::isfinite(decoded[2 * dim + i]));
    }
  }
}

TEST(Prod, RowIsCodesThenSigns) {
  EXPECT_EQ(TurboQuantProd(128, 1).row_bytes(), 16);
  EXPECT_EQ(TurboQuantProd(128, 4).row_bytes(), 48 + 16);
  EXPECT_EQ(TurboQuantProd(80, 3).row_bytes(), 20 + 10);
}

TEST(Prod, RejectsBadArguments) {
  EXPECT_THROW(TurboQuantProd(100, 4), InvalidArgument);
  EXPECT_THROW(TurboQuantProd(64, 0), InvalidArgument);
  EXPECT_THROW(TurboQuantProd(64, 10), InvalidArgument);
  const TurboQuantProd quantizer(64, 4);
  std::vector<float> vectors(2 * 64), scales(2), norms(1);
  std::vector<uint8_t> rows(2 * quantizer.row_bytes());
  EXPECT_THROW(quantizer.encode(vectors, rows, scales, norms), InvalidArgument);
  EXPECT_THROW(quantizer.decode(rows, scales, norms, vectors), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::quant
