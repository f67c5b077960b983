// Times CUDA extend attention alone, for every set of sizes that the device runs.
//
//   turboquant_cuda_extend_attention_bench [--only TEXT]
//
// Prints milliseconds of a call (all three kernels): CUDA events around 10 calls that follow one
// another, the least of 5 such rounds; then how far the others' outputs are from the first's.
// --only chooses lines by a part of their text. Rivals on the same shapes:
// extend_attention_baseline.py.
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/extend_attention_launch.hpp"
#include "synthetic_cache.cuh"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cuda/extend_attention.hpp"

namespace {

using namespace turboquant;
using bench::allocate, bench::check, bench::fill_bf16, bench::fill_random, bench::fix_blocks,
    bench::upload;
using cuda::detail::ExtendSizes;

struct Shape {
  int batch, heads, kv_heads, head_dim;
  int queries, past;
};
// The table of docs/extend.md.
constexpr Shape kShapes[] = {
    {1, 32, 8, 128, 512, 32768}, {1, 32, 8, 128, 2048, 32768}, {1, 32, 8, 128, 128, 32768},
    {1, 32, 8, 128, 32, 32768},  {1, 32, 8, 128, 512, 8192},   {1, 32, 8, 128, 512, 131072},
    {1, 28, 4, 128, 512, 32768}, {1, 32, 32, 128, 512, 32768}, {8, 32, 8, 128, 64, 8192},
    {1, 32, 8, 64, 512, 32768},  {1, 8, 4, 256, 512, 32768},   {1, 32, 8, 80, 512, 32768},
    {1, 32, 8, 96, 512, 32768}};

struct NamedSizes {
  const char* name;
  ExtendSizes sizes;
  int shared_bytes, major;  // of the device: at least, exactly (0: any)
};
constexpr NamedSizes kSizes[] = {
    {"warpgroup", ExtendSizes::kWarpgroup, cuda::detail::kExtendLargeSharedBytes, 9},
    {"large", ExtendSizes::kLarge, cuda::detail::kExtendLargeSharedBytes, 0},
    {"compact", ExtendSizes::kCompact, cuda::detail::kExtendCompactSharedBytes, 0}};

// A call over memory of its own.
class Call {
 public:
  Call(const Shape& shape, int bits)
      : shape_(shape),
        spec_{.head_dim = shape.head_dim,
              .num_kv_heads = shape.kv_heads,
              .k_bits = bits,
              .v_bits = bits,
              .scale_type = cache::ScaleType::kFloat16} {
    const cache::BlockLayout layout = spec_.block_layout();
    cache::PageTable table(shape.batch, spec_.sink_tokens, spec_.window_tokens);
    const cache::AppendPlan plan = table.plan_append(std::vector<int32_t>(shape.batch, shape.past));
    table.prepare(plan);
    table.commit(plan);
    const int64_t pages = table.high_water_pages();
    const int64_t blocks = pages * shape.kv_heads, bytes = blocks * layout.block_bytes();
    auto* const slab = own(allocate<std::byte>(bytes));
    fill_random<<<1024, 512>>>(reinterpret_cast<uint32_t*>(slab), bytes / 4, 17u);
    fix_blocks<<<static_cast<unsigned>(blocks), 64>>>(slab, blocks, layout);
    std::vector<std::byte> codec(cuda::codec_tables_bytes(spec_));
    cuda::fill_codec_tables(*cache::LayerCodec::get(spec_), codec);
    params_.spec = spec_;
    params_.tables = cuda::codec_tables_at(spec_, own(upload(codec)));
    params_.query = tensor(shape.heads, shape.queries, 3);
    params_.key_states = tensor(shape.kv_heads, shape.queries, 4);
    params_.value_states = tensor(shape.kv_heads, shape.queries, 5);
    params_.exact_keys = tensor(shape.kv_heads, spec_.exact_layout().capacity(), 6);
    params_.exact_values = tensor(shape.kv_heads, spec_.exact_layout().capacity(), 7);
    params_.out = tensor(shape.heads, shape.queries, 8);
    params_.smoothing = own(
        upload(std::vector<float>(int64_t{shape.batch} * shape.kv_heads * shape.head_dim, 1.0f)));
    params_.pages = {.slabs = own(upload(std::vector<std::byte*>{slab})),
                     .num_slabs = 1,
                     .pages_per_slab = pages,
                     .page_bytes = layout.page_bytes(shape.kv_heads),
                     .block_bytes = layout.block_bytes()};
    params_.page_columns = table.max_entries();
    params_.page_table = own(upload(table.export_page_table(params_.page_columns)));
    params_.rows = own(upload(table.export_rows(std::vector<int32_t>(shape.batch, shape.queries))));
    params_.scaling = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    params_.workspace_bytes = cuda::extend_attention_workspace_bytes(params_);
    params_.workspace = own(allocate<std::byte>(params_.workspace_bytes));
    check(cudaDeviceSynchronize(), "filling");
  }
  ~Call() {
    for (void* memory : owned_) cudaFree(memory);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  double milliseconds(ExtendSizes sizes) const {
    constexpr int kRounds = 5, kCalls = 10;
    const auto run = [&] {
      check(cuda::detail::extend_attention(params_, sizes, nullptr), "extend_attention");
    };
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    run();
    float best = INFINITY;
    for (int round = 0; round < kRounds; ++round) {
      check(cudaEventRecord(begin), "record");
      for (int i = 0; i < kCalls; ++i) run();
      check(cudaEventRecord(end), "record");
      check(cudaEventSynchronize(end), "extend_attention");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "time");
      best = std::min(best, ms / kCalls);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return best;
  }

  std::vector<float> output() const {
    std::vector<uint16_t> bits(int64_t{shape_.batch} * shape_.heads * shape_.queries *
                               shape_.head_dim);
    check(cudaMemcpy(bits.data(), params_.out.data, bits.size() * 2, cudaMemcpyDeviceToHost),
          "download");
    std::vector<float> out(bits.size());
    for (size_t i = 0; i < out.size(); ++i) out[i] = math::fp32_from_bf16(bits[i]);
    return out;
  }

 private:
  template <class T>
  T* own(T* memory) {
    owned_.push_back(memory);
    return memory;
  }
  cache::TensorView tensor(int64_t heads, int64_t tokens, uint32_t seed) {
    const std::array<int64_t, 4> dims = {shape_.batch, heads, tokens, shape_.head_dim};
    const int64_t count = dims[0] * dims[1] * dims[2] * dims[3];
    auto* const memory = own(allocate<uint16_t>(count));
    fill_bf16<<<512, 256>>>(memory, count, seed);
    return cache::TensorView::contiguous(memory, cache::ElementType::kBFloat16, dims);
  }

  Shape shape_;
  cache::LayerSpec spec_;
  cuda::DecodeAttentionParams params_{};
  std::vector<void*> owned_;
};

double relative_distance(const std::vector<float>& x, const std::vector<float>& y) {
  double distance = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    distance += (double{x[i]} - y[i]) * (double{x[i]} - y[i]);
    norm += double{y[i]} * y[i];
  }
  return std::sqrt(distance / norm);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 2 && std::strcmp(argv[1], "--only") == 0 ? argv[2] : "";
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "no usable GPU");
  std::printf("%s; batch heads kv dim queries past\n", properties.name);
  for (const Shape& shape : kShapes) {
    for (const int bits : {4, 3, 2}) {
      if (bits != 4 && &shape != kShapes) continue;
      char text[96];
      std::snprintf(text, sizeof text, "%d %d %d %d %d %d, %d+%d bits:", shape.batch, shape.heads,
                    shape.kv_heads, shape.head_dim, shape.queries, shape.past, bits, bits);
      if (std::string(text).find(only) == std::string::npos) continue;
      const Call call(shape, bits);
      std::printf("%s", text);
      std::vector<float> first;
      for (const NamedSizes& named : kSizes) {
        if (properties.sharedMemPerBlockOptin < static_cast<size_t>(named.shared_bytes) ||
            (named.major != 0 && properties.major != named.major)) {
          continue;
        }
        std::printf(" %s %.4f ms", named.name, call.milliseconds(named.sizes));
        if (first.empty()) {
          first = call.output();
        } else {
          std::printf(" (%.1e)", relative_distance(call.output(), first));
        }
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
  return 0;
}
