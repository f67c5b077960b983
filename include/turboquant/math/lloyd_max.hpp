// The optimal scalar quantiser (Lloyd-Max) of a symmetric density.
//
// Stationarity: every level is the centroid of its cell, every boundary the midpoint of its two
// levels. The plain Lloyd iteration needs tens of thousands of steps at 6 bits and more and stalls
// on empty tail cells; here Newton's method runs on the stationarity equations of the positive
// half, from the companded start (point density proportional to pdf^(1/3): Panter and Dite 1951),
// and converges in a handful of steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/error.hpp"
#include "turboquant/math/density.hpp"

namespace turboquant::math {

inline constexpr int kMinCodebookBits = 1;
inline constexpr int kMaxCodebookBits = 8;

struct LloydMaxSolution {
  std::vector<double> levels;      // 2^bits, ascending, exactly symmetric about 0
  std::vector<double> boundaries;  // 2^bits - 1, midpoints of the levels; the middle one is 0
  double distortion = 0.0;         // E[(x - Q(x))^2], x of unit variance
  double residual = 0.0;           // max |level - centroid of its cell|
  int iterations = 0;
};

// E[(x - Q(x))^2] of the nearest-level quantiser with these ascending levels: a sum of integrals
// of non-negative functions, so it keeps its relative accuracy at 8 bits (1 - sum p c^2 does not).
template <SymmetricDensity Density>
double quantiser_distortion(const Density& density, std::span<const double> levels) {
  double distortion = 0.0;
  double low = -density.support();
  for (size_t i = 0; i < levels.size(); ++i) {
    const double high =
        i + 1 < levels.size() ? 0.5 * (levels[i] + levels[i + 1]) : density.support();
    distortion += density.squared_error(low, high, levels[i]);
    low = high;
  }
  return distortion;
}

namespace detail {

// The stationarity equations of the n positive levels: cells [t_{i-1}, t_i], t_0 = 0,
// t_i = (c_i + c_{i+1}) / 2, t_n the end of the support.
template <SymmetricDensity Density>
class StationarityEquations {
 public:
  StationarityEquations(const Density& density, int count)
      : density_(density), edges_(count + 1), masses_(count), centroids_(count) {}

  // Max |c_i - centroid_i|; infinite when a cell is empty or the levels leave the support.
  double evaluate(const std::vector<double>& levels) {
    constexpr double kInvalid = std::numeric_limits<double>::infinity();
    const size_t n = levels.size();
    edges_[0] = 0.0;
    edges_[n] = density_.support();
    for (size_t i = 0; i + 1 < n; ++i) edges_[i + 1] = 0.5 * (levels[i] + levels[i + 1]);
    double residual = 0.0;
    for (size_t i = 0; i < n; ++i) {
      if (!(edges_[i] < levels[i] && levels[i] < edges_[i + 1])) return kInvalid;
      masses_[i] = density_.mass(edges_[i], edges_[i + 1]);
      if (!(masses_[i] > 0.0)) return kInvalid;
      centroids_[i] = density_.first_moment(edges_[i], edges_[i + 1]) / masses_[i];
      residual = std::max(residual, std::abs(levels[i] - centroids_[i]));
    }
    return residual;
  }

  // Newton's step from the point evaluated last: the tridiagonal Jacobian follows from
  // d centroid / d upper edge = pdf(edge) (edge - centroid) / mass, and likewise below.
  std::vector<double> newton_step(const std::vector<double>& levels) const {
    const size_t n = levels.size();
    std::vector<double> upper_ratio(n), step(n);
    for (size_t i = 0; i < n; ++i) {  // Thomas algorithm
      const double upper = i + 1 < n ? edge_influence(i, i + 1) : 0.0;
      const double lower = i > 0 ? edge_influence(i, i) : 0.0;
      double pivot = 1.0 - upper - lower;
      double right = centroids_[i] - levels[i];
      if (i > 0) {
        pivot += lower * upper_ratio[i - 1];
        right += lower * step[i - 1];
      }
      upper_ratio[i] = -upper / pivot;
      step[i] = right / pivot;
    }
    for (size_t i = n - 1; i-- > 0;) step[i] -= upper_ratio[i] * step[i + 1];
    return step;
  }

  const std::vector<double>& centroids() const { return centroids_; }

 private:
  // d centroid_i / d level of the neighbour across `edge`; an edge moves by half of its levels.
  double edge_influence(size_t i, size_t edge) const {
    const double t = edges_[edge];
    return 0.5 * density_.pdf(t) * std::abs(t - centroids_[i]) / masses_[i];
  }

  const Density& density_;
  std::vector<double> edges_, masses_, centroids_;
};

// n positive levels at the quantiles (i + 1/2) / n of the density proportional to pdf^(1/3).
template <SymmetricDensity Density>
std::vector<double> companded_levels(const Density& density, int count) {
  // pdf^(1/3) of the Gaussian has standard deviation sqrt 3: beyond 12 lie 4e-12 of it.
  constexpr double kReach = 12.0;
  constexpr int kSteps = 2048;
  const double width = std::min(density.support(), kReach) / kSteps;
  std::vector<double> cumulative(kSteps + 1, 0.0);
  for (int i = 0; i < kSteps; ++i) {  // midpoints never touch an infinite end
    cumulative[i + 1] = cumulative[i] + std::cbrt(density.pdf((i + 0.5) * width));
  }
  std::vector<double> levels(count);
  int cell = 0;
  for (int i = 0; i < count; ++i) {
    const double target = cumulative[kSteps] * (i + 0.5) / count;
    while (cumulative[cell + 1] < target) ++cell;
    const double inside = (target - cumulative[cell]) / (cumulative[cell + 1] - cumulative[cell]);
    levels[i] = (cell + inside) * width;
  }
  return levels;
}

}  // namespace detail

// Solves for the 2^bits levels, bits in 1..8. Throws InvalidArgument for other widths and
// std::runtime_error when the stationarity equations are not met to kResidualLimit.
template <SymmetricDensity Density>
LloydMaxSolution solve_lloyd_max(const Density& density, int bits) {
  if (bits < kMinCodebookBits || bits > kMaxCodebookBits) {
    turboquant::detail::throw_invalid("bits", "1 to 8", std::to_string(bits));
  }
  constexpr int kMaxIterations = 100;
  constexpr double kSmallestDamping = 1.0 / 1024;
  // Rounding leaves about 1e-14; what matters is that it is far below any level's fp32 rounding.
  constexpr double kConverged = 1e-15;
  constexpr double kResidualLimit = 1e-11;

  const int count = 1 << (bits - 1);
  detail::StationarityEquations<Density> equations(density, count);
  std::vector<double> levels = detail::companded_levels(density, count);
  LloydMaxSolution solution;
  double residual = equations.evaluate(levels);
  while (residual > kConverged && std::isfinite(residual) && solution.iterations < kMaxIterations) {
    ++solution.iterations;
    const std::vector<double> lloyd = equations.centroids();
    const std::vector<double> step = equations.newton_step(levels);
    std::vector<double> trial(levels.size());
    double trial_residual = residual;
    double damping = 1.0;
    for (; damping >= kSmallestDamping; damping *= 0.5) {
      for (size_t i = 0; i < levels.size(); ++i) trial[i] = levels[i] + damping * step[i];
      trial_residual = equations.evaluate(trial);
      if (trial_residual < residual) break;
    }
    if (damping < kSmallestDamping) {
      if (residual < kResidualLimit) break;  // rounding noise: nothing left to gain
      trial = lloyd;                         // Lloyd's step never increases the distortion
      trial_residual = equations.evaluate(trial);
    }
    levels = trial;
    residual = trial_residual;
  }
  if (!(residual <= kResidualLimit)) {
    std::ostringstream message;
    message << "solve_lloyd_max: the stationarity residual is " << residual << " after "
            << solution.iterations << " iterations at " << bits << " bits, expected at most "
            << kResidualLimit;
    throw std::runtime_error(message.str());
  }

  solution.residual = residual;
  solution.levels.resize(2 * count);
  for (int i = 0; i < count; ++i) {
    solution.levels[count + i] = levels[i];
    solution.levels[count - 1 - i] = -levels[i];
  }
  for (int i = 0; i + 1 < 2 * count; ++i) {
    solution.boundaries.push_back(0.5 * (solution.levels[i] + solution.levels[i + 1]));
  }
  solution.distortion = quantiser_distortion(density, solution.levels);
  return solution;
}

}  // namespace turboquant::math
