#include "turboquant/quant/rotation.hpp"

#include <cmath>
#include <numbers>
#include <string>

#include "turboquant/error.hpp"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/math/philox.hpp"

namespace turboquant::quant {
namespace {

using turboquant::detail::throw_invalid;

// Counter word 1: rounds of signs count from 0, normal numbers have a value of their own.
constexpr uint32_t kGaussianCounter = 0x6E6F726D;

uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }
uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

void multiply_signs(const float* signs, int dim, double* row) {
  for (int i = 0; i < dim; ++i) row[i] *= signs[i];
}

template <class Float>
struct Turn {
  Float c, s;
};

// The turn whose half angle has the tangent t.
template <class Float>
Turn<Float> turn_of(Float t) {
  const Float t_squared = t * t;
  return {(1 - t_squared) / (1 + t_squared), 2 * t / (1 + t_squared)};
}

void turn_pairs(const std::vector<float>& tangents, bool transpose, double* row) {
  for (size_t j = 0; j < tangents.size(); ++j) {
    const auto [c, s] = turn_of<double>(transpose ? -tangents[j] : tangents[j]);
    const double x = row[2 * j];
    const double y = row[2 * j + 1];
    row[2 * j] = c * x - s * y;
    row[2 * j + 1] = s * x + c * y;
  }
}

// out = M row (or M^T row) in double, ascending order of additions.
template <class Float>
void multiply_rows(const std::vector<double>& matrix, int dim, bool transpose, Float* rows,
                   int64_t num_rows, int64_t row_stride_elems) {
  const int64_t stride = row_stride_elems == 0 ? dim : row_stride_elems;
  std::vector<double> out(dim);
  for (int64_t r = 0; r < num_rows; ++r) {
    Float* const row = rows + r * stride;
    if (transpose) {
      std::fill(out.begin(), out.end(), 0.0);
      for (int i = 0; i < dim; ++i) {
        const double x = row[i];
        const double* const line = matrix.data() + int64_t{i} * dim;
        for (int j = 0; j < dim; ++j) out[j] += line[j] * x;
      }
    } else {
      for (int i = 0; i < dim; ++i) {
        const double* const line = matrix.data() + int64_t{i} * dim;
        double sum = 0.0;
        for (int j = 0; j < dim; ++j) sum += line[j] * row[j];
        out[i] = sum;
      }
    }
    for (int i = 0; i < dim; ++i) row[i] = static_cast<Float>(out[i]);
  }
}

}  // namespace

std::string_view rotation_kind_name(RotationKind kind) {
  switch (kind) {
    case RotationKind::kSignHadamard:
      return "sign_hadamard";
    case RotationKind::kHaar:
      return "haar";
  }
  return "unknown";
}

SignHadamardRotation::SignHadamardRotation(int dim, uint64_t seed, uint64_t stream) : dim_(dim) {
  if (!math::hadamard_supported(dim)) {
    throw_invalid("dim", math::hadamard_supported_text() + " for a sign-Hadamard rotation",
                  std::to_string(dim));
  }
  signs_.resize(int64_t{kRounds} * dim);
  math::PhiloxWords random{};
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < dim; ++i) {
      if (i % 128 == 0) {
        random = math::philox4x32({{static_cast<uint32_t>(i / 128), static_cast<uint32_t>(round),
                                    low_word(stream), high_word(stream)}},
                                  seed);
      }
      const uint32_t bit = random.word[i / 32 % 4] >> (i % 32) & 1;
      signs_[int64_t{round} * dim + i] = bit ? -1.0f : 1.0f;
    }
  }
  for (int j = 0; j < dim / 2; ++j) {
    const math::PhiloxWords words = math::philox4x32(
        {{static_cast<uint32_t>(j / 4), kTurnCounter, low_word(stream), high_word(stream)}}, seed);
    tangents_.push_back(static_cast<float>(words.word[j % 4] >> 8) * 0x1p-24f);
    const auto [c, s] = turn_of<float>(tangents_.back());
    turns_.insert(turns_.end(), {c, s});
  }
}

void SignHadamardRotation::apply(double* rows, int64_t num_rows, int64_t row_stride_elems) const {
  const int64_t stride = row_stride_elems == 0 ? dim_ : row_stride_elems;
  for (int64_t r = 0; r < num_rows; ++r) {
    double* const row = rows + r * stride;
    for (int round = 0; round < kRounds; ++round) {
      multiply_signs(signs_.data() + int64_t{round} * dim_, dim_, row);
      if (round == kTurnRound) turn_pairs(tangents_, false, row);
      math::hadamard_transform(row, dim_);
    }
  }
}

void SignHadamardRotation::apply_transpose(double* rows, int64_t num_rows,
                                           int64_t row_stride_elems) const {
  const int64_t stride = row_stride_elems == 0 ? dim_ : row_stride_elems;
  for (int64_t r = 0; r < num_rows; ++r) {
    double* const row = rows + r * stride;
    for (int round = kRounds - 1; round >= 0; --round) {
      math::hadamard_transform_transpose(row, dim_);
      if (round == kTurnRound) turn_pairs(tangents_, true, row);
      multiply_signs(signs_.data() + int64_t{round} * dim_, dim_, row);
    }
  }
}

std::vector<double> gaussian_numbers(int64_t count, uint64_t seed, uint64_t stream) {
  std::vector<double> numbers(count);
  for (int64_t i = 0; i < count; i += 2) {
    const math::PhiloxWords random = math::philox4x32(
        {{static_cast<uint32_t>(i / 2), kGaussianCounter, low_word(stream), high_word(stream)}},
        seed);
    const double u = math::uniform_open_closed(random.word[0], random.word[1]);
    const double v = math::uniform_open_closed(random.word[2], random.word[3]);
    const double radius = std::sqrt(-2.0 * std::log(u));
    const double angle = 2.0 * std::numbers::pi * v;
    numbers[i] = radius * std::cos(angle);
    if (i + 1 < count) numbers[i + 1] = radius * std::sin(angle);
  }
  return numbers;
}

HaarRotation::HaarRotation(int dim, uint64_t seed, uint64_t stream) : dim_(dim) {
  if (dim < 2) throw_invalid("dim", "at least 2", std::to_string(dim));
  const int64_t d = dim;
  // Columns are contiguous: column j of the Gaussian matrix is a[j * d ...]. Below the diagonal it
  // is overwritten by the Householder vector v_j.
  std::vector<double> a = gaussian_numbers(d * d, seed, stream);
  std::vector<double> column_sign(d);
  auto reflect = [&](const double* v, int64_t first, double* x) {  // x -= 2 v <v,x>, |v| = 1
    double dot = 0.0;
    for (int64_t i = first; i < d; ++i) dot += v[i] * x[i];
    for (int64_t i = first; i < d; ++i) x[i] -= 2.0 * dot * v[i];
  };
  for (int64_t j = 0; j < d; ++j) {
    double* const v = a.data() + j * d;
    double squares = 0.0;
    for (int64_t i = j; i < d; ++i) squares += v[i] * v[i];
    // The reflection sends the column to `diagonal` on the axis, away from v[j]: no cancellation.
    const double diagonal = v[j] > 0.0 ? -std::sqrt(squares) : std::sqrt(squares);
    column_sign[j] = diagonal < 0.0 ? -1.0 : 1.0;
    const double length = std::sqrt(2.0 * (squares - diagonal * v[j]));
    v[j] -= diagonal;
    for (int64_t i = j; i < d; ++i) v[i] /= length;
    for (int64_t k = j + 1; k < d; ++k) reflect(v, j, a.data() + k * d);
  }
  // Q sign(diag R) = H_0 H_1 ... H_{d-1} applied to signed axes; a reflection before the axis' own
  // index is the identity on it.
  matrix_.assign(d * d, 0.0);
  for (int64_t k = 0; k < d; ++k) {
    double* const column = matrix_.data() + k * d;
    column[k] = column_sign[k];
    for (int64_t j = k; j >= 0; --j) reflect(a.data() + j * d, j, column);
  }
  // matrix_ now holds Q's columns as rows: the transpose of a Haar matrix is Haar too.
}

void HaarRotation::apply(float* rows, int64_t num_rows, int64_t stride) const {
  multiply_rows(matrix_, dim_, false, rows, num_rows, stride);
}
void HaarRotation::apply_transpose(float* rows, int64_t num_rows, int64_t stride) const {
  multiply_rows(matrix_, dim_, true, rows, num_rows, stride);
}
void HaarRotation::apply(double* rows, int64_t num_rows, int64_t stride) const {
  multiply_rows(matrix_, dim_, false, rows, num_rows, stride);
}
void HaarRotation::apply_transpose(double* rows, int64_t num_rows, int64_t stride) const {
  multiply_rows(matrix_, dim_, true, rows, num_rows, stride);
}

}  // namespace turboquant::quant
