#include "turboquant/quant/mse.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "test_vectors.hpp"
#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

struct Batch {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};

Batch encode(const TurboQuantMse& quantizer, const std::vector<float>& vectors,
             const ParallelFor& parallel = threads()) {
  const auto n = static_cast<int64_t>(vectors.size()) / quantizer.dim();
  Batch batch{std::vector<uint8_t>(n * quantizer.row_bytes()), std::vector<float>(n)};
  quantizer.encode(vectors, batch.codes, batch.scales, parallel);
  return batch;
}

std::vector<float> decode(const TurboQuantMse& quantizer, const Batch& batch,
                          const ParallelFor& parallel = threads()) {
  std::vector<float> vectors(batch.scales.size() * quantizer.dim());
  quantizer.decode(batch.codes, batch.scales, vectors, parallel);
  return vectors;
}

double mean_squared_error(const std::vector<float>& a, const std::vector<float>& b, int dim) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = static_cast<double>(a[i]) - b[i];
    sum += error * error;
  }
  return sum / (static_cast<double>(a.size()) / dim);
}

class MseDistortion : public ::testing::TestWithParam<int> {};

// The acceptance figure: 1e5 random unit vectors against the exact distortion of the codebook.
TEST_P(MseDistortion, IsTheExactOneOnRandomVectors) {
  const int dim = GetParam();
  const std::vector<float> vectors = random_unit_vectors(100000, dim, dim);
  for (int bits = 1; bits <= 8; ++bits) {
    const TurboQuantMse quantizer(dim, bits);
    const double measured =
        mean_squared_error(decode(quantizer, encode(quantizer, vectors)), vectors, dim);
    EXPECT_NEAR(measured / quantizer.codebook().distortion(), 1.0, 0.01) << "bits " << bits;
  }
}

// Vectors an adversary (or a model) would pick, averaged over seeds. At 8 bits a third of the error
// comes from rare coordinates beyond the last level, so thousands of seeds are needed for 10 %.
TEST_P(MseDistortion, IsWithinTenPercentOnStructuredVectors) {
  const int dim = GetParam();
  constexpr int kSeeds = 5000;
  for (int bits = 1; bits <= 8; ++bits) {
    double measured[4] = {};
    double exact = 0.0;
    for (int seed = 0; seed < kSeeds; ++seed) {
      const TurboQuantMse quantizer(dim, bits, seed);
      exact = quantizer.codebook().distortion();
      std::vector<float> vectors(4 * dim, 0.0f);
      const int hot = seed * 7 % dim;
      vectors[hot] = 1.0f;
      vectors[dim + hot] = std::sqrt(0.5f);
      vectors[dim + (hot + 1 + seed % (dim - 1)) % dim] =
          seed % 2 ? std::sqrt(0.5f) : -std::sqrt(0.5f);
      const float flat = 1.0f / std::sqrt(static_cast<float>(dim));
      for (int i = 0; i < dim; ++i) {
        vectors[2 * dim + i] = flat;
        vectors[3 * dim + i] = i % 2 ? -flat : flat;
      }
      const std::vector<float> decoded =
          decode(quantizer, encode(quantizer, vectors, serial()), serial());
      for (int row = 0; row < 4; ++row) {
        for (int i = row * dim; i < (row + 1) * dim; ++i) {
          measured[row] += std::pow(static_cast<double>(decoded[i]) - vectors[i], 2) / kSeeds;
        }
      }
    }
    const char* const names[] = {"one-hot", "2-sparse", "constant", "alternating"};
    for (int row = 0; row < 4; ++row) {
      const double ratio = measured[row] / exact;
      EXPECT_NEAR(ratio, 1.0, 0.1) << names[row] << " bits " << bits;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, MseDistortion, ::testing::Values(64, 80, 96, 128, 256),
                         [](const auto& dim) { return std::to_string(dim.param); });

// Errors of the four rules at d = 128 and b = 2, 3, 4, measured elsewhere with a float reference.
TEST(Mse, ScaleRulesHaveTheirKnownErrors) {
  const struct {
    ScaleRule rule;
    double error[3];
  } known[] = {{ScaleRule::kNorm, {0.11600, 0.03397, 0.00932}},
               {ScaleRule::kLeastSquares, {0.11522, 0.03352, 0.00915}},
               {ScaleRule::kNormPreserving, {0.11882, 0.03381, 0.00917}},
               {ScaleRule::kUnbiased, {0.13057, 0.03472, 0.00924}}};
  const int dim = 128;
  const std::vector<float> vectors = random_unit_vectors(100000, dim, 1);
  for (const auto& [rule, errors] : known) {
    for (int bits = 2; bits <= 4; ++bits) {
      const TurboQuantMse quantizer(dim, bits, 42, rule);
      const double measured =
          mean_squared_error(decode(quantizer, encode(quantizer, vectors)), vectors, dim);
      EXPECT_NEAR(measured / errors[bits - 2], 1.0, 0.005)
          << scale_rule_name(rule) << " bits " << bits;
    }
  }
}

// x' = decode(encode(x)) under each rule's defining property, to fp32 rounding.
TEST(Mse, ScaleRulesHoldTheirPromises) {
  for (const int dim : {64, 80, 128}) {
    const int64_t n = 100;
    const std::vector<float> vectors = random_unit_vectors(n, dim, 2);
    for (int bits = 1; bits <= 8; ++bits) {
      for (const ScaleRule rule : kScaleRules) {
        const TurboQuantMse quantizer(dim, bits, 42, rule);
        const std::vector<float> decoded = decode(quantizer, encode(quantizer, vectors));
        for (int64_t r = 0; r < n; ++r) {
          double xx = 0.0, xd = 0.0, dd = 0.0;
          for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
            xx += static_cast<double>(vectors[i]) * vectors[i];
            xd += static_cast<double>(vectors[i]) * decoded[i];
            dd += static_cast<double>(decoded[i]) * decoded[i];
          }
          if (rule == ScaleRule::kNormPreserving) {
            ASSERT_NEAR(dd, xx, 1e-5);
          }
          if (rule == ScaleRule::kLeastSquares) {
            ASSERT_NEAR(xd, dd, 1e-5);
          }
          if (rule == ScaleRule::kUnbiased) {
            ASSERT_NEAR(xd, xx, 1e-5);
          }
        }
      }
    }
  }
}

// Unbiased inner products: mean error 0, variance D / (1 - D) / d for independent queries.
TEST(Mse, UnbiasedScaleGivesUnbiasedInnerProducts) {
  const int dim = 128;
  const int64_t n = 40000;
  const std::vector<float> vectors = random_unit_vectors(n, dim, 3);
  const std::vector<float> queries = random_unit_vectors(n, dim, 4);
  for (int bits = 2; bits <= 4; ++bits) {
    const TurboQuantMse quantizer(dim, bits, 42, ScaleRule::kUnbiased);
    const std::vector<float> decoded = decode(quantizer, encode(quantizer, vectors));
    double sum = 0.0, squares = 0.0;
    for (int64_t r = 0; r < n; ++r) {
      double error = 0.0;
      for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
        error += queries[i] * (static_cast<double>(decoded[i]) - vectors[i]);
      }
      sum += error;
      squares += error * error;
    }
    const double variance = squares / n;
    const double distortion = quantizer.codebook().distortion();
    EXPECT_LT(std::abs(sum / n), 4 * std::sqrt(variance / n)) << "bits " << bits;
    EXPECT_NEAR(variance / (distortion / (1 - distortion) / dim), 1.0, 0.05) << "bits " << bits;
  }
}

TEST(Mse, ScoreIsTheInnerProductWithTheDecodedVector) {
  for (const auto rotation : {RotationKind::kSignHadamard, RotationKind::kHaar}) {
    for (const int dim : {20, 96, 128}) {
      for (int bits = 1; bits <= 8; ++bits) {
        const TurboQuantMse quantizer(dim, bits, 9, ScaleRule::kUnbiased, rotation);
        const int64_t n = 70, m = 3;
        const std::vector<float> queries = random_unit_vectors(m, dim, 6);
        const Batch batch = encode(quantizer, random_unit_vectors(n, dim, 5));
        const std::vector<float> decoded = decode(quantizer, batch);
        std::vector<float> scores(m * n);
        quantizer.score(queries, batch.codes, batch.scales, scores);
        for (int64_t q = 0; q < m; ++q) {
          for (int64_t r = 0; r < n; ++r) {
            double expected = 0.0;
            for (int i = 0; i < dim; ++i) expected += queries[q * dim + i] * decoded[r * dim + i];
            ASSERT_NEAR(scores[q * n + r], expected, 1e-6);
          }
        }
      }
    }
  }
}

TEST(Mse, ResultsDoNotDependOnThreads) {
  const TurboQuantMse quantizer(80, 3);
  const std::vector<float> vectors = random_unit_vectors(333, 80, 7);
  const Batch alone = encode(quantizer, vectors, serial());
  const Batch spread = encode(quantizer, vectors, threads(5));
  EXPECT_EQ(alone.codes, spread.codes);
  EXPECT_EQ(alone.scales, spread.scales);
  EXPECT_EQ(decode(quantizer, alone, serial()), decode(quantizer, alone, threads(7)));
}

TEST(Mse, HaarRotationServesAnyDimension) {
  for (const int dim : {2, 3, 50, 100}) {
    const TurboQuantMse quantizer(dim, 4, 1, ScaleRule::kNorm, RotationKind::kHaar);
    const std::vector<float> vectors = random_unit_vectors(20000, dim, 8);
    const double measured =
        mean_squared_error(decode(quantizer, encode(quantizer, vectors)), vectors, dim);
    EXPECT_NEAR(measured / quantizer.codebook().distortion(), 1.0, 0.03) << "dim " << dim;
  }
}

TEST(Mse, ZeroAndNonFiniteVectors) {
  const int dim = 64;
  const TurboQuantMse quantizer(dim, 4, 42, ScaleRule::kUnbiased);
  std::vector<float> vectors = random_unit_vectors(4, dim, 9);
  std::fill_n(vectors.begin(), dim, 0.0f);
  vectors[dim + 3] = std::numeric_limits<float>::quiet_NaN();
  vectors[2 * dim + 9] = std::numeric_limits<float>::infinity();
  Batch batch{std::vector<uint8_t>(4 * quantizer.row_bytes(), 0xEE), std::vector<float>(4)};
  EXPECT_EQ(quantizer.encode(vectors, batch.codes, batch.scales), 2);
  EXPECT_EQ(batch.scales[0], 0.0f);
  EXPECT_TRUE(std::isnan(batch.scales[1]) && std::isnan(batch.scales[2]));
  EXPECT_TRUE(std::isfinite(batch.scales[3]));
  const std::vector<float> decoded = decode(quantizer, batch);
  for (int i = 0; i < dim; ++i) {
    EXPECT_EQ(decoded[i], 0.0f);
    EXPECT_TRUE(std::isnan(decoded[dim + i]));
    EXPECT_NEAR(decoded[3 * dim + i], vectors[3 * dim + i], 0.2);
  }
}

TEST(Mse, EmptyBatchesAreFine) {
  const TurboQuantMse quantizer(64, 4);
  const Batch batch = encode(quantizer, {});
  EXPECT_TRUE(decode(quantizer, batch).empty());
}

TEST(Mse, RejectsBadArguments) {
  EXPECT_THROW(TurboQuantMse(100, 4), InvalidArgument);
  EXPECT_THROW(TurboQuantMse(1, 4, 42, ScaleRule::kNorm, RotationKind::kHaar), InvalidArgument);
  EXPECT_THROW(TurboQuantMse(64, 0), InvalidArgument);
  EXPECT_THROW(TurboQuantMse(64, 9), InvalidArgument);
  const TurboQuantMse quantizer(64, 4);
  std::vector<float> vectors(2 * 64), scales(2), scores(2);
  std::vector<uint8_t> codes(2 * 32);
  auto message = [](auto call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "accepted";
  };
  std::vector<float> odd(65), few(1);
  std::vector<uint8_t> short_codes(33);
  EXPECT_EQ(message([&] { quantizer.encode(odd, codes, scales); }),
            "vectors: expected rows of 64 elements, got 65 elements");
  EXPECT_EQ(message([&] { quantizer.encode(vectors, short_codes, scales); }),
            "codes: expected 64 elements, got 33");
  EXPECT_EQ(message([&] { quantizer.encode(vectors, codes, few); }),
            "scales: expected 2 elements, got 1");
  EXPECT_EQ(message([&] { quantizer.decode(short_codes, scales, vectors); }),
            "codes: expected rows of 32 elements, got 33 elements");
  EXPECT_EQ(message([&] { quantizer.score(vectors, codes, scales, scores); }),
            "scores: expected 4 elements, got 2");
}

}  // namespace
}  // namespace turboquant::quant
