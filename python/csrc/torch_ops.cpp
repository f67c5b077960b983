// The torch operators of the namespace turboquant, through LibTorch's stable ABI: one library
// serves every torch from the target version on. Each operator turns its tensors into the params of
// the C++ operator of the same name, which also checks that tables and shapes fit together, and
// runs it on torch's own threads. turboquant_cpp/ops.py documents the arguments. The schemas are
// here; torch_ops_cuda.cpp has the operators of CUDA tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_steps.hpp"
#include "operator_arguments.hpp"
#include "turboquant/attention/decode_attention.hpp"
#include "turboquant/cache/dequantize.hpp"
#include "turboquant/cache/encode_append.hpp"
#include "turboquant/cache/fixed_append.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::torch_ops {
namespace {

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

// Attention of decode_attention, into `out` ([B, Hq, q, D] or, heads last, [B, q, Hq, D]) and,
// unless null, `lse`.
void attend(const Tensor& query, const Tensor& key_states, const Tensor& value_states,
            const Tensor& exact_keys, const Tensor& exact_values, const Tensor& smoothing,
            const std::vector<Tensor>& slabs, const Tensor& page_table, const Tensor& rows,
            const std::optional<Tensor>& sink_logits, const std::vector<int64_t>& spec_ints,
            double scaling, double softcap, int64_t sliding_window, const Tensor& out,
            bool heads_last, float* lse) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const Storage storage(spec, exact_keys, exact_values, smoothing, slabs);
  check_attention_inputs(query, key_states, value_states, exact_keys, sink_logits);
  const int64_t batch = sizes_of("query", query)[0];
  attention::decode_attention(
      {.spec = spec,
       .query = const_view("query", query),
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
       .out = heads_last ? transposed(view("out", out)) : view("out", out),
       .lse = lse},
      torch_parallel_for);
}

// For attention_steps.hpp.
struct Cpu {
  static constexpr auto kAttend = &attend;
  static constexpr auto kEncodeAppend = &encode_append;
};

cache::FixedAppendParams fixed_params(const LayerSpec& spec, const Tensor& rows,
                                      const Tensor& page_table, const Tensor& positions,
                                      int64_t chunk_tokens, int64_t max_tokens) {
  const int64_t batch = rows.size(0);
  return {
      .spec = spec,
      .max_tokens = max_tokens,
      .chunk_tokens = chunk_tokens,
      .rows = mutable_table("rows", rows, {batch, cache::tables::kRowColumns}),
      .page_table =
          mutable_table("page_table", page_table, {batch, kAnySize, cache::tables::kPageColumns}),
      .positions = mutable_table("positions", positions, {batch, cache::tables::kPositionColumns})};
}

std::tuple<Tensor, Tensor> plan_append(Tensor rows, Tensor page_table, Tensor positions,
                                       std::vector<int64_t> spec_ints, int64_t chunk_tokens,
                                       int64_t max_tokens) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const auto params = fixed_params(spec, rows, page_table, positions, chunk_tokens, max_tokens);
  const auto [planned, jobs] = new_plan(spec, rows, chunk_tokens);
  cache::plan_append(params,
                     mutable_table("planned", planned, {kAnySize, cache::tables::kRowColumns}),
                     mutable_table("jobs", jobs, {kAnySize, cache::tables::kJobColumns}));
  return {planned, jobs};
}

void commit_append(Tensor planned, Tensor rows, Tensor page_table, Tensor positions,
                   std::vector<int64_t> spec_ints, int64_t chunk_tokens, int64_t max_tokens) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  cache::commit_append(fixed_params(spec, rows, page_table, positions, chunk_tokens, max_tokens),
                       table("planned", planned, {rows.size(0), cache::tables::kRowColumns}));
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
  library.def(
      "attend_append(Tensor query, Tensor key_states, Tensor value_states, "
      "Tensor(a!) exact_keys, Tensor(b!) exact_values, Tensor(c!) smoothing, Tensor(d!)[] slabs, "
      "Tensor(e!) counters, Tensor page_table, Tensor rows, Tensor jobs, Tensor? sink_logits, "
      "int[] spec, float scaling, float softcap, int sliding_window) -> Tensor");
  library.def(
      "plan_append(Tensor rows, Tensor page_table, Tensor positions, int[] spec, int chunk_tokens, "
      "int max_tokens) -> (Tensor planned, Tensor jobs)");
  library.def(
      "commit_append(Tensor planned, Tensor(a!) rows, Tensor(b!) page_table, Tensor(c!) positions, "
      "int[] spec, int chunk_tokens, int max_tokens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(turboquant, CPU, library) {
  using namespace turboquant;
  library.impl("encode_append", TORCH_BOX(&torch_ops::encode_append));
  library.impl("dequantize", TORCH_BOX(&torch_ops::dequantize));
  library.impl("decode_attention", TORCH_BOX(&torch_ops::decode_attention<torch_ops::Cpu>));
  library.impl("attend_append", TORCH_BOX(&torch_ops::attend_append<torch_ops::Cpu>));
  library.impl("plan_append", TORCH_BOX(&torch_ops::plan_append));
  library.impl("commit_append", TORCH_BOX(&torch_ops::commit_append));
}
