// Gauss-Legendre quadrature for integrals without cancellation (squared errors of narrow cells).
#pragma once

#include <array>
#include <cmath>
#include <numbers>

namespace turboquant::math {

struct GaussLegendreRule {
  static constexpr int kPoints = 16;
  std::array<double, kPoints> nodes{};    // in (-1, 1), ascending
  std::array<double, kPoints> weights{};  // sum to 2
};

// Nodes are the roots of the Legendre polynomial P_16, found by Newton from Tricomi's estimate.
inline const GaussLegendreRule& gauss_legendre_rule() {
  static const GaussLegendreRule rule = [] {
    constexpr int n = GaussLegendreRule::kPoints;
    GaussLegendreRule result;
    for (int i = 0; i < n; ++i) {
      double x = -std::cos(std::numbers::pi * (i + 0.75) / (n + 0.5));
      double slope = 1.0;
      for (int step = 0; step < 8; ++step) {
        double previous = 1.0;
        double value = x;
        for (int k = 2; k <= n; ++k) {
          const double next = ((2 * k - 1) * x * value - (k - 1) * previous) / k;
          previous = value;
          value = next;
        }
        slope = n * (previous - x * value) / (1.0 - x * x);
        x -= value / slope;
      }
      result.nodes[i] = x;
      result.weights[i] = 2.0 / ((1.0 - x * x) * slope * slope);
    }
    return result;
  }();
  return rule;
}

// The integral of a non-negative integrand over [a, b], summed in panels of at most `max_panel`
// from a outwards; b may be infinite. Stops where what is left cannot change the sum, which needs
// an integrand that decays outwards faster than a geometric series once it is small.
template <class Integrand>
double integrate_outwards(const Integrand& integrand, double a, double b, double max_panel) {
  const GaussLegendreRule& rule = gauss_legendre_rule();
  double sum = 0.0;
  for (double low = a; low < b;) {
    // The last two panels share what is left, so that none is a sliver.
    const double left = b - low;
    const double width = left <= max_panel ? left : left < 2 * max_panel ? 0.5 * left : max_panel;
    const double half = 0.5 * width;
    double panel = 0.0;
    for (int i = 0; i < GaussLegendreRule::kPoints; ++i) {
      panel += rule.weights[i] * integrand(low + half * (1.0 + rule.nodes[i]));
    }
    panel *= half;
    sum += panel;
    if (panel < 1e-18 * sum) break;
    low = left <= max_panel ? b : low + width;
  }
  return sum;
}

}  // namespace turboquant::math
