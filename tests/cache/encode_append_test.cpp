#include "turboquant/cache/encode_append.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "../support/layer.hpp"
#include "../support/tensor.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/layer_store.hpp"
#include "turboquant/cache/stored_scale.hpp"
#include "turboquant/math/half.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::cache {
namespace {

using testing_support::kNan;
using testing_support::row_bytes;
using testing_support::Tensor;

LayerSpec spec_of(int head_dim, int k_bits, int v_bits) {
  return {.head_dim = head_dim, .num_kv_heads = 2, .k_bits = k_bits, .v_bits = v_bits};
}

LayerSpec plain_spec(int head_dim, int bits) {
  LayerSpec spec = spec_of(head_dim, bits, bits);
  spec.center_keys = spec.smooth_keys = false;
  spec.sink_tokens = spec.window_tokens = 0;
  return spec;
}

// A chunk of keys (with a mean per channel) and values.
struct Chunk {
  Chunk(const LayerSpec& spec, int64_t batch, int64_t tokens, uint32_t seed,
        ElementType type = ElementType::kFloat32, bool gaps = false)
      : keys(Tensor::random(type, {batch, spec.num_kv_heads, tokens, spec.head_dim}, seed, 2.0f,
                            gaps)),
        values(Tensor::random(type, {batch, spec.num_kv_heads, tokens, spec.head_dim}, seed + 1,
                              0.0f, gaps)) {}
  void widen_key_channel(int channel, float factor) {
    for (int64_t head = 0; head < keys.view().shape[1]; ++head) {
      for (int64_t t = 0; t < keys.view().shape[2]; ++t) {
        std::vector<float> key = keys.row(0, head, t);
        key[channel] *= factor;
        keys.set_row(0, head, t, key);
      }
    }
  }
  Tensor keys, values;
};

void append(LayerStore& store, const Chunk& chunk, std::span<const int32_t> counts = {},
            const ParallelFor& parallel_for = serial()) {
  store.append(chunk.keys.view(), chunk.values.view(), counts, parallel_for);
}

// One block of one head by the words of the recipe, with plain loops.
struct ExpectedBlock {
  std::vector<float> smoothing;
  std::vector<uint16_t> mean;
  std::vector<uint8_t> k_codes, v_codes;
  std::vector<float> k_scales, v_scales;
};

ExpectedBlock expected_block(const LayerSpec& spec, const Chunk& chunk, int head, int64_t first,
                             const std::vector<float>* smoothing) {
  const int64_t dim = spec.head_dim;
  const LayerCodec codec(spec);
  ExpectedBlock block;
  std::vector<std::vector<float>> keys, values;
  for (int64_t t = 0; t < 64; ++t) {
    keys.push_back(chunk.keys.row(0, head, first + t));
    values.push_back(chunk.values.row(0, head, first + t));
  }
  if (smoothing != nullptr) {
    block.smoothing = *smoothing;
  } else {
    std::vector<float> rms;
    for (int64_t c = 0; c < dim; ++c) {
      float mean = 0, squares = 0;
      for (const auto& key : keys) mean += key[c];
      mean /= 64;
      for (const auto& key : keys) squares += (key[c] - mean) * (key[c] - mean);
      rms.push_back(std::sqrt(squares / 64));
    }
    std::vector<float> sorted = rms;
    std::ranges::sort(sorted);
    for (const float x : rms) {
      const float ratio = x / sorted[dim / 2];
      block.smoothing.push_back(
          std::min(256.0f, std::max(1.0f / 16, std::sqrt(ratio * (1 + ratio / 4)))));
    }
  }
  for (auto& key : keys) {
    for (int64_t c = 0; c < dim; ++c) key[c] /= block.smoothing[c];
    codec.keys().rotations[head].apply(key.data(), 1);
  }
  for (int64_t c = 0; c < dim; ++c) {
    float sum = 0;
    for (const auto& key : keys) sum += key[c];
    block.mean.push_back(math::fp16_from_fp32(sum / 64));
    for (auto& key : keys) key[c] -= math::fp32_from_fp16(block.mean.back());
  }
  const auto quantize = [&](const LayerCodec::Side& side, const std::vector<float>& row,
                            std::vector<uint8_t>& codes, std::vector<float>& scales) {
    const int64_t bytes = quant::packed_row_bytes(dim, side.bits);
    codes.resize(codes.size() + bytes);
    scales.push_back(0);
    quant::quantize_rows({.dim = spec.head_dim,
                          .bits = side.bits,
                          .levels = side.codebook->levels(),
                          .boundaries = side.codebook->boundaries(),
                          .rule = side.rule,
                          .rows = row.data(),
                          .row_stride_elems = dim,
                          .num_rows = 1,
                          .codes = codes.data() + codes.size() - bytes,
                          .codes_stride_bytes = bytes,
                          .scales = &scales.back()});
  };
  for (const auto& key : keys) quantize(codec.keys(), key, block.k_codes, block.k_scales);
  for (auto& value : values) {
    codec.values().rotations[head].apply(value.data(), 1);
    quantize(codec.values(), value, block.v_codes, block.v_scales);
  }
  return block;
}

std::vector<uint16_t> halves(const std::vector<float>& numbers) {
  std::vector<uint16_t> rounded;
  for (const float x : numbers) rounded.push_back(math::fp16_from_fp32(x));
  return rounded;
}

TEST(EncodeAppend, StoresTheRecipeBitForBit) {
  for (const int head_dim : {16, 80, 128}) {
    for (int bits = 1; bits <= 8; ++bits) {
      LayerSpec spec = spec_of(head_dim, bits, 9 - bits);
      spec.scale_type = bits % 2 ? ScaleType::kFloat16 : ScaleType::kFloat32;
      LayerStore store(spec, 1, ElementType::kFloat32);
      Chunk chunk(spec, 1, 4 + 64 * 3, bits);
      if (bits % 2) chunk.widen_key_channel(3, 500.0f);  // beyond the knee of the smoothing
      append(store, chunk);
      ASSERT_EQ(store.table().entries(0).size(), 2u);
      const BlockLayout layout = spec.block_layout();
      for (int head = 0; head < 2; ++head) {
        const ExpectedBlock first = expected_block(spec, chunk, head, 4, nullptr);
        const ExpectedBlock second = expected_block(spec, chunk, head, 68, &first.smoothing);
        EXPECT_EQ(std::memcmp(store.smoothing() + head * head_dim, first.smoothing.data(),
                              head_dim * sizeof(float)),
                  0);
        for (const auto& [page, expected] : {std::pair{0, &first}, std::pair{1, &second}}) {
          const std::byte* block = store.pages().block(page, head);
          const auto same = [&](int64_t offset, const auto& content) {
            return std::memcmp(block + offset, content.data(),
                               content.size() * sizeof(content[0])) == 0;
          };
          EXPECT_TRUE(same(layout.k_mean_offset(), expected->mean));
          EXPECT_TRUE(same(layout.k_codes_offset(), expected->k_codes));
          EXPECT_TRUE(same(layout.v_codes_offset(), expected->v_codes));
          if (spec.scale_type == ScaleType::kFloat16) {
            EXPECT_TRUE(same(layout.k_scales_offset(), halves(expected->k_scales)));
            EXPECT_TRUE(same(layout.v_scales_offset(), halves(expected->v_scales)));
          } else {
            EXPECT_TRUE(same(layout.k_scales_offset(), expected->k_scales));
            EXPECT_TRUE(same(layout.v_scales_offset(), expected->v_scales));
          }
        }
      }
    }
  }
}

// Neither the size of the chunks, nor threads, nor the SIMD level, nor strides change a byte.
TEST(EncodeAppend, BytesDependOnTheTokensOnly) {
  for (const bool plain : {false, true}) {
    LayerSpec spec = plain ? plain_spec(40, 3) : spec_of(40, 3, 5);
    spec.scale_type = ScaleType::kFloat16;
    const int64_t tokens = 460;
    const Chunk all(spec, 2, tokens, 7, ElementType::kBFloat16);
    LayerStore at_once(spec, 2, ElementType::kBFloat16);
    append(at_once, all);
    const std::vector<std::byte> expected = row_bytes(at_once, 1);

    for (const int64_t step : {1, 7, 64, 129}) {
      LayerStore store(spec, 2, ElementType::kBFloat16);
      for (int64_t begin = 0; begin < tokens; begin += step) {
        const int64_t end = std::min(tokens, begin + step);
        store.append(all.keys.tokens(begin, end), all.values.tokens(begin, end), {}, threads(3));
      }
      EXPECT_EQ(row_bytes(store, 1), expected) << "chunks of " << step;
    }
    for (const quant::SimdLevel level : quant::available_simd_levels()) {
      const quant::SimdLevel before = quant::active_simd_level();
      quant::set_simd_level(level);
      LayerStore store(spec, 2, ElementType::kBFloat16);
      append(store, all);
      quant::set_simd_level(before);
      EXPECT_EQ(row_bytes(store, 1), expected) << quant::simd_level_name(level);
    }
    const Chunk gaps(spec, 2, tokens, 7, ElementType::kBFloat16, true);
    LayerStore strided(spec, 2, ElementType::kBFloat16);
    append(strided, gaps);
    EXPECT_EQ(row_bytes(strided, 1), expected);
  }
}

TEST(EncodeAppend, LeftPaddingIsNeverRead) {
  const LayerSpec spec = spec_of(64, 4, 4);
  Chunk padded(spec, 2, 300, 3);
  LayerStore alone(spec, 1, ElementType::kFloat32);
  alone.append(
      [&] {
        ConstTensorView view = padded.keys.tokens(100, 300);
        view.shape[0] = 1;
        return view;
      }(),
      [&] {
        ConstTensorView view = padded.values.tokens(100, 300);
        view.shape[0] = 1;
        return view;
      }(),
      {}, serial());
  for (int64_t t = 0; t < 100; ++t) {
    for (int head = 0; head < 2; ++head) {
      padded.keys.fill_row(0, head, t, kNan);
      padded.values.fill_row(0, head, t, kNan);
    }
  }
  LayerStore batch(spec, 2, ElementType::kFloat32);
  append(batch, padded, std::vector<int32_t>{200, 300});
  EXPECT_EQ(row_bytes(batch, 0), row_bytes(alone, 0));
  EXPECT_EQ(batch.non_finite_vectors(), 0);
}

TEST(EncodeAppend, NonFiniteTokensPoisonThemselvesOnly) {
  const LayerSpec spec = spec_of(64, 4, 4);
  const BlockLayout layout = spec.block_layout();
  Chunk chunk(spec, 1, 4 + 128, 11);
  chunk.keys.fill_row(0, 0, 4 + 10, kNan);
  std::vector<float> spoiled = chunk.keys.row(0, 0, 4 + 20);
  spoiled[5] = INFINITY;
  chunk.keys.set_row(0, 0, 4 + 20, spoiled);
  chunk.values.fill_row(0, 1, 4 + 30, -INFINITY);
  LayerStore store(spec, 1, ElementType::kFloat32);
  append(store, chunk);
  EXPECT_EQ(store.non_finite_vectors(), 3);
  for (int head = 0; head < 2; ++head) {
    const std::byte* block = store.pages().block(0, head);
    for (int c = 0; c < 64; ++c) EXPECT_TRUE(std::isfinite(store.smoothing()[head * 64 + c]));
    for (int t = 0; t < 64; ++t) {
      const float k_scale = load_scale(spec.scale_type, block + layout.k_scale(t));
      const float v_scale = load_scale(spec.scale_type, block + layout.v_scale(t));
      EXPECT_EQ(std::isnan(k_scale), head == 0 && (t == 10 || t == 20)) << t;
      EXPECT_EQ(std::isnan(v_scale), head == 1 && t == 30) << t;
    }
  }
  // The poisoned tokens are left out of mean and smoothing: the others are stored as if the
  // poisoned ones had been any finite token that leaves both unchanged. Here: fewer tokens' mean.
  std::vector<float> mean(64, 0.0f);
  const LayerCodec codec(spec);
  for (int64_t t = 0; t < 64; ++t) {
    if (t == 10 || t == 20) continue;
    std::vector<float> key = chunk.keys.row(0, 0, 4 + t);
    for (int c = 0; c < 64; ++c) key[c] /= store.smoothing()[c];
    codec.keys().rotations[0].apply(key.data(), 1);
    for (int c = 0; c < 64; ++c) mean[c] += key[c];
  }
  for (int c = 0; c < 64; ++c) {
    uint16_t bits;
    std::memcpy(&bits, store.pages().block(0, 0) + layout.k_mean_offset() + 2 * c, 2);
    EXPECT_EQ(bits, math::fp16_from_fp32(mean[c] / 62));
  }
}

TEST(EncodeAppend, ABlockWithoutFiniteKeysIsHarmless) {
  const LayerSpec spec = spec_of(16, 4, 4);
  Chunk chunk(spec, 1, 4 + 128, 1);
  for (int64_t t = 4; t < 68; ++t) chunk.keys.fill_row(0, 0, t, kNan);
  LayerStore store(spec, 1, ElementType::kFloat32);
  append(store, chunk);
  for (int c = 0; c < 16; ++c) EXPECT_EQ(store.smoothing()[c], 1.0f);
  uint16_t mean;
  std::memcpy(&mean, store.pages().block(0, 0), 2);
  EXPECT_EQ(mean, 0);
  EXPECT_EQ(store.non_finite_vectors(), 64);
}

TEST(EncodeAppend, ZeroAndConstantKeysHaveNoSmoothing) {
  const LayerSpec spec = spec_of(32, 4, 4);
  for (const float value : {0.0f, 3.0f}) {
    Chunk chunk(spec, 1, 4 + 128, 1);
    for (int64_t t = 0; t < 132; ++t) {
      chunk.keys.fill_row(0, 0, t, value);
      chunk.values.fill_row(0, 0, t, 0.0f);
    }
    LayerStore store(spec, 1, ElementType::kFloat32);
    append(store, chunk);
    for (int c = 0; c < 32; ++c) EXPECT_EQ(store.smoothing()[c], 1.0f);
    const std::byte* const v_scale = store.pages().block(0, 0) + spec.block_layout().v_scale(0);
    EXPECT_EQ(load_scale(spec.scale_type, v_scale), 0.0f);
  }
}

TEST(EncodeAppend, Fp16NumbersSaturateAndAreCounted) {
  LayerSpec spec = spec_of(64, 4, 4);
  spec.scale_type = ScaleType::kFloat16;
  spec.smooth_keys = false;
  Chunk chunk(spec, 1, 4 + 128, 5);
  std::vector<float> huge = chunk.values.row(0, 0, 10);
  for (float& x : huge) x *= 1e8f;
  chunk.values.set_row(0, 0, 10, huge);
  LayerStore store(spec, 1, ElementType::kFloat32);
  append(store, chunk);
  EXPECT_EQ(store.saturated_numbers(), 1);
  EXPECT_EQ(store.non_finite_vectors(), 0);
  uint16_t bits;
  std::memcpy(&bits, store.pages().block(0, 0) + spec.block_layout().v_scale(6), 2);
  EXPECT_EQ(math::fp32_from_fp16(bits), 65504.0f);

  // Means beyond fp16 saturate too, whatever the scales are.
  LayerSpec wide = spec;
  wide.scale_type = ScaleType::kFloat32;
  for (int64_t t = 0; t < 132; ++t) {
    std::vector<float> key = chunk.keys.row(0, 1, t);
    key[0] += 1e9f;
    chunk.keys.set_row(0, 1, t, key);
  }
  LayerStore shifted(wide, 1, ElementType::kFloat32);
  append(shifted, chunk);
  EXPECT_EQ(shifted.saturated_numbers(), 64);
  for (int c = 0; c < 64; ++c) {
    std::memcpy(&bits, shifted.pages().block(0, 1) + 2 * c, 2);
    EXPECT_EQ(std::abs(math::fp32_from_fp16(bits)), 65504.0f);
  }
}

TEST(EncodeAppend, RefusesWhatDoesNotFit) {
  const LayerSpec spec = spec_of(64, 4, 4);
  LayerStore store(spec, 1, ElementType::kFloat32);
  Chunk good(spec, 1, 8, 1);
  append(store, good);
  const std::vector<std::byte> before = row_bytes(store, 0);
  const auto refuses = [&](const ConstTensorView& keys, const ConstTensorView& values,
                           std::vector<int32_t> counts = {}) {
    EXPECT_THROW(store.append(keys, values, counts, serial()), InvalidArgument);
    EXPECT_EQ(store.table().length(0), 8);
    EXPECT_EQ(row_bytes(store, 0), before);
  };
  refuses(Chunk(spec, 2, 8, 1).keys.view(), Chunk(spec, 2, 8, 1).values.view());
  refuses(good.keys.view(), good.values.tokens(0, 7));
  refuses(good.keys.view(), Tensor(ElementType::kFloat16, good.keys.view().shape).view());
  const Chunk half(spec, 1, 8, 1, ElementType::kFloat16);
  refuses(half.keys.view(), half.values.view());
  refuses(good.keys.view(), good.values.view(), {9});
  refuses(good.keys.view(), good.values.view(), {-1});
  refuses(good.keys.view(), good.values.view(), {1, 1});
  LayerSpec other = spec;
  other.head_dim = 32;
  const Chunk narrow(other, 1, 8, 1);
  refuses(narrow.keys.view(), narrow.values.view());
}

// Tables that lie must not lead outside the buffers.
TEST(EncodeAppend, RefusesTablesThatDoNotFit) {
  const LayerSpec spec = spec_of(16, 4, 4);
  LayerStore store(spec, 1, ElementType::kFloat32);
  const Chunk chunk(spec, 1, 200, 1);
  append(store, chunk);
  const PagePoolView pages = store.pages();
  std::array<int64_t, 2> counters{};
  std::vector<float> smoothing(2 * 16, 1.0f);
  const auto run = [&](const std::vector<int32_t>& rows, const std::vector<int32_t>& jobs) {
    encode_append({.spec = spec,
                   .key_states = chunk.keys.view(),
                   .value_states = chunk.values.view(),
                   .exact_keys = store.exact_keys(),
                   .exact_values = store.exact_values(),
                   .smoothing = smoothing.data(),
                   .pages = pages,
                   .rows = rows,
                   .jobs = jobs,
                   .counters = counters.data()},
                  serial());
  };
  EXPECT_NO_THROW(run({0, 0, 0, 200}, {0, 4, 64, 0, 0, 1, 0, 68, 64, 1, 0, 0}));
  EXPECT_THROW(run({0, 0, 0}, {}), InvalidArgument);
  EXPECT_THROW(run({0, 0, 0, 201}, {}), InvalidArgument);
  EXPECT_THROW(run({-1, 0, 0, 0}, {}), InvalidArgument);
  EXPECT_THROW(run({500, 0, 4, 0}, {}), InvalidArgument);  // a ring longer than the ring
  EXPECT_THROW(run({500, 1, 500, 0}, {}), InvalidArgument);
  const auto bad_job = [&](int column, int32_t value) {
    std::vector<int32_t> job = {0, 4, 64, 0, 0, 1};
    job[column] = value;
    EXPECT_THROW(run({0, 0, 0, 200}, job), InvalidArgument) << column << " " << value;
  };
  bad_job(0, 1);
  bad_job(0, -1);
  bad_job(1, 5);
  bad_job(1, -1);
  bad_job(2, 0);
  bad_job(2, 63);
  bad_job(2, 65);
  bad_job(3, -1);
  bad_job(3, static_cast<int32_t>(pages.num_pages()));
  bad_job(4, 1);
  bad_job(5, 2);

  EXPECT_THROW(run({0, 0, 0, 200}, {}), InvalidArgument);  // more than the ring holds
  EXPECT_THROW(run({0, 0, 0, 200}, {0, 4, 64, 0, 0, 1, 0, 68, 64, 1, 0, 1}), InvalidArgument)
      << "two jobs may not fit one row's smoothing";
  EXPECT_THROW(run({68, 1, 68, 132}, {0, 68, 64, 0, 0, 1}), InvalidArgument)
      << "a row with pages has its smoothing";
}

// Without a ring a token that no job takes has no place at all.
TEST(EncodeAppend, WithoutAWindowJobsMustTakeEveryToken) {
  const LayerSpec spec = plain_spec(16, 4);
  LayerStore store(spec, 1, ElementType::kFloat32);
  const Chunk chunk(spec, 1, 5, 1);
  append(store, chunk);
  std::array<int64_t, 2> counters{};
  const auto run = [&](const std::vector<int32_t>& jobs) {
    encode_append({.spec = spec,
                   .key_states = chunk.keys.view(),
                   .value_states = chunk.values.view(),
                   .exact_keys = store.exact_keys(),
                   .exact_values = store.exact_values(),
                   .pages = store.pages(),
                   .rows = std::vector<int32_t>{0, 0, 0, 5},
                   .jobs = jobs,
                   .counters = counters.data()},
                  serial());
  };
  EXPECT_NO_THROW(run({0, 0, 5, 0, 0, 0}));
  EXPECT_THROW(run({}), InvalidArgument);
  EXPECT_THROW(run({0, 0, 4, 0, 0, 0}), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
