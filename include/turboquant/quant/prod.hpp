// TurboQuantProd: algorithm 2 of the TurboQuant paper (arXiv 2504.19874), with unbiased inner
// products: b-1 bits by TurboQuantMse, one sign bit a coordinate of the projected residual (QJL),
// and the residual's norm.
//
// With y = R x, y_mse its (b-1)-bit reconstruction (0 at b = 1), r = y - y_mse, g = |r|:
//   y' = y_mse + g k S^T sign(S r),   <q, x'> = <R q, y_mse> + g k <S R q, sign(S r)>.
// The projection S acts on rotated coordinates, which changes nothing: S R is distributed like S.
//
// Error of <q, x'> for independent random unit vectors q and x, D = distortion at b-1 bits
// (1 at b = 1):
//   kGaussian    S iid N(0, 1), k = sqrt(pi/2) / d: variance (pi/2 - 1/d) D / d;
//   kOrthogonal  S orthogonal, k = 1 / (d E|u_1|), u a random unit vector: (k^2 d - 1) D / d, 2.8
//                times less. Unbiasedness: E<u, sign(u)> = d E|u_1|. Variance: k S^T sign(S r/g)
//                has squared length k^2 d and a mean component of 1 along r/g.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "turboquant/parallel.hpp"
#include "turboquant/quant/decode_table.hpp"
#include "turboquant/quant/mse.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::quant {

enum class Projection { kOrthogonal, kGaussian };

std::string_view projection_name(Projection projection);  // "orthogonal", "gaussian"

// Conventions as TurboQuantMse. A row is the packed codes of b-1 bits followed by the packed sign
// bits (1 = not negative), each part whole bytes.
class TurboQuantProd {
 public:
  // bits: 1 to 9 a coordinate, the sign included. An orthogonal projection is of the same kind as
  // the rotation, with signs of its own.
  TurboQuantProd(int dim, int bits, uint64_t seed = 42,
                 Projection projection = Projection::kOrthogonal,
                 RotationKind rotation = RotationKind::kSignHadamard);

  int dim() const { return dim_; }
  int bits() const { return bits_; }
  uint64_t seed() const { return seed_; }
  Projection projection() const { return projection_; }
  int64_t row_bytes() const { return mse_row_bytes() + packed_row_bytes(dim_, 1); }
  double sign_scale() const { return sign_scale_; }  // k above

  // The variance above, for |q| = |x| = 1.
  double expected_variance() const;

  // vectors [n, dim] -> rows [n, row_bytes()], scales [n] (0 at b = 1), residual_norms [n]. A
  // vector with NaN or inf stores NaN in both. Returns how many of them there were.
  int64_t encode(std::span<const float> vectors, std::span<uint8_t> rows, std::span<float> scales,
                 std::span<float> residual_norms, const ParallelFor& parallel = threads()) const;

  // -> vectors [n, dim].
  void decode(std::span<const uint8_t> rows, std::span<const float> scales,
              std::span<const float> residual_norms, std::span<float> vectors,
              const ParallelFor& parallel = threads()) const;

  // Inner products of queries [m, dim] with the encoded vectors -> scores [m, n], without
  // decoding: queries are rotated and projected once.
  void score(std::span<const float> queries, std::span<const uint8_t> rows,
             std::span<const float> scales, std::span<const float> residual_norms,
             std::span<float> scores, const ParallelFor& parallel = threads()) const;

 private:
  int64_t mse_row_bytes() const { return bits_ == 1 ? 0 : packed_row_bytes(dim_, bits_ - 1); }
  void project(float* rows, int64_t num_rows) const;            // rows <- S rows
  void project_transpose(float* rows, int64_t num_rows) const;  // rows <- S^T rows
  void multiply_gaussian(bool transpose, float* rows, int64_t num_rows) const;

  int dim_;
  int bits_;
  uint64_t seed_;
  Projection projection_;
  Rotation rotation_;
  std::optional<Rotation> orthogonal_;
  std::vector<float> gaussian_;  // [dim, dim]
  double sign_scale_;
  const math::Codebook* codebook_ = nullptr;  // null at b = 1
  DecodeTable table_;                         // empty at b = 1
  DecodeTable sign_table_;
};

}  // namespace turboquant::quant
