#include "turboquant/cuda/encode_append.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/append_cases.hpp"
#include "append_twin.hpp"
#include "device_buffer.hpp"
#include "device_layer.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::AppendStorage;
using testing_support::AppendTwin;
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
  AppendTwin twin(spec, kBatch, cache::ElementType::kBFloat16, 40);
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

class CudaEncodeAppendPrompt : public GpuTest, public ::testing::WithParamInterface<int> {};

// A prompt of many blocks at once, in the layout of a projection: [B, T, H, D] seen as
// [B, H, T, D]; then a chunk whose tokens take ring slots that its own jobs read. All of it read
// back. With so many heads a thread block has several jobs, and of both rows, and several entries.
TEST_P(CudaEncodeAppendPrompt, EncodesAPromptAndALongChunk) {
  const int head_dim = GetParam();
  constexpr int kBatch = 2, kHeads = 64;
  const cache::LayerSpec spec = {.head_dim = head_dim, .num_kv_heads = kHeads};
  AppendTwin twin(spec, kBatch, cache::ElementType::kBFloat16, 100);
  for (const int64_t tokens : {900, 300}) {
    const std::array<int64_t, 4> shape = {kBatch, tokens, kHeads, head_dim};
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
    twin.expect_equal_numbers();
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaEncodeAppendPrompt, ::testing::Values(64, 80, 128, 256),
                         ::testing::PrintToStringParamName());

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
  refuses(
      [](auto& p) { p.spec.codebook = quant::CodebookKind::kVector; });  // tables of a scalar one
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
