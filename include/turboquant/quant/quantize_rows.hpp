// The quantiser's bit-exact core: rows that are already rotated (and centred) become packed codes
// and one scale per row.
//
// Numerics, the same on every backend, all in fp32 without FMA contraction:
//   1. squares = <y,y> in 16 lanes: lane[l] += y[16i+l]^2 for ascending i, then
//      lane[l] += lane[l+8], += lane[l+4], += lane[l+2], += lane[l+1]; the result is lane[0];
//   2. x = y * (sqrt(d) / sqrt(squares)); code = number of boundaries below x (vector codebooks:
//      below);
//   3. <y,c> and <c,c> in the order of step 1, then the scale by scale_rule.hpp.
// Vector codebooks. The cost of index e for the pair (x, y) is (|c_e|^2 / 2 - x c_e0) - y c_e1,
// half of the squared distance less a constant. Of equal costs the index that is tried first wins.
//   4 bits  the index of least cost, tried in ascending order;
//   3 bits  for each of a group's three whole bytes and each value of its bits 3 and 7, the index
//           of least cost, in ascending order; then the last quarter's index s of least sum
//           ((cost + cost of byte 0) + cost of byte 1) + cost of byte 2 of those bytes whose bits 3
//           and 7 make s, in ascending order;
//   2 bits  Viterbi's algorithm over a word's nibbles n_0, n_1, ...: best_0(n) = 0,
//           best_{k+1}(m) = min over ascending n of best_k(n) + cost of pair k's index n + 16 m;
//           behind the last pair m is 0.
// A row whose squares fall below 2^-90 is first multiplied by 2^105, one whose squares exceed 2^100
// by 2^-80, and the scale is multiplied back: rows from subnormal to the largest float keep their
// direction. A scale beyond the largest float saturates there.
// A zero row stores codes 0 and scale 0. A row with NaN or inf stores codes 0 and scale NaN, which
// poisons that row only.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/math/vector_codebook.hpp"
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
  // Instead of levels and boundaries, which are then empty: of as many bits, dim a multiple of 8.
  const math::VectorCodebook* vector_codebook = nullptr;
};

// Returns the number of rows with NaN or inf in them. Runs in the calling thread.
// Throws InvalidArgument for a size or stride outside the ranges above.
int64_t quantize_rows(const QuantizeRowsParams& params);

}  // namespace turboquant::quant
