// Tables of a cache of fixed capacity in host memory, beside a PageTable that holds the same rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "turboquant/cache/fixed_append.hpp"
#include "turboquant/cache/page_table.hpp"

namespace turboquant::testing_support {

class FixedRows {
 public:
  FixedRows(const cache::LayerSpec& spec, int batch, int64_t max_tokens)
      : spec_(spec),
        max_tokens_(max_tokens),
        columns_(max_tokens / cache::kBlockTokens + 20),  // crops within pages take more
        rows_(static_cast<size_t>(batch) * cache::tables::kRowColumns, 0),
        page_table_(static_cast<size_t>(batch * columns_) * cache::tables::kPageColumns, 0),
        positions_(static_cast<size_t>(batch) * cache::tables::kPositionColumns, 0) {
    for (int64_t i = 0; i < batch * columns_; ++i) page_table_[2 * i] = static_cast<int32_t>(i);
  }

  // Says that of the next chunk_tokens positions each row's last counts[b] are tokens.
  void place(const std::vector<int32_t>& counts, int64_t chunk_tokens) {
    for (size_t b = 0; b < counts.size(); ++b) {
      int32_t* const position = positions_.data() + b * cache::tables::kPositionColumns;
      position[cache::tables::kPositionFirst] =
          position[cache::tables::kPositionSeen] + static_cast<int32_t>(chunk_tokens) - counts[b];
    }
  }
  // Gives the entries that the jobs of a plan add the pages that the jobs name.
  void adopt_pages(const std::vector<cache::EncodeJob>& jobs) {
    std::vector<int32_t> next;
    for (size_t b = 0; b < positions_.size() / cache::tables::kPositionColumns; ++b) {
      next.push_back(rows_[b * cache::tables::kRowColumns + cache::tables::kRowEntries]);
    }
    for (const cache::EncodeJob& job : jobs) {
      if (job.page_offset > 0) continue;
      page_table_[2 * (job.row * columns_ + next[job.row]++)] = job.page;
    }
  }

  cache::FixedAppendParams params(int64_t chunk_tokens) {
    return {.spec = spec_,
            .max_tokens = max_tokens_,
            .chunk_tokens = chunk_tokens,
            .rows = rows_,
            .page_table = page_table_,
            .positions = positions_};
  }
  cache::FixedTables tables(int64_t chunk_tokens) {
    return {.exact = spec_.exact_layout(),
            .batch = static_cast<int32_t>(rows_.size() / cache::tables::kRowColumns),
            .page_columns = static_cast<int32_t>(columns_),
            .max_tokens = static_cast<int32_t>(max_tokens_),
            .chunk_tokens = static_cast<int32_t>(chunk_tokens),
            .rows = rows_.data(),
            .page_table = page_table_.data(),
            .positions = positions_.data()};
  }

  // Room for a plan, full of ones.
  std::vector<int32_t> new_planned() const { return std::vector<int32_t>(rows_.size(), -1); }
  std::vector<int32_t> new_jobs(int64_t chunk_tokens) const {
    const int64_t jobs = cache::max_append_pieces(spec_.exact_layout(), chunk_tokens);
    return std::vector<int32_t>(
        rows_.size() / cache::tables::kRowColumns * jobs * cache::tables::kJobColumns, -1);
  }

  std::vector<int32_t>& rows() { return rows_; }
  std::vector<int32_t>& page_table() { return page_table_; }
  std::vector<int32_t>& positions() { return positions_; }
  // {page, tokens} of a row's used entries.
  std::vector<cache::PageEntry> entries(int64_t b) const {
    std::vector<cache::PageEntry> entries;
    const int32_t used = rows_[b * cache::tables::kRowColumns + cache::tables::kRowEntries];
    for (int64_t e = 0; e < used; ++e) {
      const int32_t* const entry = page_table_.data() + 2 * (b * columns_ + e);
      entries.push_back({.page = entry[0], .tokens = entry[1]});
    }
    return entries;
  }

 private:
  cache::LayerSpec spec_;
  int64_t max_tokens_, columns_;
  std::vector<int32_t> rows_, page_table_, positions_;
};

// The jobs that have tokens.
inline std::vector<cache::EncodeJob> used_jobs(const std::vector<int32_t>& jobs) {
  std::vector<cache::EncodeJob> used;
  for (size_t at = 0; at < jobs.size(); at += cache::tables::kJobColumns) {
    if (jobs[at + 2] == 0) continue;
    used.push_back(
        {jobs[at], jobs[at + 1], jobs[at + 2], jobs[at + 3], jobs[at + 4], jobs[at + 5]});
  }
  return used;
}

}  // namespace turboquant::testing_support
