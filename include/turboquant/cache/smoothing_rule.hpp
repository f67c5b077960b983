// How strongly the channels of a key are smoothed: part of the cache format.
//
// Dividing channel c by s_c and multiplying the query by it leaves scores as they are. Codes put
// the same error on every channel of k / s, so the error of a score is sum_c (q_c s_c)^2 times
// sum_c (k_c / s_c)^2 / d, and smallest for s_c = sqrt(k_c / q_c). Keys alone are known. Where a
// channel's keys are ordinary, its queries are taken as ordinary too: s_c = sqrt(k_c). Where they
// are r times the median channel's with r >> kSmoothingKnee (models with a bias on keys), queries
// are taken to be small as 1 / r, or scores would be all bias: s_c = k_c up to a factor.
// docs/experiments/biased-keys.md has the figures.
#pragma once

#include <cmath>

#include "turboquant/portability.hpp"

namespace turboquant::cache {

// Where the square root gives way to proportion, in medians.
inline constexpr float kSmoothingKnee = 4.0f;
// A channel that hardly varies may have a large mean, which is divided by s too: hence the lower
// bound, which keeps rotated means within fp16.
inline constexpr float kMinSmoothing = 0x1p-4f;
inline constexpr float kMaxSmoothing = 0x1p+8f;

// How many channels come before c when they are sorted by rms, equal ones by number. A NaN comes
// before none and after none. The median of d channels is the one of rank d / 2.
TQ_HOST_DEVICE inline int smoothing_rank(const float* rms, int dim, int c) {
  int rank = 0;
  for (int i = 0; i < dim; ++i) rank += rms[i] < rms[c] || (rms[i] == rms[c] && i < c);
  return rank;
}

// s of a channel; 1 where that is no number. Only exact or correctly rounded operations, and none
// that a compiler could contract to another result: r / 4 is exact.
TQ_HOST_DEVICE inline float smoothing_of(float rms, float median_rms) {
  const float ratio = rms / median_rms;
  const float fitted = std::sqrt(ratio * (1.0f + ratio * (1.0f / kSmoothingKnee)));
  if (!(fitted == fitted)) return 1.0f;
  if (fitted < kMinSmoothing) return kMinSmoothing;
  return fitted > kMaxSmoothing ? kMaxSmoothing : fitted;
}

}  // namespace turboquant::cache
