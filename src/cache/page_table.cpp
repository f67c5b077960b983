#include "turboquant/cache/page_table.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();  // tables are int32

// Hands out free pages, lowest first, without touching the table.
class FreePages {
 public:
  FreePages(const std::vector<int32_t>& references, int64_t lowest_free)
      : references_(references), next_(lowest_free) {}

  int32_t take() {
    const auto end = static_cast<int64_t>(references_.size());
    while (next_ < end && references_[next_] > 0) ++next_;
    if (next_ > kMaxIndex)
      turboquant::detail::throw_invalid("new_tokens", "at most 2^31 pages", "more");
    return static_cast<int32_t>(next_++);
  }

 private:
  const std::vector<int32_t>& references_;
  int64_t next_;
};

// Doubling keeps repeated appends linear; reserve alone would grow by what one append needs.
template <class Element>
void reserve_doubling(std::vector<Element>& elements, size_t wanted) {
  if (wanted > elements.capacity()) elements.reserve(std::max(wanted, 2 * elements.capacity()));
}

}  // namespace

PageTable::PageTable(int batch_size, int sink_tokens, int window_tokens)
    : sink_tokens_(sink_tokens), window_tokens_(window_tokens) {
  if (batch_size < 1)
    turboquant::detail::throw_invalid("batch_size", "1 or more", std::to_string(batch_size));
  if (sink_tokens < 0) {
    turboquant::detail::throw_invalid("sink_tokens", "0 or more", std::to_string(sink_tokens));
  }
  if (window_tokens < 0 || window_tokens % kBlockTokens != 0) {
    turboquant::detail::throw_invalid("window_tokens", "0 or a multiple of 64",
                                      std::to_string(window_tokens));
  }
  rows_.resize(batch_size);
}

PageTable PageTable::from_exports(int sink_tokens, int window_tokens, std::span<const int32_t> rows,
                                  std::span<const int32_t> page_table, int64_t num_pages) {
  const auto batch = static_cast<int64_t>(rows.size()) / tables::kRowColumns;
  if (num_pages < 0 || num_pages > kMaxIndex) {
    turboquant::detail::throw_invalid("num_pages", "0 to 2^31 - 1", std::to_string(num_pages));
  }
  PageTable table(static_cast<int>(batch), sink_tokens, window_tokens);
  // What the operators ask of every table, and then what only PageTable's own history gives.
  const LayerSpec spec{.sink_tokens = sink_tokens, .window_tokens = window_tokens};
  check_rows(spec, rows, batch, 0);
  const int64_t columns = check_page_table(spec, page_table, rows, batch,
                                           {.num_slabs = 1, .pages_per_slab = num_pages});
  const int64_t most_in_ring = std::max<int64_t>(0, spec.exact_layout().ring_tokens() - 1);
  std::vector<int32_t> last_user(num_pages, -1);
  table.references_.assign(num_pages, 0);
  for (int64_t b = 0; b < batch; ++b) {
    const RowState state = row_state(rows, b);
    if (state.length - state.exact_begin > most_in_ring) {
      turboquant::detail::throw_invalid(
          "rows[" + std::to_string(b) + "].exact_begin",
          "at most " + std::to_string(most_in_ring) + " tokens in the ring",
          std::to_string(state.length - state.exact_begin));
    }
    Row& row = table.rows_[b];
    row.length = state.length;
    row.paged_tokens = state.exact_begin - std::min<int64_t>(state.length, sink_tokens);
    row.entries.reserve(state.num_entries);
    for (int64_t e = 0; e < columns; ++e) {
      const int64_t at = b * columns + e;
      const PageEntry entry{page_table[at * tables::kPageColumns],
                            page_table[at * tables::kPageColumns + 1]};
      const auto refuse = [&](const char* expected) {
        turboquant::detail::throw_invalid(
            "page_table[" + std::to_string(at) + "]", expected,
            "{" + std::to_string(entry.page) + ", " + std::to_string(entry.tokens) + "}");
      };
      if (e >= state.num_entries) {
        if (entry != PageEntry{0, 0}) refuse("{0, 0} behind the row's entries");
        continue;
      }
      if (window_tokens == 0 && e + 1 < state.num_entries && entry.tokens < kBlockTokens) {
        refuse("full pages before the row's last one, as there is no window");
      }
      if (last_user[entry.page] == b) refuse("a page that the row does not use yet");
      last_user[entry.page] = static_cast<int32_t>(b);
      if (++table.references_[entry.page] == 1) ++table.used_pages_;
      row.entries.push_back(entry);
    }
  }
  table.drop_free_tail();
  table.find_lowest_free();
  return table;
}

AppendPlan PageTable::plan_append(std::span<const int32_t> new_tokens) const {
  check_new_tokens(new_tokens);
  AppendPlan plan;
  plan.revision = revision_;
  plan.new_tokens.assign(new_tokens.begin(), new_tokens.end());
  FreePages free_pages(references_, lowest_free_);
  int64_t highest_page = high_water_pages() - 1;
  const auto take_page = [&] {
    const int32_t page = free_pages.take();
    highest_page = std::max<int64_t>(highest_page, page);
    return page;
  };

  for (int b = 0; b < batch_size(); ++b) {
    const Row& row = rows_[b];
    AppendPieces pieces({sink_tokens_, window_tokens_}, extent(row), new_tokens[b]);
    for (AppendPiece piece{}; pieces.next(piece);) {
      int32_t page;
      if (piece.page_offset == 0) {
        page = take_page();
      } else if (page = row.entries.back().page; references_[page] > 1) {
        // Even when every sharer leaves the page in this plan: until commit it belongs to all of
        // them.
        const int32_t copy = take_page();
        plan.copies.push_back({.from_page = page, .to_page = copy});
        page = copy;
      }
      plan.jobs.push_back({.row = b,
                           .first_token = static_cast<int32_t>(piece.first_token),
                           .tokens = static_cast<int32_t>(piece.tokens),
                           .page = page,
                           .page_offset = static_cast<int32_t>(piece.page_offset),
                           .fit_smoothing = fits_smoothing(piece)});
    }
  }
  plan.pages_needed = highest_page + 1;
  return plan;
}

void PageTable::prepare(const AppendPlan& plan) {
  if (plan.revision != revision_ || plan.new_tokens.size() != rows_.size()) {
    turboquant::detail::throw_invalid(
        "plan",
        "a plan made since the table last changed (revision " + std::to_string(revision_) + ")",
        "revision " + std::to_string(plan.revision));
  }
  reserve_doubling(references_, static_cast<size_t>(plan.pages_needed));
  for (size_t i = 0; i < plan.jobs.size();) {
    size_t run_end = i;
    while (run_end < plan.jobs.size() && plan.jobs[run_end].row == plan.jobs[i].row) ++run_end;
    std::vector<PageEntry>& entries = rows_[plan.jobs[i].row].entries;
    reserve_doubling(entries, entries.size() + (run_end - i));
    i = run_end;
  }
}

void PageTable::commit(const AppendPlan& plan) {
  prepare(plan);
  if (plan.pages_needed > high_water_pages()) references_.resize(plan.pages_needed, 0);
  for (const EncodeJob& job : plan.jobs) {
    Row& row = rows_[job.row];
    if (job.page_offset > 0) {  // continues the last page, or its copy
      PageEntry& last = row.entries.back();
      if (last.page != job.page) {
        release(last.page);
        references_[job.page] = 1;
        ++used_pages_;
        last.page = job.page;
      }
      last.tokens += job.tokens;
    } else {
      references_[job.page] = 1;
      ++used_pages_;
      row.entries.push_back({.page = job.page, .tokens = job.tokens});
    }
    row.paged_tokens += job.tokens;
  }
  for (size_t b = 0; b < rows_.size(); ++b) rows_[b].length += plan.new_tokens[b];
  drop_free_tail();
  find_lowest_free();
  ++revision_;
}

void PageTable::crop(int row, int64_t new_length) {
  checked_row(row);
  Row& state = rows_[row];
  if (new_length < 0 || new_length > state.length) {
    turboquant::detail::throw_invalid("new_length",
                                      "0 to the row's " + std::to_string(state.length) + " tokens",
                                      std::to_string(new_length));
  }
  const int64_t kept_paged =
      kept_paged_tokens({sink_tokens_, window_tokens_}, state.paged_tokens, new_length);
  while (state.paged_tokens > kept_paged) {
    PageEntry& last = state.entries.back();
    const int64_t surplus = state.paged_tokens - kept_paged;
    if (surplus >= last.tokens) {
      state.paged_tokens -= last.tokens;
      release(last.page);
      state.entries.pop_back();
    } else {
      state.paged_tokens -= surplus;
      last.tokens -= static_cast<int32_t>(surplus);
    }
  }
  state.length = new_length;
  drop_free_tail();
  ++revision_;
}

void PageTable::select(std::span<const int64_t> indices) {
  if (indices.empty() || static_cast<int64_t>(indices.size()) > kMaxIndex) {
    turboquant::detail::throw_invalid("indices", "1 to 2^31 - 1 rows",
                                      std::to_string(indices.size()));
  }
  for (const int64_t index : indices) {
    if (index < 0 || index >= batch_size()) {
      turboquant::detail::throw_invalid("indices", "rows 0 to " + std::to_string(batch_size() - 1),
                                        std::to_string(index));
    }
  }
  std::vector<Row> rows;
  rows.reserve(indices.size());
  for (const int64_t index : indices) rows.push_back(rows_[index]);
  for (const Row& row : rows) {  // added before removed, so that no page in use is ever free
    for (const PageEntry& entry : row.entries) ++references_[entry.page];
  }
  for (const Row& row : rows_) {
    for (const PageEntry& entry : row.entries) release(entry.page);
  }
  rows_ = std::move(rows);
  drop_free_tail();
  ++revision_;
}

void PageTable::reset() noexcept {
  for (Row& row : rows_) row = Row{};
  references_.clear();
  used_pages_ = 0;
  lowest_free_ = 0;
  ++revision_;
}

int64_t PageTable::max_entries() const noexcept {
  size_t most = 0;
  for (const Row& row : rows_) most = std::max(most, row.entries.size());
  return static_cast<int64_t>(most);
}

int PageTable::references(int64_t page) const {
  return page >= 0 && page < high_water_pages() ? references_[page] : 0;
}

std::vector<int32_t> PageTable::export_page_table(int64_t columns) const {
  if (columns < max_entries() || columns > kMaxIndex) {
    turboquant::detail::throw_invalid("columns", std::to_string(max_entries()) + " or more",
                                      std::to_string(columns));
  }
  std::vector<int32_t> table(rows_.size() * columns * tables::kPageColumns, 0);
  for (size_t b = 0; b < rows_.size(); ++b) {
    int32_t* out = table.data() + b * columns * tables::kPageColumns;
    for (const PageEntry& entry : rows_[b].entries) {
      *out++ = entry.page;
      *out++ = entry.tokens;
    }
  }
  return table;
}

std::vector<int32_t> PageTable::export_rows(std::span<const int32_t> new_tokens) const {
  if (!new_tokens.empty()) check_new_tokens(new_tokens);
  std::vector<int32_t> table;
  table.reserve(rows_.size() * tables::kRowColumns);
  for (size_t b = 0; b < rows_.size(); ++b) {
    table.push_back(static_cast<int32_t>(rows_[b].length));
    table.push_back(static_cast<int32_t>(rows_[b].entries.size()));
    table.push_back(static_cast<int32_t>(exact_begin(rows_[b])));
    table.push_back(new_tokens.empty() ? 0 : new_tokens[b]);
  }
  return table;
}

std::vector<uint8_t> PageTable::export_live_slots() const {
  const ExactLayout layout{sink_tokens_, window_tokens_};
  std::vector<uint8_t> live(rows_.size() * layout.capacity(), 0);
  for (size_t b = 0; b < rows_.size(); ++b) {
    uint8_t* slots = live.data() + b * layout.capacity();
    std::fill_n(slots, std::min<int64_t>(rows_[b].length, sink_tokens_), uint8_t{1});
    for (int64_t t = exact_begin(rows_[b]); t < rows_[b].length; ++t) slots[layout.slot(t)] = 1;
  }
  return live;
}

const PageTable::Row& PageTable::checked_row(int row) const {
  if (row < 0 || row >= batch_size()) {
    turboquant::detail::throw_invalid("row", "0 to " + std::to_string(batch_size() - 1),
                                      std::to_string(row));
  }
  return rows_[row];
}

int64_t PageTable::exact_begin(const Row& row) const noexcept {
  return cache::exact_begin({sink_tokens_, window_tokens_}, row.length, row.paged_tokens);
}

RowExtent PageTable::extent(const Row& row) {
  return {.length = row.length,
          .num_entries = static_cast<int64_t>(row.entries.size()),
          .paged_tokens = row.paged_tokens,
          .last_tokens = row.entries.empty() ? kBlockTokens : row.entries.back().tokens};
}

void PageTable::check_new_tokens(std::span<const int32_t> new_tokens) const {
  if (new_tokens.size() != rows_.size()) {
    turboquant::detail::throw_invalid("new_tokens",
                                      std::to_string(rows_.size()) + " counts, one per row",
                                      std::to_string(new_tokens.size()));
  }
  for (size_t b = 0; b < rows_.size(); ++b) {
    if (new_tokens[b] < 0 || rows_[b].length + new_tokens[b] > kMaxIndex) {
      turboquant::detail::throw_invalid(
          "new_tokens[" + std::to_string(b) + "]",
          "0 or more, with a row of at most 2^31 - 1 tokens",
          std::to_string(new_tokens[b]) + " after " + std::to_string(rows_[b].length));
    }
  }
}

void PageTable::release(int32_t page) noexcept {
  if (--references_[page] > 0) return;
  --used_pages_;
  lowest_free_ = std::min<int64_t>(lowest_free_, page);
}

void PageTable::drop_free_tail() noexcept {
  while (!references_.empty() && references_.back() == 0) references_.pop_back();
  lowest_free_ = std::min(lowest_free_, high_water_pages());
}

void PageTable::find_lowest_free() noexcept {
  while (lowest_free_ < high_water_pages() && references_[lowest_free_] > 0) ++lowest_free_;
}

}  // namespace turboquant::cache
