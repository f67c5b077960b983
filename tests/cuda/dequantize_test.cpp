#include "turboquant/cuda/dequantize.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/dequantize_cases.hpp"
#include "device_buffer.hpp"
#include "device_layer.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::check_cuda;
using testing_support::DequantizeCase;
using testing_support::DeviceBuffer;
using testing_support::DeviceStorage;
using testing_support::DeviceTables;
using testing_support::DeviceTensor;
using testing_support::GpuTest;
using testing_support::Tensor;

class CudaDequantize : public GpuTest, public ::testing::WithParamInterface<int> {};

// Random layers and ranges; every number, and the bytes between rows.
TEST_P(CudaDequantize, GivesTheNumbersOfTheCpu) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    AppendCase layer({.head_dim = GetParam(), .seed = 55000 + 1000 * seed + GetParam()});
    const DeviceTables tables(layer.spec());
    for (int step = 0; step < 5; ++step) {
      if (step == 3) layer.crop();
      layer.append_cpu();
      DequantizeCase range(layer, 100 * seed + step);
      bool guards_intact = false;
      const std::string difference =
          range.compare([&](const DequantizeCase& c, Tensor& keys, Tensor& values) {
            const DeviceStorage storage(layer, layer.storage());
            const DeviceBuffer<int32_t> page_table(c.page_table), rows(c.rows);
            const DeviceTensor out_keys(keys), out_values(values);
            check_cuda(dequantize({.spec = layer.spec(),
                                   .tables = tables.tables(),
                                   .exact_keys = storage.exact_keys(),
                                   .exact_values = storage.exact_values(),
                                   .smoothing = storage.smoothing(),
                                   .pages = storage.pages(),
                                   .page_table = page_table.data(),
                                   .page_columns = c.page_columns,
                                   .rows = rows.data(),
                                   .past_tokens = c.past_tokens,
                                   .first_position = c.first_position,
                                   .out_keys = out_keys.view(),
                                   .out_values = out_values.view()},
                                  nullptr),
                       "dequantize");
            check_cuda(cudaDeviceSynchronize(), "dequantize");
            out_keys.download_to(keys);
            out_values.download_to(values);
            guards_intact = out_keys.guards_intact() && out_values.guards_intact();
          });
      ASSERT_EQ(difference, "") << "seed " << seed << ", step " << step << ", " << layer.text();
      ASSERT_TRUE(guards_intact) << "seed " << seed << ", step " << step << ", " << layer.text();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaDequantize,
                         ::testing::ValuesIn(testing_support::kKernelHeadDims),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace turboquant::cuda
