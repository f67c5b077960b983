// A whole append as a GPU carries it out for a cache of fixed capacity, thread by thread: planned
// from the tables, encoded, committed; against the CPU encoder and the host's page table.
#include "turboquant/cuda/fixed_append.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "../support/append_cases.hpp"
#include "../support/fixed_tables.hpp"
#include "encode_emulation.hpp"
#include "host_tables.hpp"

namespace turboquant::cuda {
namespace {

using testing_support::AppendCase;
using testing_support::AppendStorage;
using testing_support::FixedRows;
using testing_support::HostTables;

TEST(FixedAppendEmulation, StoresTheBytesOfTheCpuEncoder) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    AppendCase layer({.head_dim = seed % 2 ? 64 : 16, .seed = 500 + seed});
    const HostTables codec(layer.spec());
    FixedRows fixed(layer.spec(), layer.batch(), 4000);
    for (int step = 0; step < 6; ++step) {
      if (step == 4) {
        layer.crop();
        std::vector<int64_t> lengths;
        for (int b = 0; b < layer.batch(); ++b) lengths.push_back(layer.table().length(b));
        cache::crop(fixed.params(0), lengths);
      }
      const bool backwards = step % 2 == 1;
      const std::string difference = layer.append(
          [&](const AppendCase& c, const AppendCase::Chunk& chunk, AppendStorage& storage) {
            const int64_t tokens = chunk.keys.view().shape[2];
            std::vector<int32_t> counts;
            for (int b = 0; b < c.batch(); ++b) {
              counts.push_back(
                  chunk.rows[b * cache::tables::kRowColumns + cache::tables::kRowNewTokens]);
            }
            fixed.place(counts, tokens);
            fixed.adopt_pages(testing_support::used_jobs(chunk.jobs));
            std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(tokens);
            FixedAppendParams params{
                .tables = fixed.tables(tokens), .planned = planned.data(), .jobs = jobs.data()};
            check_fixed_append(params, true);
            const auto each_row = [&](auto body) {  // no row may depend on another
              for (int i = 0; i < c.batch(); ++i) body(backwards ? c.batch() - 1 - i : i);
            };
            each_row([&](int b) {
              cache::plan_append_row(params.tables, b, params.planned, params.jobs);
            });
            ASSERT_EQ(planned, chunk.rows);
            const std::vector<std::byte*> slabs =
                c.slab_addresses(storage.pages.data(), storage.pages.size());
            cuda::EncodeAppendParams encoding =
                testing_support::host_params(c, chunk, storage, codec.tables(), slabs);
            encoding.rows = planned.data();
            encoding.jobs = jobs.data();
            encoding.num_jobs = static_cast<int64_t>(jobs.size()) / cache::tables::kJobColumns;
            testing_support::emulate_encode_append(encoding, backwards);
            each_row([&](int b) { cache::commit_append_row(params.tables, b, params.planned); });
          });
      ASSERT_EQ(difference, "") << "seed " << seed << ", step " << step << ", " << layer.text();
      ASSERT_EQ(fixed.rows(), layer.table().export_rows());
    }
  }
}

TEST(FixedAppendParamsChecks, RefuseWhatTheKernelsDoNotTake) {
  std::vector<int32_t> memory(64, 0);
  const FixedAppendParams good{.tables = {.exact = {4, 64},
                                          .batch = 2,
                                          .page_columns = 3,
                                          .max_tokens = 200,
                                          .chunk_tokens = 1,
                                          .rows = memory.data(),
                                          .page_table = memory.data(),
                                          .positions = memory.data()},
                               .planned = memory.data(),
                               .jobs = memory.data()};
  EXPECT_NO_THROW(check_fixed_append(good, true));
  const auto refuses = [&](auto change, bool is_plan) {
    FixedAppendParams bad = good;
    change(bad);
    EXPECT_THROW(check_fixed_append(bad, is_plan), InvalidArgument);
  };
  refuses([](auto& p) { p.tables.max_tokens = 0; }, true);
  refuses([](auto& p) { p.tables.chunk_tokens = -1; }, true);
  refuses([](auto& p) { p.tables.page_columns = 0; }, true);
  refuses([](auto& p) { p.tables.batch = -1; }, false);
  refuses([](auto& p) { p.tables.batch = INT32_MAX; }, false);
  refuses([](auto& p) { p.tables.rows = nullptr; }, false);
  refuses([](auto& p) { p.tables.page_table = nullptr; }, true);
  refuses([](auto& p) { p.tables.positions = nullptr; }, true);
  refuses([](auto& p) { p.planned = nullptr; }, false);
  refuses([](auto& p) { p.jobs = nullptr; }, true);
  FixedAppendParams commit = good;
  commit.jobs = nullptr;
  EXPECT_NO_THROW(check_fixed_append(commit, false));
}

}  // namespace
}  // namespace turboquant::cuda
