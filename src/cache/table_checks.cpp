#include "turboquant/cache/table_checks.hpp"

#include <algorithm>
#include <string>

#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

using turboquant::detail::throw_invalid;

std::string at(const char* table, int64_t index, const char* column) {
  return std::string(table) + "[" + std::to_string(index) + "]." + column;
}

void require_range(int64_t value, int64_t low, int64_t high, const char* table, int64_t index,
                   const char* column) {
  if (value >= low && value <= high) return;
  throw_invalid(
      at(table, index, column),
      low == high ? std::to_string(low) : std::to_string(low) + " to " + std::to_string(high),
      std::to_string(value));
}

// One job whose tokens must start at next_token; the row has tokens up to `end`.
void check_job(const LayerSpec& spec, const EncodeJob& job, int64_t n, int64_t next_token,
               int64_t end, const PagePoolView& pages) {
  require_range(job.first_token, next_token, next_token, "jobs", n, "first_token");
  require_range(job.page, 0, pages.num_pages() - 1, "jobs", n, "page");
  require_range(job.page_offset, 0, kBlockTokens - 1, "jobs", n, "page_offset");
  require_range(job.tokens, 1, std::min<int64_t>(kBlockTokens - job.page_offset, end - next_token),
                "jobs", n, "tokens");
  if (spec.window_tokens > 0) {  // whole blocks: means and smoothing are taken over 64 tokens
    require_range(job.tokens, kBlockTokens, kBlockTokens, "jobs", n, "tokens");
  }
}

}  // namespace

void check_rows(const LayerSpec& spec, std::span<const int32_t> rows, int64_t batch,
                int64_t chunk_tokens) {
  if (static_cast<int64_t>(rows.size()) != batch * tables::kRowColumns) {
    throw_invalid("rows", std::to_string(batch) + " rows of 4 integers",
                  std::to_string(rows.size()) + " integers");
  }
  const int64_t ring_tokens = spec.exact_layout().ring_tokens();
  for (int64_t b = 0; b < batch; ++b) {
    const RowState row = row_state(rows, b);
    require_range(row.length, 0, INT32_MAX, "rows", b, "length");
    const int64_t sinks = std::min<int64_t>(row.length, spec.sink_tokens);
    require_range(row.exact_begin, std::max(sinks, row.length - ring_tokens), row.length, "rows", b,
                  "exact_begin");
    // An entry holds 1 to 64 tokens.
    const int64_t paged = row.exact_begin - sinks;
    require_range(row.num_entries, (paged + kBlockTokens - 1) / kBlockTokens, paged, "rows", b,
                  "num_entries");
    require_range(row.new_tokens, 0, std::min<int64_t>(chunk_tokens, INT32_MAX - row.length),
                  "rows", b, "new_tokens");
  }
}

int64_t check_page_table(const LayerSpec& spec, std::span<const int32_t> page_table,
                         std::span<const int32_t> rows, int64_t batch, const PagePoolView& pages) {
  const auto size = static_cast<int64_t>(page_table.size());
  const int64_t row_size = batch * tables::kPageColumns;
  if (batch == 0 ? size != 0 : size % row_size != 0) {
    throw_invalid("page_table", std::to_string(batch) + " rows of {page, tokens}",
                  std::to_string(size) + " integers");
  }
  const int64_t columns = batch == 0 ? 0 : size / row_size;
  for (int64_t b = 0; b < batch; ++b) {
    const RowState row = row_state(rows, b);
    require_range(row.num_entries, 0, columns, "rows", b, "num_entries");
    int64_t paged = 0;
    for (int64_t e = 0; e < row.num_entries; ++e) {
      const int32_t* entry = page_table.data() + (b * columns + e) * tables::kPageColumns;
      require_range(entry[0], 0, pages.num_pages() - 1, "page_table", b * columns + e, "page");
      require_range(entry[1], 1, kBlockTokens, "page_table", b * columns + e, "tokens");
      paged += entry[1];
    }
    require_range(std::min<int64_t>(row.length, spec.sink_tokens) + paged, row.exact_begin,
                  row.exact_begin, "page_table", b, "tokens (sum of the row, with its sinks)");
  }
  return columns;
}

int64_t check_jobs(const LayerSpec& spec, std::span<const int32_t> jobs,
                   std::span<const int32_t> rows, int64_t batch, const PagePoolView& pages) {
  if (jobs.size() % tables::kJobColumns != 0) {
    throw_invalid("jobs", "rows of 6 integers", std::to_string(jobs.size()) + " integers");
  }
  const auto count = static_cast<int64_t>(jobs.size()) / tables::kJobColumns;
  const int64_t ring_tokens = spec.exact_layout().ring_tokens();
  int64_t n = 0;
  const auto skip_empty = [&] {
    while (n < count && job_at(jobs, n).tokens == 0) ++n;
  };
  int32_t last_row = 0;
  skip_empty();
  for (int64_t b = 0; b < batch; ++b) {
    const RowState row = row_state(rows, b);
    const int64_t end = row.length + row.new_tokens;
    const int64_t paged = row.exact_begin - std::min<int64_t>(row.length, spec.sink_tokens);
    int64_t next_token = std::min<int64_t>(end, spec.sink_tokens) + paged;
    for (bool first_job = true; n < count && job_at(jobs, n).row == b; first_job = false) {
      check_job(spec, job_at(jobs, n), n, next_token, end, pages);
      // Jobs run in parallel: only one may write the row's smoothing.
      const bool may_fit = first_job && row.num_entries == 0;
      require_range(job_at(jobs, n).fit_smoothing, 0, may_fit ? 1 : 0, "jobs", n, "fit_smoothing");
      next_token += job_at(jobs, n).tokens;
      last_row = static_cast<int32_t>(b);
      ++n;
      skip_empty();
    }
    if (end - next_token > ring_tokens) {
      throw_invalid("jobs",
                    "jobs for all but " + std::to_string(ring_tokens) +
                        " of the tokens behind the sinks and pages of row " + std::to_string(b),
                    "jobs that leave " + std::to_string(end - next_token));
    }
  }
  if (n < count) {  // whatever stopped the walk: a row out of range, or out of order
    require_range(job_at(jobs, n).row, last_row, batch - 1, "jobs", n, "row");
  }
  return count;
}

void check_pages(const LayerSpec& spec, const PagePoolView& pages) {
  const BlockLayout layout = spec.block_layout();
  if (pages.block_bytes != layout.block_bytes() ||
      pages.page_bytes != layout.page_bytes(spec.num_kv_heads)) {
    throw_invalid("pages",
                  "pages of " + std::to_string(layout.page_bytes(spec.num_kv_heads)) +
                      " bytes in blocks of " + std::to_string(layout.block_bytes()),
                  std::to_string(pages.page_bytes) + " in " + std::to_string(pages.block_bytes));
  }
  if (pages.num_slabs < 0 || pages.pages_per_slab < 1 ||
      (pages.num_slabs > 0 && pages.slabs == nullptr && pages.only_slab == nullptr) ||
      (pages.num_slabs != 1 && pages.only_slab != nullptr)) {
    throw_invalid(
        "pages", "slabs of 1 or more pages",
        std::to_string(pages.num_slabs) + " slabs of " + std::to_string(pages.pages_per_slab));
  }
}

void check_exact(const LayerSpec& spec, int64_t batch, const ConstTensorView& exact_keys,
                 const ConstTensorView& exact_values) {
  const std::array<int64_t, 4> shape = {batch, spec.num_kv_heads, spec.exact_layout().capacity(),
                                        spec.head_dim};
  check_shape("exact_keys", exact_keys, shape);
  check_shape("exact_values", exact_values, shape);
}

}  // namespace turboquant::cache
