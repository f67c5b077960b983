#include "turboquant/quant/quantize_rows.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../support/at_simd_level.hpp"
#include "encoded_rows.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/codebook.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/simd_level.hpp"

namespace turboquant::quant {
namespace {

constexpr int kDims[] = {1, 2, 3, 8, 12, 16, 17, 20, 24, 40, 64, 80, 96, 128, 160, 256};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The codebook of the nearest dim there is one for.
const math::Codebook& codebook(int dim, int bits) {
  return math::Codebook::sphere(std::max(dim, 2), bits);
}

Encoded encode(const std::vector<float>& rows, int dim, int bits, ScaleRule rule) {
  const math::Codebook& book = codebook(dim, bits);
  QuantizeRowsParams params{};
  params.dim = dim;
  params.bits = bits;
  params.levels = book.levels();
  params.boundaries = book.boundaries();
  params.rule = rule;
  return encode_rows(params, rows);
}

// The header's numerics, one row, written as it reads.
Encoded reference(const float* row, int dim, int bits, ScaleRule rule) {
  const math::Codebook& book = codebook(dim, bits);
  std::vector<float> y(row, row + dim);
  float squares = lane_sum(y.data(), y.data(), dim);
  float unit = 1.0f;
  if (!(squares >= 0x1p-90f && squares <= 0x1p100f)) {
    unit = squares < 0x1p-90f ? 0x1p-105f : 0x1p80f;
    for (float& value : y) value *= 1 / unit;
    squares = lane_sum(y.data(), y.data(), dim);
  }
  Encoded out;
  out.codes.assign(packed_row_bytes(dim, bits), 0);
  if (!std::isfinite(squares)) {
    out.scales = {kNan};
    out.non_finite_rows = 1;
    return out;
  }
  if (squares == 0.0f) {
    out.scales = {0.0f};
    return out;
  }
  const volatile float root = std::sqrt(squares);
  const float sqrt_dim = static_cast<float>(std::sqrt(static_cast<double>(dim)));
  const volatile float factor = sqrt_dim / root;
  std::vector<uint8_t> codes(dim);
  std::vector<float> c(dim);
  for (int i = 0; i < dim; ++i) {
    const volatile float x = y[i] * factor;
    for (const float boundary : book.boundaries()) codes[i] += boundary < x;
    c[i] = book.levels()[codes[i]];
  }
  pack_row(codes.data(), dim, bits, out.codes.data());
  const float scale = scale_from_sums(
      rule, {squares, lane_sum(y.data(), c.data(), dim), lane_sum(c.data(), c.data(), dim)},
      sqrt_dim);
  out.scales = {std::min(scale * unit, std::numeric_limits<float>::max())};
  return out;
}

// Rows of every temper: what the rotation makes, and what a broken model may send.
std::vector<float> wild_rows(int dim, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> rows;
  auto random_row = [&](float scale) {
    std::vector<float> row(dim);
    for (float& value : row) value = scale * normal(generator);
    return row;
  };
  const float max = std::numeric_limits<float>::max();
  const float tiniest = std::numeric_limits<float>::denorm_min();
  for (const float scale :
       {1.0f, 1e-3f, 300.0f, 1e-15f, 1e15f, 1e-25f, 1e25f, 1e-38f, 1e-42f, 1e37f}) {
    rows.push_back(random_row(scale));
  }
  for (const float value : {0.0f, -0.0f, 1.0f, -1.0f, max, -max, tiniest, kNan, kInf, -kInf}) {
    rows.push_back(std::vector<float>(dim, value));
  }
  for (const float value : {1.0f, -3.0f, max, tiniest, kNan, kInf, -kInf}) {  // one spike
    auto row = std::vector<float>(dim, 0.0f);
    row[generator() % dim] = value;
    rows.push_back(row);
    row = random_row(1.0f);
    row[generator() % dim] = value;
    rows.push_back(row);
  }
  auto row = std::vector<float>(dim);
  for (int i = 0; i < dim; ++i) row[i] = i % 2 ? -1.0f : 1.0f;
  rows.push_back(row);
  std::vector<float> flat;
  for (const auto& r : rows) flat.insert(flat.end(), r.begin(), r.end());
  return flat;
}

class EverySimdLevel : public testing_support::AtSimdLevel {};

TEST_P(EverySimdLevel, StoresTheDocumentedBits) {
  for (const int dim : kDims) {
    const std::vector<float> rows = wild_rows(dim, dim);
    for (int bits = 1; bits <= 8; ++bits) {
      expect_documented_bits(rows, dim, bits, encode, reference);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(EverySimdLevel, ARowDoesNotDependOnItsNeighbours) {
  const int dim = 96, bits = 3;
  const std::vector<float> rows = wild_rows(dim, 5);
  for (int64_t count = 1; count <= 17; ++count) {
    expect_rows_alone(rows, dim, bits, count, encode);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(QuantizeRows, EverySimdLevel, ::testing::ValuesIn(available_simd_levels()),
                         testing_support::simd_level_of);

TEST(QuantizeRows, HonoursStrides) {
  const int dim = 20, bits = 5;
  const math::Codebook& book = codebook(dim, bits);
  const std::vector<float> rows = wild_rows(dim, 9);
  const auto num_rows = static_cast<int64_t>(rows.size()) / dim;
  const Encoded dense = encode(rows, dim, bits, ScaleRule::kNorm);
  const int64_t row_stride = dim + 3, row_bytes = packed_row_bytes(dim, bits);
  const int64_t code_stride = row_bytes + 5;
  std::vector<float> spread(num_rows * row_stride, kNan);
  for (int64_t r = 0; r < num_rows; ++r) {
    std::copy_n(rows.begin() + r * dim, dim, spread.begin() + r * row_stride);
  }
  std::vector<uint8_t> codes(num_rows * code_stride, 0xEE);
  std::vector<float> scales(num_rows);
  quantize_rows({dim, bits, book.levels(), book.boundaries(), ScaleRule::kNorm, spread.data(),
                 row_stride, num_rows, codes.data(), code_stride, scales.data()});
  EXPECT_EQ(0, std::memcmp(scales.data(), dense.scales.data(), num_rows * sizeof(float)));
  for (int64_t r = 0; r < num_rows; ++r) {
    EXPECT_EQ(0, std::memcmp(&codes[r * code_stride], &dense.codes[r * row_bytes], row_bytes));
    for (int64_t i = row_bytes; i < code_stride; ++i) ASSERT_EQ(codes[r * code_stride + i], 0xEE);
  }
}

TEST(QuantizeRows, RejectsBadSizes) {
  const math::Codebook& book = codebook(16, 2);
  std::vector<float> row(16);
  std::vector<uint8_t> codes(4);
  float scale = 0.0f;
  const QuantizeRowsParams good = {
      16,           2, book.levels(), book.boundaries(), ScaleRule::kNorm, row.data(), 16, 1,
      codes.data(), 4, &scale};
  EXPECT_EQ(quantize_rows(good), 0);
  auto expect_thrown = [&](auto change, const std::string& argument) {
    QuantizeRowsParams bad = good;
    change(bad);
    try {
      quantize_rows(bad);
      ADD_FAILURE() << argument << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()).rfind(argument + ": expected ", 0), 0u) << error.what();
    }
  };
  expect_thrown([](auto& p) { p.dim = 0; }, "dim");
  expect_thrown([](auto& p) { p.bits = 9; }, "bits");
  expect_thrown([](auto& p) { p.levels = p.levels.first(3); }, "levels");
  expect_thrown([](auto& p) { p.boundaries = p.boundaries.first(2); }, "boundaries");
  expect_thrown([](auto& p) { p.num_rows = -1; }, "num_rows");
  expect_thrown([](auto& p) { p.row_stride_elems = 15; }, "row_stride_elems");
  expect_thrown([](auto& p) { p.codes_stride_bytes = 3; }, "codes_stride_bytes");
}

}  // namespace
}  // namespace turboquant::quant
