// The one number stored beside a row's codes. With y the coded row, n = |y| and c its decoded
// levels (unit variance), the row is read back as scale * c.
#pragma once

#include <array>
#include <cmath>
#include <string>
#include <string_view>

#include "turboquant/error.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::quant {

enum class ScaleRule {
  kNorm,            // n / sqrt(d): the paper's plain quantiser
  kNormPreserving,  // n / |c|: |scale c| = |y|
  kLeastSquares,    // <y,c> / |c|^2: least squared error
  kUnbiased,        // n^2 / <y,c>: <y, scale c> = |y|^2, inner products keep their mean
};

inline constexpr std::array<ScaleRule, 4> kScaleRules = {
    ScaleRule::kNorm, ScaleRule::kNormPreserving, ScaleRule::kLeastSquares, ScaleRule::kUnbiased};

constexpr std::string_view scale_rule_name(ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kNorm:
      return "norm";
    case ScaleRule::kNormPreserving:
      return "norm_preserving";
    case ScaleRule::kLeastSquares:
      return "least_squares";
    case ScaleRule::kUnbiased:
      return "unbiased";
  }
  return "unknown";
}

inline ScaleRule parse_scale_rule(std::string_view name) {
  std::string supported;
  for (const ScaleRule rule : kScaleRules) {
    if (scale_rule_name(rule) == name) return rule;
    if (!supported.empty()) supported += ", ";
    supported += scale_rule_name(rule);
  }
  turboquant::detail::throw_invalid("scale rule", "one of " + supported, std::string(name));
}

// The sums over a row that every rule is made of.
struct RowSums {
  float squares;        // <y,y> = n^2
  float row_dot_level;  // <y,c>
  float level_squares;  // <c,c>
};

// `sqrt_dim` is sqrt(d) rounded to fp32. Square root and division only, each correctly rounded on
// host and device, so every backend stores the same bits. The sums must be positive: scalar codes
// follow the sign of y, so <y,c> > 0 whenever y is not zero. A vector codebook's rows may
// differ in sign where y is small beside a cell, but lie near y as a whole:
// tests/quant/quantize_rows_vector_test.cpp asks rows of few directions.
TQ_HOST_DEVICE inline float scale_from_sums(ScaleRule rule, const RowSums& sums, float sqrt_dim) {
#if defined(__CUDA_ARCH__)
  const auto root = [](float x) { return __fsqrt_rn(x); };
  const auto divide = [](float a, float b) { return __fdiv_rn(a, b); };
#else
  const auto root = [](float x) { return std::sqrt(x); };
  const auto divide = [](float a, float b) { return a / b; };
#endif
  // One division for all rules: on a GPU every branch is code that must be fetched.
  const bool norm = rule == ScaleRule::kNorm, fits = rule == ScaleRule::kLeastSquares;
  const bool preserves = rule == ScaleRule::kNormPreserving;
  const float ratio = divide(norm   ? root(sums.squares)
                             : fits ? sums.row_dot_level
                                    : sums.squares,
                             norm                ? sqrt_dim
                             : fits || preserves ? sums.level_squares
                                                 : sums.row_dot_level);
  return preserves ? root(ratio) : ratio;
}

}  // namespace turboquant::quant
