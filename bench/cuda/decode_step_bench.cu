// Times what a layer of a cache of fixed capacity does in a decode step (plan_append,
// decode_attention, encode_append with the fit of the smoothing, commit_append) by graph replays,
// beside attention alone and attention with each part of the append: what appending adds.
//
//   turboquant_cuda_decode_step_bench [--replays N]
//
// Rows grow by a token a step, so that one step in 64 of a layer encodes blocks; layers are
// staggered. Llama-3.1-8B's shape: 32 layers, 32 query and 8 KV heads, d=128, bf16, 4+4 bits.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "synthetic_cache.cuh"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cuda/decode_attention.hpp"
#include "turboquant/cuda/encode_append.hpp"
#include "turboquant/cuda/fixed_append.hpp"

namespace {

using namespace turboquant;
using bench::allocate, bench::check, bench::fill_bf16, bench::fill_random, bench::fix_blocks,
    bench::time_graph, bench::upload;

constexpr int kLayers = 32, kHeads = 32, kDim = 128;
constexpr int kRoom = 1024;  // tokens that replays may add to a row

struct Layer {
  cuda::FixedAppendParams tables;
  cuda::DecodeAttentionParams attention;
  cuda::EncodeAppendParams append;
};

class Model {
 public:
  Model(int batch, int tokens) : batch_(batch) {
    std::vector<std::byte> codec(cuda::codec_tables_bytes(spec_));
    cuda::fill_codec_tables(*cache::LayerCodec::get(spec_), codec);
    codec_ = upload(codec);
    for (int i = 0; i < kLayers; ++i) layers_.push_back(make_layer(tokens + i * 2));
    check(cudaDeviceSynchronize(), "filling");
  }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  cache::TensorView tensor(int64_t heads, int64_t tokens) {
    const int64_t count = batch_ * heads * tokens * kDim;
    auto* const memory = allocate<uint16_t>(count);
    fill_bf16<<<256, 256>>>(memory, count, static_cast<uint32_t>(++tensors_));
    return cache::TensorView::contiguous(memory, cache::ElementType::kBFloat16,
                                         {batch_, heads, tokens, kDim});
  }

  Layer make_layer(int tokens) {
    const cache::BlockLayout layout = spec_.block_layout();
    const cache::ExactLayout exact = spec_.exact_layout();
    const int64_t kv_heads = spec_.num_kv_heads;
    const int paged = (tokens - spec_.sink_tokens - spec_.window_tokens) / cache::kBlockTokens *
                      cache::kBlockTokens;
    const int entries = paged / cache::kBlockTokens;
    const int columns = (tokens + kRoom) / cache::kBlockTokens + 2;
    const int64_t pages = int64_t{batch_} * columns;
    std::vector<int32_t> rows, positions(size_t(batch_) * cache::tables::kPositionColumns, 0);
    std::vector<int32_t> page_table;
    for (int b = 0; b < batch_; ++b) {
      rows.insert(rows.end(), {tokens, entries, spec_.sink_tokens + paged, 0});
      for (int e = 0; e < columns; ++e) {
        page_table.insert(page_table.end(),
                          {b * columns + e, e < entries ? int32_t{cache::kBlockTokens} : 0});
      }
    }
    const int64_t page_bytes = layout.page_bytes(spec_.num_kv_heads);
    auto* const slab = allocate<std::byte>(pages * page_bytes);
    fill_random<<<1024, 256>>>(reinterpret_cast<uint32_t*>(slab), pages * page_bytes / 4, 17u);
    fix_blocks<<<static_cast<unsigned>(pages * kv_heads), 64>>>(slab, pages * kv_heads, layout);
    auto* const smoothing =
        upload(std::vector<float>(static_cast<size_t>(batch_ * kv_heads * kDim), 1.0f));
    const int64_t jobs = batch_ * cache::max_append_pieces(exact, 1);

    Layer layer;
    layer.tables = {.tables = {.exact = exact,
                               .batch = batch_,
                               .page_columns = columns,
                               .max_tokens = tokens + kRoom,
                               .chunk_tokens = 1,
                               .rows = upload(rows),
                               .page_table = upload(page_table),
                               .positions = upload(positions)},
                    .planned = allocate<int32_t>(batch_ * cache::tables::kRowColumns),
                    .jobs = allocate<int32_t>(jobs * cache::tables::kJobColumns)};
    const cache::PagePoolView pool{.num_slabs = 1,
                                   .pages_per_slab = pages,
                                   .page_bytes = page_bytes,
                                   .block_bytes = layout.block_bytes(),
                                   .only_slab = slab};
    cuda::DecodeAttentionParams& p = layer.attention;
    p.spec = spec_;
    p.tables = cuda::codec_tables_at(spec_, codec_);
    p.query = tensor(kHeads, 1);
    p.key_states = tensor(kv_heads, 1);
    p.value_states = tensor(kv_heads, 1);
    const cache::TensorView exact_keys = tensor(kv_heads, exact.capacity());
    const cache::TensorView exact_values = tensor(kv_heads, exact.capacity());
    p.exact_keys = exact_keys;
    p.exact_values = exact_values;
    p.out = tensor(kHeads, 1);
    p.smoothing = smoothing;
    p.pages = pool;
    p.page_table = layer.tables.tables.page_table;
    p.page_columns = columns;
    p.rows = layer.tables.planned;
    p.scaling = 0.0883883f;
    p.workspace_bytes = cuda::decode_attention_workspace_bytes(p);
    p.workspace = allocate<std::byte>(p.workspace_bytes);
    layer.append = {.spec = spec_,
                    .tables = p.tables,
                    .key_states = p.key_states,
                    .value_states = p.value_states,
                    .exact_keys = exact_keys,
                    .exact_values = exact_values,
                    .smoothing = smoothing,
                    .pages = pool,
                    .rows = layer.tables.planned,
                    .jobs = layer.tables.jobs,
                    .num_jobs = jobs,
                    .counters = upload(std::vector<int64_t>(2, 0))};
    return layer;
  }

  const cache::LayerSpec spec_{.head_dim = kDim, .num_kv_heads = 8, .k_bits = 4, .v_bits = 4};
  const int batch_;
  const std::byte* codec_ = nullptr;
  int tensors_ = 0;
  std::vector<Layer> layers_;
};

// What of a step is timed.
struct Parts {
  const char* name;
  bool plan, attention, append, commit;
};
// Without a commit tables stay as they are, and without a plan its results are the last one's.
constexpr Parts kParts[] = {{"plan alone", true, false, false, false},
                            {"attention", false, true, false, false},
                            {"plan, attention", true, true, false, false},
                            {"attention, append", false, true, true, false},
                            {"plan, attention, append", true, true, true, false},
                            {"plan, attention, append, commit", true, true, true, true}};

double time_step(const Model& model, const Parts& parts, int replays, cudaStream_t stream) {
  const double ms = time_graph(stream, replays, [&] {
    for (const Layer& layer : model.layers()) {
      if (parts.plan) check(cuda::plan_append(layer.tables, stream), "plan_append");
      if (parts.attention) check(cuda::decode_attention(layer.attention, stream), "attention");
      if (parts.append) check(cuda::encode_append(layer.append, stream), "encode_append");
      if (parts.commit) check(cuda::commit_append(layer.tables, stream), "commit_append");
    }
  });
  return ms * 1e3 / kLayers;
}

}  // namespace

int main(int argc, char** argv) {
  const int replays = argc > 2 && std::strcmp(argv[1], "--replays") == 0 ? std::atoi(argv[2]) : 101;
  if (replays < 1 || replays + 3 > kRoom) {
    std::fprintf(stderr, "--replays: 1 to %d\n", kRoom - 3);
    return 2;
  }
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no usable GPU");
  std::printf("us a layer; %d layers, %d query and 8 KV heads, d=%d, 4+4 bits\n", kLayers, kHeads,
              kDim);
  for (const auto& [batch, tokens] : {std::pair{1, 2048}, {1, 11264}, {1, 32768}, {8, 2048}}) {
    const Model model(batch, tokens);
    double attention = 0.0;
    for (const Parts& parts : kParts) {
      const double us = time_step(model, parts, replays, stream);
      if (std::strcmp(parts.name, "attention") == 0) attention = us;
      std::printf("%d x %-7d %-34s %8.2f", batch, tokens, parts.name, us);
      if (parts.attention) std::printf("   %+.2f", us - attention);
      std::printf("\n");
    }
  }
  return 0;
}
