// The operators on CUDA tensors: the same arguments as on the CPU, every tensor on one device.
// Tables are device memory, so their contents are not checked here: whoever makes them (LayerStore)
// keeps them as cache/table_checks.hpp describes. Everything is enqueued on torch's current stream;
// nothing waits for the device, except for a spec's first use there.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_steps.hpp"
#include "operator_arguments.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/cuda/decode_attention.hpp"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/cuda/encode_append.hpp"
#include "turboquant/cuda/extend_attention.hpp"
#include "turboquant/cuda/fixed_append.hpp"
#include "turboquant/cuda/slab_addresses.hpp"
#include "turboquant/cuda/supported.hpp"
#include "turboquant/error.hpp"

namespace turboquant::torch_ops {
namespace {

void check_cuda(const char* what, int status) {
  if (status == cudaSuccess) return;
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// torch's current stream of a device. The stable ABI has no such function before torch 2.13, but
// every libtorch_cuda exports this one; it is loaded already, or there were no CUDA tensors.
cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
      if (void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
        symbol = dlsym(library, kName);
      }
    }
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get_stream == nullptr) {
    throw CudaError("libtorch_cuda.so does not export aoti_torch_get_current_cuda_stream");
  }
  void* stream = nullptr;
  if (get_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw CudaError("torch gave no current stream of device " + std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device the calling thread's, as long as it lives. This library has a CUDA
// runtime of its own, so it asks that one, not torch's guard.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : device_(tensor.get_device_index()) {
    check_cuda("cudaGetDevice", cudaGetDevice(&previous_));
    if (previous_ != device_) check_cuda("cudaSetDevice", cudaSetDevice(device_));
    stream_ = current_stream(device_);
  }
  ~DeviceScope() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

  void check_device(Argument argument, const Tensor& tensor) const {
    if (tensor.is_cuda() && tensor.get_device_index() == device_) return;
    const std::string actual =
        tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
    turboquant::detail::throw_invalid(
        argument.text(), "a tensor on cuda:" + std::to_string(device_) + ", as the first argument",
        actual);
  }

 private:
  int device_;
  int previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

Tensor new_bytes(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// What is asked of a device once, at the first use of a spec on it.
struct DeviceCodec {
  Tensor memory;  // of the tables
  cuda::CodecTables tables;
  int capability_major = 0;
};

// A spec's rotations, codebooks and decode tables on a device. They are uploaded on first use and
// kept as long as the process, for captured graphs hold their addresses: some tens of KB a layer.
const DeviceCodec& device_codec(const LayerSpec& spec, const std::vector<int64_t>& spec_ints,
                                const DeviceScope& scope, const Tensor& like) {
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be gone before.
  static auto& codecs = *new std::map<std::pair<int, std::vector<int64_t>>, DeviceCodec>;
  const std::lock_guard lock(mutex);
  const auto key = std::pair(scope.device(), spec_ints);
  if (const auto found = codecs.find(key); found != codecs.end()) return found->second;

  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda("cudaStreamIsCapturing", cudaStreamIsCapturing(scope.stream(), &capture));
  if (capture != cudaStreamCaptureStatusNone) {
    throw CudaError(
        "spec: its first use on a device cannot be captured in a CUDA graph; call the "
        "operator once before the capture");
  }
  std::vector<std::byte> host(cuda::codec_tables_bytes(spec));
  cuda::fill_codec_tables(*cache::LayerCodec::get(spec), host);
  const Tensor memory = new_bytes(like, static_cast<int64_t>(host.size()));
  check_cuda("cudaMemcpyAsync", cudaMemcpyAsync(memory.mutable_data_ptr(), host.data(), host.size(),
                                                cudaMemcpyHostToDevice, scope.stream()));
  // Other streams and threads find the tables without waiting for this one.
  check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(scope.stream()));
  int major = 0;
  check_cuda("cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, scope.device()));
  const cuda::CodecTables tables = cuda::codec_tables_at(spec, memory.const_data_ptr());
  return codecs.emplace(key, DeviceCodec{memory, tables, major}).first->second;
}

// Storage whose slabs kernels find: one among their arguments, an array of addresses on the device
// for more, written there by a launch before every operator (about 2 us), so that nothing has to be
// kept or invalidated.
class DeviceStorage {
 public:
  DeviceStorage(const LayerSpec& spec, const DeviceScope& scope, const Tensor& exact_keys,
                const Tensor& exact_values, const Tensor& smoothing,
                const std::vector<Tensor>& slabs)
      : storage_(spec, exact_keys, exact_values, smoothing, slabs), pages_(storage_.pages()) {
    scope.check_device("exact_keys", exact_keys);
    scope.check_device("exact_values", exact_values);
    scope.check_device("smoothing", smoothing);
    for (size_t i = 0; i < slabs.size(); ++i) {
      const Argument argument("slabs", static_cast<int64_t>(i));
      scope.check_device(argument, slabs[i]);
      if (reinterpret_cast<uintptr_t>(pages_.slabs[i]) % 16 != 0) {
        turboquant::detail::throw_invalid(argument.text(), "memory that starts on 16 bytes",
                                          "other");
      }
    }
    if (pages_.num_slabs == 1) {
      pages_.only_slab = pages_.slabs[0];
      pages_.slabs = nullptr;
      return;
    }
    addresses_ = torch::stable::new_empty(exact_keys, {pages_.num_slabs}, ScalarType::Long);
    auto* const device_addresses = static_cast<std::byte**>(addresses_->mutable_data_ptr());
    check_cuda("write_slab_addresses",
               cuda::write_slab_addresses(pages_.slabs, pages_.num_slabs, device_addresses,
                                          scope.stream()));
    pages_.slabs = device_addresses;
  }

  const PagePoolView& pages() const { return pages_; }

 private:
  Storage storage_;
  PagePoolView pages_;
  std::optional<Tensor> addresses_;
};

void encode_append(Tensor key_states, Tensor value_states, Tensor exact_keys, Tensor exact_values,
                   Tensor smoothing, std::vector<Tensor> slabs, Tensor counters, Tensor rows,
                   Tensor jobs, std::vector<int64_t> spec_ints) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const DeviceScope scope(key_states);
  scope.check_device("value_states", value_states);
  scope.check_device("counters", counters);
  scope.check_device("rows", rows);
  scope.check_device("jobs", jobs);
  const DeviceStorage storage(spec, scope, exact_keys, exact_values, smoothing, slabs);
  check_same_dtype("key_states", key_states, "exact_keys", exact_keys);
  check_same_dtype("value_states", value_states, "exact_keys", exact_keys);
  check_dtype("counters", counters, ScalarType::Long);
  check_shape("counters", counters, {2});
  check_contiguous("counters", counters);
  const auto job_table = table("jobs", jobs, {kAnySize, cache::tables::kJobColumns});
  const cuda::EncodeAppendParams params{
      .spec = spec,
      .tables = device_codec(spec, spec_ints, scope, exact_keys).tables,
      .key_states = const_view("key_states", key_states),
      .value_states = const_view("value_states", value_states),
      .exact_keys = view("exact_keys", exact_keys),
      .exact_values = view("exact_values", exact_values),
      .smoothing = smoothing.mutable_data_ptr<float>(),
      .pages = storage.pages(),
      .rows = table("rows", rows, {key_states.size(0), cache::tables::kRowColumns}).data(),
      .jobs = job_table.data(),
      .num_jobs = jobs.size(0),
      .counters = counters.mutable_data_ptr<int64_t>()};
  cuda::check_encode_append(params);
  check_cuda("encode_append", cuda::encode_append(params, scope.stream()));
}

void dequantize(Tensor exact_keys, Tensor exact_values, Tensor smoothing, std::vector<Tensor> slabs,
                Tensor page_table, Tensor rows, Tensor out_keys, Tensor out_values,
                std::vector<int64_t> spec_ints, int64_t past_tokens, int64_t first_position) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const DeviceScope scope(exact_keys);
  scope.check_device("page_table", page_table);
  scope.check_device("rows", rows);
  scope.check_device("out_keys", out_keys);
  scope.check_device("out_values", out_values);
  const DeviceStorage storage(spec, scope, exact_keys, exact_values, smoothing, slabs);
  const int64_t batch = exact_keys.size(0);
  const auto pages =
      table("page_table", page_table, {batch, kAnySize, cache::tables::kPageColumns});
  const cuda::DequantizeParams params{
      .spec = spec,
      .tables = device_codec(spec, spec_ints, scope, exact_keys).tables,
      .exact_keys = const_view("exact_keys", exact_keys),
      .exact_values = const_view("exact_values", exact_values),
      .smoothing = smoothing.const_data_ptr<float>(),
      .pages = storage.pages(),
      .page_table = pages.data(),
      .page_columns = page_table.size(1),
      .rows = table("rows", rows, {batch, cache::tables::kRowColumns}).data(),
      .past_tokens = past_tokens,
      .first_position = first_position,
      .out_keys = view("out_keys", out_keys),
      .out_values = view("out_values", out_values)};
  cuda::check_dequantize(params);
  check_cuda("dequantize", cuda::dequantize(params, scope.stream()));
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
  const DeviceScope scope(query);
  for (const auto& [argument, tensor] : {std::pair{"key_states", &key_states},
                                         {"value_states", &value_states},
                                         {"page_table", &page_table},
                                         {"rows", &rows}}) {
    scope.check_device(argument, *tensor);
  }
  if (sink_logits) scope.check_device("sink_logits", *sink_logits);
  const DeviceStorage storage(spec, scope, exact_keys, exact_values, smoothing, slabs);
  check_attention_inputs(query, key_states, value_states, exact_keys, sink_logits);
  const ConstTensorView query_view = const_view("query", query);
  const int64_t batch = query_view.shape[0];
  const auto pages =
      table("page_table", page_table, {batch, kAnySize, cache::tables::kPageColumns});
  const DeviceCodec& codec = device_codec(spec, spec_ints, scope, exact_keys);
  cuda::DecodeAttentionParams params{
      .spec = spec,
      .tables = codec.tables,
      .query = query_view,
      .key_states = const_view("key_states", key_states),
      .value_states = const_view("value_states", value_states),
      .exact_keys = const_view("exact_keys", exact_keys),
      .exact_values = const_view("exact_values", exact_values),
      .smoothing = smoothing.const_data_ptr<float>(),
      .pages = storage.pages(),
      .page_table = pages.data(),
      .page_columns = page_table.size(1),
      .rows = table("rows", rows, {batch, cache::tables::kRowColumns}).data(),
      .sink_logits = sink_logits ? sink_logits->const_data_ptr<float>() : nullptr,
      .scaling = static_cast<float>(scaling),
      .softcap = static_cast<float>(softcap),
      .sliding_window = sliding_window,
      .out = heads_last ? transposed(view("out", out)) : view("out", out),
      .lse = lse};
  // Short queries where their kernels run; all others.
  const bool decodes = query_view.shape[2] <= cuda::kDecodeAttentionMaxQueries &&
                       cuda::decode_attention_runs_on(codec.capability_major);
  params.workspace_bytes = decodes ? cuda::decode_attention_workspace_bytes(params)
                                   : cuda::extend_attention_workspace_bytes(params);
  const Tensor workspace = new_bytes(query, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  decodes ? cuda::check_decode_attention(params) : cuda::check_extend_attention(params);
  const int status = decodes ? cuda::decode_attention(params, scope.stream())
                             : cuda::extend_attention(params, scope.stream());
  if (status == cudaErrorNotSupported) {
    throw CudaError(
        "decode_attention: runs on compute capability 8.0 or newer, not on this device");
  }
  check_cuda("decode_attention", status);
}

// For attention_steps.hpp.
struct Cuda {
  static constexpr auto kAttend = &attend;
  static constexpr auto kEncodeAppend = &encode_append;
};

cache::FixedTables fixed_tables(const LayerSpec& spec, const DeviceScope& scope, const Tensor& rows,
                                const Tensor& page_table, const Tensor& positions,
                                int64_t chunk_tokens, int64_t max_tokens) {
  scope.check_device("page_table", page_table);
  scope.check_device("positions", positions);
  for (const auto& [argument, tokens] :
       {std::pair{"chunk_tokens", chunk_tokens}, {"max_tokens", max_tokens}}) {
    if (tokens < 0 || tokens > INT32_MAX) {
      turboquant::detail::throw_invalid(argument, "0 to 2^31 - 1", std::to_string(tokens));
    }
  }
  const int64_t batch = rows.size(0);
  return {
      .exact = spec.exact_layout(),
      .batch = static_cast<int32_t>(batch),
      .page_columns = static_cast<int32_t>(page_table.size(1)),
      .max_tokens = static_cast<int32_t>(max_tokens),
      .chunk_tokens = static_cast<int32_t>(chunk_tokens),
      .rows = mutable_table("rows", rows, {batch, cache::tables::kRowColumns}).data(),
      .page_table =
          mutable_table("page_table", page_table, {batch, kAnySize, cache::tables::kPageColumns})
              .data(),
      .positions =
          mutable_table("positions", positions, {batch, cache::tables::kPositionColumns}).data()};
}

std::tuple<Tensor, Tensor> plan_append(Tensor rows, Tensor page_table, Tensor positions,
                                       std::vector<int64_t> spec_ints, int64_t chunk_tokens,
                                       int64_t max_tokens) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const DeviceScope scope(rows);
  const cache::FixedTables tables =
      fixed_tables(spec, scope, rows, page_table, positions, chunk_tokens, max_tokens);
  const auto [planned, jobs] = new_plan(spec, rows, chunk_tokens);
  const cuda::FixedAppendParams params{.tables = tables,
                                       .planned = planned.mutable_data_ptr<int32_t>(),
                                       .jobs = jobs.mutable_data_ptr<int32_t>()};
  cuda::check_fixed_append(params, true);
  check_cuda("plan_append", cuda::plan_append(params, scope.stream()));
  return {planned, jobs};
}

void commit_append(Tensor planned, Tensor rows, Tensor page_table, Tensor positions,
                   std::vector<int64_t> spec_ints, int64_t chunk_tokens, int64_t max_tokens) {
  const LayerSpec spec = LayerSpec::from_ints(spec_ints);
  const DeviceScope scope(rows);
  scope.check_device("planned", planned);
  const cache::FixedTables tables =
      fixed_tables(spec, scope, rows, page_table, positions, chunk_tokens, max_tokens);
  const cuda::FixedAppendParams params{
      .tables = tables,
      .planned =
          mutable_table("planned", planned, {rows.size(0), cache::tables::kRowColumns}).data()};
  cuda::check_fixed_append(params, false);
  check_cuda("commit_append", cuda::commit_append(params, scope.stream()));
}

}  // namespace
}  // namespace turboquant::torch_ops

STABLE_TORCH_LIBRARY_IMPL(turboquant, CUDA, library) {
  using namespace turboquant;
  library.impl("encode_append", TORCH_BOX(&torch_ops::encode_append));
  library.impl("dequantize", TORCH_BOX(&torch_ops::dequantize));
  library.impl("decode_attention", TORCH_BOX(&torch_ops::decode_attention<torch_ops::Cuda>));
  library.impl("attend_append", TORCH_BOX(&torch_ops::attend_append<torch_ops::Cuda>));
  library.impl("plan_append", TORCH_BOX(&torch_ops::plan_append));
  library.impl("commit_append", TORCH_BOX(&torch_ops::commit_append));
}
