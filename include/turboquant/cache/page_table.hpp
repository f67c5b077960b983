// Which page holds which tokens of which sequence: bookkeeping only, for any storage.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/append_rule.hpp"
#include "turboquant/cache/layout.hpp"

namespace turboquant::cache {

// One used page of a row: its first `tokens` tokens belong to the row.
struct PageEntry {
  int32_t page;
  int32_t tokens;  // 1 to 64; below 64 after a crop, or the last page of a cache without window
  bool operator==(const PageEntry&) const = default;
};

// Encode `tokens` tokens of `row`, from position first_token, into slots page_offset... of `page`.
struct EncodeJob {
  int32_t row;
  int32_t first_token;
  int32_t tokens;
  int32_t page;
  int32_t page_offset;
  int32_t fit_smoothing;  // 1: the row had no page before this job, so its smoothing is fitted here
  bool operator==(const EncodeJob&) const = default;
};
static_assert(sizeof(EncodeJob) == tables::kJobColumns * sizeof(int32_t));

// Before the jobs run, page to_page becomes a copy of from_page (copy-on-write).
struct PageCopy {
  int32_t from_page;
  int32_t to_page;
  bool operator==(const PageCopy&) const = default;
};

// What one append will do. Carry out in this order: make pages [0, pages_needed) exist, copies,
// jobs, exact tokens, commit.
struct AppendPlan {
  std::vector<int32_t> new_tokens;  // per row
  std::vector<PageCopy> copies;
  std::vector<EncodeJob> jobs;  // rows ascending, tokens ascending within a row
  int64_t pages_needed = 0;
  uint64_t revision = 0;  // of the table it was made for
};

// The rows (sequences) of one cache. A row's tokens lie, in order, in the sinks
// [0, min(length, sink_tokens)), the entries, and the exact ring [exact_begin, length).
//
// With a window W > 0 the ring holds at most W + 63 tokens: when it would hold W + 64, its oldest
// 64 become one new page. Without a window every token after the sinks goes to a page at once and
// the last partly filled page is continued; if other rows share that page it is copied first.
// Rows share pages after select(); a page is free when no row uses it, and the lowest free page is
// used first. Row indices out of range, negative counts and stale plans are InvalidArgument; every
// throwing call leaves the table as it was.
class PageTable {
 public:
  PageTable(int batch_size, int sink_tokens, int window_tokens);

  // The table whose export_rows() and export_page_table() these are; storage has num_pages pages.
  // The tables may come from a file, so nothing about them is taken on trust: InvalidArgument
  // names what no table could have exported. A page of several rows is shared, as after select().
  static PageTable from_exports(int sink_tokens, int window_tokens, std::span<const int32_t> rows,
                                std::span<const int32_t> page_table, int64_t num_pages);

  // What appending new_tokens[row] tokens to every row takes. Changes nothing.
  AppendPlan plan_append(std::span<const int32_t> new_tokens) const;

  // Obtains the memory that commit(plan) needs: commit cannot fail after it.
  void prepare(const AppendPlan& plan);

  // Makes the plan's result the state of the table. The plan must be the latest: any change of
  // the table since makes it stale.
  void commit(const AppendPlan& plan);

  // Shortens a row to new_length <= length(row) tokens. Tokens that were encoded stay encoded.
  void crop(int row, int64_t new_length);

  // Row i becomes a copy of row indices[i]: reorder, repeat and select; pages are shared.
  void select(std::span<const int64_t> indices);

  // Every row becomes empty and every page free.
  void reset() noexcept;

  int batch_size() const noexcept { return static_cast<int>(rows_.size()); }
  int64_t length(int row) const { return checked_row(row).length; }
  const std::vector<PageEntry>& entries(int row) const { return checked_row(row).entries; }
  // First token of the row's exact ring; equals length(row) when the ring is empty.
  int64_t exact_begin(int row) const { return exact_begin(checked_row(row)); }

  // Storage must hold pages [0, high_water_pages()): one more than the highest page in use.
  int64_t high_water_pages() const noexcept { return static_cast<int64_t>(references_.size()); }
  int64_t used_pages() const noexcept { return used_pages_; }
  int64_t max_entries() const noexcept;
  // Rows that use the page: 0 for a free one.
  int references(int64_t page) const;
  uint64_t revision() const noexcept { return revision_; }

  // page_table [batch, columns, 2] = {page, tokens}; unused entries are {0, 0}. columns must be
  // at least max_entries().
  std::vector<int32_t> export_page_table(int64_t columns) const;
  // rows [batch, 4] = {length, num_entries, exact_begin, new_tokens}; an empty span means 0 new
  // tokens in every row.
  std::vector<int32_t> export_rows(std::span<const int32_t> new_tokens = {}) const;
  // [batch, ExactLayout::capacity()]: 1 where a slot of the exact buffers holds a token of the row.
  std::vector<uint8_t> export_live_slots() const;

 private:
  struct Row {
    int64_t length = 0;
    int64_t paged_tokens = 0;  // sum of entries[].tokens
    std::vector<PageEntry> entries;
  };

  const Row& checked_row(int row) const;
  int64_t exact_begin(const Row& row) const noexcept;
  static RowExtent extent(const Row& row);
  void check_new_tokens(std::span<const int32_t> new_tokens) const;
  void release(int32_t page) noexcept;
  void drop_free_tail() noexcept;
  void find_lowest_free() noexcept;  // lowest_free_ is a lower bound before

  int sink_tokens_;
  int window_tokens_;
  std::vector<Row> rows_;
  std::vector<int32_t> references_;  // per page; the last one is never 0
  int64_t used_pages_ = 0;
  int64_t lowest_free_ = 0;  // no page below is free
  uint64_t revision_ = 0;
};

}  // namespace turboquant::cache
