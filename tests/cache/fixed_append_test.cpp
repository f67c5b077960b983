#include "turboquant/cache/fixed_append.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "../support/fixed_tables.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

using testing_support::FixedRows;
using testing_support::used_jobs;

LayerSpec spec_of(int sinks, int window) {
  return {.head_dim = 64,
          .num_kv_heads = 1,
          .center_keys = window > 0,
          .smooth_keys = window > 0,
          .sink_tokens = sinks,
          .window_tokens = window};
}

std::vector<int32_t> vector_of(const std::vector<EncodeJob>& jobs) {
  std::vector<int32_t> integers;
  for (const EncodeJob& job : jobs) {
    integers.insert(integers.end(), {job.row, job.first_token, job.tokens, job.page,
                                     job.page_offset, job.fit_smoothing});
  }
  return integers;
}

struct Case {
  int sinks, window;
};

class FixedAppend : public ::testing::TestWithParam<Case> {};

// Ragged chunks and crops: plans, entries and rows are the PageTable's at every step.
TEST_P(FixedAppend, IsThePageTable) {
  const LayerSpec spec = spec_of(GetParam().sinks, GetParam().window);
  for (uint32_t seed = 0; seed < 40; ++seed) {
    std::mt19937 random(seed);
    const int batch = 1 + static_cast<int>(random() % 3);
    PageTable truth(batch, spec.sink_tokens, spec.window_tokens);
    FixedRows fixed(spec, batch, 5000);
    for (int step = 0; step < 30; ++step) {
      const int64_t tokens = std::vector<int>{1, 1, 1, 2, 63, 64, 65, 130, 333}[random() % 9];
      std::vector<int32_t> counts(batch);
      for (int32_t& count : counts) {
        count = static_cast<int32_t>(random() % 4 ? tokens : random() % (tokens + 1));
      }
      const AppendPlan plan = truth.plan_append(counts);
      fixed.place(counts, tokens);
      fixed.adopt_pages(plan.jobs);
      std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(tokens);
      const std::vector<int32_t> before = fixed.rows();
      plan_append(fixed.params(tokens), planned, jobs);
      ASSERT_EQ(fixed.rows(), before);
      ASSERT_EQ(planned, truth.export_rows(counts));
      ASSERT_EQ(vector_of(used_jobs(jobs)), vector_of(plan.jobs));
      commit_append(fixed.params(tokens), planned);
      truth.commit(plan);
      if (random() % 5 == 0) {
        std::vector<int64_t> lengths;
        for (int b = 0; b < batch; ++b) {
          lengths.push_back(truth.length(b) - static_cast<int64_t>(random() % 200));
          lengths.back() = std::max<int64_t>(lengths.back(), 0);
          truth.crop(b, lengths.back());
        }
        crop(fixed.params(0), lengths);
      }
      ASSERT_EQ(fixed.rows(), truth.export_rows());
      for (int b = 0; b < batch; ++b) ASSERT_EQ(fixed.entries(b), truth.entries(b));
    }
  }
}

// The bound that sizes `jobs` is met and never exceeded.
TEST_P(FixedAppend, HasAsManyPiecesAsTheBoundAtMost) {
  const ExactLayout exact{GetParam().sinks, GetParam().window};
  const LayerSpec spec = spec_of(GetParam().sinks, GetParam().window);
  for (const int64_t tokens : {1, 2, 63, 64, 65, 66, 128, 129, 200}) {
    int64_t most = 0;
    for (int32_t past = 0; past < 400; ++past) {
      PageTable table(1, spec.sink_tokens, spec.window_tokens);
      const std::vector<int32_t> first = {past}, next = {static_cast<int32_t>(tokens)};
      table.commit(table.plan_append(first));
      most = std::max<int64_t>(most, table.plan_append(next).jobs.size());
    }
    EXPECT_EQ(most, max_append_pieces(exact, tokens)) << tokens << " tokens";
  }
  EXPECT_EQ(max_append_pieces(exact, 0), 0);
}

TEST_P(FixedAppend, LeavesPaddingOut) {
  const LayerSpec spec = spec_of(GetParam().sinks, GetParam().window);
  FixedRows fixed(spec, 3, 1000);
  fixed.positions()[0 * tables::kPositionColumns] = 100;  // first real position of each row
  fixed.positions()[1 * tables::kPositionColumns] = 64;
  const auto step = [&](int64_t tokens) {
    std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(tokens);
    plan_append(fixed.params(tokens), planned, jobs);
    commit_append(fixed.params(tokens), planned);
    std::vector<int32_t> lengths;
    for (int b = 0; b < 3; ++b) lengths.push_back(fixed.rows()[b * tables::kRowColumns]);
    return lengths;
  };
  EXPECT_EQ(step(64), (std::vector<int32_t>{0, 0, 64}));
  EXPECT_EQ(step(64), (std::vector<int32_t>{28, 64, 128}));
  EXPECT_EQ(step(1), (std::vector<int32_t>{29, 65, 129}));
  EXPECT_EQ(fixed.positions()[tables::kPositionSeen], 129);
}

INSTANTIATE_TEST_SUITE_P(Windows, FixedAppend,
                         ::testing::Values(Case{4, 64}, Case{0, 64}, Case{5, 128}, Case{4, 0},
                                           Case{0, 0}),
                         [](const auto& info) {
                           return std::to_string(info.param.sinks) + "Sinks" +
                                  std::to_string(info.param.window) + "Window";
                         });

// The host throws; the function that the device runs takes what there is room for.
TEST(FixedAppendCapacity, IsNeverExceeded) {
  const LayerSpec spec = spec_of(4, 64);
  FixedRows fixed(spec, 2, 300);
  fixed.positions()[tables::kPositionFirst] = 5;
  std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(299);
  plan_append(fixed.params(299), planned, jobs);
  commit_append(fixed.params(299), planned);
  jobs = fixed.new_jobs(3);
  const std::vector<int32_t> before = planned;
  EXPECT_THROW(plan_append(fixed.params(3), planned, jobs), InvalidArgument);
  EXPECT_EQ(planned, before);
  for (int step = 0; step < 100; ++step) {
    const FixedTables tables = fixed.tables(3);
    for (int b = 0; b < 2; ++b) plan_append_row(tables, b, planned.data(), jobs.data());
    for (const EncodeJob& job : used_jobs(jobs)) {
      EXPECT_LE(job.first_token + job.tokens, 300);
      EXPECT_LT(job.page, fixed.page_table().size() / 2);
    }
    for (int b = 0; b < 2; ++b) commit_append_row(tables, b, planned.data());
    EXPECT_LE(fixed.rows()[0], 300);
    EXPECT_LE(fixed.rows()[tables::kRowColumns], 300);
  }
  EXPECT_EQ(fixed.rows()[0], 300);
  EXPECT_EQ(fixed.positions()[tables::kPositionRefused], 300 - 6);
  EXPECT_EQ(fixed.positions()[tables::kPositionColumns + tables::kPositionRefused], 300 - 1);
}

TEST(FixedAppendCapacity, CountsTheEntriesOfAFullRow) {
  const LayerSpec spec = spec_of(4, 64);
  FixedRows fixed(spec, 1, 5000);
  const std::vector<int32_t> all = {5000};
  const PageTable empty(1, 4, 64);
  const auto entries = static_cast<int64_t>(empty.plan_append(all).jobs.size());
  EXPECT_EQ(entries_of_full_rows(fixed.params(0)), std::vector<int64_t>{entries});
  // Cropped in the middle of a page: its unused slots are lost to the row.
  std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(1000);
  plan_append(fixed.params(1000), planned, jobs);
  commit_append(fixed.params(1000), planned);
  EXPECT_EQ(entries_of_full_rows(fixed.params(0)), std::vector<int64_t>{entries});
  const std::vector<int64_t> length = {4 + 64 + 1};
  crop(fixed.params(0), length);
  EXPECT_EQ(entries_of_full_rows(fixed.params(0)), std::vector<int64_t>{entries + 1});
}

TEST(FixedAppendChecks, RefuseTablesThatDoNotFit) {
  const LayerSpec spec = spec_of(4, 64);
  const auto refuses = [&](auto change, bool at_commit = false) {
    FixedRows fixed(spec, 2, 1000);
    std::vector<int32_t> planned = fixed.new_planned(), jobs = fixed.new_jobs(200);
    plan_append(fixed.params(200), planned, jobs);
    FixedAppendParams params = fixed.params(200);
    change(params, planned, jobs);
    const std::vector<int32_t> before = fixed.rows();
    if (at_commit) {
      EXPECT_THROW(commit_append(params, planned), InvalidArgument);
    } else {
      EXPECT_THROW(plan_append(params, planned, jobs), InvalidArgument);
    }
    EXPECT_EQ(fixed.rows(), before);
  };
  refuses([](auto& p, auto&, auto&) { p.max_tokens = 0; });
  refuses([](auto& p, auto&, auto&) { p.max_tokens = 100000; });  // more than the entries hold
  refuses([](auto& p, auto&, auto&) { p.chunk_tokens = -1; });
  refuses([](auto& p, auto&, auto&) { p.chunk_tokens = 400; });  // jobs have no room
  refuses([](auto& p, auto&, auto&) { p.positions = p.positions.first(3); });
  refuses([](auto& p, auto&, auto&) { p.positions[0] = -1; });
  refuses([](auto& p, auto&, auto&) { p.positions[1] = INT32_MAX; });
  refuses([](auto& p, auto&, auto&) { p.page_table = p.page_table.first(3); });
  refuses([](auto& p, auto&, auto&) { p.rows[0] = 1001; });
  refuses([](auto& p, auto&, auto&) { p.rows[tables::kRowNewTokens] = 1; });
  refuses([](auto&, auto& planned, auto&) { planned.pop_back(); });
  refuses([](auto&, auto& planned, auto&) { planned.pop_back(); }, true);
  refuses([](auto&, auto& planned, auto&) { planned[0] = 7; }, true);
  refuses([](auto&, auto& planned, auto&) { planned[tables::kRowNewTokens] = 201; }, true);
  refuses([](auto&, auto& planned, auto&) { planned[tables::kRowNewTokens] = -1; }, true);
  FixedRows fixed(spec, 2, 1000);
  const std::vector<int64_t> too_long = {0, 1}, too_few = {0};
  EXPECT_THROW(crop(fixed.params(0), too_long), InvalidArgument);
  EXPECT_THROW(crop(fixed.params(0), too_few), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
