// The operators decode_attention and attend_append of any device, made of its two kernels' calls:
//   Device::kAttend        attention into a given tensor, and log-sum-exps unless null
//   Device::kEncodeAppend  the operator encode_append
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "operator_arguments.hpp"

namespace turboquant::torch_ops {

// What attention asks of its tensors on any device, beside their shapes.
inline void check_attention_inputs(const Tensor& query, const Tensor& key_states,
                                   const Tensor& value_states, const Tensor& exact_keys,
                                   const std::optional<Tensor>& sink_logits) {
  check_same_dtype("query", query, "exact_keys", exact_keys);
  check_same_dtype("key_states", key_states, "exact_keys", exact_keys);
  check_same_dtype("value_states", value_states, "exact_keys", exact_keys);
  if (!sink_logits) return;
  check_dtype("sink_logits", *sink_logits, ScalarType::Float);
  check_shape("sink_logits", *sink_logits, {sizes_of("query", query)[1]});
  check_contiguous("sink_logits", *sink_logits);
}

template <class Device>
std::tuple<Tensor, Tensor> decode_attention(Tensor query, Tensor key_states, Tensor value_states,
                                            Tensor exact_keys, Tensor exact_values,
                                            Tensor smoothing, std::vector<Tensor> slabs,
                                            Tensor page_table, Tensor rows,
                                            std::optional<Tensor> sink_logits,
                                            std::vector<int64_t> spec_ints, double scaling,
                                            double softcap, int64_t sliding_window) {
  const auto [batch, heads, tokens, dim] = sizes_of("query", query);
  Tensor out = torch::stable::new_empty(query, {batch, heads, tokens, dim});
  Tensor lse = torch::stable::new_empty(query, {batch, heads, tokens}, ScalarType::Float);
  Device::kAttend(query, key_states, value_states, exact_keys, exact_values, smoothing, slabs,
                  page_table, rows, sink_logits, spec_ints, scaling, softcap, sliding_window, out,
                  /*heads_last=*/false, lse.mutable_data_ptr<float>());
  return {out, lse};
}

template <class Device>
Tensor attend_append(Tensor query, Tensor key_states, Tensor value_states, Tensor exact_keys,
                     Tensor exact_values, Tensor smoothing, std::vector<Tensor> slabs,
                     Tensor counters, Tensor page_table, Tensor rows, Tensor jobs,
                     std::optional<Tensor> sink_logits, std::vector<int64_t> spec_ints,
                     double scaling, double softcap, int64_t sliding_window) {
  const auto [batch, heads, tokens, dim] = sizes_of("query", query);
  Tensor out = torch::stable::new_empty(query, {batch, tokens, heads, dim});
  Device::kAttend(query, key_states, value_states, exact_keys, exact_values, smoothing, slabs,
                  page_table, rows, sink_logits, spec_ints, scaling, softcap, sliding_window, out,
                  /*heads_last=*/true,
                  /*lse=*/nullptr);
  Device::kEncodeAppend(key_states, value_states, exact_keys, exact_values, smoothing,
                        std::move(slabs), counters, rows, jobs, std::move(spec_ints));
  return out;
}

}  // namespace turboquant::torch_ops
