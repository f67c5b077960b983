// The number of codebook boundaries below x by one look-up and one comparison, for encoders whose
// look-ups cost no more than a comparison (GPU shared memory).
//
// The line is cut into cells of equal width, narrow enough that none holds two boundaries. With
// cell(x) a monotone function of x (each of its steps rounds monotonically), boundaries in lower
// cells are below x and boundaries in higher cells are not, so
//   code = codes before the cell + (x > the cell's boundary)
// is exactly the count of boundaries below x, for every float but NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "turboquant/error.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::quant {

struct SearchCell {
  float boundary;  // +inf: the cell holds none; never -0
  uint32_t code;   // boundaries in lower cells
};

// Cells of a codebook of 2^bits levels. The least spacing of a Lloyd-Max codebook's boundaries is
// in the middle, about 0.69 of the mean spacing at any width (Panter and Dite: spacing ~ p^(-1/3)),
// so twice as many cells as codes do; tests/quant/cell_search_test.cpp holds every supported
// head_dim and width to it.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int search_cells(int bits) {
  return bits <= 3 ? 16 : 1 << (bits + 1);
}

// Which cell x is in: round((cells - 1) saturate(x scale + 1/2)), ties to even. The product is
// formed at the scale of the smallest subnormal, whose bits are the integer: one multiplication.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t search_cell(float x, float scale, int cells) {
  const float per_cell = __builtin_bit_cast(float, static_cast<uint32_t>(cells - 1));
#if defined(__CUDA_ARCH__)
  const float position = __saturatef(__fmaf_rn(x, scale, 0.5f));
  return __float_as_uint(__fmul_rn(position, per_cell));
#else
  float position = std::fma(x, scale, 0.5f);
  position = position > 0.0f ? (position < 1.0f ? position : 1.0f) : 0.0f;
  return __builtin_bit_cast(uint32_t, position * per_cell);
#endif
}

// The code of x in its cell. x > boundary as the sign of boundary - x, which no rounding changes
// (boundary is not -0): a subtraction and a shifted addition.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t search_code(const SearchCell& cell, float x) {
#if defined(__CUDA_ARCH__)
  return cell.code + (__float_as_uint(__fsub_rn(cell.boundary, x)) >> 31);
#else
  return cell.code + (__builtin_bit_cast(uint32_t, cell.boundary - x) >> 31);
#endif
}

struct CellSearch {
  float scale = 0.0f;
  std::vector<SearchCell> cells;
};

// Throws InvalidArgument for boundaries of which two share a cell.
inline CellSearch make_cell_search(int bits, std::span<const float> boundaries) {
  const int count = search_cells(bits);
  // The end cells reach to infinity, so one boundary each lies in them wherever it is: the others
  // are spread over the cells between.
  float largest = 0.0f;
  for (size_t i = 1; i + 1 < boundaries.size(); ++i) {
    largest = std::fmax(largest, std::fabs(boundaries[i]));
  }
  CellSearch search;
  search.scale = largest > 0.0f ? (0.5f - 0.6f / static_cast<float>(count - 1)) / largest : 0.5f;
  search.cells.assign(count, {std::numeric_limits<float>::infinity(), 0});
  for (const float boundary : boundaries) {
    const uint32_t cell = search_cell(boundary, search.scale, count);
    if (!std::isinf(search.cells[cell].boundary)) {
      turboquant::detail::throw_invalid(
          "boundaries", "at most one in each of " + std::to_string(count) + " equal cells",
          std::to_string(search.cells[cell].boundary) + " and " + std::to_string(boundary));
    }
    search.cells[cell].boundary = boundary + 0.0f;  // -0 becomes 0
    for (int above = static_cast<int>(cell) + 1; above < count; ++above) {
      ++search.cells[above].code;
    }
  }
  return search;
}

}  // namespace turboquant::quant
