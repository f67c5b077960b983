#include "turboquant/cuda/fixed_append.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../support/fixed_tables.hpp"
#include "append_twin.hpp"
#include "device_buffer.hpp"
#include "device_layer.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendTwin;
using testing_support::check_cuda;
using testing_support::DeviceBuffer;
using testing_support::DeviceTensor;
using testing_support::FixedRows;
using testing_support::GpuTest;
using testing_support::Tensor;

class CudaFixedAppend : public GpuTest {};

// Random tables and ragged chunks: what a thread writes for its row is what the host writes.
TEST_F(CudaFixedAppend, PlansAndCommitsAsTheHostDoes) {
  for (const auto& [sinks, window] : {std::array{4, 64}, {0, 128}, {5, 0}}) {
    cache::LayerSpec spec{.head_dim = 64, .num_kv_heads = 1};
    spec.sink_tokens = sinks;
    spec.window_tokens = window;
    spec.center_keys = spec.smooth_keys = window > 0;
    constexpr int kBatch = 150;  // more than a thread block
    FixedRows host(spec, kBatch, 400);
    for (int step = 0; step < 12; ++step) {
      const int64_t tokens = std::array{1, 65, 3, 130}[step % 4];
      std::vector<int32_t> counts;
      for (int b = 0; b < kBatch; ++b)
        counts.push_back(static_cast<int32_t>((b * 7) % (tokens + 1)));
      host.place(counts, tokens);
      DeviceBuffer<int32_t> rows(host.rows()), pages(host.page_table()),
          positions(host.positions());
      std::vector<int32_t> planned = host.new_planned(), jobs = host.new_jobs(tokens);
      DeviceBuffer<int32_t> device_planned(planned), device_jobs(jobs);
      FixedAppendParams params{.tables = host.tables(tokens),
                               .planned = device_planned.data(),
                               .jobs = device_jobs.data()};
      params.tables.rows = rows.data();
      params.tables.page_table = pages.data();
      params.tables.positions = positions.data();
      ASSERT_EQ(plan_append(params, nullptr), cudaSuccess);
      ASSERT_EQ(commit_append(params, nullptr), cudaSuccess);
      check_cuda(cudaDeviceSynchronize(), "fixed_append");
      for (int b = 0; b < kBatch; ++b) {
        cache::plan_append_row(host.tables(tokens), b, planned.data(), jobs.data());
      }
      for (int b = 0; b < kBatch; ++b) {
        cache::commit_append_row(host.tables(tokens), b, planned.data());
      }
      ASSERT_EQ(device_planned.download(), planned);
      ASSERT_EQ(device_jobs.download(), jobs);
      ASSERT_EQ(rows.download(), host.rows());
      ASSERT_EQ(pages.download(), host.page_table());
      ASSERT_EQ(positions.download(), host.positions());
      ASSERT_TRUE(device_planned.guards_intact() && device_jobs.guards_intact() &&
                  rows.guards_intact() && pages.guards_intact() && positions.guards_intact());
    }
  }
}

// One captured append, replayed as rows grow through four blocks; then beyond the capacity, where
// the stored tokens must stay as they are. The host changes nothing but the chunk in between.
TEST_F(CudaFixedAppend, ReplaysOneGraphUntilTheCacheIsFull) {
  const cache::LayerSpec spec = {.head_dim = 128, .num_kv_heads = 2};
  constexpr int kBatch = 3, kSteps = 400;
  constexpr int32_t kPadding[kBatch] = {0, 20, 40};
  AppendTwin twin(spec, kBatch, cache::ElementType::kBFloat16, 40);
  const std::array<int64_t, 4> shape = {kBatch, 2, 1, 128};
  std::vector<Tensor> chunks;
  for (int i = 0; i < 2 * kSteps; ++i) {
    chunks.push_back(Tensor::random(cache::ElementType::kBFloat16, shape, i, 1.0f));
  }
  const auto counts_at = [&](int step) {
    std::vector<int32_t> counts;
    for (const int32_t padding : kPadding) counts.push_back(step >= padding ? 1 : 0);
    return counts;
  };
  // The host's pages are the device's, so that the bytes can be compared.
  FixedRows fixed(spec, kBatch, kSteps);
  for (int b = 0; b < kBatch; ++b) {
    fixed.positions()[b * cache::tables::kPositionColumns] = kPadding[b];
  }
  {
    cache::PageTable plans(kBatch, spec.sink_tokens, spec.window_tokens);
    std::vector<cache::EncodeJob> jobs;
    for (int step = 0; step < kSteps; ++step) {
      const cache::AppendPlan plan = plans.plan_append(counts_at(step));
      plans.commit(plan);
      jobs.insert(jobs.end(), plan.jobs.begin(), plan.jobs.end());
    }
    fixed.adopt_pages(jobs);
  }
  DeviceBuffer<int32_t> rows(fixed.rows()), pages(fixed.page_table()), positions(fixed.positions());
  DeviceBuffer<int32_t> planned(fixed.new_planned()), jobs(fixed.new_jobs(1));
  FixedAppendParams params{
      .tables = fixed.tables(1), .planned = planned.data(), .jobs = jobs.data()};
  params.tables.max_tokens = 300;
  params.tables.rows = rows.data();
  params.tables.page_table = pages.data();
  params.tables.positions = positions.data();
  DeviceTensor keys(chunks[0]), values(chunks[1]);
  cudaStream_t stream;
  check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  ASSERT_EQ(plan_append(params, stream), cudaSuccess);
  ASSERT_EQ(
      encode_append(twin.params(keys.view(), values.view(), planned.data(), jobs.data(), kBatch),
                    stream),
      cudaSuccess);
  ASSERT_EQ(commit_append(params, stream), cudaSuccess);
  check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  for (int step = 0; step < kSteps; ++step) {
    const Tensor &k = chunks[2 * step], &v = chunks[2 * step + 1];
    check_cuda(
        cudaMemcpy(keys.view().data, k.bytes().data(), k.bytes().size(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    check_cuda(
        cudaMemcpy(values.view().data, v.bytes().data(), v.bytes().size(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    check_cuda(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
    check_cuda(cudaStreamSynchronize(stream), "replay");
    std::vector<int32_t> counts = counts_at(step);
    for (int b = 0; b < kBatch; ++b) {
      if (twin.store().table().length(b) == 300) counts[b] = 0;
    }
    twin.store().append(k.view(), v.view(), counts, serial());
    ASSERT_EQ(rows.download(), twin.store().table().export_rows()) << "step " << step;
  }
  twin.expect_equal();
  const std::vector<int32_t> seen = positions.download();
  for (int b = 0; b < kBatch; ++b) {
    EXPECT_EQ(seen[b * cache::tables::kPositionColumns + cache::tables::kPositionRefused],
              kSteps - kPadding[b] - 300);
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace turboquant::cuda
