// Compiled without FMA contraction and without type-based aliasing (tests/CMakeLists.txt).
#include "dequantize_block.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "../support/dequantize_cases.hpp"
#include "encode_emulation.hpp"
#include "host_tables.hpp"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/cuda/supported.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::DequantizeCase;
using testing_support::HostTables;
using testing_support::SharedMemory;

template <int kDim>
void emulate(const detail::DequantizeArgs& args, bool backwards) {
  using Plan = detail::DequantizePlan<kDim>;
  using Block = detail::DequantizeBlock<kDim>;
  const auto each_place = [&args](int items, auto run) {
    for (int row = 0; row < args.batch; ++row) {
      for (int i = 0; i < items * args.num_heads * 2; ++i) {
        run(row, detail::BlockPlace{i / 2 / args.num_heads, i / 2 % args.num_heads, i % 2});
      }
    }
  };
  each_place(args.workers, [&](int row, detail::BlockPlace place) {
    const auto bytes_of = [](const detail::DequantizeSideArgs& side) {
      return Plan::bytes(side.bits, static_cast<int>(cache::element_bytes(side.out_type)));
    };
    SharedMemory memory(std::max(bytes_of(args.sides[0]), bytes_of(args.sides[1])),
                        Plan::kExchangedBytes);
    std::vector<Block> threads;
    for (int t = 0; t < Plan::kThreads; ++t) {
      threads.emplace_back(args, memory.data(), row, place, t);
    }
    if (threads[0].empty()) return;
    const auto each = testing_support::each_of(threads, backwards);
    detail::dequantize_steps<kDim>(threads[0], each, each, testing_support::HostCopies{});
  });
  each_place(detail::UnpagedBlock::parts(args), [&](int row, detail::BlockPlace place) {
    for (int t = 0; t < Plan::kThreads; ++t) {
      detail::UnpagedBlock(args, row, place, t, Plan::kThreads).run();
    }
  });
}

// Blocks have up to max_entries entries each.
void emulate_dequantize(const DequantizeParams& params, bool backwards, int max_entries) {
  check_dequantize(params);
  detail::DequantizeArgs args = detail::make_dequantize_args(params);
  args.workers = (args.page_columns + max_entries - 1) / max_entries;
  switch (params.spec.head_dim) {
#define TQ_CASE(dim) \
  case dim:          \
    return emulate<dim>(args, backwards);
    TQ_CODEC_HEAD_DIMS(TQ_CASE)
#undef TQ_CASE
  }
}

class DequantizeBlock : public ::testing::TestWithParam<int> {};

TEST_P(DequantizeBlock, GivesTheNumbersOfTheCpu) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    AppendCase layer({.head_dim = GetParam(), .seed = 1000 * seed + GetParam()});
    const HostTables tables(layer.spec());
    for (int step = 0; step < 4; ++step) {
      if (step == 2) layer.crop();
      layer.append_cpu();
      DequantizeCase range(layer, 100 * seed + step);
      const std::string difference =
          range.compare([&](const DequantizeCase& c, testing_support::Tensor& keys,
                            testing_support::Tensor& values) {
            auto& storage = layer.storage();
            const std::vector<std::byte*> slabs =
                layer.slab_addresses(storage.pages.data(), storage.pages.size());
            emulate_dequantize({.spec = layer.spec(),
                                .tables = tables.tables(),
                                .exact_keys = layer.exact_view(storage.exact_keys.data()),
                                .exact_values = layer.exact_view(storage.exact_values.data()),
                                .smoothing = storage.smoothing.data(),
                                .pages = layer.pages_view(slabs.data(), storage.pages.size()),
                                .page_table = c.page_table.data(),
                                .page_columns = c.page_columns,
                                .rows = c.rows.data(),
                                .past_tokens = c.past_tokens,
                                .first_position = c.first_position,
                                .out_keys = keys.view(),
                                .out_values = values.view()},
                               step % 2 == 1, 1 + static_cast<int>(seed) % 5);
          });
      ASSERT_EQ(difference, "") << "seed " << seed << ", step " << step << ", " << layer.text();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, DequantizeBlock,
                         ::testing::ValuesIn(testing_support::kKernelHeadDims),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace turboquant::cuda
