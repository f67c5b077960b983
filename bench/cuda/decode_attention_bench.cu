// Times CUDA decode attention alone: graph replays over rotating caches larger than twice the L2.
//
//   turboquant_cuda_decode_attention_bench [--json FILE] [--replays N] [--only TEXT] [--parts 1]
//                                            [--shape TEXT] [--more 1]
//
// Prints, for every shape and width, the median microseconds of a call (all three kernels), the
// bytes that a call must read (codes, scales, means, exact tokens), GB/s and the share of the
// bandwidth that a plain read of a large buffer reaches on the same card in the same run. --parts 1
// times the kernels alone too (scalar codebooks); --only and --shape choose recipes and shapes by a
// part of their names. --more 1: other groups and head dims.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cuda/decode_attention.hpp"
// Behind the launcher: its kernels one by one.
#include "../../kernels/decode_attention_dispatch.hpp"
#include "../../kernels/decode_attention_launch.hpp"
#include "synthetic_cache.cuh"

namespace {

using namespace turboquant;
using bench::allocate, bench::check, bench::fill_bf16, bench::fill_random, bench::fix_blocks,
    bench::time_graph, bench::upload;

struct Shape {
  int batch, heads, kv_heads, head_dim;
  int tokens;
};
// The table of the project's measurements (docs/kernels.md).
constexpr Shape kShapes[] = {
    {1, 32, 8, 128, 2048},   {1, 32, 8, 128, 4096},  {8, 32, 8, 128, 2048},
    {1, 32, 8, 128, 8192},   {1, 32, 8, 128, 32768}, {1, 32, 8, 128, 131072},
    {4, 32, 8, 128, 131072}, {32, 32, 8, 128, 8192}, {1, 28, 4, 128, 11264},
    {64, 64, 8, 128, 4096},  {1, 32, 32, 128, 32768}};
// Other groups and head dims, about 72 MB each at 4+4 bits, then 1.2 GB.
constexpr Shape kMoreShapes[] = {
    {1, 8, 8, 128, 65536},   {1, 24, 8, 128, 65536},  {1, 32, 8, 128, 65536},
    {1, 56, 8, 128, 65536},  {1, 64, 8, 128, 65536},  {1, 96, 8, 128, 65536},
    {1, 128, 8, 128, 65536}, {1, 32, 8, 96, 87360},   {1, 128, 8, 96, 87360},
    {1, 32, 8, 64, 131072},  {1, 128, 8, 64, 131072}, {1, 32, 8, 256, 32768},
    {1, 128, 8, 256, 32768}, {32, 32, 8, 128, 32768}, {32, 128, 8, 128, 32768}};

struct Recipe {
  const char* name;
  int k_bits, v_bits;
  cache::ScaleType scale_type;
  quant::CodebookKind codebook = quant::CodebookKind::kScalar;
  cache::ElementType states = cache::ElementType::kBFloat16;
};
constexpr Recipe kRecipes[] = {
    {"4+4 fp16 scales", 4, 4, cache::ScaleType::kFloat16},
    {"4+4 fp32 scales", 4, 4, cache::ScaleType::kFloat32},
    {"3+3 fp16 scales", 3, 3, cache::ScaleType::kFloat16},
    {"2+2 fp16 scales", 2, 2, cache::ScaleType::kFloat16},
    {"4+4 vector", 4, 4, cache::ScaleType::kFloat16, quant::CodebookKind::kVector},
    {"3+3 vector", 3, 3, cache::ScaleType::kFloat16, quant::CodebookKind::kVector},
    {"2+2 vector", 2, 2, cache::ScaleType::kFloat16, quant::CodebookKind::kVector},
    {"4+4 fp16 states", 4, 4, cache::ScaleType::kFloat16, quant::CodebookKind::kScalar,
     cache::ElementType::kFloat16}};

__global__ void read_all(const uint4* from, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = __ldcs(from + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  for (; i < count; i += stride) sum += from[i].x;
  if (sum == 0x12345u) *sink = sum;
}

double measure_read_bandwidth(cudaStream_t stream, int multiprocessors) {
  const int64_t bytes = int64_t{4} << 30;
  auto* const memory = allocate<uint4>(bytes / 16);
  auto* const sink = allocate<uint32_t>(1);
  fill_random<<<multiprocessors * 8, 512, 0, stream>>>(reinterpret_cast<uint32_t*>(memory),
                                                       bytes / 4, 1);
  double best = 0;
  for (const int blocks : {2, 4, 8}) {
    const double ms = time_graph(stream, 7, [&] {
      read_all<<<multiprocessors * blocks, 512, 0, stream>>>(memory, bytes / 16, sink);
    });
    best = std::max(best, static_cast<double>(bytes) / (ms * 1e-3));
  }
  cudaFree(memory);
  cudaFree(sink);
  return best;
}

// What is timed: the launcher, or its kernels alone (d = 128, equal widths).
struct Part {
  const char* name;
  unsigned stages;  // 0: the launcher
  bool exact, pages;
};
constexpr Part kWhole = {"all", 0, true, true};
using cuda::detail::kAllStages, cuda::detail::kAttendStage, cuda::detail::kCombineStage,
    cuda::detail::kLatePrepare, cuda::detail::kLateStages, cuda::detail::kPrepareStage;
constexpr Part kParts[] = {{"prepare", kPrepareStage | kLateStages, true, true},
                           {"attend", kAttendStage | kLateStages, true, true},
                           {"attend, pages", kAttendStage | kLateStages, false, true},
                           {"attend, exact tokens", kAttendStage | kLateStages, true, false},
                           {"attend, nothing", kAttendStage | kLateStages, false, false},
                           {"combine", kCombineStage | kLateStages, true, true},
                           {"prepare and attend", kPrepareStage | kAttendStage, true, true},
                           {"attend and combine", kAttendStage | kCombineStage, true, true},
                           {"all, prepare starts late", kAllStages | kLatePrepare, true, true},
                           {"all, each starts late", kAllStages | kLateStages, true, true}};

int launch_part(const cuda::DecodeAttentionParams& params, const Part& part,
                const int32_t* rows_without_pages, int multiprocessors, cudaStream_t stream) {
  if (part.stages == 0) return cuda::decode_attention(params, stream);
  cuda::detail::DecodeArgs args = cuda::detail::make_decode_args(params, 0, params.query.shape[0]);
  if (!part.exact) args.exact_slots = 0;
  if (!part.pages) args.row_table = rows_without_pages;
  switch (params.spec.k_bits) {
    case 4:
      return cuda::detail::launch_decode_attention<128, 4, 4>(args, multiprocessors, stream,
                                                              part.stages);
    case 3:
      return cuda::detail::launch_decode_attention<128, 3, 3>(args, multiprocessors, stream,
                                                              part.stages);
    default:
      return cuda::detail::launch_decode_attention<128, 2, 2>(args, multiprocessors, stream,
                                                              part.stages);
  }
}

struct Result {
  double microseconds;
  int64_t bytes;
};

Result run(const Shape& shape, const Recipe& recipe, const Part& part, int64_t l2_bytes,
           int multiprocessors, cudaStream_t stream, int replays) {
  const cache::LayerSpec spec{.head_dim = shape.head_dim,
                              .num_kv_heads = shape.kv_heads,
                              .k_bits = recipe.k_bits,
                              .v_bits = recipe.v_bits,
                              .scale_type = recipe.scale_type,
                              .codebook = recipe.codebook};
  const cache::BlockLayout layout = spec.block_layout();
  cache::PageTable table(shape.batch, spec.sink_tokens, spec.window_tokens);
  const std::vector<int32_t> lengths(shape.batch, shape.tokens - 1);
  const cache::AppendPlan plan = table.plan_append(lengths);
  table.prepare(plan);
  table.commit(plan);
  const std::vector<int32_t> ones(shape.batch, 1);
  const int64_t columns = table.max_entries();
  const int64_t pages = table.high_water_pages();
  const int64_t cache_bytes = pages * layout.page_bytes(spec.num_kv_heads);
  const int64_t capacity = spec.exact_layout().capacity();
  int64_t exact_tokens = 0;
  for (int b = 0; b < shape.batch; ++b) {
    exact_tokens += spec.sink_tokens + table.length(b) - table.exact_begin(b) + 1;
  }
  const int64_t exact_bytes = exact_tokens * spec.num_kv_heads * spec.head_dim * 2 * 2;

  std::vector<std::byte> codec(cuda::codec_tables_bytes(spec));
  cuda::fill_codec_tables(*cache::LayerCodec::get(spec), codec);
  std::byte* const codec_memory = upload(codec);
  std::vector<int32_t> row_table = table.export_rows(ones);
  int32_t* const rows = upload(row_table);
  for (int b = 0; b < shape.batch; ++b) {
    row_table[b * cache::tables::kRowColumns + cache::tables::kRowEntries] = 0;
  }
  int32_t* const rows_without_pages = upload(row_table);
  int32_t* const page_table = upload(table.export_page_table(columns));

  const auto copies =
      static_cast<int>(std::max<int64_t>(2, (5 * l2_bytes / 2 + cache_bytes - 1) / cache_bytes));
  std::vector<void*> owned = {codec_memory, rows, rows_without_pages, page_table};
  std::vector<cuda::DecodeAttentionParams> calls;
  const auto tensor = [&](int64_t heads, int64_t tokens, uint32_t seed) {
    const std::array<int64_t, 4> dims = {shape.batch, heads, tokens, shape.head_dim};
    const int64_t count = dims[0] * dims[1] * dims[2] * dims[3];
    auto* const memory = allocate<uint16_t>(count);
    owned.push_back(memory);
    // The bits of bf16 numbers are other, finite ones in fp16.
    fill_bf16<<<multiprocessors * 4, 256, 0, stream>>>(memory, count, seed);
    return cache::TensorView::contiguous(memory, recipe.states, dims);
  };
  for (int i = 0; i < copies; ++i) {
    auto* const slab = allocate<std::byte>(cache_bytes);
    fill_random<<<multiprocessors * 8, 512, 0, stream>>>(reinterpret_cast<uint32_t*>(slab),
                                                         cache_bytes / 4, 17u + i);
    const int64_t blocks = pages * spec.num_kv_heads;
    fix_blocks<<<static_cast<unsigned>(blocks), 64, 0, stream>>>(slab, blocks, layout);
    std::byte** const slabs = upload(std::vector<std::byte*>{slab});
    auto* const smoothing =
        upload(std::vector<float>(int64_t{shape.batch} * spec.num_kv_heads * spec.head_dim, 1.0f));
    owned.insert(owned.end(), {slab, slabs, smoothing});
    cuda::DecodeAttentionParams p{.spec = spec};
    p.tables = cuda::codec_tables_at(spec, codec_memory);
    p.query = tensor(shape.heads, 1, 3);
    p.key_states = tensor(spec.num_kv_heads, 1, 4);
    p.value_states = tensor(spec.num_kv_heads, 1, 5);
    p.exact_keys = tensor(spec.num_kv_heads, capacity, 6);
    p.exact_values = tensor(spec.num_kv_heads, capacity, 7);
    p.out = tensor(shape.heads, 1, 8);
    p.smoothing = smoothing;
    p.pages = {.slabs = slabs,
               .num_slabs = 1,
               .pages_per_slab = pages,
               .page_bytes = layout.page_bytes(spec.num_kv_heads),
               .block_bytes = layout.block_bytes()};
    p.page_table = page_table;
    p.page_columns = columns;
    p.rows = rows;
    p.scaling = 0.0883883f;
    p.workspace_bytes = cuda::decode_attention_workspace_bytes(p);
    p.workspace = allocate<std::byte>(p.workspace_bytes);
    owned.push_back(p.workspace);
    calls.push_back(p);
  }
  check(cudaStreamSynchronize(stream), "filling");

  // At least 16 calls a replay, so that the replay's own start does not count.
  const int rounds = std::max(1, (16 + copies - 1) / copies);
  for (const auto& call : calls) check(cuda::decode_attention(call, stream), "decode_attention");
  check(cudaStreamSynchronize(stream), "decode_attention");
  const double ms = time_graph(stream, replays, [&] {
    for (int r = 0; r < rounds; ++r) {
      for (const auto& call : calls) {
        check(launch_part(call, part, rows_without_pages, multiprocessors, stream), part.name);
      }
    }
  });

  std::vector<uint16_t> out(int64_t{shape.batch} * shape.heads * shape.head_dim);
  check(cudaMemcpy(out.data(), calls.back().out.data, out.size() * 2, cudaMemcpyDeviceToHost),
        "download");
  for (const uint16_t x : out) {
    if ((x & 0x7F80u) == 0x7F80u) {
      std::fprintf(stderr, "an output is not a number\n");
      std::exit(1);
    }
  }
  for (void* memory : owned) cudaFree(memory);
  return {ms * 1e3 / (rounds * copies), cache_bytes + exact_bytes};
}

}  // namespace

int main(int argc, char** argv) {
  std::string json_path, only, only_shape;
  bool parts = false, more = false;
  int replays = 15;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--json") == 0) json_path = argv[i + 1];
    if (std::strcmp(argv[i], "--only") == 0) only = argv[i + 1];
    if (std::strcmp(argv[i], "--shape") == 0) only_shape = argv[i + 1];
    if (std::strcmp(argv[i], "--replays") == 0) replays = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--more") == 0) more = std::strcmp(argv[i + 1], "1") == 0;
    if (std::strcmp(argv[i], "--parts") == 0) parts = std::strcmp(argv[i + 1], "1") == 0;
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "no usable GPU");
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  const int multiprocessors = properties.multiProcessorCount;
  const double bandwidth = measure_read_bandwidth(stream, multiprocessors);
  std::printf("%s, %d multiprocessors, L2 %.0f MB, read %.2f TB/s\n", properties.name,
              multiprocessors, properties.l2CacheSize / 1e6, bandwidth / 1e12);
  std::printf("%-28s %-16s %10s %10s %8s %7s\n", "batch heads kv dim tokens", "codes", "us", "MB",
              "GB/s", "% read");
  std::string json = "{\"device\": \"" + std::string(properties.name) +
                     "\", \"read_bytes_per_second\": " + std::to_string(bandwidth) +
                     ", \"results\": [";
  bool first = true;
  for (const Shape& shape : more ? std::span<const Shape>(kMoreShapes) : kShapes) {
    const std::string text = std::to_string(shape.batch) + " " + std::to_string(shape.heads) + " " +
                             std::to_string(shape.kv_heads) + " " + std::to_string(shape.head_dim) +
                             " " + std::to_string(shape.tokens);
    if (text.find(only_shape) == std::string::npos) continue;
    for (const Recipe& recipe : kRecipes) {
      if (!only.empty() && std::string(recipe.name).find(only) == std::string::npos) continue;
      const Result result =
          run(shape, recipe, kWhole, properties.l2CacheSize, multiprocessors, stream, replays);
      const double rate = static_cast<double>(result.bytes) / (result.microseconds * 1e-6);
      std::printf("%-28s %-16s %10.2f %10.1f %8.0f %6.1f%%\n", text.c_str(), recipe.name,
                  result.microseconds, static_cast<double>(result.bytes) / 1e6, rate / 1e9,
                  100 * rate / bandwidth);
      for (const Part& part : kParts) {
        if (!parts || recipe.codebook != quant::CodebookKind::kScalar) break;
        const Result alone =
            run(shape, recipe, part, properties.l2CacheSize, multiprocessors, stream, replays);
        std::printf("    %-41s %10.2f\n", part.name, alone.microseconds);
      }
      std::fflush(stdout);
      char line[512];
      std::snprintf(line, sizeof line,
                    "%s{\"batch\": %d, \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, "
                    "\"tokens\": %d, \"codes\": \"%s\", \"us\": %.3f, \"bytes\": %lld}",
                    first ? "" : ", ", shape.batch, shape.heads, shape.kv_heads, shape.head_dim,
                    shape.tokens, recipe.name, result.microseconds,
                    static_cast<long long>(result.bytes));
      json += line;
      first = false;
    }
  }
  json += "]}\n";
  if (!json_path.empty()) {
    std::FILE* const file = std::fopen(json_path.c_str(), "w");
    if (file == nullptr) {
      std::fprintf(stderr, "cannot write %s\n", json_path.c_str());
      return 1;
    }
    std::fputs(json.c_str(), file);
    std::fclose(file);
  }
  return 0;
}
