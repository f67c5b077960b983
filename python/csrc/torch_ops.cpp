// The torch operators of the namespace turboquant, through LibTorch's stable ABI: one library
// serves every torch from the target version on. Each operator turns its tensors into the params of
// the C++ operator of the same name, which also checks that tables and shapes fit together, and
// runs it on torch's own threads. turboquant_cpp/ops.py documents the arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor_checks.hpp"
#include "turboquant/attention/decode_attention.hpp"
#include "turboquant/cache/dequantize.hpp"
#include "turboquant/cache/encode_append.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::torch_ops {
namespace {

using cache::ConstTensorView;
using cache::ElementType;
using cache::LayerSpec;
using cache::PagePoolView;
using cache::TensorView;

// torch's thread pool. An exception is carried past the C interface, which would lose its type.
void torch_parallel_for(int64_t count, const ParallelBody& body) {
  std::exception_ptr failure;
  std::mutex failure_mutex;
  torch::stable::parallel_for(0, count, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

ElementType element_type(const char* argument, const Tensor& tensor) {
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

template <class View, class Data>
View make_view(const char* argument, const Tensor& tensor, Data* data) {
  check_shape(argument, tensor, {kAnySize, kAnySize, kAnySize, kAnySize});
  View view{.data = data, .type = element_type(argument, tensor)};
  for (int i = 0; i < 4; ++i) {
    view.shape[i] = tensor.size(i);
    view.strides[i] = tensor.stride(i);
  }
  return view;
}

ConstTensorView const_view(const char* argument, const Tensor& tensor) {
  return make_view<ConstTensorView>(argument, tensor, tensor.const_data_ptr());
}

TensorView view(const char* argument, const Tensor& tensor) {
  return make_view<TensorView>(argument, tensor, tensor.mutable_data_ptr());
}

std::span<const int32_t> table(const char* argument, const Tensor& tensor,
                               const std::vector<int64_t>& shape) {
  check_dtype(argument, tensor, ScalarType::Int);
  check_shape(argument, tensor, shape);
  check_contiguous(argument, tensor);
  return {tensor.const_data_ptr<int32_t>(), static_cast<size_t>(tensor.numel())};
}

void check_same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                      const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    turboquant::detail::throw_invalid(argument,
                                      std::string("the dtype of ") + other_argument + ", " +
                                          torch::headeronly::toString(other.scalar_type()),
                                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What every operator takes of a layer's storage.
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
    for (const Tensor& slab : slabs) {
      const std::string argument = "slabs[" + std::to_string(addresses_.size()) + "]";
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

void encode_append(Tensor key_states, Tensor value_states, Tensor exact_keys, Tensor exact_values,
                   Tensor smoothing, std::vector<Tensor> slabs, Tensor counters, Tensor rows,
                   Tensor jobs, std::vector<int64_t> spec_ints) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const Storage storage(spec, exact_keys, exact_values, smoothing, slabs);
  check_same_dtype("key_states", key_states, "exact_keys", exact_keys);
  check_same_dtype("value_states", value_states, "exact_keys", exact_keys);
  check_dtype("counters", counters, ScalarType::Long);
  check_shape("counters", counters, {2});
  check_contiguous("counters", counters);
  cache::encode_append(
      {.spec = spec,
       .key_states = const_view("key_states", key_states),
       .value_states = const_view("value_states", value_states),
       .exact_keys = view("exact_keys", exact_keys),
       .exact_values = view("exact_values", exact_values),
       .smoothing = smoothing.mutable_data_ptr<float>(),
       .pages = storage.pages(),
       .rows = table("rows", rows, {key_states.size(0), cache::tables::kRowColumns}),
       .jobs = table("jobs", jobs, {kAnySize, cache::tables::kJobColumns}),
       .counters = counters.mutable_data_ptr<int64_t>()},
      torch_parallel_for);
}

void dequantize(Tensor exact_keys, Tensor exact_values, Tensor smoothing, std::vector<Tensor> slabs,
                Tensor page_table, Tensor rows, Tensor out_keys, Tensor out_values,
                std::vector<int64_t> spec_ints, int64_t past_tokens, int64_t first_position) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const Storage storage(spec, exact_keys, exact_values, smoothing, slabs);
  const int64_t batch = exact_keys.size(0);
  cache::dequantize({.spec = spec,
                     .exact_keys = const_view("exact_keys", exact_keys),
                     .exact_values = const_view("exact_values", exact_values),
                     .smoothing = smoothing.const_data_ptr<float>(),
                     .pages = storage.pages(),
                     .page_table = table("page_table", page_table,
                                         {batch, kAnySize, cache::tables::kPageColumns}),
                     .rows = table("rows", rows, {batch, cache::tables::kRowColumns}),
                     .past_tokens = past_tokens,
                     .first_position = first_position,
                     .out_keys = view("out_keys", out_keys),
                     .out_values = view("out_values", out_values)},
                    torch_parallel_for);
}

std::tuple<Tensor, Tensor> decode_attention(Tensor query, Tensor key_states, Tensor value_states,
                                            Tensor exact_keys, Tensor exact_values,
                                            Tensor smoothing, std::vector<Tensor> slabs,
                                            Tensor page_table, Tensor rows,
                                            std::optional<Tensor> sink_logits,
                                            std::vector<int64_t> spec_ints, double scaling,
                                            double softcap, int64_t sliding_window) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const Storage storage(spec, exact_keys, exact_values, smoothing, slabs);
  for (const auto& [argument, tensor] :
       {std::pair{"query", &query}, {"key_states", &key_states}, {"value_states", &value_states}}) {
    check_same_dtype(argument, *tensor, "exact_keys", exact_keys);
  }
  const ConstTensorView query_view = const_view("query", query);
  const auto [batch, query_heads, query_tokens, head_dim] = query_view.shape;
  if (sink_logits) {
    check_dtype("sink_logits", *sink_logits, ScalarType::Float);
    check_shape("sink_logits", *sink_logits, {query_heads});
    check_contiguous("sink_logits", *sink_logits);
  }
  Tensor out = torch::stable::new_empty(query, {batch, query_heads, query_tokens, head_dim});
  Tensor lse =
      torch::stable::new_empty(query, {batch, query_heads, query_tokens}, ScalarType::Float);
  attention::decode_attention(
      {.spec = spec,
       .query = query_view,
       .key_states = const_view("key_states", key_states),
       .value_states = const_view("value_states", value_states),
       .exact_keys = const_view("exact_keys", exact_keys),
       .exact_values = const_view("exact_values", exact_values),
       .smoothing = smoothing.const_data_ptr<float>(),
       .pages = storage.pages(),
       .page_table =
           table("page_table", page_table, {batch, kAnySize, cache::tables::kPageColumns}),
       .rows = table("rows", rows, {batch, cache::tables::kRowColumns}),
       .sink_logits = sink_logits ? sink_logits->const_data_ptr<float>() : nullptr,
       .scaling = static_cast<float>(scaling),
       .softcap = static_cast<float>(softcap),
       .sliding_window = sliding_window,
       .out = view("out", out),
       .lse = lse.mutable_data_ptr<float>()},
      torch_parallel_for);
  return {out, lse};
}

}  // namespace
}  // namespace turboquant::torch_ops

STABLE_TORCH_LIBRARY(turboquant, library) {
  library.def(
      "encode_append(Tensor key_states, Tensor value_states, Tensor(a!) exact_keys, "
      "Tensor(b!) exact_values, Tensor(c!) smoothing, Tensor(d!)[] slabs, Tensor(e!) counters, "
      "Tensor rows, Tensor jobs, int[] spec) -> ()");
  library.def(
      "dequantize(Tensor exact_keys, Tensor exact_values, Tensor smoothing, Tensor[] slabs, "
      "Tensor page_table, Tensor rows, Tensor(a!) out_keys, Tensor(b!) out_values, int[] spec, "
      "int past_tokens, int first_position) -> ()");
  library.def(
      "decode_attention(Tensor query, Tensor key_states, Tensor value_states, Tensor exact_keys, "
      "Tensor exact_values, Tensor smoothing, Tensor[] slabs, Tensor page_table, Tensor rows, "
      "Tensor? sink_logits, int[] spec, float scaling, float softcap, int sliding_window) "
      "-> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(turboquant, CPU, library) {
  using namespace turboquant;
  library.impl("encode_append", TORCH_BOX(&torch_ops::encode_append));
  library.impl("dequantize", TORCH_BOX(&torch_ops::dequantize));
  library.impl("decode_attention", TORCH_BOX(&torch_ops::decode_attention));
}
