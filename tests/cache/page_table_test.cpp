#include "turboquant/cache/page_table.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

using Tokens = std::vector<int64_t>;
constexpr int64_t kNoToken = -1;

// Storage of token ids that obeys only the tables, beside the naive truth: every row a list.
class Model {
 public:
  Model(int batch_size, int sinks, int window)
      : exact_layout_{sinks, window}, table_(batch_size, sinks, window), truth_(batch_size) {
    exact_.assign(batch_size, Tokens(exact_layout_.capacity(), kNoToken));
  }

  void append(const std::vector<int32_t>& counts) {
    const AppendPlan plan = table_.plan_append(counts);
    EXPECT_EQ(table_.plan_append(counts).jobs, plan.jobs);  // planning changed nothing
    check();
    std::vector<Tokens> chunks;
    for (const int32_t count : counts) {
      Tokens chunk(count);
      std::iota(chunk.begin(), chunk.end(), next_token_);
      next_token_ += count;
      chunks.push_back(chunk);
    }
    if (static_cast<int64_t>(pages_.size()) < plan.pages_needed) {
      pages_.resize(plan.pages_needed, Tokens(kBlockTokens, kNoToken));
    }
    const std::set<std::pair<int32_t, int32_t>> live = live_slots();
    for (const PageCopy& copy : plan.copies) {
      EXPECT_GT(table_.references(copy.from_page), 1);
      EXPECT_EQ(table_.references(copy.to_page), 0);
      pages_[copy.to_page] = pages_[copy.from_page];
    }
    std::vector<int64_t> encoded_end(counts.size(), kNoToken);
    for (const EncodeJob& job : plan.jobs) {
      for (int32_t i = 0; i < job.tokens; ++i) {
        const int32_t slot = job.page_offset + i;
        EXPECT_FALSE(live.contains({job.page, slot})) << "a job overwrites a live token";
        pages_[job.page][slot] = token_of(job.row, job.first_token + i, chunks[job.row]);
      }
      encoded_end[job.row] = job.first_token + job.tokens;
    }
    for (size_t b = 0; b < counts.size(); ++b) {
      for (int32_t i = 0; i < counts[b]; ++i) {
        const int64_t t = table_.length(b) + i;
        const bool stays = t < exact_layout_.sink_tokens || t >= encoded_end[b];
        if (stays) exact_[b][exact_layout_.slot(t)] = chunks[b][i];
      }
    }
    table_.commit(plan);
    for (size_t b = 0; b < counts.size(); ++b) {
      truth_[b].insert(truth_[b].end(), chunks[b].begin(), chunks[b].end());
    }
    EXPECT_LE(table_.high_water_pages(), plan.pages_needed);
    check();
  }

  void crop(int row, int64_t length) {
    table_.crop(row, length);
    truth_[row].resize(length);
    check();
  }

  void select(const std::vector<int64_t>& indices) {
    table_.select(indices);
    std::vector<Tokens> truth, exact;
    for (const int64_t index : indices) {
      truth.push_back(truth_[index]);
      exact.push_back(exact_[index]);
    }
    truth_ = truth;
    exact_ = exact;
    check();
  }

  void reset() {
    table_.reset();
    for (Tokens& row : truth_) row.clear();
    check();
    EXPECT_EQ(table_.high_water_pages(), 0);
  }

  // Every row's tokens are found where the tables say; counts of references are exact.
  void check() const {
    std::map<int32_t, int> references;
    const int64_t columns = table_.max_entries() + 2;
    const std::vector<int32_t> page_table = table_.export_page_table(columns);
    const std::vector<int32_t> rows = table_.export_rows();
    for (int b = 0; b < table_.batch_size(); ++b) {
      const int32_t* row = rows.data() + b * tables::kRowColumns;
      ASSERT_EQ(row[tables::kRowLength], static_cast<int64_t>(truth_[b].size()));
      Tokens found;
      const int64_t sinks = std::min<int64_t>(row[tables::kRowLength], exact_layout_.sink_tokens);
      for (int64_t t = 0; t < sinks; ++t) found.push_back(exact_[b][exact_layout_.slot(t)]);
      for (int64_t e = 0; e < columns; ++e) {
        const int32_t page = page_table[(b * columns + e) * 2];
        const int32_t tokens = page_table[(b * columns + e) * 2 + 1];
        if (e >= row[tables::kRowEntries]) {
          ASSERT_EQ(page, 0);
          ASSERT_EQ(tokens, 0);
          continue;
        }
        ASSERT_GE(tokens, 1);
        ASSERT_LE(tokens, kBlockTokens);
        ++references[page];
        found.insert(found.end(), pages_[page].begin(), pages_[page].begin() + tokens);
      }
      ASSERT_EQ(row[tables::kRowExactBegin], static_cast<int64_t>(found.size()));
      ASSERT_EQ(table_.exact_begin(b), static_cast<int64_t>(found.size()));
      const int64_t ring = row[tables::kRowLength] - row[tables::kRowExactBegin];
      ASSERT_LE(ring, std::max<int64_t>(0, exact_layout_.ring_tokens() - 1));
      for (int64_t t = row[tables::kRowExactBegin]; t < row[tables::kRowLength]; ++t) {
        found.push_back(exact_[b][exact_layout_.slot(t)]);
      }
      ASSERT_EQ(found, truth_[b]) << "row " << b;
    }
    ASSERT_EQ(table_.used_pages(), static_cast<int64_t>(references.size()));
    for (int64_t page = 0; page < table_.high_water_pages(); ++page) {
      const auto uses = references.find(static_cast<int32_t>(page));
      ASSERT_EQ(table_.references(page), uses == references.end() ? 0 : uses->second);
    }
    const int64_t high_water = references.empty() ? 0 : references.rbegin()->first + 1;
    ASSERT_EQ(table_.high_water_pages(), high_water);
    check_live_slots();
    check_import(rows, page_table);
  }

  const PageTable& table() const { return table_; }
  int64_t length(int row) const { return truth_[row].size(); }

 private:
  void check_live_slots() const {
    const std::vector<uint8_t> live = table_.export_live_slots();
    std::vector<uint8_t> expected(live.size(), 0);
    for (size_t b = 0; b < truth_.size(); ++b) {
      for (int64_t t = 0; t < length(b); ++t) {
        if (t >= exact_layout_.sink_tokens && t < table_.exact_begin(b)) continue;
        expected[b * exact_layout_.capacity() + exact_layout_.slot(t)] = 1;
      }
    }
    ASSERT_EQ(live, expected);
  }

  // A table made from the exports goes on like this one.
  void check_import(const std::vector<int32_t>& rows,
                    const std::vector<int32_t>& page_table) const {
    const PageTable twin =
        PageTable::from_exports(exact_layout_.sink_tokens, exact_layout_.window_tokens, rows,
                                page_table, table_.high_water_pages());
    ASSERT_EQ(twin.export_rows(), rows);
    ASSERT_EQ(twin.used_pages(), table_.used_pages());
    ASSERT_EQ(twin.high_water_pages(), table_.high_water_pages());
    for (int64_t page = 0; page < table_.high_water_pages(); ++page) {
      ASSERT_EQ(twin.references(page), table_.references(page));
    }
    const std::vector<int32_t> counts(table_.batch_size(), 150);
    const AppendPlan expected = table_.plan_append(counts), plan = twin.plan_append(counts);
    ASSERT_EQ(plan.jobs, expected.jobs);
    ASSERT_EQ(plan.copies, expected.copies);
  }

  int64_t token_of(int row, int64_t t, const Tokens& chunk) const {
    const int64_t length = table_.length(row);
    return t < length ? exact_[row][exact_layout_.slot(t)] : chunk[t - length];
  }
  std::set<std::pair<int32_t, int32_t>> live_slots() const {
    std::set<std::pair<int32_t, int32_t>> live;
    for (int b = 0; b < table_.batch_size(); ++b) {
      for (const PageEntry& entry : table_.entries(b)) {
        for (int32_t i = 0; i < entry.tokens; ++i) live.insert({entry.page, i});
      }
    }
    return live;
  }

  ExactLayout exact_layout_;
  PageTable table_;
  std::vector<Tokens> truth_;
  std::vector<Tokens> pages_;
  std::vector<Tokens> exact_;
  int64_t next_token_ = 0;
};

struct Config {
  int sinks, window;
};

class PageTableProperty : public testing::TestWithParam<Config> {};

TEST_P(PageTableProperty, AgreesWithTheNaiveModel) {
  const auto [sinks, window] = GetParam();
  for (uint32_t seed = 0; seed < 25; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto pick = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    Model model(static_cast<int>(pick(1, 4)), sinks, window);
    for (int step = 0; step < 60; ++step) {
      const int batch = model.table().batch_size();
      const int64_t action = pick(0, 99);
      if (action < 60) {
        const int64_t most = action < 45 ? 3 : 200;
        std::vector<int32_t> counts(batch);
        for (int32_t& count : counts) count = static_cast<int32_t>(pick(0, most));
        model.append(counts);
      } else if (action < 78) {
        const int row = static_cast<int>(pick(0, batch - 1));
        const int64_t most =
            action < 70 ? std::min<int64_t>(10, model.length(row)) : model.length(row);
        model.crop(row, model.length(row) - pick(0, most));
      } else if (action < 98) {
        std::vector<int64_t> indices(pick(1, 5));
        for (int64_t& index : indices) index = pick(0, batch - 1);
        model.select(indices);
      } else {
        model.reset();
      }
      if (HasFatalFailure() || HasNonfatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Configs, PageTableProperty,
                         testing::Values(Config{4, 64}, Config{0, 64}, Config{4, 128},
                                         Config{1, 256}, Config{70, 64}, Config{0, 0}, Config{4, 0},
                                         Config{100, 0}),
                         [](const auto& config) {
                           return "Sinks" + std::to_string(config.param.sinks) + "Window" +
                                  std::to_string(config.param.window);
                         });

void append(PageTable& table, const std::vector<int32_t>& counts) {
  table.commit(table.plan_append(counts));
}

TEST(PageTable, WindowHoldsBackTheRecentTokens) {
  PageTable table(1, 4, 64);
  append(table, {4 + 127});
  EXPECT_TRUE(table.entries(0).empty());
  const AppendPlan plan = table.plan_append(std::vector<int32_t>{1});
  ASSERT_EQ(plan.jobs.size(), 1u);
  EXPECT_EQ(plan.jobs[0], (EncodeJob{0, 4, 64, 0, 0, 1}));
  table.commit(plan);
  EXPECT_EQ(table.exact_begin(0), 68);
  append(table, {64 * 3});
  EXPECT_EQ(table.entries(0), (std::vector<PageEntry>{{0, 64}, {1, 64}, {2, 64}, {3, 64}}));
}

TEST(PageTable, SmoothingIsFittedOnTheFirstPageOnly) {
  PageTable table(2, 4, 64);
  AppendPlan plan = table.plan_append(std::vector<int32_t>{300, 10});
  ASSERT_EQ(plan.jobs.size(), 3u);
  EXPECT_EQ(plan.jobs[0].fit_smoothing, 1);
  EXPECT_EQ(plan.jobs[1].fit_smoothing, 0);
  table.commit(plan);
  EXPECT_EQ(table.plan_append(std::vector<int32_t>{64, 300}).jobs[0].fit_smoothing, 0);
  table.crop(0, 3);  // no page left: what is encoded next fits anew
  EXPECT_EQ(table.plan_append(std::vector<int32_t>{300, 0}).jobs[0].fit_smoothing, 1);
}

TEST(PageTable, LowestFreePageIsUsedFirst) {
  PageTable table(3, 0, 0);
  append(table, {64, 64, 64});  // pages 0, 1, 2
  table.crop(1, 0);
  table.crop(0, 0);
  append(table, {0, 0, 64});
  EXPECT_EQ(table.entries(2), (std::vector<PageEntry>{{2, 64}, {0, 64}}));
  append(table, {128, 0, 0});
  EXPECT_EQ(table.entries(0), (std::vector<PageEntry>{{1, 64}, {3, 64}}));
}

TEST(PageTable, HighWaterFallsWhenTheLastPagesBecomeFree) {
  PageTable table(2, 0, 0);
  append(table, {640, 64});
  EXPECT_EQ(table.high_water_pages(), 11);
  table.crop(1, 0);
  EXPECT_EQ(table.high_water_pages(), 10);
  table.crop(0, 65);
  EXPECT_EQ(table.high_water_pages(), 2);
}

TEST(PageTable, SharedPartialPageIsCopiedByEveryRowThatAppends) {
  PageTable table(1, 0, 0);
  append(table, {10});
  table.select(std::vector<int64_t>{0, 0, 0});
  EXPECT_EQ(table.references(0), 3);
  const AppendPlan plan = table.plan_append(std::vector<int32_t>{1, 0, 1});
  EXPECT_EQ(plan.copies, (std::vector<PageCopy>{{0, 1}, {0, 2}}));
  table.commit(plan);
  EXPECT_EQ(table.references(0), 1);
  EXPECT_TRUE(table.plan_append(std::vector<int32_t>{0, 1, 0}).copies.empty());
}

TEST(PageTable, APageThatEverySharerLeavesIsFree) {
  PageTable table(1, 0, 0);
  append(table, {10});
  table.select(std::vector<int64_t>{0, 0});
  append(table, {1, 1});
  EXPECT_EQ(table.references(0), 0);
  EXPECT_EQ(table.used_pages(), 2);
  append(table, {64, 0});
  EXPECT_EQ(table.entries(0).back(), (PageEntry{0, 11}));
}

TEST(PageTable, StalePlansAreRefused) {
  PageTable table(1, 4, 64);
  const AppendPlan plan = table.plan_append(std::vector<int32_t>{10});
  table.commit(plan);
  EXPECT_THROW(table.commit(plan), InvalidArgument);
  const AppendPlan before_crop = table.plan_append(std::vector<int32_t>{10});
  table.crop(0, 5);
  EXPECT_THROW(table.commit(before_crop), InvalidArgument);
  EXPECT_EQ(table.length(0), 5);
}

TEST(PageTable, CopiesAreIndependent) {
  PageTable table(1, 0, 0);
  append(table, {100});
  PageTable copy = table;
  append(copy, {100});
  EXPECT_EQ(table.length(0), 100);
  EXPECT_EQ(table.high_water_pages(), 2);
  EXPECT_EQ(copy.high_water_pages(), 4);
}

TEST(PageTable, RefusesWrongArgumentsAndStaysAsItWas) {
  EXPECT_THROW(PageTable(0, 4, 64), InvalidArgument);
  EXPECT_THROW(PageTable(1, -1, 64), InvalidArgument);
  EXPECT_THROW(PageTable(1, 4, 63), InvalidArgument);
  PageTable table(2, 4, 64);
  append(table, {200, 10});
  const std::vector<int32_t> rows = table.export_rows();
  EXPECT_THROW(table.plan_append(std::vector<int32_t>{1}), InvalidArgument);
  EXPECT_THROW(table.plan_append(std::vector<int32_t>{1, -1}), InvalidArgument);
  EXPECT_THROW(table.plan_append(std::vector<int32_t>{INT32_MAX - 100, 0}), InvalidArgument);
  EXPECT_THROW(table.crop(2, 0), InvalidArgument);
  EXPECT_THROW(table.crop(0, 201), InvalidArgument);
  EXPECT_THROW(table.crop(0, -1), InvalidArgument);
  EXPECT_THROW(table.select(std::vector<int64_t>{}), InvalidArgument);
  EXPECT_THROW(table.select(std::vector<int64_t>{0, 2}), InvalidArgument);
  EXPECT_THROW(table.export_page_table(0), InvalidArgument);
  EXPECT_THROW(table.length(-1), InvalidArgument);
  EXPECT_EQ(table.export_rows(), rows);
}

struct BadExports {
  const char* name;
  int sinks, window;
  std::vector<int32_t> rows, page_table;
  int64_t num_pages;
  const char* message;
};

class PageTableImport : public testing::TestWithParam<BadExports> {};

TEST_P(PageTableImport, RefusesWhatNoTableExports) {
  const BadExports& bad = GetParam();
  try {
    PageTable::from_exports(bad.sinks, bad.window, bad.rows, bad.page_table, bad.num_pages);
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(bad.message), std::string::npos) << error.what();
  }
}

// One row of 200 tokens with 4 sinks and two full pages is {200, 2, 132, 0}, {0, 64, 1, 64}.
INSTANTIATE_TEST_SUITE_P(
    Tables, PageTableImport,
    testing::Values(
        BadExports{"NoRows", 4, 64, {}, {}, 0, "batch_size"},
        BadExports{"HalfARow", 4, 64, {200, 2}, {0, 64, 1, 64}, 2, "batch_size"},
        BadExports{"RowsOfFive", 4, 64, {200, 2, 132, 0, 0}, {0, 64, 1, 64}, 2, "rows: expected"},
        BadExports{"Sinks", -1, 64, {200, 2, 132, 0}, {0, 64, 1, 64}, 2, "sink_tokens"},
        BadExports{"Window", 4, 65, {200, 2, 132, 0}, {0, 64, 1, 64}, 2, "window_tokens"},
        BadExports{"NegativeLength", 4, 64, {-1, 2, 132, 0}, {0, 64, 1, 64}, 2, "rows[0].length"},
        BadExports{"ShortLength", 4, 64, {131, 2, 132, 0}, {0, 64, 1, 64}, 2, "exact_begin"},
        BadExports{"LongLength", 4, 64, {400, 2, 132, 0}, {0, 64, 1, 64}, 2, "exact_begin"},
        BadExports{"FullRing", 4, 64, {260, 2, 132, 0}, {0, 64, 1, 64}, 2, "at most 127 tokens"},
        BadExports{"NewTokens", 4, 64, {200, 2, 132, 1}, {0, 64, 1, 64}, 2, "new_tokens"},
        BadExports{"NegativeEntries", 4, 64, {200, -1, 132, 0}, {0, 64, 1, 64}, 2, "num_entries"},
        BadExports{"MissingEntries", 4, 64, {200, 3, 132, 0}, {0, 64, 1, 64}, 2, "num_entries"},
        BadExports{"OddTable", 4, 64, {200, 2, 132, 0}, {0, 64, 1}, 2, "page_table: expected"},
        BadExports{"PageBehind", 4, 64, {200, 2, 132, 0}, {0, 64, 2, 64}, 2, "page_table[1].page"},
        BadExports{"NegativePage", 4, 64, {200, 2, 132, 0}, {-1, 64, 1, 64}, 2, "].page"},
        BadExports{"HugePage", 4, 64, {200, 2, 132, 0}, {INT32_MAX, 64, 1, 64}, 2, "].page"},
        BadExports{"NoPages", 4, 64, {200, 2, 132, 0}, {0, 64, 1, 64}, 0, "].page"},
        BadExports{"NegativePages", 4, 64, {10, 0, 4, 0}, {}, -1, "num_pages"},
        BadExports{"TooManyPages", 4, 64, {10, 0, 4, 0}, {}, int64_t{1} << 40, "num_pages"},
        BadExports{"PageTwice", 4, 64, {200, 2, 132, 0}, {1, 64, 1, 64}, 2, "does not use yet"},
        BadExports{"EmptyEntry", 4, 64, {200, 2, 132, 0}, {0, 64, 1, 0}, 2, "].tokens"},
        BadExports{"LargeEntry", 4, 64, {200, 2, 132, 0}, {0, 64, 1, 65}, 2, "].tokens"},
        BadExports{"Sum", 4, 64, {200, 2, 132, 0}, {0, 64, 1, 63}, 2, "sum of the row"},
        BadExports{"Surplus", 4, 64, {190, 1, 68, 0}, {0, 64, 1, 64}, 2, "behind the row's"},
        BadExports{"GapWithoutWindow", 0, 0, {100, 2, 100, 0}, {0, 36, 1, 64}, 2, "full pages"},
        BadExports{"RingWithoutWindow", 0, 0, {100, 1, 64, 0}, {0, 64}, 1, "exact_begin"}),
    [](const auto& bad) { return bad.param.name; });

}  // namespace
}  // namespace turboquant::cache
