// Dense 4-D tensors of the caller, [batch, heads, tokens, head_dim], as operators take them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "turboquant/error.hpp"
#include "turboquant/math/half.hpp"

namespace turboquant::cache {

enum class ElementType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// Owns nothing. Strides are in elements and arbitrary (negative and zero too).
template <class Data>
struct BasicTensorView {
  using Byte = std::conditional_t<std::is_const_v<Data>, const std::byte, std::byte>;

  Data* data = nullptr;
  ElementType type = ElementType::kFloat32;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> strides{};

  static BasicTensorView contiguous(Data* data, ElementType type,
                                    const std::array<int64_t, 4>& shape) {
    return {data, type, shape, {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1}};
  }

  // Start of the row (b, h, t, :).
  Byte* row(int64_t b, int64_t h, int64_t t) const {
    return static_cast<Byte*>(data) +
           (b * strides[0] + h * strides[1] + t * strides[2]) * element_bytes(type);
  }

  // Implicit, as a pointer's conversion to const is. NOLINTNEXTLINE(google-explicit-constructor)
  operator BasicTensorView<const Data>() const requires(!std::is_const_v<Data>) {
    return {data, type, shape, strides};
  }
};
using ConstTensorView = BasicTensorView<const void>;
using TensorView = BasicTensorView<void>;

namespace detail {

// f(stride_bytes) for a row of elements; the stride of a dense row is a constant, as vectorising
// asks.
template <class Element, class F>
void with_stride(int64_t stride_elems, F f) {
  if (stride_elems == 1) {
    f(std::integral_constant<int64_t, sizeof(Element)>{});
  } else {
    f(stride_elems * int64_t{sizeof(Element)});
  }
}

// out[i] = convert(element i) for elements of `Element` that lie stride_elems apart.
template <class Element, class Convert>
void load_elements(const std::byte* from, int64_t stride_elems, int64_t dim, float* out,
                   Convert convert) {
  with_stride<Element>(stride_elems, [=](auto stride_bytes) {
    for (int64_t i = 0; i < dim; ++i) {
      Element element;
      std::memcpy(&element, from + i * stride_bytes, sizeof element);
      out[i] = convert(element);
    }
  });
}

template <class Element, class Convert>
void store_elements(std::byte* to, int64_t stride_elems, int64_t dim, const float* in,
                    Convert convert) {
  with_stride<Element>(stride_elems, [=](auto stride_bytes) {
    for (int64_t i = 0; i < dim; ++i) {
      const Element element = convert(in[i]);
      std::memcpy(to + i * stride_bytes, &element, sizeof element);
    }
  });
}

}  // namespace detail

// Reads row (b, h, t, :) as fp32 (exact for every element type).
inline void load_row(const ConstTensorView& tensor, int64_t b, int64_t h, int64_t t, float* out) {
  const std::byte* from = tensor.row(b, h, t);
  const int64_t dim = tensor.shape[3], stride = tensor.strides[3];
  switch (tensor.type) {
    case ElementType::kFloat32:
      return detail::load_elements<float>(from, stride, dim, out, [](float x) { return x; });
    case ElementType::kFloat16:
      return detail::load_elements<uint16_t>(from, stride, dim, out,
                                             [](uint16_t x) { return math::fp32_from_fp16(x); });
    case ElementType::kBFloat16:
      return detail::load_elements<uint16_t>(from, stride, dim, out,
                                             [](uint16_t x) { return math::fp32_from_bf16(x); });
  }
}

// Writes row (b, h, t, :), rounded to nearest even.
inline void store_row(const TensorView& tensor, int64_t b, int64_t h, int64_t t, const float* in) {
  std::byte* to = tensor.row(b, h, t);
  const int64_t dim = tensor.shape[3], stride = tensor.strides[3];
  switch (tensor.type) {
    case ElementType::kFloat32:
      return detail::store_elements<float>(to, stride, dim, in, [](float x) { return x; });
    case ElementType::kFloat16:
      return detail::store_elements<uint16_t>(to, stride, dim, in,
                                              [](float x) { return math::fp16_from_fp32(x); });
    case ElementType::kBFloat16:
      return detail::store_elements<uint16_t>(to, stride, dim, in,
                                              [](float x) { return math::bf16_from_fp32(x); });
  }
}

// Copies one row between tensors of one element type, bit for bit.
inline void copy_row(const ConstTensorView& from, int64_t b, int64_t h, int64_t t,
                     const TensorView& to, int64_t to_b, int64_t to_h, int64_t to_t) {
  const int64_t bytes = element_bytes(from.type);
  const int64_t dim = from.shape[3];
  const std::byte* source = from.row(b, h, t);
  std::byte* target = to.row(to_b, to_h, to_t);
  if (from.strides[3] == 1 && to.strides[3] == 1) {
    std::memcpy(target, source, dim * bytes);
    return;
  }
  for (int64_t i = 0; i < dim; ++i) {
    std::memcpy(target + i * to.strides[3] * bytes, source + i * from.strides[3] * bytes, bytes);
  }
}

namespace detail {

inline std::string shape_text(const std::array<int64_t, 4>& shape) {
  std::string text = "[";
  for (int i = 0; i < 4; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace detail

// Throws InvalidArgument unless the tensor has exactly this shape (and data, if it has elements).
template <class Data>
void check_shape(const char* argument, const BasicTensorView<Data>& tensor,
                 const std::array<int64_t, 4>& expected) {
  if (tensor.shape != expected) {
    turboquant::detail::throw_invalid(argument, "shape " + detail::shape_text(expected),
                                      detail::shape_text(tensor.shape));
  }
  const bool empty = expected[0] == 0 || expected[1] == 0 || expected[2] == 0 || expected[3] == 0;
  if (tensor.data == nullptr && !empty) {
    turboquant::detail::throw_invalid(argument, "data", "a null pointer");
  }
}

}  // namespace turboquant::cache
