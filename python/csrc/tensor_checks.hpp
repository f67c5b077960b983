// Checks of operator arguments. Every message names the argument, what is expected and what was
// given. torch raises them in Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "turboquant/error.hpp"

namespace turboquant::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAnySize = -1;

// A message is written only when a check fails: until then nothing is allocated, for a decode step
// of a small model makes hundreds of checks.
struct Argument {
  // NOLINTNEXTLINE(google-explicit-constructor): names are written as literals
  Argument(const char* argument, int64_t at = -1) : name(argument), index(at) {}

  std::string text() const {
    return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
  }

  const char* name;
  int64_t index;  // of a tensor in a list, or -1
};

using Shape = std::initializer_list<int64_t>;

template <class Sizes>
std::string shape_text(const Sizes& shape) {
  std::string text;
  for (const int64_t size : shape) {
    text += (text.empty() ? "" : ", ") + (size == kAnySize ? "any" : std::to_string(size));
  }
  return "shape [" + text + "]";
}

inline void check_shape(Argument argument, const Tensor& tensor, Shape expected) {
  const auto actual = tensor.sizes();
  const bool fits = std::equal(actual.begin(), actual.end(), expected.begin(), expected.end(),
                               [](int64_t a, int64_t e) { return e == kAnySize || e == a; });
  if (!fits) {
    turboquant::detail::throw_invalid(argument.text(), shape_text(expected), shape_text(actual));
  }
}

inline void check_dtype(Argument argument, const Tensor& tensor, ScalarType expected) {
  const ScalarType actual = tensor.scalar_type();
  if (actual != expected) {
    turboquant::detail::throw_invalid(argument.text(),
                                      std::string("dtype ") + torch::headeronly::toString(expected),
                                      torch::headeronly::toString(actual));
  }
}

inline void check_contiguous(Argument argument, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    turboquant::detail::throw_invalid(argument.text(), "a contiguous tensor",
                                      "one with other strides");
  }
}

}  // namespace turboquant::torch_ops
