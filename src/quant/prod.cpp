#include "turboquant/quant/prod.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>

#include "quant/batch.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/density.hpp"
#include "turboquant/quant/quantize_rows.hpp"

namespace turboquant::quant {
namespace {

using detail::check_size;
using detail::count_rows;
using detail::for_chunks;
using detail::lane_dot;

constexpr uint64_t kProjectionStream = rotation_stream(0, 0, StreamPurpose::kProjection);
constexpr float kSigns[] = {-1.0f, 1.0f};

int checked_bits(int bits) {
  if (bits < 1 || bits > kMaxBits + 1) {
    turboquant::detail::throw_invalid("bits", "1 to 9 (the sign bit included)",
                                      std::to_string(bits));
  }
  return bits;
}

}  // namespace

std::string_view projection_name(Projection projection) {
  switch (projection) {
    case Projection::kOrthogonal:
      return "orthogonal";
    case Projection::kGaussian:
      return "gaussian";
  }
  return "unknown";
}

TurboQuantProd::TurboQuantProd(int dim, int bits, uint64_t seed, Projection projection,
                               RotationKind rotation)
    : dim_(dim),
      bits_(checked_bits(bits)),
      seed_(seed),
      projection_(projection),
      rotation_(rotation, dim, seed, rotation_stream(0, 0, StreamPurpose::kVectors)),
      sign_table_(make_decode_table(1, kSigns)) {
  if (bits > 1) {
    codebook_ = &math::Codebook::sphere(dim, bits - 1);
    table_ = make_decode_table(bits - 1, codebook_->levels());
  }
  const double d = dim;
  if (projection == Projection::kOrthogonal) {
    orthogonal_.emplace(rotation, dim, seed, kProjectionStream);
    const math::SphereMarginal marginal(dim);  // of sqrt(d) u_1
    const double mean_abs = 2.0 * marginal.first_moment(0.0, marginal.support()) / std::sqrt(d);
    sign_scale_ = 1.0 / (d * mean_abs);
  } else {
    const auto numbers = gaussian_numbers(int64_t{dim} * dim, seed, kProjectionStream);
    gaussian_.assign(numbers.begin(), numbers.end());
    sign_scale_ = std::sqrt(std::numbers::pi / 2.0) / d;
  }
}

double TurboQuantProd::expected_variance() const {
  const double d = dim_;
  const double distortion = codebook_ ? codebook_->distortion() : 1.0;
  const double per_residual = projection_ == Projection::kOrthogonal
                                  ? sign_scale_ * sign_scale_ * d - 1.0
                                  : std::numbers::pi / 2.0 - 1.0 / d;
  return per_residual * distortion / d;
}

void TurboQuantProd::multiply_gaussian(bool transpose, float* rows, int64_t num_rows) const {
  std::vector<float> out(dim_);
  for (int64_t r = 0; r < num_rows; ++r) {
    float* const row = rows + r * dim_;
    if (transpose) {
      std::fill(out.begin(), out.end(), 0.0f);
      for (int i = 0; i < dim_; ++i) {
        const float* const line = gaussian_.data() + int64_t{i} * dim_;
        for (int j = 0; j < dim_; ++j) out[j] += line[j] * row[i];
      }
    } else {
      for (int i = 0; i < dim_; ++i) {
        out[i] = lane_dot(gaussian_.data() + int64_t{i} * dim_, row, dim_);
      }
    }
    std::copy(out.begin(), out.end(), row);
  }
}

void TurboQuantProd::project(float* rows, int64_t num_rows) const {
  if (orthogonal_) return orthogonal_->apply(rows, num_rows);
  multiply_gaussian(false, rows, num_rows);
}

void TurboQuantProd::project_transpose(float* rows, int64_t num_rows) const {
  if (orthogonal_) return orthogonal_->apply_transpose(rows, num_rows);
  multiply_gaussian(true, rows, num_rows);
}

int64_t TurboQuantProd::encode(std::span<const float> vectors, std::span<uint8_t> rows,
                               std::span<float> scales, std::span<float> residual_norms,
                               const ParallelFor& parallel) const {
  const int64_t num_rows = count_rows("vectors", vectors.size(), dim_);
  check_size("rows", rows.size(), num_rows * row_bytes());
  check_size("scales", scales.size(), num_rows);
  check_size("residual_norms", residual_norms.size(), num_rows);
  std::atomic<int64_t> non_finite_rows{0};
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    const float* const from = vectors.data() + first * dim_;
    std::vector<float> residual(from, from + count * dim_);
    rotation_.apply(residual.data(), count);
    uint8_t* const packed = rows.data() + first * row_bytes();
    if (codebook_) {
      quantize_rows({.dim = dim_,
                     .bits = bits_ - 1,
                     .levels = codebook_->levels(),
                     .boundaries = codebook_->boundaries(),
                     .rule = ScaleRule::kNorm,
                     .rows = residual.data(),
                     .row_stride_elems = dim_,
                     .num_rows = count,
                     .codes = packed,
                     .codes_stride_bytes = row_bytes(),
                     .scales = scales.data() + first});
    } else {
      std::fill_n(scales.data() + first, count, 0.0f);
    }
    std::vector<float> levels(dim_);
    for (int64_t r = 0; r < count; ++r) {
      float* const row = residual.data() + r * dim_;
      if (codebook_) {
        decode_row(table_, packed + r * row_bytes(), dim_, levels.data());
        for (int i = 0; i < dim_; ++i) row[i] -= scales[first + r] * levels[i];
      }
      double squares = 0.0;  // no overflow: the largest float squared is far inside a double
      for (int i = 0; i < dim_; ++i) squares += static_cast<double>(row[i]) * row[i];
      const bool finite = std::isfinite(squares);
      non_finite_rows += !finite;
      const double norm =
          std::fmin(std::sqrt(squares), static_cast<double>(std::numeric_limits<float>::max()));
      constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
      residual_norms[first + r] = finite ? static_cast<float>(norm) : kNan;
      if (!finite) {
        scales[first + r] = kNan;
        std::fill_n(row, dim_, 0.0f);
      }
    }
    project(residual.data(), count);
    std::vector<uint8_t> sign_codes(dim_);
    for (int64_t r = 0; r < count; ++r) {
      const float* const row = residual.data() + r * dim_;
      for (int i = 0; i < dim_; ++i) sign_codes[i] = row[i] >= 0.0f;
      pack_row(sign_codes.data(), dim_, 1, packed + r * row_bytes() + mse_row_bytes());
    }
  });
  return non_finite_rows;
}

void TurboQuantProd::decode(std::span<const uint8_t> rows, std::span<const float> scales,
                            std::span<const float> residual_norms, std::span<float> vectors,
                            const ParallelFor& parallel) const {
  const int64_t num_rows = count_rows("rows", rows.size(), row_bytes());
  check_size("scales", scales.size(), num_rows);
  check_size("residual_norms", residual_norms.size(), num_rows);
  check_size("vectors", vectors.size(), num_rows * dim_);
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    float* const out = vectors.data() + first * dim_;
    const uint8_t* const packed = rows.data() + first * row_bytes();
    for (int64_t r = 0; r < count; ++r) {
      float* const row = out + r * dim_;
      decode_row(sign_table_, packed + r * row_bytes() + mse_row_bytes(), dim_, row);
      const auto length = static_cast<float>(residual_norms[first + r] * sign_scale_);
      for (int i = 0; i < dim_; ++i) row[i] *= length;
    }
    project_transpose(out, count);
    std::vector<float> levels(dim_);
    for (int64_t r = 0; codebook_ && r < count; ++r) {
      float* const row = out + r * dim_;
      decode_row(table_, packed + r * row_bytes(), dim_, levels.data());
      for (int i = 0; i < dim_; ++i) row[i] += scales[first + r] * levels[i];
    }
    rotation_.apply_transpose(out, count);
  });
}

void TurboQuantProd::score(std::span<const float> queries, std::span<const uint8_t> rows,
                           std::span<const float> scales, std::span<const float> residual_norms,
                           std::span<float> scores, const ParallelFor& parallel) const {
  const int64_t num_queries = count_rows("queries", queries.size(), dim_);
  const int64_t num_rows = count_rows("rows", rows.size(), row_bytes());
  check_size("scales", scales.size(), num_rows);
  check_size("residual_norms", residual_norms.size(), num_rows);
  check_size("scores", scores.size(), num_queries * num_rows);
  std::vector<float> rotated(queries.begin(), queries.end());
  rotation_.apply(rotated.data(), num_queries);
  std::vector<float> projected = rotated;
  project(projected.data(), num_queries);
  for_chunks(num_rows, parallel, [&](int64_t first, int64_t count) {
    std::vector<float> levels(dim_), signs(dim_);
    for (int64_t r = first; r < first + count; ++r) {
      const uint8_t* const packed = rows.data() + r * row_bytes();
      if (codebook_) decode_row(table_, packed, dim_, levels.data());
      decode_row(sign_table_, packed + mse_row_bytes(), dim_, signs.data());
      const auto length = static_cast<float>(residual_norms[r] * sign_scale_);
      for (int64_t q = 0; q < num_queries; ++q) {
        const float coarse =
            codebook_ ? scales[r] * lane_dot(rotated.data() + q * dim_, levels.data(), dim_) : 0.0f;
        scores[q * num_rows + r] =
            coarse + length * lane_dot(projected.data() + q * dim_, signs.data(), dim_);
      }
    }
  });
}

}  // namespace turboquant::quant
