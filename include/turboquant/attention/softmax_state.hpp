// The state of an online softmax and its merge: the one way in which partial attention results
// (splits, sinks, window, current chunk) are put together.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "turboquant/portability.hpp"

namespace turboquant::attention {

// Attention over a set of tokens with scores x_t is the triple (max, sum, o): max = max x_t,
// sum = sum exp(x_t - max), o = sum exp(x_t - max) v_t; o is kept by the caller. The result over
// the set is o / sum. Merging is associative and commutative up to rounding; the empty set is its
// neutral element, exactly: merging it in changes no bit.
template <class Real>
struct SoftmaxState {
  Real max = -std::numeric_limits<Real>::infinity();
  Real sum = 0;

  // A NaN score keeps the maximum and makes the sum NaN: that is not the empty state.
  TQ_HOST_DEVICE bool empty() const { return sum == Real{0}; }
  // log sum exp x_t; -inf for the empty set.
  TQ_HOST_DEVICE Real log_sum_exp() const {
    return empty() ? -std::numeric_limits<Real>::infinity() : max + std::log(sum);
  }
};

// What the two outputs are multiplied by: o = first * o_a + second * o_b.
template <class Real>
struct MergeWeights {
  Real first;
  Real second;
};

// state <- state merged with other.
template <class Real>
TQ_HOST_DEVICE MergeWeights<Real> merge(SoftmaxState<Real>& state,
                                        const SoftmaxState<Real>& other) {
  if (other.empty()) return {1, 0};
  if (state.empty()) {
    state = other;
    return {0, 1};
  }
  const Real max = state.max > other.max ? state.max : other.max;
  const MergeWeights<Real> weights{std::exp(state.max - max), std::exp(other.max - max)};
  state.sum = weights.first * state.sum + weights.second * other.sum;
  state.max = max;
  return weights;
}

// The same with outputs [dim]. Skips a side of weight 0: memory of an empty state is not read.
template <class Real>
TQ_HOST_DEVICE void merge(SoftmaxState<Real>& state, Real* output, const SoftmaxState<Real>& other,
                          const Real* other_output, int64_t dim) {
  if (other.empty()) return;
  const bool was_empty = state.empty();
  const MergeWeights<Real> weights = merge(state, other);
  if (was_empty) {
    for (int64_t i = 0; i < dim; ++i) output[i] = other_output[i];
    return;
  }
  for (int64_t i = 0; i < dim; ++i) {
    output[i] = weights.first * output[i] + weights.second * other_output[i];
  }
}

}  // namespace turboquant::attention
