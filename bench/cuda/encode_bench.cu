// Times encode_append and dequantize on a GPU by graph replays, beside the device's copy bandwidth.
// Prints a table, and the same numbers as JSON lines with --json.
//
// Bytes are counted from first principles: chunk elements read, block bytes written (encode) or
// block bytes read, elements written (dequantise). Buffers rotate so that more than twice the L2
// lies between two uses.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "synthetic_cache.cuh"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/cuda/encode_append.hpp"

namespace {

using namespace turboquant;
using bench::check, bench::time_graph;

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() { cudaFree(data_); }
  template <class Element>
  static Memory copy_of(const std::vector<Element>& host) {
    Memory memory(static_cast<int64_t>(std::max<size_t>(1, host.size()) * sizeof(Element)));
    check(cudaMemcpy(memory.data_, host.data(), host.size() * sizeof(Element),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
    return memory;
  }
  template <class Element = void>
  Element* as() const {
    return static_cast<Element*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

// Values about normal in [-4, 4]: sums of uniform numbers of a hash.
__global__ void fill_random(uint16_t* out, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t h = (static_cast<uint64_t>(i) + seed) * 0x9E3779B97F4A7C15ull;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    const float sum = static_cast<float>(h & 0xFFFF) + static_cast<float>(h >> 16 & 0xFFFF) +
                      static_cast<float>(h >> 32 & 0xFFFF) + static_cast<float>(h >> 48);
    const float x = (sum - 131070.0f) * (1.7320508f / 65536.0f);
    out[i] = static_cast<uint16_t>(__float_as_uint(x) + 0x8000u >> 16);
  }
}

__global__ void copy_vectors(const uint4* from, uint4* to, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k * step < count) v[k] = __ldcs(from + i + k * step);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k * step < count) __stcs(to + i + k * step, v[k]);
    }
  }
}

// Microseconds of one launch: the median over replays of a graph of `launches` calls launch(i).
double time_us(int launches, const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  const double ms = time_graph(stream, 11, [&] {
    for (int i = 0; i < launches; ++i) launch(i, stream);
  });
  cudaStreamDestroy(stream);
  return ms * 1e3 / launches;
}

struct Report {
  bool json;
  double copy_gbs = 0;
  void line(const std::string& name, double us, int64_t bytes) const {
    const double gbs = static_cast<double>(bytes) / us * 1e-3;
    if (json) {
      std::printf("{\"name\": \"%s\", \"us\": %.3f, \"gbs\": %.1f, \"of_copy\": %.4f}\n",
                  name.c_str(), us, gbs, gbs / copy_gbs);
    } else if (bytes > 0) {
      std::printf("%-52s %9.2f us %8.1f GB/s %6.1f %% of copy\n", name.c_str(), us, gbs,
                  100 * gbs / copy_gbs);
    } else {
      std::printf("%-52s %9.2f us\n", name.c_str(), us);
    }
    std::fflush(stdout);
  }
};

// One layer on the device whose rows are empty, and a chunk to append.
struct Layer {
  Layer(const cache::LayerSpec& spec, int batch, int64_t tokens, uint32_t seed)
      : spec(spec),
        batch(batch),
        tokens(tokens),
        chunk_shape{batch, spec.num_kv_heads, tokens, spec.head_dim},
        keys(elements() * 2),
        values(elements() * 2),
        exact_keys(exact_elements() * 2),
        exact_values(exact_elements() * 2),
        smoothing(Memory::copy_of(
            std::vector<float>(int64_t{batch} * spec.num_kv_heads * spec.head_dim, 1.0f))),
        counters(Memory::copy_of(std::vector<int64_t>(2, 0))),
        table(batch, spec.sink_tokens, spec.window_tokens),
        plan(table.plan_append(std::vector<int32_t>(batch, static_cast<int32_t>(tokens)))),
        pages(std::max<int64_t>(1, plan.pages_needed) * page_bytes()),
        slabs(Memory::copy_of(std::vector<std::byte*>{pages.as<std::byte>()})),
        rows(Memory::copy_of(
            table.export_rows(std::vector<int32_t>(batch, static_cast<int32_t>(tokens))))),
        jobs(Memory::copy_of(plan.jobs)),
        codec(cache::LayerCodec::get(spec)),
        tables(cuda::codec_tables_bytes(spec)) {
    for (const Memory* memory : {&keys, &values, &exact_keys, &exact_values}) {
      fill_random<<<1024, 256>>>(memory->as<uint16_t>(), memory->bytes() / 2, seed++);
    }
    std::vector<std::byte> host(tables.bytes());
    cuda::fill_codec_tables(*codec, host);
    check(cudaMemcpy(tables.as(), host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  int64_t elements() const { return int64_t{batch} * spec.num_kv_heads * tokens * spec.head_dim; }
  int64_t exact_elements() const {
    return int64_t{batch} * spec.num_kv_heads * spec.exact_layout().capacity() * spec.head_dim;
  }
  int64_t page_bytes() const { return spec.block_layout().page_bytes(spec.num_kv_heads); }
  int64_t traffic_bytes() const {
    return 4 * elements() + static_cast<int64_t>(plan.jobs.size()) * page_bytes();
  }
  cache::TensorView exact(const Memory& memory) const {
    return cache::TensorView::contiguous(
        memory.as(), cache::ElementType::kBFloat16,
        {batch, spec.num_kv_heads, spec.exact_layout().capacity(), spec.head_dim});
  }
  cache::TensorView chunk(const Memory& memory) const {
    return cache::TensorView::contiguous(memory.as(), cache::ElementType::kBFloat16, chunk_shape);
  }
  cache::PagePoolView pool() const {
    return {.slabs = slabs.as<std::byte*>(),
            .num_slabs = 1,
            .pages_per_slab = std::max<int64_t>(1, plan.pages_needed),
            .page_bytes = page_bytes(),
            .block_bytes = spec.block_layout().block_bytes()};
  }
  void append(cudaStream_t stream, int64_t num_jobs, bool may_fit) const {
    check(cuda::encode_append({.spec = spec,
                               .tables = cuda::codec_tables_at(spec, tables.as()),
                               .key_states = chunk(keys),
                               .value_states = chunk(values),
                               .exact_keys = exact(exact_keys),
                               .exact_values = exact(exact_values),
                               .smoothing = smoothing.as<float>(),
                               .pages = pool(),
                               .rows = rows.as<int32_t>(),
                               .jobs = jobs.as<int32_t>(),
                               .num_jobs = num_jobs,
                               .may_fit_smoothing = may_fit,
                               .counters = counters.as<int64_t>()},
                              stream),
          "encode_append");
  }

  cache::LayerSpec spec;
  int batch;
  int64_t tokens;
  std::array<int64_t, 4> chunk_shape;
  Memory keys, values, exact_keys, exact_values, smoothing, counters;
  cache::PageTable table;
  cache::AppendPlan plan;
  Memory pages, slabs, rows, jobs;
  std::shared_ptr<const cache::LayerCodec> codec;
  Memory tables;
};

std::string name_of(const char* what, const cache::LayerSpec& spec, int batch, int64_t tokens) {
  return std::string(what) + " " + std::to_string(batch) + " x " + std::to_string(tokens) +
         " tokens, " + std::to_string(spec.num_kv_heads) +
         " heads, d=" + std::to_string(spec.head_dim) + ", " + std::to_string(spec.k_bits) + "+" +
         std::to_string(spec.v_bits) + " bits" +
         (spec.codebook == quant::CodebookKind::kVector ? ", vector" : "");
}

void bench_prompt(const Report& report, const cache::LayerSpec& spec, int64_t tokens,
                  int64_t l2_bytes) {
  std::vector<Layer> layers;
  layers.emplace_back(spec, 1, tokens, 1);
  const auto sets =
      static_cast<int>(std::min<int64_t>(16, 1 + 2 * l2_bytes / layers[0].traffic_bytes()));
  for (int i = 1; i < sets; ++i) layers.emplace_back(spec, 1, tokens, 10 * i);
  const int launches = std::max(sets, 4);
  const auto num_jobs = static_cast<int64_t>(layers[0].plan.jobs.size());
  report.line(name_of("encode", spec, 1, tokens),
              time_us(launches,
                      [&](int i, cudaStream_t s) {
                        layers[i % sets].append(s, num_jobs, spec.smooth_keys);
                      }),
              layers[0].traffic_bytes());

  // The same tokens back. The row is committed, its ring was filled by the append.
  std::vector<Memory> tables, rows;
  for (Layer& layer : layers) {
    layer.table.prepare(layer.plan);
    layer.table.commit(layer.plan);
    tables.push_back(Memory::copy_of(layer.table.export_page_table(layer.table.max_entries())));
    rows.push_back(Memory::copy_of(layer.table.export_rows()));
  }
  report.line(
      name_of("dequantise", spec, 1, tokens),
      time_us(launches,
              [&](int i, cudaStream_t s) {
                const Layer& layer = layers[i % sets];
                check(cuda::dequantize({.spec = spec,
                                        .tables = cuda::codec_tables_at(spec, layer.tables.as()),
                                        .exact_keys = layer.exact(layer.exact_keys),
                                        .exact_values = layer.exact(layer.exact_values),
                                        .smoothing = layer.smoothing.as<float>(),
                                        .pages = layer.pool(),
                                        .page_table = tables[i % sets].as<int32_t>(),
                                        .page_columns = layer.table.max_entries(),
                                        .rows = rows[i % sets].as<int32_t>(),
                                        .past_tokens = tokens,
                                        .out_keys = layer.chunk(layer.keys),
                                        .out_values = layer.chunk(layer.values)},
                                       s),
                      "dequantize");
              }),
      layers[0].traffic_bytes());
}

// One token a row: the ring's copy alone, and with a block encoded in every row.
void bench_step(const Report& report, const cache::LayerSpec& spec, int batch) {
  constexpr int kLaunches = 100;
  Layer layer(spec, batch, 1, 5);
  report.line(name_of("append, no block,", spec, batch, 1),
              time_us(kLaunches, [&](int, cudaStream_t s) { layer.append(s, 0, false); }), 0);
  layer.jobs =
      Memory::copy_of(std::vector<int32_t>(int64_t{batch} * cache::tables::kJobColumns, 0));
  report.line(name_of("append, room for a block a row,", spec, batch, 1),
              time_us(kLaunches, [&](int, cudaStream_t s) { layer.append(s, batch, false); }), 0);
  report.line(name_of("append, the same with the fit's launch,", spec, batch, 1),
              time_us(kLaunches, [&](int, cudaStream_t s) { layer.append(s, batch, true); }), 0);
}

// A block of every head, keys and values: what a decode step in 64 takes besides.
void bench_block(const Report& report, const cache::LayerSpec& spec) {
  const int64_t tokens = spec.sink_tokens + spec.window_tokens + cache::kBlockTokens;
  const Layer layer(spec, 1, tokens, 5);
  report.line(name_of("append, one block,", spec, 1, tokens),
              time_us(100, [&](int, cudaStream_t s) { layer.append(s, 1, false); }), 0);
}

}  // namespace

int main(int argc, char** argv) {
  Report report{.json = argc > 1 && std::strcmp(argv[1], "--json") == 0};
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "encode_bench: no usable GPU\n");
    return 1;
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  {
    constexpr int64_t kBytes = int64_t{1} << 30;
    const Memory from(kBytes), to(kBytes);
    fill_random<<<1024, 256>>>(from.as<uint16_t>(), kBytes / 2, 3);
    const double us = time_us(4, [&](int, cudaStream_t s) {
      copy_vectors<<<device.multiProcessorCount * 8, 512, 0, s>>>(from.as<uint4>(), to.as<uint4>(),
                                                                  kBytes / 16);
    });
    report.copy_gbs = 2.0 * kBytes / us * 1e-3;
    if (!report.json) std::printf("%s, L2 %d MB\n", device.name, device.l2CacheSize >> 20);
    report.line("copy 1 GiB", us, 2 * kBytes);
  }
  const auto spec = [](int head_dim, int heads, int bits) {
    return cache::LayerSpec{
        .head_dim = head_dim, .num_kv_heads = heads, .k_bits = bits, .v_bits = bits};
  };
  for (const int64_t tokens : {8192, 32768, 131072}) {
    bench_prompt(report, spec(128, 8, 4), tokens, device.l2CacheSize);
  }
  cache::LayerSpec plain = spec(128, 8, 4);
  plain.center_keys = plain.smooth_keys = false;
  if (!report.json) std::printf("without means and smoothing:\n");
  bench_prompt(report, plain, 32768, device.l2CacheSize);
  if (!report.json) std::printf("other widths and head dims:\n");
  for (const int bits : {2, 3, 8}) {
    bench_prompt(report, spec(128, 8, bits), 32768, device.l2CacheSize);
  }
  for (const int head_dim : {64, 80, 96, 256}) {
    bench_prompt(report, spec(head_dim, 8, 4), 32768, device.l2CacheSize);
  }
  for (const int batch : {1, 32}) bench_step(report, spec(128, 8, 4), batch);
  bench_block(report, spec(128, 8, 4));
  for (const int bits : {2, 3, 4}) {
    cache::LayerSpec vector = spec(128, 8, bits);
    vector.codebook = quant::CodebookKind::kVector;
    bench_prompt(report, vector, 8192, device.l2CacheSize);
    bench_block(report, vector);
  }
  return 0;
}
