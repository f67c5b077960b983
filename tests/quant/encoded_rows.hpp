// What quantize_rows makes of rows, and what is asked of it whatever the codebook.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/quantize_rows.hpp"

namespace turboquant::quant {

struct Encoded {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  int64_t non_finite_rows = 0;

  bool same_bits(const Encoded& other) const {
    return codes == other.codes && non_finite_rows == other.non_finite_rows &&
           std::memcmp(scales.data(), other.scales.data(), scales.size() * sizeof(float)) == 0;
  }
};

// Rows without gaps; `params` names the codebook, the dim and the rule.
inline Encoded encode_rows(QuantizeRowsParams params, const std::vector<float>& rows) {
  const int64_t row_bytes = packed_row_bytes(params.dim, params.bits);
  Encoded out;
  params.num_rows = static_cast<int64_t>(rows.size()) / params.dim;
  out.codes.assign(params.num_rows * row_bytes, 0xEE);
  out.scales.assign(params.num_rows, -1.0f);
  params.rows = rows.data();
  params.row_stride_elems = params.dim;
  params.codes = out.codes.data();
  params.codes_stride_bytes = row_bytes;
  params.scales = out.scales.data();
  out.non_finite_rows = quantize_rows(params);
  return out;
}

inline float rounded_product(float a, float b) {
  const volatile float product = a * b;  // volatile: rounds, nothing is contracted
  return product;
}

// <a, b> in the documented order of additions.
inline float lane_sum(const float* a, const float* b, int dim) {
  volatile float lanes[kSumLanes] = {};
  for (int i = 0; i < dim; ++i) {
    lanes[i % kSumLanes] = lanes[i % kSumLanes] + rounded_product(a[i], b[i]);
  }
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  }
  return lanes[0];
}

// encode(rows, dim, bits, rule) and reference(row, dim, bits, rule) agree bit for bit.
template <class Encode, class Reference>
void expect_documented_bits(const std::vector<float>& rows, int dim, int bits, Encode encode,
                            Reference reference) {
  for (const ScaleRule rule : kScaleRules) {
    Encoded expected;
    for (size_t start = 0; start < rows.size(); start += dim) {
      const Encoded one = reference(rows.data() + start, dim, bits, rule);
      expected.codes.insert(expected.codes.end(), one.codes.begin(), one.codes.end());
      expected.scales.push_back(one.scales[0]);
      expected.non_finite_rows += one.non_finite_rows;
    }
    ASSERT_TRUE(encode(rows, dim, bits, rule).same_bits(expected))
        << "dim " << dim << " bits " << bits << " rule " << scale_rule_name(rule);
  }
}

// `count` rows at a time give the bits of all at once.
template <class Encode>
void expect_rows_alone(const std::vector<float>& rows, int dim, int bits, int64_t count,
                       Encode encode) {
  const Encoded all = encode(rows, dim, bits, ScaleRule::kUnbiased);
  const auto total = static_cast<int64_t>(rows.size()) / dim;
  const int64_t row_bytes = packed_row_bytes(dim, bits);
  for (int64_t first = 0; first + count <= total; first += count) {
    const Encoded some = encode({rows.begin() + first * dim, rows.begin() + (first + count) * dim},
                                dim, bits, ScaleRule::kUnbiased);
    ASSERT_EQ(
        0, std::memcmp(some.codes.data(), all.codes.data() + first * row_bytes, count * row_bytes));
    ASSERT_EQ(0, std::memcmp(some.scales.data(), all.scales.data() + first, count * 4));
  }
}

}  // namespace turboquant::quant
