#include "turboquant/cuda/encode_append.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/append_cases.hpp"
#include "device_buffer.hpp"
#include "device_layer.hpp"
#include "turboquant/cache/layer_store.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::AppendStorage;
using testing_support::check_cuda;
using testing_support::DeviceBuffer;
using testing_support::DeviceStorage;
using testing_support::DeviceTables;
using testing_support::DeviceTensor;
using testing_support::GpuTest;
using testing_support::Tensor;

class CudaEncodeAppend : public GpuTest, public ::testing::WithParamInterface<int> {};

// Random layers, widths, types, strides, ragged rows and hard numbers; every byte of pages, exact
// buffers, smoothing and counters, written or not.
TEST_P(CudaEncodeAppend, StoresTheBytesOfTheCpuEncoder) {
  for (uint32_t seed = 0; seed < 25; ++seed) {
    AppendCase layer({.head_dim = GetParam(), .seed = 77000 + 1000 * seed + GetParam()});
    const DeviceTables tables(layer.spec());
    for (int step = 0; step < 6; ++step) {
      if (step == 4) layer.crop();
      bool guards_intact = false;
      const std::string difference = layer.append(
          [&](const AppendCase& c, const AppendCase::Chunk& chunk, AppendStorage& storage) {
            const DeviceStorage device(c, storage);
            const DeviceTensor keys(chunk.keys), values(chunk.values);
            const DeviceBuffer<int32_t> rows(chunk.rows);
            std::vector<int32_t> host_jobs = chunk.jobs;  // with room for more
            host_jobs.resize(host_jobs.size() + 2 * cache::tables::kJobColumns, 0);
            const DeviceBuffer<int32_t> jobs(host_jobs);
            check_cuda(encode_append({.spec = c.spec(),
                                      .tables = tables.tables(),
                                      .key_states = keys.view(),
                                      .value_states = values.view(),
                                      .exact_keys = device.exact_keys(),
                                      .exact_values = device.exact_values(),
                                      .smoothing = device.smoothing(),
                                      .pages = device.pages(),
                                      .rows = rows.data(),
                                      .jobs = jobs.data(),
                                      .num_jobs = chunk.num_jobs() + 2,
                                      .may_fit_smoothing = chunk.fits,
                                      .counters = device.counters()},
                                     nullptr),
                       "encode_append");
            check_cuda(cudaDeviceSynchronize(), "encode_append");
            device.download_to(storage);
            guards_intact =
                device.guards_intact() && keys.guards_intact() && values.guards_intact();
          });
      ASSERT_EQ(difference, "") << "seed " << seed << ", step " << step << ", " << layer.text();
      ASSERT_TRUE(guards_intact) << "seed " << seed << ", step " << step << ", " << layer.text();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaEncodeAppend,
                         ::testing::ValuesIn(testing_support::kKernelHeadDims),
                         ::testing::PrintToStringParamName());

// What a test needs of a layer on the host and its twin on the device.
class Twin {
 public:
  Twin(const cache::LayerSpec& spec, int batch, cache::ElementType type, int64_t pages)
      : spec_(spec),
        type_(type),
        store_(spec, batch, type, kPagesPerSlab),
        tables_(spec),
        exact_keys_(store_exact_bytes()),
        exact_values_(store_exact_bytes()),
        smoothing_(std::vector<float>(int64_t{batch} * spec.num_kv_heads * spec.head_dim, 1.0f)),
        counters_(std::vector<int64_t>{0, 0}) {
    const int64_t slab_bytes = kPagesPerSlab * page_bytes();
    std::vector<std::byte*> addresses;
    for (int64_t page = 0; page < pages; page += kPagesPerSlab) {
      slabs_.emplace_back(slab_bytes);
      addresses.push_back(slabs_.back().data());
    }
    addresses_ = DeviceBuffer<std::byte*>(addresses);
  }

  EncodeAppendParams params(const cache::TensorView& keys, const cache::TensorView& values,
                            const int32_t* rows, const int32_t* jobs, int64_t num_jobs) const {
    const auto exact = [&](const DeviceBuffer<std::byte>& memory) {
      return cache::TensorView::contiguous(memory.data(), type_, store_.exact_keys().shape);
    };
    return {.spec = spec_,
            .tables = tables_.tables(),
            .key_states = keys,
            .value_states = values,
            .exact_keys = exact(exact_keys_),
            .exact_values = exact(exact_values_),
            .smoothing = smoothing_.data(),
            .pages = {.slabs = addresses_.data(),
                      .num_slabs = static_cast<int64_t>(slabs_.size()),
                      .pages_per_slab = kPagesPerSlab,
                      .page_bytes = page_bytes(),
                      .block_bytes = spec_.block_layout().block_bytes()},
            .rows = rows,
            .jobs = jobs,
            .num_jobs = num_jobs,
            .may_fit_smoothing = true,
            .counters = counters_.data()};
  }

  // Whether the host's committed tokens are the device's bytes.
  void expect_equal() const {
    std::vector<std::vector<std::byte>> slabs;
    for (const auto& slab : slabs_) slabs.push_back(slab.download());
    const std::vector<std::byte> keys = exact_keys_.download(), values = exact_values_.download();
    const cache::PageTable& table = store_.table();
    const cache::BlockLayout layout = spec_.block_layout();
    const int64_t row_bytes = spec_.head_dim * cache::element_bytes(type_);
    for (int b = 0; b < table.batch_size(); ++b) {
      for (const cache::PageEntry& entry : table.entries(b)) {
        ASSERT_EQ(entry.tokens, cache::kBlockTokens);
        const std::byte* const page =
            slabs[entry.page / kPagesPerSlab].data() + entry.page % kPagesPerSlab * page_bytes();
        for (int head = 0; head < spec_.num_kv_heads; ++head) {
          ASSERT_EQ(std::memcmp(page + head * layout.block_bytes(),
                                store_.pages().block(entry.page, head), layout.block_bytes()),
                    0)
              << "row " << b << ", page " << entry.page << ", head " << head;
        }
      }
      for (int64_t t = 0; t < table.length(b); ++t) {
        if (t >= spec_.sink_tokens && t < table.exact_begin(b)) continue;
        for (int head = 0; head < spec_.num_kv_heads; ++head) {
          const std::byte* const row =
              store_.exact_keys().row(b, head, spec_.exact_layout().slot(t));
          const int64_t at = row - static_cast<const std::byte*>(store_.exact_keys().data);
          ASSERT_EQ(std::memcmp(keys.data() + at, row, row_bytes), 0) << "token " << t;
          ASSERT_EQ(std::memcmp(values.data() + at,
                                static_cast<const std::byte*>(store_.exact_values().data) + at,
                                row_bytes),
                    0)
              << "token " << t;
        }
      }
    }
    const std::vector<float> smoothing = smoothing_.download();
    ASSERT_EQ(std::memcmp(smoothing.data(), store_.smoothing(), smoothing.size() * sizeof(float)),
              0);
  }

  cache::LayerStore& store() { return store_; }

 private:
  static constexpr int64_t kPagesPerSlab = 5;
  int64_t page_bytes() const { return spec_.block_layout().page_bytes(spec_.num_kv_heads); }
  int64_t store_exact_bytes() const {
    const auto& shape = store_.exact_keys().shape;
    return shape[0] * shape[1] * shape[2] * shape[3] * cache::element_bytes(type_);
  }

  cache::LayerSpec spec_;
  cache::ElementType type_;
  cache::LayerStore store_;
  DeviceTables tables_;
  DeviceBuffer<std::byte> exact_keys_, exact_values_;
  DeviceBuffer<float> smoothing_;
  DeviceBuffer<int64_t> counters_;
  std::vector<DeviceBuffer<std::byte>> slabs_;
  DeviceBuffer<std::byte*> addresses_;
};

std::vector<int32_t> ints_of(const std::vector<cache::EncodeJob>& jobs, size_t capacity) {
  std::vector<int32_t> ints(capacity * cache::tables::kJobColumns, 0);
  std::memcpy(ints.data(), jobs.data(), jobs.size() * sizeof(cache::EncodeJob));
  return ints;
}

class CudaEncodeAppendGraph : public GpuTest {};

// One captured launch, replayed for 300 steps whose lengths and jobs change on the device.
TEST_F(CudaEncodeAppendGraph, ReplaysWithGrowingLengths) {
  const cache::LayerSpec spec = {.head_dim = 128, .num_kv_heads = 2};
  constexpr int kBatch = 3, kSteps = 300;
  Twin twin(spec, kBatch, cache::ElementType::kBFloat16, 40);
  const std::array<int64_t, 4> shape = {kBatch, 2, 1, 128};
  DeviceTensor keys(Tensor(cache::ElementType::kBFloat16, shape));
  DeviceTensor values(Tensor(cache::ElementType::kBFloat16, shape));
  DeviceBuffer<int32_t> rows(kBatch * cache::tables::kRowColumns);
  DeviceBuffer<int32_t> jobs(kBatch * cache::tables::kJobColumns);
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  ASSERT_EQ(encode_append(twin.params(keys.view(), values.view(), rows.data(), jobs.data(), kBatch),
                          stream),
            cudaSuccess);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  for (int step = 0; step < kSteps; ++step) {
    const Tensor k = Tensor::random(cache::ElementType::kBFloat16, shape, 2 * step, 1.0f);
    const Tensor v = Tensor::random(cache::ElementType::kBFloat16, shape, 2 * step + 1);
    // Rows start at different steps.
    std::vector<int32_t> counts;
    for (int b = 0; b < kBatch; ++b) counts.push_back(step >= 20 * b ? 1 : 0);
    const cache::AppendPlan plan = twin.store().table().plan_append(counts);
    rows.upload(twin.store().table().export_rows(counts));
    jobs.upload(ints_of(plan.jobs, kBatch));
    check_cuda(
        cudaMemcpy(keys.view().data, k.bytes().data(), k.bytes().size(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    check_cuda(
        cudaMemcpy(values.view().data, v.bytes().data(), v.bytes().size(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    check_cuda(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    check_cuda(cudaStreamSynchronize(stream), "replay");
    twin.store().append(k.view(), v.view(), counts, serial());
  }
  twin.expect_equal();
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// A prompt of many blocks at once, in the layout of a projection: [B, T, H, D] seen as
// [B, H, T, D]; then a chunk whose tokens take ring slots that its own jobs read.
TEST_F(CudaEncodeAppendGraph, EncodesAPromptAndALongChunk) {
  for (const int head_dim : {64, 80, 128, 256}) {
    const cache::LayerSpec spec = {.head_dim = head_dim, .num_kv_heads = 4};
    constexpr int kBatch = 2;
    Twin twin(spec, kBatch, cache::ElementType::kBFloat16, 200);
    for (const int64_t tokens : {4000, 500}) {
      const std::array<int64_t, 4> shape = {kBatch, tokens, 4, head_dim};
      const auto projected = [](cache::TensorView view) {
        std::swap(view.shape[1], view.shape[2]);
        std::swap(view.strides[1], view.strides[2]);
        return view;
      };
      Tensor k = Tensor::random(cache::ElementType::kBFloat16, shape, head_dim, 1.0f);
      Tensor v = Tensor::random(cache::ElementType::kBFloat16, shape, head_dim + 1);
      const DeviceTensor keys(k), values(v);
      const std::vector<int32_t> counts = {static_cast<int32_t>(tokens),
                                           static_cast<int32_t>(tokens - 37)};
      const cache::AppendPlan plan = twin.store().table().plan_append(counts);
      const DeviceBuffer<int32_t> rows(twin.store().table().export_rows(counts));
      const DeviceBuffer<int32_t> jobs(ints_of(plan.jobs, plan.jobs.size()));
      ASSERT_EQ(
          encode_append(twin.params(projected(keys.view()), projected(values.view()), rows.data(),
                                    jobs.data(), static_cast<int64_t>(plan.jobs.size())),
                        nullptr),
          cudaSuccess);
      check_cuda(cudaDeviceSynchronize(), "encode_append");
      twin.store().append(projected(k.view()), projected(v.view()), counts, threads());
      twin.expect_equal();
    }
  }
}

// The host's checks need no GPU.
TEST(CudaEncodeAppendChecks, RefuseWhatTheKernelsDoNotTake) {
  const cache::LayerSpec spec = {.head_dim = 64, .num_kv_heads = 2};
  const cache::BlockLayout layout = spec.block_layout();
  std::vector<std::byte> memory(codec_tables_bytes(spec));
  Tensor chunk(cache::ElementType::kFloat16, {1, 2, 3, 64});
  Tensor exact(cache::ElementType::kFloat16, {1, 2, spec.exact_layout().capacity(), 64});
  float smoothing = 0;
  int64_t counters = 0;
  int32_t table = 0;
  const EncodeAppendParams good = {
      .spec = spec,
      .tables = codec_tables_at(spec, memory.data()),
      .key_states = chunk.view(),
      .value_states = chunk.view(),
      .exact_keys = exact.view(),
      .exact_values = exact.view(),
      .smoothing = &smoothing,
      .pages = {.page_bytes = layout.page_bytes(2), .block_bytes = layout.block_bytes()},
      .rows = &table,
      .jobs = &table,
      .num_jobs = 1,
      .counters = &counters};
  EXPECT_NO_THROW(check_encode_append(good));
  const auto refuses = [&](auto change) {
    EncodeAppendParams bad = good;
    change(bad);
    EXPECT_THROW(check_encode_append(bad), InvalidArgument);
    EXPECT_EQ(encode_append(bad, nullptr), cudaErrorInvalidValue);
  };
  refuses([](auto& p) { p.spec.head_dim = 512; });
  refuses([](auto& p) { p.spec.head_dim = 32; });
  refuses([](auto& p) { p.spec.k_bits = 9; });
  refuses([](auto& p) { p.key_states.shape[2] = 4; });
  refuses([](auto& p) { p.value_states.type = cache::ElementType::kFloat32; });
  refuses([](auto& p) { p.smoothing = nullptr; });
  refuses([](auto& p) { p.counters = nullptr; });
  refuses([](auto& p) { p.rows = nullptr; });
  refuses([](auto& p) { p.jobs = nullptr; });
  refuses([](auto& p) { p.num_jobs = -1; });
  refuses([](auto& p) { p.num_jobs = INT32_MAX; });
  refuses([](auto& p) { p.pages.block_bytes += 16; });
  refuses([](auto& p) { p.tables.values.cells = nullptr; });
}

}  // namespace
}  // namespace turboquant::cuda
