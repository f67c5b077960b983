// What the batch interfaces share: spans checked against each other, and rows in chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "turboquant/error.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::quant::detail {

// Rows a thread takes at a time: whole tiles of the encoder, small enough for the L1/L2 caches.
inline constexpr int64_t kChunkRows = 64;

// The number of rows in a span of `size` elements.
inline int64_t count_rows(const char* argument, size_t size, int64_t row_elems) {
  const auto elems = static_cast<int64_t>(size);
  if (elems % row_elems != 0) {
    turboquant::detail::throw_invalid(argument,
                                      "rows of " + std::to_string(row_elems) + " elements",
                                      std::to_string(elems) + " elements");
  }
  return elems / row_elems;
}

inline void check_size(const char* argument, size_t size, int64_t expected) {
  if (static_cast<int64_t>(size) != expected) {
    turboquant::detail::throw_invalid(argument, std::to_string(expected) + " elements",
                                      std::to_string(size));
  }
}

// body(first_row, num_rows) over chunks of at most kChunkRows rows.
template <class Body>
void for_chunks(int64_t num_rows, const ParallelFor& parallel, const Body& body) {
  const int64_t chunks = (num_rows + kChunkRows - 1) / kChunkRows;
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkRows;
      body(first, std::min(kChunkRows, num_rows - first));
    }
  });
}

// <a, b> in fp32: 16 lanes, then a tree, so that the compiler may vectorise it.
inline float lane_dot(const float* a, const float* b, int64_t dim) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t start = 0;
  for (; start + kLanes <= dim; start += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[start + l] * b[start + l];
  }
  for (int l = 0; start + l < dim; ++l) lanes[l] += a[start + l] * b[start + l];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

}  // namespace turboquant::quant::detail
