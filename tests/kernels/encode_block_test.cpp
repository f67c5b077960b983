// The encode kernels, run on the CPU (encode_emulation.hpp): the bytes of the CPU encoder.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/append_cases.hpp"
#include "encode_emulation.hpp"
#include "host_tables.hpp"
#include "turboquant/cuda/encode_append.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::AppendStorage;
using testing_support::HostTables;

class EncodeBlock : public ::testing::TestWithParam<int> {};

TEST_P(EncodeBlock, StoresTheBytesOfTheCpuEncoder) {
  for (uint32_t seed = 0; seed < 15; ++seed) {
    AppendCase layer({.head_dim = GetParam(), .seed = 1000 * seed + GetParam()});
    const HostTables tables(layer.spec());
    for (int step = 0; step < 6; ++step) {
      if (step == 4) layer.crop();
      const std::string difference = layer.append(
          [&](const AppendCase& c, const AppendCase::Chunk& chunk, AppendStorage& storage) {
            const std::vector<std::byte*> slabs =
                c.slab_addresses(storage.pages.data(), storage.pages.size());
            // Room for more jobs than there are.
            std::vector<int32_t> jobs = chunk.jobs;
            jobs.resize(jobs.size() + 2 * cache::tables::kJobColumns, 0);
            cuda::EncodeAppendParams params =
                testing_support::host_params(c, chunk, storage, tables.tables(), slabs);
            params.jobs = jobs.data();
            params.num_jobs += 2;
            params.may_fit_smoothing = chunk.fits;
            testing_support::emulate_encode_append(params, step % 2 == 1, 1 + seed % 4);
          });
      ASSERT_EQ(difference, "") << "seed " << seed << ", step " << step << ", " << layer.text();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, EncodeBlock,
                         ::testing::ValuesIn(testing_support::kKernelHeadDims),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace turboquant::cuda
