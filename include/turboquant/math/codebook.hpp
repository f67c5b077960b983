// A scalar codebook in the precision encoders and decoders use.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/error.hpp"
#include "turboquant/math/density.hpp"
#include "turboquant/math/lloyd_max.hpp"

namespace turboquant::math {

// 2^bits ascending fp32 levels for coordinates of unit variance, and their 2^bits - 1 boundaries.
// The code of x is the number of boundaries below x. Immutable.
class Codebook {
 public:
  // The dim of a codebook designed for the Gaussian density.
  static constexpr int kGaussianDim = 0;

  // The Lloyd-Max codebook of a coordinate of a random unit vector in R^dim, dim >= 2, bits 1..8.
  // Solved on first use, then shared for the life of the process; safe to call from any thread.
  static const Codebook& sphere(int dim, int bits) {
    check_bits(bits);
    check_dim(dim);
    return cached(dim, bits);
  }

  // The same for the standard normal density, the limit of large dim.
  static const Codebook& gaussian(int bits) {
    check_bits(bits);
    return cached(kGaussianDim, bits);
  }

  // Explicit levels (from a file, or a test): 2, 4, ..., 256 finite ascending numbers, in units of
  // the standard deviation. Boundaries are the midpoints; the distortion is computed for the
  // density of `dim` (kGaussianDim: the normal density).
  Codebook(int dim, std::span<const float> levels) : dim_(dim) {
    if (dim != kGaussianDim) check_dim(dim);
    if (levels.size() < 2 || levels.size() > 256 || !std::has_single_bit(levels.size())) {
      turboquant::detail::throw_invalid("levels", "2, 4, 8, ..., 256 of them",
                                        std::to_string(levels.size()));
    }
    for (size_t i = 0; i < levels.size(); ++i) {
      if (!std::isfinite(levels[i]) || (i > 0 && !(levels[i - 1] < levels[i]))) {
        turboquant::detail::throw_invalid(
            "levels", "finite numbers in ascending order",
            std::to_string(levels[i]) + " at index " + std::to_string(i));
      }
    }
    bits_ = std::countr_zero(levels.size());
    levels_.assign(levels.begin(), levels.end());
    const std::vector<double> exact(levels.begin(), levels.end());
    for (size_t i = 0; i + 1 < exact.size(); ++i) {
      boundaries_.push_back(static_cast<float>(0.5 * (exact[i] + exact[i + 1])));
    }
    distortion_ = dim == kGaussianDim ? quantiser_distortion(Gaussian(), exact)
                                      : quantiser_distortion(SphereMarginal(dim), exact);
  }

  int dim() const { return dim_; }
  int bits() const { return bits_; }
  std::span<const float> levels() const { return levels_; }
  std::span<const float> boundaries() const { return boundaries_; }

  // E[(x - Q(x))^2] over the density, x of unit variance: the mean squared error of a coordinate
  // of a unit vector times dim, that is of a whole unit vector.
  double distortion() const { return distortion_; }

 private:
  Codebook(int dim, int bits, const LloydMaxSolution& solution)
      : dim_(dim),
        bits_(bits),
        levels_(solution.levels.begin(), solution.levels.end()),
        boundaries_(solution.boundaries.begin(), solution.boundaries.end()),
        distortion_(solution.distortion) {}

  static void check_bits(int bits) {
    if (bits < kMinCodebookBits || bits > kMaxCodebookBits) {
      turboquant::detail::throw_invalid("bits", "1 to 8", std::to_string(bits));
    }
  }

  static void check_dim(int dim) {
    if (dim < 2) turboquant::detail::throw_invalid("dim", "at least 2", std::to_string(dim));
  }

  // Solved under the lock: a solution takes well under 10 ms and is needed by every waiter.
  static const Codebook& cached(int dim, int bits) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<const Codebook>> codebooks;
    const std::lock_guard lock(mutex);
    std::unique_ptr<const Codebook>& slot = codebooks[{dim, bits}];
    if (!slot) {
      slot.reset(new Codebook(dim, bits,
                              dim == kGaussianDim ? solve_lloyd_max(Gaussian(), bits)
                                                  : solve_lloyd_max(SphereMarginal(dim), bits)));
    }
    return *slot;
  }

  int dim_ = kGaussianDim;
  int bits_ = 0;
  std::vector<float> levels_;
  std::vector<float> boundaries_;
  double distortion_ = 0.0;
};

}  // namespace turboquant::math
