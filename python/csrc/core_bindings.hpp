// What the units of the _core module share: one function per room, and NumPy conversions.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "turboquant/error.hpp"

namespace turboquant::python {

namespace py = pybind11;

void bind_math(py::module_& module);
void bind_packing(py::module_& module);
void bind_quantizers(py::module_& module);
void bind_cache(py::module_& module);
void bind_fixed(py::module_& module);

// Arrays as arguments: C order and the element type are made, by a copy where needed.
template <class T>
using InputArray = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> new_array(const std::vector<py::ssize_t>& shape) {
  return py::array_t<T>(shape);
}

template <class Range>
auto to_array(const Range& values) {
  using T = std::remove_cvref_t<decltype(*std::begin(values))>;
  py::array_t<T> array(static_cast<py::ssize_t>(std::size(values)));
  std::copy(std::begin(values), std::end(values), array.mutable_data());
  return array;
}

template <class T>
std::span<T> elements(py::array_t<T>& array) {
  return {array.mutable_data(), static_cast<size_t>(array.size())};
}

template <class T, int kFlags>
std::span<const T> elements(const py::array_t<T, kFlags>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

inline std::string shape_text(const py::array& array) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + ")";
}

// `array` must have `shape`; -1 stands for any size.
inline void check_shape(const char* argument, const py::array& array,
                        const std::vector<py::ssize_t>& shape) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string expected = "shape (";
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && (shape[i] == -1 || array.shape(static_cast<py::ssize_t>(i)) == shape[i]);
    expected += (i ? ", " : "") + (shape[i] == -1 ? std::string("any") : std::to_string(shape[i]));
  }
  if (!fits) detail::throw_invalid(argument, expected + ")", shape_text(array));
}

}  // namespace turboquant::python
