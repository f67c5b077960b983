#include "cpu/attention_kernels.hpp"

#include <gtest/gtest.h>

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

INSTANTIATE_TEST_SUITE_P(Levels, AttentionKernelsTest,
                         ::testing::ValuesIn(quant::available_simd_levels()), [](const auto& info) {
                           return std::string(quant::simd_level_name(info.param));
                         });

}  // namespace
}  // namespace turboquant::attention::detail
