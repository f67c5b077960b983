#include "turboquant/cache/fixed_append.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "turboquant/cache/table_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

using turboquant::detail::throw_invalid;

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

// The tables, after checking all that a row's plan relies on.
FixedTables checked_tables(const FixedAppendParams& params) {
  const LayerSpec& spec = params.spec;
  spec.validate();
  const auto batch = static_cast<int64_t>(params.rows.size()) / tables::kRowColumns;
  const auto require = [](const char* name, bool holds, const std::string& expected,
                          int64_t actual) {
    if (!holds) throw_invalid(name, expected, std::to_string(actual));
  };
  require("max_tokens", params.max_tokens >= 1 && params.max_tokens <= kMaxIndex, "1 to 2^31 - 1",
          params.max_tokens);
  require("chunk_tokens", params.chunk_tokens >= 0 && params.chunk_tokens <= kMaxIndex,
          "0 to 2^31 - 1", params.chunk_tokens);
  require("positions",
          static_cast<int64_t>(params.positions.size()) == batch * tables::kPositionColumns,
          std::to_string(batch) + " rows of 3 integers",
          static_cast<int64_t>(params.positions.size()));
  check_rows(spec, params.rows, batch, 0);
  // Which pages there are is checked where they are written.
  const PagePoolView any_pages{.num_slabs = 1, .pages_per_slab = kMaxIndex};
  const int64_t columns = check_page_table(spec, params.page_table, params.rows, batch, any_pages);
  const FixedTables tables{.exact = spec.exact_layout(),
                           .batch = static_cast<int32_t>(batch),
                           .page_columns = static_cast<int32_t>(columns),
                           .max_tokens = static_cast<int32_t>(params.max_tokens),
                           .chunk_tokens = static_cast<int32_t>(params.chunk_tokens),
                           .rows = params.rows.data(),
                           .page_table = params.page_table.data(),
                           .positions = params.positions.data()};
  for (int64_t b = 0; b < batch; ++b) {
    const RowExtent row = row_extent(tables, b);
    const auto at = [&](const char* table, const char* column) {
      return std::string(table) + "[" + std::to_string(b) + "]." + column;
    };
    require(at("rows", "length").c_str(), row.length <= params.max_tokens,
            "at most max_tokens " + std::to_string(params.max_tokens), row.length);
    const int32_t* const position = params.positions.data() + b * tables::kPositionColumns;
    const auto require_position = [&](const char* column, int index, int64_t most) {
      require(at("positions", column).c_str(), position[index] >= 0 && position[index] <= most,
              "0 to " + std::to_string(most), position[index]);
    };
    require_position("first", tables::kPositionFirst, kMaxIndex);
    require_position("seen", tables::kPositionSeen, kMaxIndex - params.chunk_tokens);
    require_position("refused", tables::kPositionRefused, kMaxIndex);
  }
  return tables;
}

int64_t entries_of_full_row(const FixedTables& tables, int64_t b) {
  const RowExtent row = row_extent(tables, b);
  int64_t entries = row.num_entries;
  AppendPieces pieces(tables.exact, row, tables.max_tokens - row.length);
  for (AppendPiece piece{}; pieces.next(piece);) entries = piece.entry + 1;
  return entries;
}

void check_size(const char* name, int64_t actual, int64_t expected) {
  if (actual == expected) return;
  throw_invalid(name, std::to_string(expected) + " integers", std::to_string(actual));
}

}  // namespace

void plan_append(const FixedAppendParams& params, std::span<int32_t> planned,
                 std::span<int32_t> jobs) {
  const FixedTables tables = checked_tables(params);
  const int64_t max_jobs = tables.batch * max_append_pieces(tables.exact, tables.chunk_tokens);
  check_size("planned", static_cast<int64_t>(planned.size()),
             int64_t{tables.batch} * tables::kRowColumns);
  check_size("jobs", static_cast<int64_t>(jobs.size()), max_jobs * tables::kJobColumns);
  for (int64_t b = 0; b < tables.batch; ++b) {
    const int64_t entries = entries_of_full_row(tables, b);
    if (entries > tables.page_columns) {
      throw_invalid("page_table",
                    std::to_string(entries) + " entries, for " + std::to_string(params.max_tokens) +
                        " tokens of row " + std::to_string(b),
                    std::to_string(tables.page_columns));
    }
    const int64_t room = params.max_tokens - row_extent(tables, b).length;
    if (arriving_tokens(tables, b) > room) {
      throw_invalid("key_states",
                    "at most " + std::to_string(room) + " more tokens in row " + std::to_string(b) +
                        " (the cache was made for " + std::to_string(params.max_tokens) + ")",
                    std::to_string(arriving_tokens(tables, b)));
    }
  }
  for (int64_t b = 0; b < tables.batch; ++b) {
    plan_append_row(tables, b, planned.data(), jobs.data());
  }
}

void commit_append(const FixedAppendParams& params, std::span<const int32_t> planned) {
  const FixedTables tables = checked_tables(params);
  check_size("planned", static_cast<int64_t>(planned.size()),
             int64_t{tables.batch} * tables::kRowColumns);
  for (int64_t b = 0; b < tables.batch; ++b) {
    const int32_t* const plan = planned.data() + b * tables::kRowColumns;
    const int32_t* const row = params.rows.data() + b * tables::kRowColumns;
    const int64_t most =
        std::min(params.max_tokens - row[tables::kRowLength], arriving_tokens(tables, b));
    if (!std::equal(row, row + tables::kRowNewTokens, plan) || plan[tables::kRowNewTokens] < 0 ||
        plan[tables::kRowNewTokens] > most) {
      throw_invalid("planned", "the plan of these tables", "another in row " + std::to_string(b));
    }
  }
  for (int64_t b = 0; b < tables.batch; ++b) commit_append_row(tables, b, planned.data());
}

void crop(const FixedAppendParams& params, std::span<const int64_t> new_lengths) {
  const FixedTables tables = checked_tables(params);
  check_size("new_lengths", static_cast<int64_t>(new_lengths.size()), tables.batch);
  for (int64_t b = 0; b < tables.batch; ++b) {
    const int64_t length = row_extent(tables, b).length;
    if (new_lengths[b] < 0 || new_lengths[b] > length) {
      throw_invalid("new_lengths[" + std::to_string(b) + "]", "0 to " + std::to_string(length),
                    std::to_string(new_lengths[b]));
    }
  }
  for (int64_t b = 0; b < tables.batch; ++b) crop_row(tables, b, new_lengths[b]);
}

std::vector<int64_t> entries_of_full_rows(const FixedAppendParams& params) {
  const FixedTables tables = checked_tables(params);
  std::vector<int64_t> entries;
  for (int64_t b = 0; b < tables.batch; ++b) entries.push_back(entries_of_full_row(tables, b));
  return entries;
}

}  // namespace turboquant::cache
