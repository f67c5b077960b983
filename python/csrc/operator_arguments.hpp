// What the operators of every device make of their tensors: views, tables, a layer's storage.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tensor_checks.hpp"
#include "turboquant/cache/append_rule.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cache/tensor_view.hpp"

namespace turboquant::torch_ops {

using cache::ConstTensorView;
using cache::ElementType;
using cache::LayerSpec;
using cache::PagePoolView;
using cache::TensorView;

inline ElementType element_type(const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      turboquant::detail::throw_invalid(argument, "dtype float32, float16 or bfloat16",
                                        torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Of a 4-D tensor.
inline std::array<int64_t, 4> sizes_of(Argument argument, const Tensor& tensor) {
  check_shape(argument, tensor, {kAnySize, kAnySize, kAnySize, kAnySize});
  std::array<int64_t, 4> sizes{};
  std::ranges::copy(tensor.sizes(), sizes.begin());
  return sizes;
}

template <class View, class Data>
View make_view(const char* argument, const Tensor& tensor, Data* data) {
  View view{
      .data = data, .type = element_type(argument, tensor), .shape = sizes_of(argument, tensor)};
  std::ranges::copy(tensor.strides(), view.strides.begin());
  return view;
}

inline ConstTensorView const_view(const char* argument, const Tensor& tensor) {
  return make_view<ConstTensorView>(argument, tensor, tensor.const_data_ptr());
}

inline TensorView view(const char* argument, const Tensor& tensor) {
  return make_view<TensorView>(argument, tensor, tensor.mutable_data_ptr());
}

// [B, q, Hq, D] seen as [B, Hq, q, D].
inline TensorView transposed(TensorView view) {
  std::swap(view.shape[1], view.shape[2]);
  std::swap(view.strides[1], view.strides[2]);
  return view;
}

// In the memory of the tensor's device.
inline std::span<const int32_t> table(const char* argument, const Tensor& tensor, Shape shape) {
  check_dtype(argument, tensor, ScalarType::Int);
  check_shape(argument, tensor, shape);
  check_contiguous(argument, tensor);
  return {tensor.const_data_ptr<int32_t>(), static_cast<size_t>(tensor.numel())};
}

inline std::span<int32_t> mutable_table(const char* argument, const Tensor& tensor, Shape shape) {
  const auto checked = table(argument, tensor, shape);
  return {tensor.mutable_data_ptr<int32_t>(), checked.size()};
}

// What plan_append fills: `planned` [B, 4] and `jobs` with room for every piece of the chunk.
inline std::pair<Tensor, Tensor> new_plan(const LayerSpec& spec, const Tensor& rows,
                                          int64_t chunk_tokens) {
  const int64_t batch = rows.size(0);
  const int64_t jobs = batch * cache::max_append_pieces(spec.exact_layout(), chunk_tokens);
  return {torch::stable::new_empty(rows, {batch, cache::tables::kRowColumns}),
          torch::stable::new_empty(rows, {jobs, cache::tables::kJobColumns})};
}

inline void check_same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                             const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    turboquant::detail::throw_invalid(argument,
                                      std::string("the dtype of ") + other_argument + ", " +
                                          torch::headeronly::toString(other.scalar_type()),
                                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What every operator takes of a layer's storage. The array of slab addresses is host memory.
class Storage {
 public:
  Storage(const LayerSpec& spec, const Tensor& exact_keys, const Tensor& exact_values,
          const Tensor& smoothing, const std::vector<Tensor>& slabs) {
    check_shape("exact_keys", exact_keys, {kAnySize, spec.num_kv_heads, kAnySize, spec.head_dim});
    check_contiguous("exact_keys", exact_keys);
    check_contiguous("exact_values", exact_values);
    check_same_dtype("exact_values", exact_values, "exact_keys", exact_keys);
    check_dtype("smoothing", smoothing, ScalarType::Float);
    check_shape("smoothing", smoothing, {exact_keys.size(0), spec.num_kv_heads, spec.head_dim});
    check_contiguous("smoothing", smoothing);
    const cache::BlockLayout layout = spec.block_layout();
    const int64_t page_bytes = layout.page_bytes(spec.num_kv_heads);
    addresses_.reserve(slabs.size());
    for (const Tensor& slab : slabs) {
      const Argument argument("slabs", static_cast<int64_t>(addresses_.size()));
      check_dtype(argument, slab, ScalarType::Byte);
      check_shape(argument, slab, {addresses_.empty() ? kAnySize : slabs[0].size(0), page_bytes});
      check_contiguous(argument, slab);
      addresses_.push_back(static_cast<std::byte*>(slab.mutable_data_ptr()));
    }
    pages_ = {.slabs = addresses_.data(),
              .num_slabs = static_cast<int64_t>(addresses_.size()),
              .pages_per_slab = slabs.empty() ? 1 : slabs[0].size(0),
              .page_bytes = page_bytes,
              .block_bytes = layout.block_bytes()};
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  const PagePoolView& pages() const { return pages_; }

 private:
  std::vector<std::byte*> addresses_;
  PagePoolView pages_;
};

}  // namespace turboquant::torch_ops
