// Double-exponential quadrature in long double and the two densities as plain integrands: a
// reference that shares nothing with the library's closed forms.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

namespace turboquant::math::reference {

// The integral over [a, b] of f(x, b - x): the distance to b is exact where x rounds to b, so an
// integrable singularity at b is resolved.
template <class Integrand>
long double tanh_sinh(const Integrand& f, long double a, long double b) {
  constexpr long double kStep = 1.0L / 16;
  constexpr int kTerms = 72;  // t up to 4.5: weights fall below 1e-60
  constexpr long double kHalfPi = std::numbers::pi_v<long double> / 2;
  const long double half = (b - a) / 2;
  long double sum = 0;
  for (int k = -kTerms; k <= kTerms; ++k) {
    const long double t = k * kStep;
    const long double s = kHalfPi * std::sinh(t);
    const long double to_end = half * 2 / (1 + std::exp(2 * s));
    const long double from_start = half * 2 / (1 + std::exp(-2 * s));
    const long double weight = half * kHalfPi * std::cosh(t) / (std::cosh(s) * std::cosh(s));
    if (to_end <= 0 || from_start <= 0) continue;
    sum += weight * f(to_end < from_start ? b - to_end : a + from_start, to_end);
  }
  return sum * kStep;
}

// The density of sqrt(dim) times a coordinate of a random unit vector; dim 0 is the Gaussian.
class Density {
 public:
  explicit Density(int dim)
      : dim_(dim), radius_(dim == 0 ? 40.0L : std::sqrt(static_cast<long double>(dim))) {
    // Normalised by its own integral: lgamma would lose six digits at dim 2^20.
    constant_ = 0.5L / integrate(0, radius_, [](long double) { return 1.0L; });
  }

  // The Gaussian is cut at 40, beyond which lies less than 1e-340 of it.
  long double support() const { return radius_; }

  long double pdf(long double x, long double to_end) const {
    if (dim_ == 0) return constant_ * std::exp(-x * x / 2);
    const long double one_minus_square = to_end / radius_ * (2 - to_end / radius_);
    return constant_ * std::exp((dim_ - 3) / 2.0L * std::log(one_minus_square));
  }

  // The integral of g(x) pdf(x) over [a, b], 0 <= a <= b, in pieces the density varies mildly on.
  template <class Weight>
  long double integrate(long double a, long double b, const Weight& g) const {
    constexpr long double kPiece = 2;
    b = std::min(b, radius_);
    long double sum = 0;
    for (long double low = a; low < b; low += kPiece) {
      if (low > a + 40 && radius_ > 50) break;  // below e^-800 of the first piece
      const long double high = std::min(low + kPiece, b);
      const long double beyond = radius_ - high;
      sum += tanh_sinh(
          [&](long double x, long double to_high) { return g(x) * pdf(x, beyond + to_high); }, low,
          high);
    }
    return sum;
  }

 private:
  int dim_;
  long double radius_;
  long double constant_ = 1.0L;
};

}  // namespace turboquant::math::reference
