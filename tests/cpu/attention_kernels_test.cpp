#include "cpu/attention_kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "../support/at_simd_level.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::attention::detail {
namespace {

constexpr float kUntouched = -12345.0f;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> distinct_levels(int bits) {
  std::vector<float> levels(1 << bits);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = 0.5f + static_cast<float>(i);
  return levels;
}

// Every level against decode_row, bit for bit, on random bytes (spare bits included). The rows end
// where their memory ends, so that AddressSanitizer sees a read behind them.
void expect_rows_decode(const quant::DecodeTable& table, int64_t dim, int num_rows,
                        int64_t stride) {
  const int64_t row_bytes = quant::packed_row_bytes(dim, table.bits);
  std::mt19937 generator(static_cast<uint32_t>(dim));
  std::vector<uint8_t> rows(num_rows * row_bytes);
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(generator());
  std::vector<float> expected(num_rows * stride, kUntouched);
  for (int r = 0; r < num_rows; ++r) {
    quant::decode_row(table, rows.data() + r * row_bytes, dim, expected.data() + r * stride);
  }
  std::vector<float> decoded(num_rows * stride, kUntouched);
  decode_table_rows(active_attention_kernels(), table, rows.data(), row_bytes, num_rows, dim,
                    decoded.data(), stride);
  EXPECT_EQ(decoded, expected) << table.bits << " bits, dim " << dim;
}

void expect_rows_decode(const quant::DecodeTable& table, int64_t dim) {
  expect_rows_decode(table, dim, 3, padded_dim(dim) + 16);
  for (const int num_rows : {1, 3, 64}) expect_rows_decode(table, dim, num_rows, padded_dim(dim));
}

class AttentionKernelsTest : public testing_support::AtSimdLevel {};

constexpr int64_t kDims[] = {8, 16, 24, 40, 64, 80, 96, 120, 128, 160, 192, 256};

TEST_P(AttentionKernelsTest, DecodesRowsOfScalarCodebooks) {
  for (int bits = 1; bits <= 8; ++bits) {
    const quant::DecodeTable table = quant::make_decode_table(bits, distinct_levels(bits));
    for (const int64_t dim : kDims) expect_rows_decode(table, dim);
  }
}

// A table whose entries are not made of one scalar codebook, as a vector codebook's.
TEST_P(AttentionKernelsTest, DecodesRowsOfAnyTable) {
  for (int bits = 1; bits <= 8; ++bits) {
    quant::DecodeTable table = quant::make_decode_table(bits, distinct_levels(bits));
    table.nibble_levels.clear();
    std::mt19937 generator(bits);
    for (float& level : table.levels) level = static_cast<float>(generator() % 1000);
    for (const int64_t dim : kDims) expect_rows_decode(table, dim);
  }
}

TEST_P(AttentionKernelsTest, DecodesRowsOfVectorCodebooks) {
  for (int bits = 2; bits <= 4; ++bits) {
    const quant::DecodeTable table = quant::make_decode_table(math::VectorCodebook::gaussian(bits));
    for (const int64_t dim : kDims) expect_rows_decode(table, dim);
  }
}

// Dims that no packed cache has (they must be multiples of 8) still decode.
TEST_P(AttentionKernelsTest, DecodesRowsOfOddDims) {
  for (int bits = 1; bits <= 8; ++bits) {
    const quant::DecodeTable table = quant::make_decode_table(bits, distinct_levels(bits));
    for (const int64_t dim : {1, 7, 12, 100}) expect_rows_decode(table, dim);
  }
}

constexpr int kTokens = 61, kQueries = 11;

// Keys or values of a tile, packed and decoded.
struct Side {
  Side(int64_t dim, int bits, bool pairs, std::mt19937& generator) {
    if (pairs) {
      table = quant::make_decode_table(math::VectorCodebook::gaussian(bits));
    } else {
      std::normal_distribution<float> normal;
      std::vector<float> levels(1 << bits);
      for (float& level : levels) level = normal(generator);
      table = quant::make_decode_table(bits, levels);
    }
    const int64_t row_bytes = quant::packed_row_bytes(dim, bits);
    codes.resize(cache::kBlockTokens * row_bytes);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(generator());
    floats.resize(cache::kBlockTokens * dim);
    for (int t = 0; t < kTokens; ++t) {
      quant::decode_row(table, codes.data() + t * row_bytes, dim, floats.data() + t * dim);
    }
    packed = {nullptr,      bits,      scalar_levels(table).data(),
              codes.data(), row_bytes, pairs ? table.pair_planes.data() : nullptr};
    decoded = {floats.data(), 0, nullptr, nullptr, 0};
  }
  Side(const Side&) = delete;

  quant::DecodeTable table;
  std::vector<uint8_t> codes;
  std::vector<float> floats;
  TileRows packed{}, decoded{};
};

// A tile with queries that see all of it, a part and nothing.
class Tile {
 public:
  Tile(const AttentionKernels& kernels, int64_t dim, int k_bits, int v_bits, bool pairs)
      : kernels_(kernels),
        dim_(dim),
        generator_(k_bits * 8 + v_bits),
        keys_(dim, k_bits, pairs, generator_),
        values_(dim, v_bits, pairs, generator_),
        queries_(numbers(kQueries * dim, 1 / std::sqrt(static_cast<float>(dim)))),
        mean_(numbers(dim)),
        key_scales_(numbers(cache::kBlockTokens)),
        value_scales_(numbers(cache::kBlockTokens)),
        packed_queries_(queries_.size()),
        query_units_(kQueries) {
    begin_[5] = 17;
    end_[5] = 40;
    end_[6] = 0;
    if (kernels.pack_queries != nullptr) {
      kernels.pack_queries({.stride = dim,
                            .k_bits = k_bits,
                            .pairs = pairs,
                            .num_queries = kQueries,
                            .queries = queries_.data(),
                            .packed = packed_queries_.data(),
                            .units = query_units_.data()});
    }
  }

  // Maximum, sum and output of queries [first, first + count), [count, dim + 2].
  std::vector<float> attend(bool packed, int first = 0, int count = kQueries) const {
    std::vector<float> max(count, -INFINITY), sum(count), output(count * dim_), result;
    const auto kernel = packed ? kernels_.attend_packed_tile : kernels_.attend_tile;
    kernel({.stride = dim_,
            .num_queries = count,
            .num_tokens = kTokens,
            .queries = &queries_[first * dim_],
            .packed_queries = &packed_queries_[first * dim_],
            .query_units = &query_units_[first],
            .keys = packed ? keys_.packed : keys_.decoded,
            .values = packed ? values_.packed : values_.decoded,
            .mean = mean_.data(),
            .key_scales = key_scales_.data(),
            .value_scales = value_scales_.data(),
            .softcap = 0.0f,
            .begin = &begin_[first],
            .end = &end_[first],
            .max = max.data(),
            .sum = sum.data(),
            .output = output.data()});
    for (int r = 0; r < count; ++r) {
      result.insert(result.end(), {max[r], sum[r]});
      result.insert(result.end(), &output[r * dim_], &output[r * dim_] + dim_);
    }
    return result;
  }

  // Largest norm of a value.
  double value_norm() const {
    double most = 0;
    for (int t = 0; t < kTokens; ++t) {
      double squares = 0;
      for (int64_t i = 0; i < dim_; ++i) {
        squares += std::pow(values_.floats[t * dim_ + i] * value_scales_[t], 2);
      }
      most = std::max(most, std::sqrt(squares));
    }
    return most;
  }

 private:
  std::vector<float> numbers(int64_t count, float size = 1.0f) {
    std::normal_distribution<float> normal(0.0f, size);
    std::vector<float> random(count);
    for (float& x : random) x = normal(generator_);
    return random;
  }

  const AttentionKernels& kernels_;
  int64_t dim_;
  std::mt19937 generator_;
  Side keys_, values_;
  std::vector<float> queries_, mean_, key_scales_, value_scales_;
  std::vector<int16_t> packed_queries_;
  std::vector<float> query_units_;
  std::vector<int32_t> begin_ = std::vector<int32_t>(kQueries, 0);
  std::vector<int32_t> end_ = std::vector<int32_t>(kQueries, kTokens);
};

// What products of integers may add to a score, and to an output in units of the largest value.
// Levels, queries and weights are rounded by some 1e-4 of their size each (tests/support/
// attention.hpp); scores are of the size of the scales here, which are up to 3.
constexpr double kIntegerError = 2e-3;

void expect_near(const std::vector<float>& packed, const std::vector<float>& decoded, int64_t dim,
                 double value_norm) {
  for (int r = 0; r < kQueries; ++r) {
    const float* const a = &packed[r * (dim + 2)];
    const float* const b = &decoded[r * (dim + 2)];
    if (b[1] == 0.0f) {  // nothing seen
      EXPECT_EQ(std::vector<float>(a, a + dim + 2), std::vector<float>(b, b + dim + 2));
      continue;
    }
    EXPECT_NEAR(a[0] + std::log(a[1]), b[0] + std::log(b[1]), kIntegerError);
    double squares = 0;
    for (int64_t i = 2; i < dim + 2; ++i) squares += std::pow(a[i] / a[1] - b[i] / b[1], 2);
    EXPECT_LE(std::sqrt(squares), kIntegerError * value_norm);
  }
}

// Attending straight from codes gives the bits of attending from the rows decode_row writes, or
// nearly so where products are of integers; and those bits whatever the number of queries.
TEST_P(AttentionKernelsTest, PackedTilesAttendAsDecodedOnes) {
  const AttentionKernels& kernels = active_attention_kernels();
  if (kernels.attend_packed_tile == nullptr) GTEST_SKIP() << "this level has no such kernel";
  const auto expect_as_decoded = [&](int64_t dim, int k_bits, int v_bits, bool pairs) {
    if (!kernels.takes_packed(dim, k_bits, pairs)) return;
    if (!kernels.takes_packed(dim, v_bits, pairs)) return;
    SCOPED_TRACE(std::to_string(k_bits) + "+" + std::to_string(v_bits) + " bits, dim " +
                 std::to_string(dim) + (pairs ? ", pairs" : ""));
    const Tile tile(kernels, dim, k_bits, v_bits, pairs);
    const std::vector<float> packed = tile.attend(true);
    if (kernels.pack_queries == nullptr) {
      EXPECT_EQ(packed, tile.attend(false));
    } else {
      expect_near(packed, tile.attend(false), dim, tile.value_norm());
    }
    for (const auto& [first, count] : {std::pair(0, 1), std::pair(3, 2), std::pair(4, 4)}) {
      const float* const from = &packed[first * (dim + 2)];
      EXPECT_EQ(tile.attend(true, first, count),
                std::vector<float>(from, from + count * (dim + 2)));
    }
  };
  for (const int64_t dim : {64, 96, 128, 192, 256}) {
    for (int k_bits = 1; k_bits <= 8; ++k_bits) {
      for (int v_bits = 1; v_bits <= 8; ++v_bits) expect_as_decoded(dim, k_bits, v_bits, false);
    }
    for (int k_bits = 2; k_bits <= 4; ++k_bits) {
      for (int v_bits = 2; v_bits <= 4; ++v_bits) expect_as_decoded(dim, k_bits, v_bits, true);
    }
  }
}

// A query or a scale that is no number makes an output that is none.
TEST_P(AttentionKernelsTest, PackedTilesPassNanOn) {
  const AttentionKernels& kernels = active_attention_kernels();
  if (kernels.pack_queries == nullptr) GTEST_SKIP() << "queries are floats here";
  for (const float bad : {kNan, INFINITY}) {
    for (const int at : {0, 77, 127}) {
      std::vector<float> query(128, 0.5f);
      query[at] = bad;
      std::vector<int16_t> packed(128);
      float unit = 0;
      kernels.pack_queries({128, 4, false, 1, query.data(), packed.data(), &unit});
      EXPECT_TRUE(std::isnan(unit));
    }
  }
  for (const float size : {0.0f, 1e-45f, 1e-38f, 1e-20f, 1e30f}) {
    std::vector<float> query(128, size);
    std::vector<int16_t> packed(128);
    float unit = -1;
    kernels.pack_queries({128, 4, false, 1, query.data(), packed.data(), &unit});
    EXPECT_NEAR(unit * packed[5], size, size * 1e-3f + 2e-38f);
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, AttentionKernelsTest,
                         ::testing::ValuesIn(quant::available_simd_levels()),
                         testing_support::simd_level_of);

}  // namespace
}  // namespace turboquant::attention::detail
