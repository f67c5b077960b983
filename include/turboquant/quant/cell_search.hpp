// The number of codebook boundaries below x by one look-up and one comparison, for encoders whose
// look-ups cost no more than a comparison (GPU shared memory).
//
// The line is cut into cells of equal width, narrow enough that none holds two boundaries. With
// cell(x) a monotone function of x (each of its steps rounds monotonically), boundaries in lower
// cells are below x and boundaries in higher cells are not, so
//   code = codes before the cell + (x > the cell's boundary)
// is exactly the count of boundaries below x, for every float but NaN. Up to kIndexedCellBits there
// are as many cells as boundaries, one in each: the codes before a cell are its index.
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

// Few bits: boundary k is within half a cell of k equal cells from the first, for a Lloyd-Max
// codebook's spacings grow from the middle by no more than that. More bits: the least spacing is
// in the middle, about 0.69 of the mean spacing at any width (Panter and Dite: spacing ~ p^(-1/3)),
// so twice as many cells as codes do. tests/quant/cell_search_test.cpp holds every supported
// head_dim and width to it.
inline constexpr int kIndexedCellBits = 4;
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int search_cells(int bits) {
  return bits <= kIndexedCellBits ? (1 << bits) - 1 : 1 << (bits + 1);
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

// The scale for few bits: boundary k, counted from the middle one, lies between k - 1/2 and
// k + 1/2 cells from the middle, the outer ones anywhere behind k - 1/2.
inline float indexed_search_scale(std::span<const float> boundaries) {
  const int middle = static_cast<int>(boundaries.size()) / 2;
  float least = 0.0f, most = std::numeric_limits<float>::infinity();  // cells per unit
  for (int k = 1; k <= middle; ++k) {
    for (const float b : {boundaries[middle + k], -boundaries[middle - k]}) {
      least = std::fmax(least, (static_cast<float>(k) - 0.5f) / b);
      if (k < middle) most = std::fmin(most, (static_cast<float>(k) + 0.5f) / b);
    }
  }
  return middle == 0
             ? 1.0f
             : std::fmin(2.0f * least, 0.5f * (least + most)) / static_cast<float>(2 * middle);
}
// For more: the end cells reach to infinity, so one boundary each lies in them wherever it is: the
// others are spread over the cells between.
inline float spread_search_scale(std::span<const float> boundaries, int cells) {
  float largest = 0.0f;
  for (size_t i = 1; i + 1 < boundaries.size(); ++i) {
    largest = std::fmax(largest, std::fabs(boundaries[i]));
  }
  return largest > 0.0f ? (0.5f - 0.6f / static_cast<float>(cells - 1)) / largest : 0.5f;
}

// Of 2^bits - 1 ascending boundaries; throws InvalidArgument where two would share a cell, or (few
// bits) one is not in the cell of its index.
inline CellSearch make_cell_search(int bits, std::span<const float> boundaries) {
  const int count = search_cells(bits);
  const bool indexed = bits <= kIndexedCellBits;
  CellSearch search;
  search.scale =
      indexed ? indexed_search_scale(boundaries) : spread_search_scale(boundaries, count);
  search.cells.assign(count, {std::numeric_limits<float>::infinity(), 0});
  for (size_t k = 0; k < boundaries.size(); ++k) {
    const uint32_t cell = search_cell(boundaries[k], search.scale, count);
    if (!std::isinf(search.cells[cell].boundary) || (indexed && cell != k)) {
      turboquant::detail::throw_invalid(
          "boundaries", "at most one in each of " + std::to_string(count) + " equal cells",
          std::to_string(boundaries[k]) + " in cell " + std::to_string(cell));
    }
    search.cells[cell].boundary = boundaries[k] + 0.0f;  // -0 becomes 0
    for (int above = static_cast<int>(cell) + 1; above < count; ++above) {
      ++search.cells[above].code;
    }
  }
  return search;
}

}  // namespace turboquant::quant
