#include "turboquant/quant/mse.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "quant/batch.hpp"
#include "turboquant/quant/quantize_rows.hpp"

namespace turboquant::quant {

using detail::check_size;
using detail::count_rows;
using detail::for_chunks;
using detail::lane_dot;

TurboQuantMse::TurboQuantMse(int dim, int bits, uint64_t seed, ScaleRule scale_rule,
                             RotationKind rotation)
    : dim_(dim),
      bits_(bits),
      seed_(seed),
      scale_rule_(scale_rule),
      rotation_(rotation, dim, seed, rotation_stream(0, 0, StreamPurpose::kVectors)),
      codebook_(&math::Codebook::sphere(dim, bits)),
      table_(make_decode_table(bits, codebook_->levels())) {}

int64_t TurboQuantMse::encode(std::span<const float> vectors, std::span<uint8_t> codes,
                              std::span<float> scales, const ParallelFor& parallel) const {
  const int64_t num_rows = count_rows("vectors", vectors.size(), dim_);
  check_size("codes", codes.size(), num_rows * row_bytes());
  check_size("scales", scales.size(), num_rows);
  std::atomic<int64_t> non_finite_rows{0};
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    const float* const from = vectors.data() + first * dim_;
    std::vector<float> rows(from, from + count * dim_);
    rotation_.apply(rows.data(), count);
    non_finite_rows += quantize_rows({.dim = dim_,
                                      .bits = bits_,
                                      .levels = codebook_->levels(),
                                      .boundaries = codebook_->boundaries(),
                                      .rule = scale_rule_,
                                      .rows = rows.data(),
                                      .row_stride_elems = dim_,
                                      .num_rows = count,
                                      .codes = codes.data() + first * row_bytes(),
                                      .codes_stride_bytes = row_bytes(),
                                      .scales = scales.data() + first});
  });
  return non_finite_rows;
}

void TurboQuantMse::decode(std::span<const uint8_t> codes, std::span<const float> scales,
                           std::span<float> vectors, const ParallelFor& parallel) const {
  const int64_t num_rows = count_rows("codes", codes.size(), row_bytes());
  check_size("scales", scales.size(), num_rows);
  check_size("vectors", vectors.size(), num_rows * dim_);
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r) {
      float* const row = vectors.data() + r * dim_;
      decode_row(table_, codes.data() + r * row_bytes(), dim_, row);
      for (int i = 0; i < dim_; ++i) row[i] *= scales[r];
    }
    rotation_.apply_transpose(vectors.data() + first * dim_, count);
  });
}

void TurboQuantMse::score(std::span<const float> queries, std::span<const uint8_t> codes,
                          std::span<const float> scales, std::span<float> scores,
                          const ParallelFor& parallel) const {
  const int64_t num_queries = count_rows("queries", queries.size(), dim_);
  const int64_t num_rows = count_rows("codes", codes.size(), row_bytes());
  check_size("scales", scales.size(), num_rows);
  check_size("scores", scores.size(), num_queries * num_rows);
  std::vector<float> rotated(queries.begin(), queries.end());
  rotation_.apply(rotated.data(), num_queries);
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    std::vector<float> levels(dim_);
    for (int64_t r = first; r < first + count; ++r) {
      decode_row(table_, codes.data() + r * row_bytes(), dim_, levels.data());
      for (int64_t q = 0; q < num_queries; ++q) {
        scores[q * num_rows + r] =
            scales[r] * lane_dot(rotated.data() + q * dim_, levels.data(), dim_);
      }
    }
  });
}

}  // namespace turboquant::quant
