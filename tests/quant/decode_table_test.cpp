#include "turboquant/quant/decode_table.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

std::vector<float> distinct_levels(int bits) {
  std::vector<float> levels(1 << bits);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = 0.5f + static_cast<float>(i);
  return levels;
}

TEST(DecodeTable, Shapes) {
  const int expected[9][2] = {{0, 0},  {256, 8}, {256, 4}, {256, 2}, {256, 2},
                              {32, 1}, {64, 1},  {128, 1}, {256, 1}};
  for (int bits = 1; bits <= 8; ++bits) {
    const DecodeTable table = make_decode_table(bits, distinct_levels(bits));
    EXPECT_EQ(table.bits, bits);
    EXPECT_EQ(table.entries, expected[bits][0]);
    EXPECT_EQ(table.dims, expected[bits][1]);
    EXPECT_EQ(static_cast<int>(table.levels.size()), table.entries * table.dims);
  }
}

TEST(DecodeTable, DecodeRowIsUnpackThenLevels) {
  std::mt19937 generator(1);
  for (int bits = 1; bits <= 8; ++bits) {
    const std::vector<float> levels = distinct_levels(bits);
    const DecodeTable table = make_decode_table(bits, levels);
    for (const int dim : {1, 5, 7, 8, 12, 31, 64, 80, 96, 100, 128, 256}) {
      std::vector<uint8_t> codes(dim);
      for (auto& code : codes) code = generator() & ((1u << bits) - 1);
      std::vector<uint8_t> packed(packed_row_bytes(dim, bits));
      pack_row(codes.data(), dim, bits, packed.data());
      std::vector<float> decoded(dim + 1, -1.0f);
      decode_row(table, packed.data(), dim, decoded.data());
      for (int i = 0; i < dim; ++i) {
        ASSERT_EQ(decoded[i], levels[codes[i]]) << "bits " << bits << " dim " << dim << " i " << i;
      }
      ASSERT_EQ(decoded[dim], -1.0f) << "wrote behind the row";
    }
  }
}

TEST(DecodeTable, ThreeBitEntriesIgnoreTheSpareBits) {
  const DecodeTable table = make_decode_table(3, distinct_levels(3));
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(table.entry(byte)[0], table.entry(byte & 0x77)[0]);
    EXPECT_EQ(table.entry(byte)[1], table.entry(byte & 0x77)[1]);
  }
}

// pair_index says bit by bit where a pair's index is; decode_row has its own way there.
TEST(DecodeTable, VectorRowsDecodeByPairIndex) {
  std::mt19937 generator(2);
  std::vector<float> levels(512);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(i % 241) / 32 - 3.75f;
  for (int bits = 2; bits <= 4; ++bits) {
    const DecodeTable table = make_decode_table(math::VectorCodebook(bits, levels));
    EXPECT_EQ(table.entries, 256);
    EXPECT_EQ(table.dims, 2);
    EXPECT_EQ(table.overlapping(), bits == 2);
    EXPECT_TRUE(table.nibble_levels.empty());
    ASSERT_EQ(table.pair_planes.size(), 512u);
    for (int v = 0; v < 512; ++v) {
      EXPECT_EQ(table.pair_planes[v % 2 * 256 + v / 2] * math::VectorCodebook::kUnit, levels[v]);
    }
    for (const int dim : {8, 16, 24, 40, 64, 80, 96, 128, 256}) {
      std::vector<uint8_t> packed(packed_row_bytes(dim, bits));
      for (uint8_t& byte : packed) byte = static_cast<uint8_t>(generator());
      std::vector<float> decoded(dim + 1, -1.0f);
      decode_row(table, packed.data(), dim, decoded.data());
      for (int i = 0; i < dim; ++i) {
        const int index = pair_index(packed.data(), dim, bits, i / 2);
        ASSERT_EQ(decoded[i], levels[2 * index + i % 2]) << "bits " << bits << " dim " << dim;
      }
      ASSERT_EQ(decoded[dim], -1.0f) << "wrote behind the row";
    }
  }
}

TEST(DecodeTable, LevelsOfAnotherUnitHaveNoPlanes) {
  for (const float odd : {1.0f + 0x1p-6f, 4.0f}) {
    std::vector<float> levels(512, 1.0f);
    levels[77] = odd;
    EXPECT_TRUE(make_decode_table(math::VectorCodebook(4, levels)).pair_planes.empty());
  }
}

TEST(DecodeTable, RejectsWrongNumberOfLevels) {
  EXPECT_THROW(make_decode_table(3, distinct_levels(2)), InvalidArgument);
  EXPECT_THROW(make_decode_table(9, distinct_levels(2)), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::quant
