// An attention call whose memory is on the device.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "../support/attention.hpp"
#include "../support/decode_problem.hpp"
#include "device_buffer.hpp"
#include "turboquant/cuda/decode_attention.hpp"

namespace turboquant::testing_support {

using cache::ElementType;

// decode_attention or extend_attention.
struct DeviceAttention {
  int64_t (*workspace_bytes)(const cuda::DecodeAttentionParams&);
  int (*launch)(const cuda::DecodeAttentionParams&, cudaStream_t);
};

struct DeviceOptions {
  int64_t extra_columns = 3;   // of the page table, full of absurd numbers
  uint32_t shuffle_pages = 0;  // not 0: seed of a random placement of the pages
  int64_t pages_per_slab = 3;
  int64_t pool_bytes = 0;  // of one slab, whose two ends hold the pages
  ElementType out_type = ElementType::kFloat32;
};

// A case's memory on the device.
class DeviceCase {
 public:
  DeviceCase(const DeviceAttention& attention, const AttentionCase& c, const DeviceOptions& options)
      : attention_(attention), case_(c), options_(options), tables_(c) {
    const cache::LayerSpec& spec = c.store->spec();
    codec_ = DeviceBuffer<std::byte>(cuda::codec_tables_bytes(spec));
    std::vector<std::byte> codec(codec_.size());
    cuda::fill_codec_tables(*cache::LayerCodec::get(spec), codec);
    codec_.upload(codec);
    upload_pages();
    upload_tensor(query_, c.query->view());
    if (c.keys != nullptr) {
      upload_tensor(keys_, c.keys->view());
      upload_tensor(values_, c.values->view());
    }
    upload_tensor(exact_keys_, c.store->exact_keys());
    upload_tensor(exact_values_, c.store->exact_values());
    const auto& shape = c.query->view().shape;
    if (spec.smooth_keys) {
      smoothing_ = DeviceBuffer<float>(std::span<const float>(
          c.store->smoothing(), shape[0] * spec.num_kv_heads * spec.head_dim));
    }
    rows_ = DeviceBuffer<int32_t>(tables_.rows);
    if (!c.sink_logits.empty()) sink_logits_ = DeviceBuffer<float>(c.sink_logits);
    out_shape_ = Tensor(options.out_type, shape).view();
    out_ = DeviceBuffer<std::byte>(shape[0] * shape[1] * shape[2] * shape[3] *
                                   cache::element_bytes(options.out_type));
    lse_ = DeviceBuffer<float>(shape[0] * shape[1] * shape[2]);
    cuda::DecodeAttentionParams sizes = params();
    workspace_ = DeviceBuffer<std::byte>(attention_.workspace_bytes(sizes));
  }

  cuda::DecodeAttentionParams params() const {
    const auto on_device = [](cache::ConstTensorView view, const DeviceBuffer<std::byte>& buffer,
                              int64_t offset) {
      view.data = buffer.data() == nullptr ? nullptr : buffer.data() + offset;
      return view;
    };
    const cache::LayerStore& store = *case_.store;
    cuda::DecodeAttentionParams p{.spec = store.spec(),
                                  .tables = cuda::codec_tables_at(store.spec(), codec_.data()),
                                  .query = on_device(case_.query->view(), query_, 0)};
    if (case_.keys != nullptr) {
      p.key_states = on_device(case_.keys->view(), keys_, 0);
      p.value_states = on_device(case_.values->view(), values_, 0);
    }
    p.exact_keys = on_device(store.exact_keys(), exact_keys_, 0);
    p.exact_values = on_device(store.exact_values(), exact_values_, 0);
    p.smoothing = smoothing_.data();
    p.pages = pages_;
    p.page_table = page_table_.size() > 0 ? page_table_.data() : nullptr;
    p.page_columns = columns_;
    p.rows = rows_.data();
    p.sink_logits = sink_logits_.data();
    p.scaling = case_.scaling;
    p.softcap = case_.softcap;
    p.sliding_window = case_.sliding_window;
    p.out = out_shape_;
    p.out.data = out_.data();
    p.lse = lse_.data();
    p.workspace = workspace_.data();
    p.workspace_bytes = workspace_.size();
    return p;
  }

  AttentionResult run() {
    out_.poison();
    lse_.poison();
    workspace_.poison();
    check_cuda(attention_.launch(params(), nullptr), "attention");
    return download();
  }

  AttentionResult download() const {
    check_cuda(cudaDeviceSynchronize(), "attention");
    EXPECT_TRUE(out_.guards_intact() && lse_.guards_intact() && workspace_.guards_intact());
    AttentionResult result{Tensor(options_.out_type, out_shape_.shape), lse_.download()};
    const std::vector<std::byte> bytes = out_.download();
    std::memcpy(result.out.view().data, bytes.data(), bytes.size());
    return result;
  }

  // New lengths, entries and exact tokens of a store that has grown; its pages must fit.
  void refresh(const AttentionCase& c) {
    case_ = c;
    tables_ = CaseTables(c);
    upload_page_bytes();
    fill_page_table();
    rows_.upload(tables_.rows);
    update_tensor(exact_keys_, c.store->exact_keys());
    update_tensor(exact_values_, c.store->exact_values());
  }

 private:
  static int64_t tensor_bytes(const cache::ConstTensorView& view) {
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) last += (view.shape[i] - 1) * view.strides[i];
    for (int i = 0; i < 4; ++i) {
      if (view.shape[i] == 0) return 0;
    }
    return (last + 1) * cache::element_bytes(view.type);
  }
  static void upload_tensor(DeviceBuffer<std::byte>& buffer, const cache::ConstTensorView& view) {
    // Room for one element, so that an empty tensor has an address.
    buffer = DeviceBuffer<std::byte>(std::max<int64_t>(tensor_bytes(view), 16));
    update_tensor(buffer, view);
  }
  static void update_tensor(DeviceBuffer<std::byte>& buffer, const cache::ConstTensorView& view) {
    const int64_t bytes = tensor_bytes(view);
    if (bytes > 0)
      buffer.upload({static_cast<const std::byte*>(view.data), static_cast<size_t>(bytes)});
  }

  void upload_pages() {
    const cache::PagePoolView host = case_.store->pages();
    // Room for pages to come and, with pages shuffled, for gaps between them.
    num_pages_ = 2 * host.num_pages() + 8;
    place_.resize(num_pages_);
    std::iota(place_.begin(), place_.end(), 0);
    if (options_.pool_bytes > 0) {
      num_pages_ = options_.pages_per_slab = options_.pool_bytes / host.page_bytes;
      for (size_t i = 1; i < place_.size(); i += 2) place_[i] = num_pages_ - 1 - place_[i];
    }
    const int64_t slabs = (num_pages_ + options_.pages_per_slab - 1) / options_.pages_per_slab;
    if (options_.shuffle_pages != 0) {
      std::mt19937 random(options_.shuffle_pages);
      std::shuffle(place_.begin(), place_.end(), random);
    }
    std::vector<std::byte*> addresses;
    for (int64_t i = 0; i < slabs; ++i) {
      slabs_.emplace_back(options_.pages_per_slab * host.page_bytes);
      addresses.push_back(slabs_.back().data());
    }
    slab_addresses_ = DeviceBuffer<std::byte*>(addresses);
    pages_ = {.slabs = slab_addresses_.data(),
              .num_slabs = slabs,
              .pages_per_slab = options_.pages_per_slab,
              .page_bytes = host.page_bytes,
              .block_bytes = host.block_bytes};
    upload_page_bytes();
    columns_ = case_.store->table().max_entries() + options_.extra_columns;
    page_table_ = DeviceBuffer<int32_t>(
        std::max<int64_t>(1, case_.store->table().batch_size() * columns_ * 2));
    fill_page_table();
  }
  void upload_page_bytes() {
    const cache::PagePoolView host = case_.store->pages();
    for (int64_t page = 0; page < host.num_pages(); ++page) {
      const int64_t to = place_[page];
      std::byte* const at = slabs_[to / options_.pages_per_slab].data() +
                            to % options_.pages_per_slab * host.page_bytes;
      check_cuda(cudaMemcpy(at, host.page(page), host.page_bytes, cudaMemcpyHostToDevice),
                 "cudaMemcpy of a page");
    }
  }
  void fill_page_table() {
    std::vector<int32_t> table = case_.store->table().export_page_table(columns_);
    for (size_t i = 0; i < table.size(); i += 2) table[i] = static_cast<int32_t>(place_[table[i]]);
    poison_unused_entries(table, columns_, tables_.rows);
    if (!table.empty()) page_table_.upload(table);
  }

  DeviceAttention attention_;
  AttentionCase case_;
  DeviceOptions options_;
  CaseTables tables_;
  int64_t columns_ = 0, num_pages_ = 0;
  std::vector<int64_t> place_;
  std::vector<DeviceBuffer<std::byte>> slabs_;
  DeviceBuffer<std::byte*> slab_addresses_;
  cache::PagePoolView pages_;
  DeviceBuffer<std::byte> codec_, query_, keys_, values_, exact_keys_, exact_values_, out_,
      workspace_;
  DeviceBuffer<float> smoothing_, sink_logits_, lse_;
  DeviceBuffer<int32_t> page_table_, rows_;
  cache::TensorView out_shape_;
};

// The same bits in every run, and wherever the pages lie.
inline void expect_same_bits(const DeviceAttention& attention, const DecodeProblem& problem,
                             int runs, uint32_t placements) {
  const BuiltDecode built(problem);
  DeviceCase on_device(attention, built.test_case, {});
  const AttentionResult expected = on_device.run();
  const auto expect_equal = [&](const AttentionResult& result) {
    ASSERT_EQ(result.out.bytes(), expected.out.bytes());
    ASSERT_EQ(result.lse, expected.lse);
  };
  for (int i = 0; i < runs; ++i) {
    SCOPED_TRACE(i);
    expect_equal(on_device.run());
  }
  for (uint32_t seed = 1; seed <= placements; ++seed) {
    SCOPED_TRACE(seed);
    DeviceCase moved(
        attention, built.test_case,
        {.extra_columns = 100 * seed, .shuffle_pages = seed, .pages_per_slab = 1 + 5 * seed});
    expect_equal(moved.run());
  }
}

// A graph is captured once and replayed while the sequence grows.
inline void expect_replays_with_growing_lengths(const DeviceAttention& attention, int64_t queries) {
  const cache::LayerSpec spec{.head_dim = 128, .num_kv_heads = 2};
  const Tensor keys = Tensor::random(ElementType::kBFloat16, {1, 2, 1200, 128}, 1, 1.0f);
  const Tensor values = Tensor::random(ElementType::kBFloat16, {1, 2, 1200, 128}, 2);
  const Tensor query = Tensor::random(ElementType::kBFloat16, {1, 8, queries, 128}, 3);
  cache::LayerStore store(spec, 1, ElementType::kBFloat16);
  store.append(keys.tokens(0, 900), values.tokens(0, 900), {}, serial());
  AttentionCase c{.store = &store, .query = &query};
  c.scaling = 0.09f;
  DeviceCase on_device(attention, c, {.extra_columns = 20});
  // Copies may land after cudaMemcpy has returned, and this stream does not wait for them.
  const auto wait_for_copies = [] { check_cuda(cudaDeviceSynchronize(), "copies to the device"); };
  wait_for_copies();
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check_cuda(attention.launch(on_device.params(), stream), "a first launch");
  check_cuda(cudaStreamSynchronize(stream), "a first launch");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  check_cuda(attention.launch(on_device.params(), stream), "a captured launch");
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  for (int step = 0; step < 4; ++step) {
    check_cuda(cudaGraphLaunch(exec, stream), "replay");
    expect_half_precision(c, on_device.download());
    store.append(keys.tokens(900 + 70 * step, 970 + 70 * step),
                 values.tokens(900 + 70 * step, 970 + 70 * step), {}, serial());
    on_device.refresh(c);
    wait_for_copies();
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace turboquant::testing_support
