// The random rotations that make every coordinate of a vector look like a coordinate of a random
// unit vector, whatever the vector was.
#pragma once

#include <cstdint>
#include <string_view>
#include <variant>
#include <vector>

namespace turboquant::quant {

enum class RotationKind { kSignHadamard, kHaar };

std::string_view rotation_kind_name(RotationKind kind);  // "sign_hadamard", "haar"

// What a rotation stream is for: streams that differ in any of layer, head and purpose give
// independent signs under one seed.
enum class StreamPurpose : uint32_t { kKeys = 0, kValues = 1, kVectors = 2, kProjection = 3 };

// layer in the high 32 bits, head in the next 24, purpose in the last 8.
constexpr uint64_t rotation_stream(uint32_t layer, uint32_t head, StreamPurpose purpose) {
  return uint64_t{layer} << 32 | uint64_t{head & 0xFFFFFFu} << 8 | static_cast<uint32_t>(purpose);
}

// R = H S_2 H G S_1 H S_0: three rounds of random signs S and the normalised Hadamard transform H;
// the second round also turns neighbouring coordinates by random angles (G). One round is not
// enough: a one-hot vector stays flat instead of becoming dense in all directions (2.2 times the
// nominal error at 2 bits). Signs alone are not enough either: they keep a one-hot, constant or
// alternating vector on a lattice whose step after three rounds is as wide as a cell of 7 bits
// (1.27 times the nominal error at d = 80). With G both are within 3 %
// (docs/experiments/rotation.md).
//
// Round r negates coordinate i where bit (i % 32) of word (i / 32 % 4) of
// Philox4x32-10(counter = {i / 128, r, stream low, stream high}, key = seed) is set.
// G sends (x_2j, x_2j+1) to (c x_2j - s x_2j+1, s x_2j + c x_2j+1), c = (1 - t^2) / (1 + t^2),
// s = 2 t / (1 + t^2), with t = (top 24 bits of word j % 4 of Philox4x32-10({j / 4, kTurnCounter,
// stream low, stream high}, seed)) / 2^24: a turn by up to a right angle, in fp32 additions,
// multiplications and divisions only, so that every backend finds the same c and s.
// fp32 results are the same bits at every SIMD level (order of additions: math/hadamard.hpp).
class SignHadamardRotation {
 public:
  static constexpr int kRounds = 3;
  static constexpr int kTurnRound = 1;  // the round with G
  static constexpr uint32_t kTurnCounter = 0x7475726E;

  // Throws InvalidArgument where dim has no Hadamard transform.
  SignHadamardRotation(int dim, uint64_t seed, uint64_t stream);

  int dim() const { return dim_; }
  const std::vector<float>& signs() const { return signs_; }  // [kRounds, dim], +1 or -1
  const std::vector<float>& turns() const { return turns_; }  // [dim / 2, 2]: c, s

  // In place, `num_rows` rows of dim, `row_stride_elems` apart (0: dim). Runs in the calling
  // thread. A row's result does not depend on its neighbours.
  void apply(float* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;
  void apply_transpose(float* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;

  // The same in double, for references: c and s too are the double ones of t.
  void apply(double* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;
  void apply_transpose(double* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;

 private:
  int dim_;
  std::vector<float> signs_;
  std::vector<float> tangents_;  // [dim / 2]: t, tangent of half the angle
  std::vector<float> turns_;
};

// A uniformly random (Haar) orthogonal matrix: Q of the Householder QR of an iid Gaussian matrix,
// columns multiplied by the sign of R's diagonal (Mezzadri, "How to generate random matrices from
// the classical compact groups", 2007). d^2 multiplications a row: for checking, and for dims
// without a Hadamard transform. Any dim >= 2.
class HaarRotation {
 public:
  HaarRotation(int dim, uint64_t seed, uint64_t stream = 0);

  int dim() const { return dim_; }
  const std::vector<double>& matrix() const { return matrix_; }  // [dim, dim], row-major

  void apply(float* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;
  void apply_transpose(float* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;
  void apply(double* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;
  void apply_transpose(double* rows, int64_t num_rows, int64_t row_stride_elems = 0) const;

 private:
  int dim_;
  std::vector<double> matrix_;
};

// Either of them, chosen at run time.
class Rotation {
 public:
  Rotation(RotationKind kind, int dim, uint64_t seed, uint64_t stream)
      : rotation_(make(kind, dim, seed, stream)) {}

  RotationKind kind() const { return static_cast<RotationKind>(rotation_.index()); }

  template <class Float>
  void apply(Float* rows, int64_t num_rows) const {
    std::visit([&](const auto& rotation) { rotation.apply(rows, num_rows); }, rotation_);
  }
  template <class Float>
  void apply_transpose(Float* rows, int64_t num_rows) const {
    std::visit([&](const auto& rotation) { rotation.apply_transpose(rows, num_rows); }, rotation_);
  }

 private:
  using Either = std::variant<SignHadamardRotation, HaarRotation>;  // RotationKind's order

  static Either make(RotationKind kind, int dim, uint64_t seed, uint64_t stream) {
    if (kind == RotationKind::kHaar) return HaarRotation(dim, seed, stream);
    return SignHadamardRotation(dim, seed, stream);
  }

  Either rotation_;
};

// `count` iid standard normal numbers from Philox by Box-Muller; stream as above, counter word 1
// apart from every rotation's.
std::vector<double> gaussian_numbers(int64_t count, uint64_t seed, uint64_t stream);

}  // namespace turboquant::quant
