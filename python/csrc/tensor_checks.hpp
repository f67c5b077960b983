// Checks of operator arguments. Every message names the argument, what is expected and what was
// given. torch raises them in Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAnySize = -1;

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "shape [";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] == kAnySize ? "any" : std::to_string(shape[i]));
  }
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline void check_shape(const std::string& argument, const Tensor& tensor,
                        const std::vector<int64_t>& expected) {
  const std::vector<int64_t> actual = shape_of(tensor);
  bool fits = actual.size() == expected.size();
  for (size_t i = 0; fits && i < expected.size(); ++i) {
    fits = expected[i] == kAnySize || expected[i] == actual[i];
  }
  if (!fits) turboquant::detail::throw_invalid(argument, shape_text(expected), shape_text(actual));
}

inline void check_dtype(const std::string& argument, const Tensor& tensor, ScalarType expected) {
  const ScalarType actual = tensor.scalar_type();
  if (actual != expected) {
    turboquant::detail::throw_invalid(argument,
                                      std::string("dtype ") + torch::headeronly::toString(expected),
                                      torch::headeronly::toString(actual));
  }
}

inline void check_contiguous(const std::string& argument, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    turboquant::detail::throw_invalid(argument, "a contiguous tensor", "one with other strides");
  }
}

}  // namespace turboquant::torch_ops
