#include "turboquant/cache/layer_spec.hpp"

#include <gtest/gtest.h>

#include <string>

namespace turboquant::cache {
namespace {

LayerSpec valid_spec() { return {.head_dim = 128, .num_kv_heads = 8}; }

template <typename Change>
std::string error_of(Change change) {
  LayerSpec spec = valid_spec();
  change(spec);
  try {
    spec.validate();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no error";
}

TEST(LayerSpec, AcceptsEverySupportedHeadDimAndWidth) {
  for (const int head_dim : {8, 16, 24, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 512}) {
    for (int bits = 1; bits <= 8; ++bits) {
      LayerSpec spec = valid_spec();
      spec.head_dim = head_dim;
      spec.k_bits = bits;
      spec.v_bits = 9 - bits;
      EXPECT_NO_THROW(spec.validate()) << head_dim << " " << bits;
    }
  }
}

TEST(LayerSpec, ErrorsNameTheArgumentAndBothValues) {
  using S = LayerSpec;
  const auto starts_with = [](const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
  };
  for (const int head_dim : {-8, 0, 1, 2, 4, 12, 20, 65, 72, 100, 127}) {
    const std::string error = error_of([&](S& s) { s.head_dim = head_dim; });
    EXPECT_TRUE(starts_with(error, "head_dim: expected")) << error;
    EXPECT_NE(error.find("got " + std::to_string(head_dim)), std::string::npos) << error;
  }
  EXPECT_EQ(error_of([](S& s) { s.k_bits = 0; }), "k_bits: expected 1 to 8, got 0");
  EXPECT_EQ(error_of([](S& s) { s.v_bits = 9; }), "v_bits: expected 1 to 8, got 9");
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.num_kv_heads = 0; }), "num_kv_heads: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.sink_tokens = -1; }), "sink_tokens: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.window_tokens = 32; }), "window_tokens: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.window_tokens = 0; }), "center_keys: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) {
                            s.window_tokens = 0;
                            s.center_keys = false;
                          }),
                          "smooth_keys: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.layer = -1; }), "layer: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.k_rule = static_cast<quant::ScaleRule>(4); }),
                          "k_rule: expected"));
  EXPECT_TRUE(starts_with(error_of([](S& s) { s.scale_type = static_cast<ScaleType>(2); }),
                          "scale_type: expected"));
  EXPECT_EQ(error_of([](S& s) { s.codebook = static_cast<quant::CodebookKind>(2); }),
            "codebook: expected 0 (scalar) or 1 (vector), got 2");
}

TEST(LayerSpec, VectorCodebooksHaveThreeWidths) {
  for (int bits = 1; bits <= 8; ++bits) {
    const auto with = [&](int k_bits, int v_bits) {
      return error_of([&](LayerSpec& s) {
        s.codebook = quant::CodebookKind::kVector;
        s.k_bits = k_bits;
        s.v_bits = v_bits;
      });
    };
    const bool exists = bits >= 2 && bits <= 4;
    const std::string expected = ": expected 2, 3 or 4 with a vector codebook, got ";
    EXPECT_EQ(with(bits, 4), exists ? "no error" : "k_bits" + expected + std::to_string(bits));
    EXPECT_EQ(with(2, bits), exists ? "no error" : "v_bits" + expected + std::to_string(bits));
  }
}

TEST(LayerSpec, IntsRoundTrip) {
  LayerSpec spec = valid_spec();
  EXPECT_EQ(LayerSpec::from_ints(spec.to_ints()), spec);
  spec = {.head_dim = 80,
          .num_kv_heads = 3,
          .k_bits = 5,
          .v_bits = 3,
          .k_rule = quant::ScaleRule::kLeastSquares,
          .v_rule = quant::ScaleRule::kNorm,
          .scale_type = ScaleType::kFloat16,
          .center_keys = false,
          .smooth_keys = false,
          .sink_tokens = 7,
          .window_tokens = 0,
          .seed = 0xfedcba9876543210u,
          .layer = 35};
  EXPECT_EQ(LayerSpec::from_ints(spec.to_ints()), spec);
  spec.k_bits = 2;
  spec.codebook = quant::CodebookKind::kVector;
  EXPECT_EQ(LayerSpec::from_ints(spec.to_ints()), spec);
  EXPECT_EQ(spec.to_ints().size(), static_cast<size_t>(LayerSpec::kNumInts));
}

TEST(LayerSpec, FromIntsRefusesHostileIntegers) {
  const std::vector<int64_t> good = valid_spec().to_ints();
  for (size_t i = 0; i < good.size(); ++i) {
    if (i == 11) continue;  // every seed is valid
    for (const int64_t bad : {int64_t{-1}, int64_t{1} << 40, INT64_MIN}) {
      std::vector<int64_t> ints = good;
      ints[i] = bad;
      EXPECT_THROW(LayerSpec::from_ints(ints), InvalidArgument) << i << " " << bad;
    }
  }
  EXPECT_THROW(LayerSpec::from_ints(std::vector<int64_t>(12)), InvalidArgument);
  EXPECT_THROW(LayerSpec::from_ints({}), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
