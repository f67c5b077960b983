#include "turboquant/quant/packing.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

constexpr int kDims[] = {1, 2, 3, 7, 8, 9, 15, 16, 20, 36, 44, 64, 77, 80, 96, 100, 128, 160, 256};
constexpr uint8_t kGuard = 0xA5;

std::vector<uint8_t> random_codes(int dim, int bits, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<uint8_t> codes(dim);
  for (auto& code : codes) code = generator() & ((1u << bits) - 1);
  return codes;
}

// The documented layouts, bit by bit: which bit of the row holds bit j of code i.
int64_t documented_bit(int i, int j, int dim, int bits) {
  if (bits != 3) return int64_t{i} * bits + j;
  const int segment_bytes = (dim + 7) / 8;
  const int quarter = i / (2 * segment_bytes);
  const int pair = i % (2 * segment_bytes) / 2;
  const int nibble = i % 2;
  return quarter < 3 ? 8 * (quarter * segment_bytes + pair) + 4 * nibble + j
                     : 8 * (j * segment_bytes + pair) + 4 * nibble + 3;
}

TEST(Packing, RowBytes) {
  EXPECT_EQ(packed_row_bytes(128, 1), 16);
  EXPECT_EQ(packed_row_bytes(128, 2), 32);
  EXPECT_EQ(packed_row_bytes(128, 3), 48);
  EXPECT_EQ(packed_row_bytes(128, 4), 64);
  EXPECT_EQ(packed_row_bytes(80, 3), 30);
  EXPECT_EQ(packed_row_bytes(12, 3), 6);
  EXPECT_EQ(packed_row_bytes(12, 5), 8);
  EXPECT_EQ(packed_row_bytes(7, 1), 1);
}

TEST(Packing, EveryBitIsWhereTheLayoutSays) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : kDims) {
      const auto codes = random_codes(dim, bits, 100 * bits + dim);
      const int64_t bytes = packed_row_bytes(dim, bits);
      std::vector<uint8_t> expected(bytes, 0);
      for (int i = 0; i < dim; ++i) {
        for (int j = 0; j < bits; ++j) {
          const int64_t bit = documented_bit(i, j, dim, bits);
          expected[bit / 8] |= (codes[i] >> j & 1) << (bit % 8);
        }
      }
      std::vector<uint8_t> packed(bytes + 1, kGuard);
      pack_row(codes.data(), dim, bits, packed.data());
      EXPECT_EQ(packed.back(), kGuard) << "wrote behind the row, bits " << bits << " dim " << dim;
      packed.pop_back();
      EXPECT_EQ(packed, expected) << "bits " << bits << " dim " << dim;
    }
  }
}

TEST(Packing, UnpackInvertsPack) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : kDims) {
      const auto codes = random_codes(dim, bits, 7 * bits + dim);
      std::vector<uint8_t> packed(packed_row_bytes(dim, bits));
      pack_row(codes.data(), dim, bits, packed.data());
      std::vector<uint8_t> unpacked(dim + 1, kGuard);
      unpack_row(packed.data(), dim, bits, unpacked.data());
      EXPECT_EQ(unpacked.back(), kGuard) << "wrote behind the row, bits " << bits << " dim " << dim;
      unpacked.pop_back();
      EXPECT_EQ(unpacked, codes) << "bits " << bits << " dim " << dim;
    }
  }
}

TEST(Packing, EvenDimensionIsTheLowNibble) {
  const uint8_t codes[] = {1, 2, 3, 4};
  uint8_t packed[2];
  pack_row(codes, 4, 4, packed);
  EXPECT_EQ(packed[0], 0x21);
  EXPECT_EQ(packed[1], 0x43);
}

TEST(Packing, ThreeBitsByHand) {
  // One byte a segment: dims 0,1 | 2,3 | 4,5 in the nibbles, dims 6,7 spread over the spare bits.
  const uint8_t codes[] = {1, 2, 3, 4, 5, 6, 7, 5};
  uint8_t packed[3];
  pack_row(codes, 8, 3, packed);
  EXPECT_EQ(packed[0], 0x21 | 0x08 | 0x80);
  EXPECT_EQ(packed[1], 0x43 | 0x08);
  EXPECT_EQ(packed[2], 0x65 | 0x08 | 0x80);
  EXPECT_EQ(spare_bits_byte(packed[0], packed[1], packed[2]), 0x57);
}

TEST(Packing, RejectsOtherWidths) {
  EXPECT_THROW(check_bits(0), InvalidArgument);
  EXPECT_THROW(check_bits(9), InvalidArgument);
  try {
    check_bits(9, "k_bits");
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "k_bits: expected a width from 1 to 8, got 9");
  }
}

// The layout of docs/cache_format.md, bit by bit.
TEST(PairIndex, GoldenBytes) {
  const uint8_t row[] = {0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB};
  for (int p = 0; p < 6; ++p) EXPECT_EQ(pair_index(row, 12, 4, p), row[p]);
  // 24 dimensions at 2 bits: a word of eight pairs, then one of four.
  const uint8_t two_bits[] = {0x21, 0x32, 0x43, 0x54, 0x65, 0x76,
                              0x87, 0x08, 0xA9, 0xBA, 0xCB, 0x0C};
  for (int p = 0; p < 12; ++p) EXPECT_EQ(pair_index(row, 24, 2, p), two_bits[p]) << p;
  // 16 dimensions at 3 bits: S = 2; the last pairs are made of bits 3 and 7.
  const uint8_t planes[] = {0x08, 0x80, 0xF7, 0x88, 0x00, 0x7F};
  const uint8_t three_bits[] = {0x08, 0x80, 0xF7, 0x88, 0x00, 0x7F, 0x21, 0x36};
  for (int p = 0; p < 8; ++p) EXPECT_EQ(pair_index(planes, 16, 3, p), three_bits[p]) << p;
}

}  // namespace
}  // namespace turboquant::quant
