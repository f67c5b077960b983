// The bookkeeping of appends to a cache of fixed capacity. Its tables live where the pages live and
// are planned and committed there, so that a captured graph can be replayed as tokens come: what
// PageTable::plan_append and commit do for a table on the host, by the same rule.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/append_rule.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cache {

// B rows of at most max_tokens tokens, P entries each: as many as max_tokens tokens can fill. A row
// owns its pages: entry e of row b lies in page page_table[b, e].page for good.
struct FixedTables {
  ExactLayout exact;
  int32_t batch = 0;
  int32_t page_columns = 0;       // P
  int32_t max_tokens = 0;         // of a row
  int32_t chunk_tokens = 0;       // T: positions that come, a row's real tokens are the last
  int32_t* rows = nullptr;        // [B, 4], new_tokens 0 between appends
  int32_t* page_table = nullptr;  // [B, P, 2]
  int32_t* positions = nullptr;   // [B, 3]
};

// The real tokens among the chunk_tokens positions that come to row b.
TQ_HOST_DEVICE inline int64_t arriving_tokens(const FixedTables& tables, int64_t b) {
  const int32_t* const position = tables.positions + b * tables::kPositionColumns;
  const int64_t padding =
      int64_t{position[tables::kPositionFirst]} - position[tables::kPositionSeen];
  if (padding <= 0) return tables.chunk_tokens;
  return padding < tables.chunk_tokens ? tables.chunk_tokens - padding : 0;
}

// Row b as the rule sees it.
TQ_HOST_DEVICE inline RowExtent row_extent(const FixedTables& tables, int64_t b) {
  const int32_t* const row = tables.rows + b * tables::kRowColumns;
  const int64_t length = row[tables::kRowLength], entries = row[tables::kRowEntries];
  const int32_t* const last =
      tables.page_table + (b * tables.page_columns + entries - 1) * tables::kPageColumns;
  return {.length = length,
          .num_entries = entries,
          .paged_tokens = row[tables::kRowExactBegin] - exact_begin(tables.exact, length, 0),
          .last_tokens = entries > 0 ? last[1] : kBlockTokens};
}

// What appending the chunk to row b takes: its row of `planned` [B, 4] (the row with its new
// tokens) and its jobs of [B, max_append_pieces, 6], the unused ones with tokens 0. Tokens for
// which the row has no room are not planned: of those that come, the row takes the latest.
TQ_HOST_DEVICE inline void plan_append_row(const FixedTables& tables, int64_t b, int32_t* planned,
                                           int32_t* jobs) {
  const RowExtent row = row_extent(tables, b);
  const int64_t room = tables.max_tokens - row.length;
  const int64_t arriving = arriving_tokens(tables, b);
  const int64_t new_tokens = arriving < room ? arriving : room;
  const int32_t* const from = tables.rows + b * tables::kRowColumns;
  int32_t* const to = planned + b * tables::kRowColumns;
  for (int column = 0; column < tables::kRowNewTokens; ++column) to[column] = from[column];
  to[tables::kRowNewTokens] = static_cast<int32_t>(new_tokens);

  AppendPieces pieces(tables.exact, row, new_tokens);
  const int64_t room_for_jobs = max_append_pieces(tables.exact, tables.chunk_tokens);
  int32_t* job = jobs + b * room_for_jobs * tables::kJobColumns;
  for (int64_t n = 0; n < room_for_jobs; ++n, job += tables::kJobColumns) {
    AppendPiece piece{};
    const bool is_used = pieces.next(piece);
    job[0] = static_cast<int32_t>(b);
    job[1] = static_cast<int32_t>(piece.first_token);
    job[2] = static_cast<int32_t>(piece.tokens);
    job[3] = is_used
                 ? tables.page_table[(b * tables.page_columns + piece.entry) * tables::kPageColumns]
                 : 0;
    job[4] = static_cast<int32_t>(piece.page_offset);
    job[5] = is_used && fits_smoothing(piece) ? 1 : 0;
  }
}

// Makes row b's plan the state of the tables: its row of `planned` is the one that was made.
TQ_HOST_DEVICE inline void commit_append_row(const FixedTables& tables, int64_t b,
                                             const int32_t* planned) {
  const RowExtent before = row_extent(tables, b);
  const int64_t new_tokens = planned[b * tables::kRowColumns + tables::kRowNewTokens];
  AppendPieces pieces(tables.exact, before, new_tokens);
  RowExtent after = before;
  after.length += new_tokens;
  for (AppendPiece piece{}; pieces.next(piece);) {
    after.num_entries = piece.entry + 1;
    after.paged_tokens += piece.tokens;
    tables.page_table[(b * tables.page_columns + piece.entry) * tables::kPageColumns + 1] =
        static_cast<int32_t>(piece.page_offset + piece.tokens);
  }
  int32_t* const position = tables.positions + b * tables::kPositionColumns;
  position[tables::kPositionRefused] +=
      static_cast<int32_t>(arriving_tokens(tables, b) - new_tokens);
  position[tables::kPositionSeen] += tables.chunk_tokens;
  int32_t* const row = tables.rows + b * tables::kRowColumns;
  row[tables::kRowLength] = static_cast<int32_t>(after.length);
  row[tables::kRowEntries] = static_cast<int32_t>(after.num_entries);
  row[tables::kRowExactBegin] =
      static_cast<int32_t>(exact_begin(tables.exact, after.length, after.paged_tokens));
  row[tables::kRowNewTokens] = 0;
}

// Shortens row b to new_length <= its length, as PageTable::crop does.
TQ_HOST_DEVICE inline void crop_row(const FixedTables& tables, int64_t b, int64_t new_length) {
  const RowExtent row = row_extent(tables, b);
  const int64_t kept = kept_paged_tokens(tables.exact, row.paged_tokens, new_length);
  int64_t entries = row.num_entries;
  int32_t* const of_row = tables.page_table + b * tables.page_columns * tables::kPageColumns;
  for (int64_t surplus = row.paged_tokens - kept; surplus > 0;) {
    int32_t& tokens = of_row[(entries - 1) * tables::kPageColumns + 1];
    const int64_t removed = surplus < tokens ? surplus : tokens;
    tokens -= static_cast<int32_t>(removed);
    surplus -= removed;
    if (tokens == 0) --entries;
  }
  int32_t* const to = tables.rows + b * tables::kRowColumns;
  to[tables::kRowLength] = static_cast<int32_t>(new_length);
  to[tables::kRowEntries] = static_cast<int32_t>(entries);
  to[tables::kRowExactBegin] = static_cast<int32_t>(exact_begin(tables.exact, new_length, kept));
}

// Tables in host memory, as spans whose sizes are checked.
struct FixedAppendParams {
  LayerSpec spec;
  int64_t max_tokens = 0;
  int64_t chunk_tokens = 0;
  std::span<int32_t> rows;        // [B, 4]
  std::span<int32_t> page_table;  // [B, P, 2]
  std::span<int32_t> positions;   // [B, 3]
};

// Fills planned [B, 4] and jobs [B * max_append_pieces, 6] and changes nothing else. Throws
// InvalidArgument for tables that do not fit together, and where a row has no room for its tokens.
void plan_append(const FixedAppendParams& params, std::span<int32_t> planned,
                 std::span<int32_t> jobs);

// Commits a plan whose jobs were carried out. Throws InvalidArgument where `planned` is not the
// plan of these tables; they are as they were then.
void commit_append(const FixedAppendParams& params, std::span<const int32_t> planned);

// Shortens every row to new_lengths[b] tokens; positions stay. Throws
// InvalidArgument for a length that is negative or above the row's; the tables are as they were.
void crop(const FixedAppendParams& params, std::span<const int64_t> new_lengths);

// Entries that each row has once it holds max_tokens tokens: what the page table needs columns for.
// A row that was cropped within a page takes one more than a row that was not.
std::vector<int64_t> entries_of_full_rows(const FixedAppendParams& params);

}  // namespace turboquant::cache
