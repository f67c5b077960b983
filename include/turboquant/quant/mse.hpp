// TurboQuantMse: algorithm 1 of the TurboQuant paper (arXiv 2504.19874). A random rotation, then
// the optimal scalar quantiser of every coordinate, and one scale per vector.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/math/codebook.hpp"
#include "turboquant/parallel.hpp"
#include "turboquant/quant/decode_table.hpp"
#include "turboquant/quant/rotation.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::quant {

// Immutable and safe to share between threads. Every method takes whole batches, row-major without
// gaps, splits them by `parallel` and gives results that do not depend on it. Spans of wrong length
// are an InvalidArgument, thrown before anything is written.
//
//   const TurboQuantMse quantizer(128, 4);
//   std::vector<uint8_t> codes(n * quantizer.row_bytes());
//   std::vector<float> scales(n);
//   quantizer.encode(vectors, codes, scales);
class TurboQuantMse {
 public:
  // dim: any with a Hadamard transform (math/hadamard.hpp); with RotationKind::kHaar any >= 2.
  // bits: 1 to 8. With ScaleRule::kNorm this is the paper's quantiser; the expected squared error
  // of a vector x is then codebook().distortion() * |x|^2.
  TurboQuantMse(int dim, int bits, uint64_t seed = 42, ScaleRule scale_rule = ScaleRule::kNorm,
                RotationKind rotation = RotationKind::kSignHadamard);

  int dim() const { return dim_; }
  int bits() const { return bits_; }
  uint64_t seed() const { return seed_; }
  ScaleRule scale_rule() const { return scale_rule_; }
  const Rotation& rotation() const { return rotation_; }
  const math::Codebook& codebook() const { return *codebook_; }
  const DecodeTable& decode_table() const { return table_; }
  int64_t row_bytes() const { return packed_row_bytes(dim_, bits_); }  // without the scale

  // vectors [n, dim] -> codes [n, row_bytes()], scales [n]. A zero vector has scale 0; one with NaN
  // or inf has scale NaN. Returns how many of the latter there were.
  int64_t encode(std::span<const float> vectors, std::span<uint8_t> codes, std::span<float> scales,
                 const ParallelFor& parallel = threads()) const;

  // codes [n, row_bytes()], scales [n] -> vectors [n, dim].
  void decode(std::span<const uint8_t> codes, std::span<const float> scales,
              std::span<float> vectors, const ParallelFor& parallel = threads()) const;

  // Inner products of queries [m, dim] with the encoded vectors -> scores [m, n]. Queries are
  // rotated once; vectors are never rotated back.
  void score(std::span<const float> queries, std::span<const uint8_t> codes,
             std::span<const float> scales, std::span<float> scores,
             const ParallelFor& parallel = threads()) const;

 private:
  int dim_;
  int bits_;
  uint64_t seed_;
  ScaleRule scale_rule_;
  Rotation rotation_;
  const math::Codebook* codebook_;
  DecodeTable table_;
};

}  // namespace turboquant::quant
