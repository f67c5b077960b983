#include "turboquant/cache/layout.hpp"

#include <gtest/gtest.h>

#include <set>

namespace turboquant::cache {
namespace {

BlockLayout layout_128(int bits, int scale_bytes, bool has_mean) {
  return {.head_dim = 128,
          .k_bits = bits,
          .v_bits = bits,
          .scale_bytes = scale_bytes,
          .has_mean = has_mean};
}

// The bytes per token and KV head that the design promises at d = 128.
TEST(BlockLayout, BytesPerToken) {
  struct Case {
    int bits, scale_bytes;
    bool has_mean;
    int bytes_per_token;
  };
  for (const Case& c :
       {Case{4, 4, false, 136}, Case{4, 4, true, 140}, Case{4, 2, true, 136}, Case{3, 4, true, 108},
        Case{3, 2, true, 104}, Case{2, 4, true, 76}, Case{2, 2, true, 72}}) {
    EXPECT_EQ(layout_128(c.bits, c.scale_bytes, c.has_mean).block_bytes(),
              c.bytes_per_token * kBlockTokens)
        << c.bits << " bits, scales of " << c.scale_bytes << " bytes, means " << c.has_mean;
  }
  static_assert(BlockLayout{.head_dim = 128, .k_bits = 4, .v_bits = 4}.block_bytes() == 8704);
}

TEST(BlockLayout, PartsAreAlignedInOrderAndDoNotOverlap) {
  for (const int head_dim : {8, 24, 40, 64, 80, 96, 128, 160, 256, 512}) {
    for (int k_bits = 1; k_bits <= 8; ++k_bits) {
      for (int v_bits = 1; v_bits <= 8; ++v_bits) {
        for (const int scale_bytes : {2, 4}) {
          for (const bool has_mean : {false, true}) {
            const BlockLayout layout{head_dim, k_bits, v_bits, scale_bytes, has_mean};
            ASSERT_EQ(layout.k_row_bytes(), head_dim / 8 * k_bits);  // whole bytes, no padding
            ASSERT_EQ(layout.v_row_bytes(), head_dim / 8 * v_bits);
            const int64_t begins[] = {layout.k_mean_offset(),   layout.k_codes_offset(),
                                      layout.k_scales_offset(), layout.v_codes_offset(),
                                      layout.v_scales_offset(), layout.block_bytes()};
            const int64_t sizes[] = {has_mean ? 2 * head_dim : 0, 64 * layout.k_row_bytes(),
                                     64 * scale_bytes, 64 * layout.v_row_bytes(), 64 * scale_bytes};
            for (int part = 0; part < 5; ++part) {
              ASSERT_EQ(begins[part] % 16, 0);
              ASSERT_GE(begins[part + 1], begins[part] + sizes[part]);
              ASSERT_LT(begins[part + 1], begins[part] + sizes[part] + 16);
            }
            ASSERT_EQ(layout.k_row(63) + layout.k_row_bytes(), begins[1] + sizes[1]);
            ASSERT_EQ(layout.k_scale(63) + scale_bytes, begins[2] + sizes[2]);
            ASSERT_EQ(layout.v_row(63) + layout.v_row_bytes(), begins[3] + sizes[3]);
            ASSERT_EQ(layout.v_scale(63) + scale_bytes, begins[4] + sizes[4]);
            ASSERT_EQ(layout.page_bytes(5), layout.block_offset(5));
          }
        }
      }
    }
  }
}

TEST(BlockLayout, OffsetsAre64Bit) {
  const BlockLayout layout{.head_dim = 512, .k_bits = 8, .v_bits = 8};
  EXPECT_EQ(layout.block_offset(1 << 16), int64_t{66048} * (1 << 16));  // 4.3e9
}

TEST(ExactLayout, LiveTokensNeverShareASlot) {
  for (const int sinks : {0, 1, 4, 7}) {
    for (const int window : {64, 128, 256}) {
      const ExactLayout exact{sinks, window};
      EXPECT_EQ(exact.capacity(), sinks + window + 64);
      for (int64_t begin : {int64_t{sinks}, int64_t{sinks + 64}, int64_t{1'000'000'007}}) {
        std::set<int64_t> slots;
        for (int64_t t = 0; t < sinks; ++t) slots.insert(exact.slot(t));
        for (int64_t t = begin; t < begin + window + 64; ++t) slots.insert(exact.slot(t));
        EXPECT_EQ(static_cast<int64_t>(slots.size()), exact.capacity());
        EXPECT_LT(*slots.rbegin(), exact.capacity());
      }
    }
  }
  EXPECT_EQ((ExactLayout{3, 0}.capacity()), 3);
}

}  // namespace
}  // namespace turboquant::cache
