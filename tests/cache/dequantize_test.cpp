#include "turboquant/cache/dequantize.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "../support/layer.hpp"
#include "../support/tensor.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/layer_store.hpp"

namespace turboquant::cache {
namespace {

using testing_support::Tensor;

LayerSpec spec_of(int head_dim, int bits) {
  return {.head_dim = head_dim, .num_kv_heads = 2, .k_bits = bits, .v_bits = bits};
}

struct Dense {
  Tensor keys, values;
};

Dense dequantized(const LayerStore& store, int64_t past, ElementType type = ElementType::kFloat32,
                  bool gaps = false) {
  const std::array<int64_t, 4> shape = {store.table().batch_size(), store.spec().num_kv_heads, past,
                                        store.spec().head_dim};
  Dense dense{Tensor(type, shape, gaps), Tensor(type, shape, gaps)};
  store.dequantize(dense.keys.view(), dense.values.view(), threads(2));
  return dense;
}

double squared_error(const Tensor& a, const Tensor& b, int64_t row, int64_t head, int64_t t) {
  const std::vector<float> x = a.row(row, head, t), y = b.row(row, head, t);
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) error += std::pow(double{x[i]} - y[i], 2);
  return error;
}

// Gaussian keys and values: with D the codebook's distortion, the mean squared error is
// D / (1 - D) with the unbiased scale, 2 - 2 sqrt(1 - D) with the norm-preserving one, less the
// error's component along the vector, which the scale takes away. That is a share of E[e^2 y^2] / D
// d of it: 1/d if error and magnitude were independent, 3/d at high rate, where cells widen as
// p^(-1/3). The spread of <y,c> between rows adds O(1/d) to the unbiased rule's error (Jensen). 2 %
// is about three standard errors here. The block mean takes 1/64 of a key's variance; smoothing is
// about 1 for iid channels.
TEST(Dequantize, ErrorIsTheCodebooksDistortion) {
  for (const int head_dim : {64, 80, 128}) {
    for (int n = 1; n <= 8 + 3; ++n) {
      const bool vectors = n > 8;
      const int bits = vectors ? n - 7 : n;
      LayerSpec spec = spec_of(head_dim, bits);
      if (vectors) spec.codebook = quant::CodebookKind::kVector;
      const int64_t tokens = 4 + 64 * 10;
      const std::array<int64_t, 4> shape = {1, 2, tokens, head_dim};
      const Tensor keys = Tensor::random(ElementType::kFloat32, shape, bits);
      const Tensor values = Tensor::random(ElementType::kFloat32, shape, bits + 100);
      LayerStore store(spec, 1, ElementType::kFloat32);
      store.append(keys.view(), values.view(), {}, serial());
      const Dense dense = dequantized(store, tokens);
      double key_error = 0, value_error = 0;
      const int64_t first = 4, end = store.table().exact_begin(0);
      for (int head = 0; head < 2; ++head) {
        for (int64_t t = first; t < end; ++t) {
          key_error += squared_error(keys, dense.keys, 0, head, t);
          value_error += squared_error(values, dense.values, 0, head, t);
        }
      }
      const double numbers = 2.0 * static_cast<double>(end - first) * head_dim;
      // A vector codebook's is the limit of many dimensions: few lower it as they do a scalar
      // one's.
      double distortion = math::Codebook::sphere(head_dim, bits).distortion();
      if (vectors) {
        distortion *= math::VectorCodebook::gaussian(bits).distortion() /
                      math::Codebook::gaussian(bits).distortion();
      }
      const double unbiased = distortion / (1 - distortion) * (63.0 / 64);
      const double preserving = 2 - 2 * std::sqrt(1 - distortion);
      const double least = 1 - 3.0 / head_dim - 0.02, most = 1 + 2.0 / head_dim + 0.02;
      EXPECT_GT(key_error / numbers, least * unbiased) << head_dim << " " << bits;
      EXPECT_LT(key_error / numbers, most * unbiased) << head_dim << " " << bits;
      EXPECT_GT(value_error / numbers, least * preserving) << head_dim << " " << bits;
      EXPECT_LT(value_error / numbers, most * preserving) << head_dim << " " << bits;
    }
  }
}

TEST(Dequantize, RowsAreRightAlignedWithZerosBefore) {
  const LayerSpec spec = spec_of(32, 4);
  const std::array<int64_t, 4> shape = {3, 2, 400, 32};
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    const Tensor keys = Tensor::random(type, shape, 1, 1.0f);
    const Tensor values = Tensor::random(type, shape, 2);
    LayerStore store(spec, 3, type);
    const std::vector<int32_t> counts = {400, 130, 0};
    store.append(keys.view(), values.view(), counts, serial());
    testing_support::poison_unused(store);
    for (const bool gaps : {false, true}) {
      const int64_t past = 410;
      const Dense dense = dequantized(store, past, type, gaps);
      for (int b = 0; b < 3; ++b) {
        for (int head = 0; head < 2; ++head) {
          for (int64_t out = 0; out < past; ++out) {
            const int64_t t = out - (past - counts[b]);
            const std::vector<float> row = dense.keys.row(b, head, out);
            if (t < 0) {
              ASSERT_EQ(row, std::vector<float>(32, 0.0f));
              ASSERT_EQ(dense.values.row(b, head, out), std::vector<float>(32, 0.0f));
              continue;
            }
            const int64_t source = 400 - counts[b] + t;
            if (t < 4 || t >= store.table().exact_begin(b)) {
              ASSERT_EQ(row, keys.row(b, head, source)) << "exact tokens come back bit for bit";
              ASSERT_EQ(dense.values.row(b, head, out), values.row(b, head, source));
            } else {  // 4 bits: far below the square norm of about 32
              double error = 0;
              const std::vector<float> original = keys.row(b, head, source);
              for (int i = 0; i < 32; ++i) error += std::pow(row[i] - original[i], 2);
              ASSERT_LT(error, 3.0);
            }
          }
        }
      }
    }
  }
}

// Every range of positions, whole pages or parts of them, gives the bits of the whole.
TEST(Dequantize, RangesArePartsOfTheWhole) {
  const LayerSpec spec = spec_of(32, 3);
  LayerStore store(spec, 2, ElementType::kFloat32);
  const std::array<int64_t, 4> shape = {2, 2, 300, 32};
  const Tensor keys = Tensor::random(ElementType::kFloat32, shape, 1, 1.0f);
  const Tensor values = Tensor::random(ElementType::kFloat32, shape, 2);
  store.append(keys.view(), values.view(), std::vector<int32_t>{300, 210}, serial());
  const int64_t past = 310;
  const Dense whole = dequantized(store, past);
  const std::vector<int32_t> page_table =
      store.table().export_page_table(store.table().max_entries());
  const std::vector<int32_t> rows = store.table().export_rows();
  const auto run = [&](int64_t past_tokens, int64_t first, Dense& out) {
    dequantize({.spec = spec,
                .exact_keys = store.exact_keys(),
                .exact_values = store.exact_values(),
                .smoothing = store.smoothing(),
                .pages = store.pages(),
                .page_table = page_table,
                .rows = rows,
                .past_tokens = past_tokens,
                .first_position = first,
                .out_keys = out.keys.view(),
                .out_values = out.values.view()},
               threads(2));
  };
  for (const int64_t first : {0, 9, 13, 14, 77, 78, 100, 250, 309}) {
    for (const int64_t count : {0, 1, 5, 64, 200}) {
      if (first + count > past) continue;
      const std::array<int64_t, 4> part_shape = {2, 2, count, 32};
      Dense part{Tensor(ElementType::kFloat32, part_shape, true),
                 Tensor(ElementType::kFloat32, part_shape, true)};
      run(past, first, part);
      for (int b = 0; b < 2; ++b) {
        for (int64_t t = 0; t < count; ++t) {
          ASSERT_EQ(part.keys.row(b, 1, t), whole.keys.row(b, 1, first + t)) << first << " " << t;
          ASSERT_EQ(part.values.row(b, 0, t), whole.values.row(b, 0, first + t));
        }
      }
    }
  }
  const std::array<int64_t, 4> part_shape = {2, 2, 10, 32};
  Dense part{Tensor(ElementType::kFloat32, part_shape), Tensor(ElementType::kFloat32, part_shape)};
  EXPECT_THROW(run(299, 0, part), InvalidArgument) << "a row is longer";
  EXPECT_THROW(run(310, -1, part), InvalidArgument);
  EXPECT_THROW(run(310, 301, part), InvalidArgument);
}

TEST(Dequantize, CropAndPartialPages) {
  for (const int window : {0, 64}) {
    LayerSpec spec = spec_of(64, 5);
    spec.window_tokens = window;
    spec.center_keys = spec.smooth_keys = window > 0;
    const std::array<int64_t, 4> shape = {1, 2, 300, 64};
    const Tensor keys = Tensor::random(ElementType::kFloat32, shape, 1, 1.0f);
    const Tensor values = Tensor::random(ElementType::kFloat32, shape, 2);
    LayerStore store(spec, 1, ElementType::kFloat32);
    store.append(keys.view(), values.view(), {}, serial());
    const Dense whole = dequantized(store, 300);
    store.crop(197);
    testing_support::poison_unused(store);
    const Dense part = dequantized(store, 103);
    for (int64_t t = 0; t < 103; ++t) {
      ASSERT_EQ(part.keys.row(0, 1, t), whole.keys.row(0, 1, t));
      ASSERT_EQ(part.values.row(0, 1, t), whole.values.row(0, 1, t));
    }
    store.append(keys.tokens(103, 300), values.tokens(103, 300), {}, serial());
    const Dense again = dequantized(store, 300);
    for (int64_t t = 0; t < 103; ++t) ASSERT_EQ(again.keys.row(0, 0, t), whole.keys.row(0, 0, t));
    for (int64_t t = 103; t < 300; ++t)
      ASSERT_LT(squared_error(again.values, values, 0, 0, t), 3.0);
  }
}

TEST(Dequantize, PoisonedTokensComeBackAsNanAndAlone) {
  const LayerSpec spec = spec_of(32, 4);
  const std::array<int64_t, 4> shape = {1, 2, 200, 32};
  Tensor keys = Tensor::random(ElementType::kFloat32, shape, 1);
  const Tensor values = Tensor::random(ElementType::kFloat32, shape, 2);
  keys.fill_row(0, 0, 50, INFINITY);
  LayerStore store(spec, 1, ElementType::kFloat32);
  store.append(keys.view(), values.view(), {}, serial());
  const Dense dense = dequantized(store, 200);
  for (int64_t t = 0; t < 200; ++t) {
    for (const float x : dense.keys.row(0, 0, t)) EXPECT_EQ(std::isnan(x), t == 50);
    for (const float x : dense.values.row(0, 0, t)) EXPECT_TRUE(std::isfinite(x));
  }
}

TEST(Dequantize, RefusesWhatDoesNotFit) {
  const LayerSpec spec = spec_of(32, 4);
  LayerStore store(spec, 1, ElementType::kFloat32);
  const Tensor chunk = Tensor::random(ElementType::kFloat32, {1, 2, 200, 32}, 1);
  store.append(chunk.view(), chunk.view(), {}, serial());
  EXPECT_THROW(dequantized(store, 199), InvalidArgument);
  Tensor keys(ElementType::kFloat32, {1, 2, 200, 32}),
      narrow(ElementType::kFloat32, {1, 2, 200, 16});
  EXPECT_THROW(store.dequantize(keys.view(), narrow.view(), serial()), InvalidArgument);
  const std::vector<int32_t> rows = store.table().export_rows();
  const auto run = [&](const std::vector<int32_t>& page_table) {
    dequantize({.spec = spec,
                .exact_keys = store.exact_keys(),
                .exact_values = store.exact_values(),
                .smoothing = store.smoothing(),
                .pages = store.pages(),
                .page_table = page_table,
                .rows = rows,
                .past_tokens = 200,
                .out_keys = keys.view(),
                .out_values = keys.view()},
               serial());
  };
  EXPECT_NO_THROW(run({0, 64, 1, 64}));
  EXPECT_THROW(run({0, 64}), InvalidArgument);
  EXPECT_THROW(run({0, 64, 1}), InvalidArgument);
  EXPECT_THROW(run({0, 64, 1, 63}), InvalidArgument);
  EXPECT_THROW(run({0, 65, 1, 63}), InvalidArgument);
  EXPECT_THROW(run({0, 64, -1, 64}), InvalidArgument);
  EXPECT_THROW(run({0, 64, 1 << 20, 64}), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
