// The two densities scalar quantisers are designed for, scaled to unit variance: a coordinate of a
// uniformly random unit vector in R^d (times sqrt d), and its limit for large d, the Gaussian.
//
//   p_d(x) = C_d / sqrt(d) * (1 - x^2 / d)^((d - 3) / 2),  |x| <= sqrt(d),
//   C_d = Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2))                    (TurboQuant paper, lemma 1).
//
// d = 2 is the arcsine law, infinite at the ends of its support; d = 3 is uniform.
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <numbers>
#include <string>
#include <utility>

#include "turboquant/error.hpp"
#include "turboquant/math/quadrature.hpp"

namespace turboquant::math {

// A density symmetric about 0 with unit variance. mass, first_moment and second_moment integrate
// 1, x and x^2 over [a, b], a <= b; squared_error integrates (x - level)^2. The support is
// [-support(), support()].
template <class Density>
concept SymmetricDensity = requires(const Density& density, double a, double b, double level) {
  { density.pdf(a) } -> std::convertible_to<double>;
  { density.mass(a, b) } -> std::convertible_to<double>;
  { density.first_moment(a, b) } -> std::convertible_to<double>;
  { density.second_moment(a, b) } -> std::convertible_to<double>;
  { density.squared_error(a, b, level) } -> std::convertible_to<double>;
  { density.support() } -> std::convertible_to<double>;
};

namespace detail {

// The mass of [a, b] from `central(x)`, the mass of [0, x], and `tail(x)`, the mass above x, both
// for x >= 0: small results are differences of small numbers.
template <class Central, class Tail>
double mass_of_interval(double a, double b, double split, const Central& central,
                        const Tail& tail) {
  if (!(a < b)) return 0.0;
  if (b <= 0.0) return mass_of_interval(-b, -a, split, central, tail);
  if (a < 0.0) {
    return mass_of_interval(0.0, -a, split, central, tail) +
           mass_of_interval(0.0, b, split, central, tail);
  }
  if (b <= split) return central(b) - central(a);
  if (a >= split) return tail(a) - tail(b);
  return (0.5 - tail(b)) - central(a);
}

// Integrates (x - level)^2 over [a, b] outwards from zero with `half_line(a, b, level)`, a >= 0.
template <class HalfLine>
double squared_error_of_interval(double a, double b, double level, const HalfLine& half_line) {
  if (a >= 0.0) return half_line(a, b, level);
  if (b <= 0.0) return half_line(-b, -a, -level);
  return half_line(0.0, -a, -level) + half_line(0.0, b, level);
}

// Gamma(z + 1/2) / Gamma(z). A difference of lgamma would lose log10(z log z) digits; instead the
// argument is raised to 64 by the recurrence and the asymptotic series in 1/z ends below 1e-16.
inline double gamma_half_step_ratio(double z) {
  double ratio = 1.0;
  for (; z < 64.0; z += 1.0) ratio *= z / (z + 0.5);
  const double r = 1.0 / z;
  const double series =
      1.0 +
      r * (-1.0 / 8 +
           r * (1.0 / 128 + r * (5.0 / 1024 + r * (-21.0 / 32768 + r * (-399.0 / 262144 +
                                                                        r * (869.0 / 4194304))))));
  return ratio * std::sqrt(z) * series;
}

}  // namespace detail

// x = sqrt(dim) * (a coordinate of a uniformly random unit vector in R^dim), dim >= 2.
class SphereMarginal {
 public:
  explicit SphereMarginal(int dim) : dim_(dim), radius_(std::sqrt(static_cast<double>(dim))) {
    if (dim < 2) turboquant::detail::throw_invalid("dim", "at least 2", std::to_string(dim));
    normaliser_ = detail::gamma_half_step_ratio(0.5 * (dim - 1)) / std::sqrt(std::numbers::pi);
  }

  int dim() const { return dim_; }
  double support() const { return radius_; }

  // Zero outside the support; infinite at its ends when dim is 2.
  double pdf(double x) const {
    const double u = std::abs(x) / radius_;
    if (u > 1.0) return 0.0;
    return normaliser_ / radius_ * cosine_power(u, dim_ - 3);
  }

  double mass(double a, double b) const {
    // Below the split the series, above it the continued fraction converges quickly: the rule
    // x < (p + 1) / (p + q + 2) of I_x(p, q) at p = (d - 1) / 2, q = 1/2, x = 1 - u^2.
    const double split = radius_ * std::sqrt(3.0 / (dim_ + 4.0));
    return detail::mass_of_interval(
        clamp(a), clamp(b), split, [this](double x) { return central_mass(x / radius_); },
        [this](double x) { return tail_mass(x / radius_); });
  }

  // C sqrt(d) / (d - 1) * [(1 - u^2)^((d-1)/2)] from b to a, as one exponential difference.
  double first_moment(double a, double b) const {
    double low = std::abs(clamp(a)) / radius_;
    double high = std::abs(clamp(b)) / radius_;
    const double sign = low <= high ? 1.0 : -1.0;
    if (low > high) std::swap(low, high);
    const double scale = normaliser_ * radius_ / (dim_ - 1);
    const double at_low = cosine_power(low, dim_ - 1);
    if (at_low == 0.0) return 0.0;
    const double log_ratio = std::log1p(-(high - low) * (high + low) / ((1.0 - low) * (1.0 + low)));
    return -sign * scale * at_low * std::expm1(0.5 * (dim_ - 1) * log_ratio);
  }

  // Integration by parts: mass + C [u (1 - u^2)^((d-1)/2)] from b to a.
  double second_moment(double a, double b) const {
    const auto edge = [this](double x) {
      const double u = clamp(x) / radius_;
      return normaliser_ * u * cosine_power(std::abs(u), dim_ - 1);
    };
    return mass(a, b) + (edge(a) - edge(b));
  }

  // In the angle x = sqrt(d) sin(t) the measure is C cos(t)^(d-2) dt: smooth for every d >= 2.
  double squared_error(double a, double b, double level) const {
    return detail::squared_error_of_interval(
        clamp(a), clamp(b), level, [this](double low, double high, double point) {
          return normaliser_ * integrate_outwards(
                                   [&](double t) {
                                     const double u = std::sin(t);
                                     const double error = radius_ * u - point;
                                     return error * error * cosine_power(u, dim_ - 2);
                                   },
                                   std::asin(low / radius_), std::asin(high / radius_),
                                   1.0 / radius_);
        });
  }

 private:
  double clamp(double x) const { return std::fmin(std::fmax(x, -radius_), radius_); }

  // (1 - u^2)^(power / 2), 0 <= u <= 1.
  static double cosine_power(double u, int power) {
    if (power == 0) return 1.0;
    const double log_square = u < 0.7 ? std::log1p(-u * u) : std::log((1.0 - u) * (1.0 + u));
    return std::exp(0.5 * power * log_square);
  }

  // I_{u^2}(1/2, (d-1)/2) / 2 as its series of positive terms.
  double central_mass(double u) const {
    const double square = u * u;
    double term = 1.0;
    double sum = 1.0;
    for (int n = 0; term > 1e-17 * sum; ++n) {
      term *= square * (0.5 * dim_ + n) / (1.5 + n);
      sum += term;
    }
    return normaliser_ * u * cosine_power(u, dim_ - 1) * sum;
  }

  // I_{1-u^2}((d-1)/2, 1/2) / 2 by the continued fraction of Didonato and Morris (TOMS 708), with
  // the modified Lentz algorithm. Its terms are written in u^2 = 1 - x, so that large dims, where
  // x is close to 1, do not cancel.
  double tail_mass(double u) const {
    const double y = u * u;
    const double x = (1.0 - u) * (1.0 + u);
    const double p = 0.5 * (dim_ - 1);
    const double q = 0.5;
    const auto denominator = [&](int n) {
      const double first = n == 0 ? 0.0 : n + n * (q - n) * x / (p + 2 * n - 1);
      return first + (p + n) * (p * y - q * x + 1.0 + n * (1.0 + y)) / (p + 2 * n + 1);
    };
    double fraction = denominator(0);
    double c = fraction;
    double d = 0.0;
    for (int n = 1; n <= kMaxFractionTerms; ++n) {
      const double step = p + 2 * n - 1;
      const double numerator = (p + n - 1) * (p + q + n - 1) * n * (q - n) * x * x / (step * step);
      const double b = denominator(n);
      d = 1.0 / (b + numerator * d);
      c = b + numerator / c;
      fraction *= c * d;
      if (std::abs(c * d - 1.0) < 2e-16) break;
    }
    return 0.5 * normaliser_ * u * cosine_power(u, dim_ - 1) / fraction;
  }

  static constexpr int kMaxFractionTerms = 1000;

  int dim_;
  double radius_;
  double normaliser_ = 0.0;  // C_d
};

// The standard normal density: the limit of SphereMarginal for large dim.
class Gaussian {
 public:
  double support() const { return std::numeric_limits<double>::infinity(); }

  double pdf(double x) const {
    return std::exp(-0.5 * x * x) * (std::numbers::inv_sqrtpi / std::numbers::sqrt2);
  }

  double mass(double a, double b) const {
    return detail::mass_of_interval(
        a, b, 1.0, [](double x) { return 0.5 * std::erf(x / std::numbers::sqrt2); },
        [](double x) { return 0.5 * std::erfc(x / std::numbers::sqrt2); });
  }

  double first_moment(double a, double b) const {
    if (std::abs(a) > std::abs(b)) return -first_moment(b, a);
    if (std::isinf(a)) return 0.0;
    return -pdf(a) * std::expm1(-0.5 * (b - a) * (b + a));
  }

  double second_moment(double a, double b) const {
    const auto edge = [this](double x) { return std::isinf(x) ? 0.0 : x * pdf(x); };
    return mass(a, b) + (edge(a) - edge(b));
  }

  double squared_error(double a, double b, double level) const {
    return detail::squared_error_of_interval(
        a, b, level, [this](double low, double high, double point) {
          return integrate_outwards([&](double x) { return (x - point) * (x - point) * pdf(x); },
                                    low, high, 1.0);
        });
  }
};

}  // namespace turboquant::math
