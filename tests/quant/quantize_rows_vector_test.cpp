// Vector codebooks in quantize_rows.hpp: the documented bits, the least error, the distortion.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../support/at_simd_level.hpp"
#include "encoded_rows.hpp"
#include "test_vectors.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/codebook.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/decode_table.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::quant {
namespace {

using math::VectorCodebook;

constexpr int kDims[] = {8, 16, 24, 40, 64, 80, 96, 128, 256};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Encoded encode(const std::vector<float>& rows, int dim, int bits, ScaleRule rule) {
  QuantizeRowsParams params{};
  params.dim = dim;
  params.bits = bits;
  params.rule = rule;
  params.vector_codebook = &VectorCodebook::gaussian(bits);
  return encode_rows(params, rows);
}

// The header's rules for one row of numbers of unit variance, written as they read.
class Reference {
 public:
  Reference(int dim, int bits, const float* x)
      : dim_(dim), bits_(bits), book_(VectorCodebook::gaussian(bits)), x_(x) {}

  std::vector<uint8_t> row() const {
    std::vector<uint8_t> packed(packed_row_bytes(dim_, bits_));
    if (bits_ == 4) {
      for (int p = 0; p < dim_ / 2; ++p) {
        packed[p] = static_cast<uint8_t>(cheapest(p, [](int) { return true; }));
      }
    } else if (bits_ == 3) {
      for (int i = 0; i < dim_ / 8; ++i) put_planes(i, packed.data());
    } else {
      for (int p = 0; p < dim_ / 2; p += kWordPairs) {
        put_word(p, std::min(kWordPairs, dim_ / 2 - p), packed.data());
      }
    }
    return packed;
  }

 private:
  float cost(int pair, int e) const {
    const volatile float half = book_.half_squares()[e];
    const volatile float partly = half - rounded_product(x_[2 * pair], book_.levels()[2 * e]);
    const volatile float whole =
        partly - rounded_product(x_[2 * pair + 1], book_.levels()[2 * e + 1]);
    return whole;
  }

  template <class Allowed>
  int cheapest(int pair, Allowed allowed) const {
    int best = -1;
    float least = 0.0f;
    for (int e = 0; e < VectorCodebook::kEntries; ++e) {
      if (!allowed(e)) continue;
      const float tried = cost(pair, e);
      if (best < 0 || tried < least) {
        best = e;
        least = tried;
      }
    }
    return best;
  }

  void put_planes(int i, uint8_t* packed) const {
    const int segment = dim_ / 8;
    int best = -1;
    float least = 0.0f;
    uint8_t bytes[3] = {}, cheapest_byte[3][4];
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 4; ++k) {
        const int spare = (k & 1) << 3 | (k & 2) << 6;
        cheapest_byte[j][k] = static_cast<uint8_t>(
            cheapest(j * segment + i, [&](int e) { return (e & 0x88) == spare; }));
      }
    }
    for (int s = 0; s < VectorCodebook::kEntries; ++s) {
      if ((s & 0x88) != 0) continue;
      volatile float sum = cost(3 * segment + i, s);
      uint8_t tried[3];
      for (int j = 0; j < 3; ++j) {
        tried[j] = cheapest_byte[j][(s >> j & 1) | (s >> (3 + j) & 2)];
        sum = sum + cost(j * segment + i, tried[j]);
      }
      if (best < 0 || sum < least) {
        best = s;
        least = sum;
        std::copy_n(tried, 3, bytes);
      }
    }
    for (int j = 0; j < 3; ++j) packed[j * segment + i] = bytes[j];
  }

  void put_word(int first, int count, uint8_t* packed) const {
    std::vector<std::vector<int>> from(count, std::vector<int>(16));
    std::vector<float> best(16, 0.0f);
    for (int k = 0; k < count; ++k) {
      std::vector<float> next(16);
      for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
          const volatile float sum = best[n] + cost(first + k, n + 16 * m);
          if (n == 0 || sum < next[m]) {
            next[m] = sum;
            from[k][m] = n;
          }
        }
      }
      best = next;
    }
    int m = 0;
    for (int k = count - 1; k >= 0; --k) {
      m = from[k][m];
      packed[(first + k) / 2] |= static_cast<uint8_t>(m << (4 * (k % 2)));
    }
  }

  int dim_, bits_;
  const VectorCodebook& book_;
  const float* x_;
};

Encoded reference(const float* row, int dim, int bits, ScaleRule rule) {
  Encoded out;
  out.codes.assign(packed_row_bytes(dim, bits), 0);
  const float squares = lane_sum(row, row, dim);  // of rows in range
  if (!std::isfinite(squares)) {
    out.scales = {kNan};
    out.non_finite_rows = 1;
    return out;
  }
  if (squares == 0.0f) {
    out.scales = {0.0f};
    return out;
  }
  const auto sqrt_dim = static_cast<float>(std::sqrt(static_cast<double>(dim)));
  const volatile float root = std::sqrt(squares);
  const volatile float factor = sqrt_dim / root;
  std::vector<float> x(dim), c(dim);
  for (int i = 0; i < dim; ++i) x[i] = rounded_product(row[i], factor);
  out.codes = Reference(dim, bits, x.data()).row();
  decode_row(make_decode_table(VectorCodebook::gaussian(bits)), out.codes.data(), dim, c.data());
  out.scales = {scale_from_sums(
      rule, {squares, lane_sum(row, c.data(), dim), lane_sum(c.data(), c.data(), dim)}, sqrt_dim)};
  return out;
}

// Normal rows, rows with few directions, rows without any.
std::vector<float> varied_rows(int dim, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> rows;
  for (int i = 0; i < 12; ++i) {
    std::vector<float> row(dim);
    for (float& value : row) value = normal(generator) * (i == 3 ? 1e-6f : i == 4 ? 1e6f : 1.0f);
    rows.push_back(row);
  }
  for (const float value : {0.0f, -0.0f, 1.0f, -1.0f, kNan}) {
    rows.push_back(std::vector<float>(dim, value));
  }
  for (const float value : {1.0f, -3.0f, kNan, std::numeric_limits<float>::infinity()}) {
    rows.push_back(std::vector<float>(dim, 0.0f));
    rows.back()[generator() % dim] = value;
  }
  // On the border between two codewords: equal costs, where they round alike.
  const std::span<const float> levels = VectorCodebook::gaussian(4).levels();
  rows.push_back(std::vector<float>(dim));
  for (int i = 0; i < dim; ++i) {
    const size_t e = generator() % 256;
    rows.back()[i] = 0.5f * (levels[2 * e + i % 2] + levels[(2 * e + 2 + i % 2) % 512]);
  }
  std::vector<float> flat;
  for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  return flat;
}

class VectorRows : public testing_support::AtSimdLevel {};

TEST_P(VectorRows, StoresTheDocumentedBits) {
  for (const int dim : kDims) {
    const std::vector<float> rows = varied_rows(dim, dim);
    for (int bits = 2; bits <= 4; ++bits) {
      expect_documented_bits(rows, dim, bits, encode, reference);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(VectorRows, ARowDoesNotDependOnItsNeighbours) {
  const int dim = 40;
  const std::vector<float> rows = varied_rows(dim, 5);
  for (int bits = 2; bits <= 4; ++bits) {
    for (const int64_t count : {1, 3, 16, 17}) {
      expect_rows_alone(rows, dim, bits, count, encode);
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, VectorRows, ::testing::ValuesIn(available_simd_levels()),
                         testing_support::simd_level_of);

// Of all 2^16 rows of 8 coordinates at 2 bits, the encoder finds the nearest.
TEST(VectorRowsOfTwoBits, AreTheNearestOfAll) {
  const int dim = 8, bits = 2;
  const DecodeTable table = make_decode_table(VectorCodebook::gaussian(bits));
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 20; ++round) {
    std::vector<float> row(dim);
    for (float& value : row) value = normal(generator);
    const Encoded found = encode(row, dim, bits, ScaleRule::kNorm);
    const auto distance = [&](const uint8_t* packed) {
      float c[dim];
      decode_row(table, packed, dim, c);
      double sum = 0.0;
      for (int i = 0; i < dim; ++i) {
        sum += std::pow(static_cast<double>(row[i]) / found.scales[0] - c[i], 2);
      }
      return sum;
    };
    double least = INFINITY;
    for (int code = 0; code < 1 << 16; ++code) {
      std::vector<uint8_t> packed(dim);  // of which two bytes are the row
      packed[0] = static_cast<uint8_t>(code);
      packed[1] = static_cast<uint8_t>(code >> 8);
      least = std::min(least, distance(packed.data()));
    }
    EXPECT_LT(distance(found.codes.data()), least + 1e-4);
  }
}

class VectorDistortion : public ::testing::TestWithParam<int> {};

// Many dimensions: the codebook's own figure, and levels that are the means of what they stand for.
TEST_P(VectorDistortion, IsTheStatedOneAndStationary) {
  const int bits = GetParam(), dim = 4096;
  const int64_t n = 2048;
  const VectorCodebook& codebook = VectorCodebook::gaussian(bits);
  const std::vector<float> rows = random_unit_vectors(n, dim, 11);
  const Encoded encoded = encode(rows, dim, bits, ScaleRule::kNorm);
  const int64_t row_bytes = packed_row_bytes(dim, bits);
  std::vector<double> sums(512), counts(256);
  double distortion = 0.0;
  for (int64_t r = 0; r < n; ++r) {
    for (int p = 0; p < dim / 2; ++p) {
      const int e = pair_index(encoded.codes.data() + r * row_bytes, dim, bits, p);
      ++counts[e];
      for (int i = 0; i < 2; ++i) {
        const double x = static_cast<double>(rows[r * dim + 2 * p + i]) / encoded.scales[r];
        sums[2 * e + i] += x;
        distortion += std::pow(x - codebook.levels()[2 * e + i], 2);
      }
    }
  }
  const double total = static_cast<double>(n) * dim;
  double gain = 0.0;  // of moving every level to its mean; the sample's noise is 3e-5 of it
  for (int v = 0; v < 512; ++v) {
    ASSERT_GT(counts[v / 2], 0.0) << "codeword " << v / 2 << " is never used";
    const double off = sums[v] / counts[v / 2] - codebook.levels()[v];
    gain += counts[v / 2] * off * off;
  }
  EXPECT_NEAR(distortion / total / codebook.distortion(), 1.0, 3e-3);
  // Rounding levels to the unit takes a twelfth of its square, give or take 4 % over 512 levels.
  constexpr double kRounding = VectorCodebook::kUnit * VectorCodebook::kUnit / 12.0;
  EXPECT_LT(gain / total, 1.15 * kRounding + 1e-3 * codebook.distortion());
}

// Few dimensions, where coordinates are not normal: their tails are lighter, which can only help;
// still better than the scalar codebook made for the very dimension, by as much as in many.
TEST_P(VectorDistortion, HoldsForFewDimensions) {
  const int bits = GetParam();
  const double gaussian_ratio =
      VectorCodebook::gaussian(bits).distortion() / math::Codebook::gaussian(bits).distortion();
  const DecodeTable table = make_decode_table(VectorCodebook::gaussian(bits));
  for (const int dim : {64, 80, 96, 128, 256}) {
    const int64_t n = 40000;
    const std::vector<float> rows = random_unit_vectors(n, dim, dim);
    const Encoded encoded = encode(rows, dim, bits, ScaleRule::kNorm);
    std::vector<float> c(dim);
    double error = 0.0;
    for (int64_t r = 0; r < n; ++r) {
      decode_row(table, encoded.codes.data() + r * packed_row_bytes(dim, bits), dim, c.data());
      for (int i = 0; i < dim; ++i) {
        error += std::pow(static_cast<double>(rows[r * dim + i]) - encoded.scales[r] * c[i], 2);
      }
    }
    const double distortion = error / static_cast<double>(n);
    EXPECT_LT(distortion, 1.003 * VectorCodebook::gaussian(bits).distortion()) << "dim " << dim;
    const double ratio = distortion / math::Codebook::sphere(dim, bits).distortion();
    EXPECT_LT(ratio, 1.02 * gaussian_ratio) << "dim " << dim;
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, VectorDistortion, ::testing::Values(2, 3, 4),
                         ::testing::PrintToStringParamName());

// <y, c> > 0, which the scale rules need, for rows that are as far from normal as rows can be.
TEST(VectorRowsOfFewDirections, HavePositiveScales) {
  for (const int dim : {8, 16, 24, 64, 128}) {
    std::vector<float> rows;
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < dim; ++j) {
        for (const float sign : {-1.0f, 1.0f}) {
          std::vector<float> row(dim, 0.0f);
          row[i] = sign;
          row[j] += dim % 3 == 0 ? 0.01f : -1.3f;
          rows.insert(rows.end(), row.begin(), row.end());
        }
      }
    }
    for (int bits = 2; bits <= 4; ++bits) {
      for (const ScaleRule rule : {ScaleRule::kUnbiased, ScaleRule::kLeastSquares}) {
        for (const float scale : encode(rows, dim, bits, rule).scales) {
          ASSERT_GT(scale, 0.0f) << "dim " << dim << " bits " << bits;
        }
      }
    }
  }
}

TEST(VectorRowsParams, AreChecked) {
  std::vector<float> row(24);
  std::vector<uint8_t> codes(24);
  float scale = 0.0f;
  QuantizeRowsParams good{.dim = 24,
                          .bits = 3,
                          .levels = {},
                          .boundaries = {},
                          .rule = ScaleRule::kNorm,
                          .rows = row.data(),
                          .row_stride_elems = 24,
                          .num_rows = 1,
                          .codes = codes.data(),
                          .codes_stride_bytes = 24,
                          .scales = &scale,
                          .vector_codebook = &VectorCodebook::gaussian(3)};
  EXPECT_EQ(quantize_rows(good), 0);
  const auto message = [&](auto change) -> std::string {
    QuantizeRowsParams bad = good;
    change(bad);
    try {
      quantize_rows(bad);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message([](auto& p) { p.bits = 4; }), "bits: expected the vector codebook's 3, got 4");
  EXPECT_EQ(message([](auto& p) { p.dim = 12; }),
            "dim: expected a multiple of 8 with a vector codebook, got 12");
  EXPECT_EQ(message([&](auto& p) { p.levels = row; }), "levels: expected 0 values, got 24");
  EXPECT_EQ(message([&](auto& p) { p.boundaries = row; }), "boundaries: expected 0 values, got 24");
}

}  // namespace
}  // namespace turboquant::quant
