#include "cpu/attention_kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "turboquant/quant/simd_level.hpp"

namespace turboquant::attention::detail {
namespace {

constexpr float kUntouched = -12345.0f;

std::vector<float> distinct_levels(int bits) {
  std::vector<float> levels(1 << bits);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = 0.5f + static_cast<float>(i);
  return levels;
}

// Every level against decode_row, bit for bit, on random bytes (spare bits included). The rows end
// where their memory ends, so that AddressSanitizer sees a read behind them.
void expect_rows_decode(const quant::DecodeTable& table, int64_t dim) {
  constexpr int kRows = 3;
  const int64_t row_bytes = quant::packed_row_bytes(dim, table.bits);
  const int64_t stride = padded_dim(dim) + 16;
  std::mt19937 generator(static_cast<uint32_t>(dim));
  std::vector<uint8_t> rows(kRows * row_bytes);
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(generator());
  std::vector<float> expected(kRows * stride, kUntouched);
  for (int r = 0; r < kRows; ++r) {
    quant::decode_row(table, rows.data() + r * row_bytes, dim, expected.data() + r * stride);
  }
  std::vector<float> decoded(kRows * stride, kUntouched);
  decode_table_rows(active_attention_kernels(), table, rows.data(), row_bytes, kRows, dim,
                    decoded.data(), stride);
  EXPECT_EQ(decoded, expected) << table.bits << " bits, dim " << dim;
}

class AttentionKernelsTest : public ::testing::TestWithParam<quant::SimdLevel> {
 protected:
  void SetUp() override { quant::set_simd_level(GetParam()); }
  void TearDown() override { quant::set_simd_level(before_); }

 private:
  quant::SimdLevel before_ = quant::active_simd_level();
};

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

// Dims that no packed cache has (they must be multiples of 8) still decode.
TEST_P(AttentionKernelsTest, DecodesRowsOfOddDims) {
  for (int bits = 1; bits <= 8; ++bits) {
    const quant::DecodeTable table = quant::make_decode_table(bits, distinct_levels(bits));
    for (const int64_t dim : {1, 7, 12, 100}) expect_rows_decode(table, dim);
  }
}

// Attending straight from codes gives the bits of attending from the rows decode_row writes.
TEST_P(AttentionKernelsTest, PackedTilesAttendAsDecodedOnes) {
  const AttentionKernels& kernels = active_attention_kernels();
  if (kernels.attend_packed_tile == nullptr) GTEST_SKIP() << "this level has no such kernel";
  constexpr int kQueries = 7, kTokens = 61;
  for (const int64_t dim : {64, 128, 256}) {
    for (int k_bits = 1; k_bits <= 4; ++k_bits) {
      for (int v_bits = 1; v_bits <= 4; ++v_bits) {
        if (!whole_vectors(dim, k_bits, kernels.vector_floats)) continue;
        if (!whole_vectors(dim, v_bits, kernels.vector_floats)) continue;
        std::mt19937 generator(k_bits * 8 + v_bits);
        std::normal_distribution<float> normal;
        const auto numbers = [&](int64_t count) {
          std::vector<float> random(count);
          for (float& x : random) x = normal(generator);
          return random;
        };
        const std::vector<float> queries = numbers(kQueries * dim), mean = numbers(dim);
        const std::vector<float> k_scales = numbers(64), v_scales = numbers(64);
        std::vector<int32_t> begin(kQueries, 0), end(kQueries, kTokens);
        begin[5] = 17;
        end[5] = 40;
        end[6] = 0;
        struct Side {
          quant::DecodeTable table;
          std::vector<uint8_t> codes;
          std::vector<float> floats;
          TileRows packed{}, decoded{};
        };
        const auto side = [&](int bits) {
          Side result;
          result.table = quant::make_decode_table(bits, numbers(1 << bits));
          const int64_t row_bytes = quant::packed_row_bytes(dim, bits);
          result.codes.resize(kTokens * row_bytes);
          for (uint8_t& byte : result.codes) byte = static_cast<uint8_t>(generator());
          result.floats.resize(64 * dim);
          for (int t = 0; t < kTokens; ++t) {
            quant::decode_row(result.table, result.codes.data() + t * row_bytes, dim,
                              result.floats.data() + t * dim);
          }
          result.packed = {nullptr, bits, result.table.nibble_levels.data(), result.codes.data(),
                           row_bytes};
          result.decoded = {result.floats.data(), 0, nullptr, nullptr, 0};
          return result;
        };
        const Side keys = side(k_bits), values = side(v_bits);
        const auto attend = [&](auto kernel, const TileRows& k, const TileRows& v) {
          std::vector<float> state(kQueries * (dim + 2), 0.0f);
          std::fill_n(state.begin(), kQueries, -INFINITY);
          kernel({.stride = dim,
                  .num_queries = kQueries,
                  .num_tokens = kTokens,
                  .queries = queries.data(),
                  .keys = k,
                  .values = v,
                  .mean = mean.data(),
                  .key_scales = k_scales.data(),
                  .value_scales = v_scales.data(),
                  .softcap = 0.0f,
                  .begin = begin.data(),
                  .end = end.data(),
                  .max = state.data(),
                  .sum = state.data() + kQueries,
                  .output = state.data() + 2 * kQueries});
          return state;
        };
        EXPECT_EQ(attend(kernels.attend_packed_tile, keys.packed, values.packed),
                  attend(kernels.attend_tile, keys.decoded, values.decoded))
            << k_bits << "+" << v_bits << " bits, dim " << dim;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, AttentionKernelsTest,
                         ::testing::ValuesIn(quant::available_simd_levels()), [](const auto& info) {
                           return std::string(quant::simd_level_name(info.param));
                         });

}  // namespace
}  // namespace turboquant::attention::detail
