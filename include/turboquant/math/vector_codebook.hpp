// A codebook of pairs of coordinates, behind the same 256-entry table as a scalar codebook's bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::math {

// 256 codewords of two fp32 levels each (unit variance), for one width. Every pair of coordinates
// has an index of 8 bits in the row's bytes; how many of them it shares with other pairs is the
// width's arrangement (quant/packing.hpp):
//   4 bits  a byte a pair: a two-dimensional vector quantiser of 256 codewords
//   3 bits  24 bits for four pairs: three have all 8 bits, the fourth is the bits 3 and 7 of those
//   2 bits  32 bits for eight pairs: the indices overlap by half, a trellis code of 16 states
// What a pair shares with its neighbours is chosen for all of them together, so the same bytes
// carry less error than independent pairs could: the idea of trellis coded quantisation (Marcellin
// and Fischer, 1990) with the sliding window of bits of QTIP (arXiv 2406.11235).
//
// Immutable.
class VectorCodebook {
 public:
  static constexpr int kMinBits = 2;
  static constexpr int kMaxBits = 4;
  static constexpr int kEntries = 256;
  static constexpr float kUnit = 0x1p-5f;  // of the library's levels, which int8 holds

  static constexpr bool exists(int bits) { return bits >= kMinBits && bits <= kMaxBits; }

  // The library's codebook of a width, trained for independent normal coordinates
  // (tools/train_vector_codebook.cpp). Its levels are multiples of kUnit below 4.
  // Lives as long as the process; safe to call from any thread.
  static const VectorCodebook& gaussian(int bits);

  // Explicit levels [256, 2]: finite. Distortion is not known (NaN).
  VectorCodebook(int bits, std::span<const float> levels)
      : VectorCodebook(bits, levels, std::nan("")) {}

  int bits() const { return bits_; }
  std::span<const float> levels() const { return levels_; }              // [256, 2]
  std::span<const float> half_squares() const { return half_squares_; }  // [256]: |c|^2 / 2

  // E[|x - Q(x)|^2] / 2 over pairs of independent standard normal coordinates: the mean squared
  // error of a whole unit vector of many dimensions.
  double distortion() const { return distortion_; }

 private:
  VectorCodebook(int bits, std::span<const float> levels, double distortion)
      : bits_(bits), distortion_(distortion) {
    if (!exists(bits)) {
      turboquant::detail::throw_invalid("bits", "2, 3 or 4 for a vector codebook",
                                        std::to_string(bits));
    }
    if (levels.size() != 2 * kEntries) {
      turboquant::detail::throw_invalid("levels", std::to_string(2 * kEntries) + " values",
                                        std::to_string(levels.size()));
    }
    for (const float level : levels) {
      if (!std::isfinite(level)) {
        turboquant::detail::throw_invalid("levels", "finite numbers", std::to_string(level));
      }
    }
    levels_.assign(levels.begin(), levels.end());
    for (int e = 0; e < kEntries; ++e) {
      const double x = levels[2 * e], y = levels[2 * e + 1];
      half_squares_.push_back(static_cast<float>(0.5 * (x * x + y * y)));
    }
  }

  int bits_;
  double distortion_;
  std::vector<float> levels_;
  std::vector<float> half_squares_;
};

}  // namespace turboquant::math
