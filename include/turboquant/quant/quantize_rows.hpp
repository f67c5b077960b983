// The quantiser's bit-exact core: rows that are already rotated (and centred) become packed codes
// and one scale per row.
//
// Numerics, the same on every backend, all in fp32 without FMA contraction:
//   1. squares = <y,y> in 16 lanes: lane[l] += y[16i+l]^2 for ascending i, then
//      lane[l] += lane[l+8], += lane[l+4], += lane[l+2], += lane[l+1]; the result is lane[0];
//   2. x = y * (sqrt(d) / sqrt(squares)); code = number of boundaries below x;
//   3. <y,c> and <c,c> in the order of step 1, then the scale by scale_rule.hpp.
// A row whose squares fall below 2^-90 is first multiplied by 2^105, one whose squares exceed 2^100
// by 2^-80, and the scale is multiplied back: rows from subnormal to the largest float keep their
// direction. A scale beyond the largest float saturates there.
// A zero row stores codes 0 and scale 0. A row with NaN or inf stores codes 0 and scale NaN, which
// poisons that row only.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::quant {

inline constexpr int kSumLanes = 16;
inline constexpr float kMinSquares = 0x1p-90f;
inline constexpr float kMaxSquares = 0x1p+100f;
inline constexpr float kTinyUnit = 0x1p-105f;
inline constexpr float kHugeUnit = 0x1p+80f;

struct QuantizeRowsParams {
  int dim;                            // 1 to 2^20
  int bits;                           // 1 to 8
  std::span<const float> levels;      // [2^bits] ascending, unit variance
  std::span<const float> boundaries;  // [2^bits - 1] ascending
  ScaleRule rule;
  const float* rows;         // [num_rows, dim]
  int64_t row_stride_elems;  // at least dim
  int64_t num_rows;
  uint8_t* codes;              // [num_rows, packed_row_bytes(dim, bits)]
  int64_t codes_stride_bytes;  // at least packed_row_bytes(dim, bits)
  float* scales;               // [num_rows]
};

// Returns the number of rows with NaN or inf in them. Runs in the calling thread.
// Throws InvalidArgument for a size or stride outside the ranges above.
int64_t quantize_rows(const QuantizeRowsParams& params);

}  // namespace turboquant::quant
