// How decode attention cuts a layer's tokens into pieces of work. Host and device: the launcher
// sizes the workspace with it, every kernel finds its piece with it, tests run it on the CPU.
#pragma once

#include <cstdint>

#include "turboquant/attention/split_plan.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// Query rows of a tile: a KV head's queries, flattened [q][group], in the eight columns of an mma.
inline constexpr int kTileRows = 8;

// Tiles that a warp takes in one pass over a page where a call has two or more: each decoded code
// is an operand of as many mma. Wider keys and 256 coordinates leave no registers for a second
// tile's outputs; groups of more than 8 heads of 80 coordinates are not known to exist.
TQ_HOST_DEVICE constexpr int pass_tiles(int head_dim, int k_bits) {
  return (head_dim == 64 || head_dim == 96 || head_dim == 128) && k_bits <= 4 ? 2 : 1;
}

// A split is a whole number of these: two pages or more for each warp of a group, for a merge of
// the group's states and the next split's start cost about as much as half a page.
inline constexpr int kUnitShift = 4;
inline constexpr int kSplitUnitPages = 1 << kUnitShift;
// Rows of so few pages that splits of this size are one round of a lone sequence's: a page for each
// warp, 7 to 20 % less time than with splits of 16. Large batches of such rows are not merged page
// by page: warps take whole splits.
inline constexpr int kShortSplitPages = 8;

// How many of the short splits that many warps take whole: rounds of one for every warp. A round
// that is not full takes as long as a full one: three quarters at least.
TQ_HOST_DEVICE constexpr int whole_splits(int short_splits, int warps) {
  const int spare = warps / 4;
  if (short_splits < warps - spare) return 0;
  const auto rounds = static_cast<uint32_t>(short_splits + spare) / static_cast<uint32_t>(warps);
  const int64_t places = int64_t{rounds} * warps;
  return places < short_splits ? static_cast<int>(places) : short_splits;
}

// Splits of a row over all KV heads: with two groups of warps on each of 132 multiprocessors, a
// lone sequence is one round of equal pieces whatever its length. A constant of the numerics (it
// fixes which tokens are summed together), not a property of the device.
inline constexpr int64_t kSplitsPerRow = 256;

// Exact tokens (sinks, ring, chunk) of one piece of work: two tiles of 16 for each of eight warps.
inline constexpr int kExactPieceTokens = 256;

TQ_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TQ_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
TQ_HOST_DEVICE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Tiles of a KV head's query rows: one, or whole pairs, of which the last tile may have no row.
TQ_HOST_DEVICE constexpr int64_t row_tiles(int64_t rows) {
  return rows <= kTileRows ? 1 : 2 * ceil_div(rows, 2 * kTileRows);
}

TQ_HOST_DEVICE inline cache::RowState load_row_state(const int32_t* rows, int64_t b) {
  const int32_t* const row = rows + b * cache::tables::kRowColumns;
  return {row[cache::tables::kRowLength], row[cache::tables::kRowEntries],
          row[cache::tables::kRowExactBegin], row[cache::tables::kRowNewTokens]};
}

// What the partition depends on beside the row.
struct PlanShape {
  int64_t num_kv_heads;
  int64_t sink_tokens;
  int64_t num_queries;
  int64_t sliding_window;
  int64_t window_pages = (sliding_window >> 6) + 3;  // that a window can touch; kBlockTokens = 64
};

// The page splits of one row (and KV head, and tile). Split i covers the table entries
// [i, i + 1) * split_pages; splits [first_split, first_split + num_splits) hold all entries
// [first_entry, end_entry) that any query may see.
struct RowSplits {
  int split_pages;
  int first_split;
  int num_splits;
  int first_entry;
  int end_entry;
  // Some entry in that range holds a token that some query does not see.
  bool masked;
};

// The page table entries that can hold tokens of [begin, end). An entry holds 1 to 64 tokens, so
// entry e starts at or before position sinks + 64 e, and at or behind exact_begin - 64 (num_entries
// - e): the range is found without the table.
struct EntryRange {
  int64_t begin, end;
};
TQ_HOST_DEVICE inline EntryRange visible_entries(const cache::RowState& row, int64_t sink_tokens,
                                                 int64_t begin, int64_t end) {
  constexpr int kPageShift = 6;
  static_assert(cache::kBlockTokens == 1 << kPageShift);
  const int64_t sinks = min_of(row.length, sink_tokens);
  return {begin > sinks ? min_of(row.num_entries, (begin - sinks) >> kPageShift) : 0,
          end >= row.exact_begin
              ? row.num_entries
              : max_of(0, row.num_entries - ((row.exact_begin - end) >> kPageShift))};
}

TQ_HOST_DEVICE inline RowSplits row_splits(const PlanShape& shape, const cache::RowState& row) {
  // Numbers that are not negative are divided by powers of two with shifts, and by others in 32
  // bits: every block of a launch starts with this.
  constexpr int kSplitsShift = 8;
  static_assert(kSplitsPerRow == 1 << kSplitsShift);

  const int64_t last = attention::query_position(row, shape.num_queries, shape.num_queries - 1);
  RowSplits splits{kSplitUnitPages, 0, 0, 0, 0, false};
  if (row.num_entries == 0 || last < 0) return splits;
  const int64_t first = max_of(0, attention::query_position(row, shape.num_queries, 0));
  const attention::VisibleTokens of_first = attention::visible_tokens(first, shape.sliding_window);
  const attention::VisibleTokens of_last = attention::visible_tokens(last, shape.sliding_window);
  const auto [begin, end] = visible_entries(row, shape.sink_tokens, of_first.begin, of_last.end);
  if (begin >= end) return splits;
  splits.masked =
      of_first.end < row.exact_begin || of_last.begin > min_of(row.length, shape.sink_tokens);
  // With a window, the pages it can touch stand for the row's pages, whatever q is, so that padded
  // and unpadded calls agree. More than that only where a crop has left partly filled pages.
  const int64_t pages = shape.sliding_window > 0
                            ? max_of(end - begin, min_of(row.num_entries, shape.window_pages))
                            : row.num_entries;
  const auto share =
      static_cast<uint32_t>((pages * shape.num_kv_heads + (kSplitsPerRow - 1)) >> kSplitsShift);
  const uint32_t split_pages = share <= kShortSplitPages
                                   ? kShortSplitPages
                                   : (share + kSplitUnitPages - 1) >> kUnitShift << kUnitShift;
  splits.split_pages = static_cast<int>(split_pages);
  splits.first_entry = static_cast<int>(begin);
  splits.end_entry = static_cast<int>(end);
  const auto first_entry = static_cast<uint32_t>(begin),
             last_entry = static_cast<uint32_t>(end) - 1;
  uint32_t first_split, last_split;
  if (split_pages == kShortSplitPages) {  // without divisions: lone rows wait for this
    first_split = first_entry / kShortSplitPages;
    last_split = last_entry / kShortSplitPages;
  } else {
    first_split = first_entry / split_pages;
    last_split = last_entry / split_pages;
  }
  splits.first_split = static_cast<int>(first_split);
  splits.num_splits = static_cast<int>(last_split - first_split) + 1;
  return splits;
}

// Never less than any row's num_splits: ceil(pages / split_pages), and one more where a window
// starts inside a split.
TQ_HOST_DEVICE constexpr int64_t max_row_splits(int64_t num_kv_heads, int64_t page_columns) {
  if (page_columns == 0) return 0;
  return 1 +
         min_of(ceil_div(page_columns, kShortSplitPages), ceil_div(kSplitsPerRow, num_kv_heads));
}

// Blocks of attend_pages, in which four warps share a page: the first ones take pieces of exact
// tokens, the others a page for each of `teams` teams, all of one row and KV head.
struct PageBlocks {
  int exact, pages;  // how many blocks
  int teams;
};
// All warps of a block are in teams, or, where multiprocessors are left, all but four, which rotate
// the queries of up to as many rows meanwhile.
inline constexpr int kMostTeams = 4;
// Multiprocessors of an H100 SXM and an H200, and those of them that are free while the call before
// ends. Constants, for the workspace follows from them; on a device with fewer, some blocks wait.
inline constexpr int64_t kMultiprocessors = 132, kFreeMultiprocessors = 100;
// None where pages are too many for a team each. units: rows and KV heads; page_columns: entries of
// a row's page table, used or not.
TQ_HOST_DEVICE constexpr PageBlocks plan_page_blocks(int64_t units, int64_t rows,
                                                     int64_t page_columns, int64_t exact_pieces) {
  if (rows > kTileRows || page_columns == 0) return {0, 0, 0};
  const int64_t pieces = units * exact_pieces;
  const int64_t few = units * ceil_div(page_columns, kMostTeams - 1);
  if (rows <= 4 && few + pieces <= kFreeMultiprocessors) {
    return {static_cast<int>(pieces), static_cast<int>(few), kMostTeams - 1};
  }
  const int64_t blocks = units * ceil_div(page_columns, kMostTeams);
  const int64_t left = kMultiprocessors - blocks;
  if (2 * left < pieces) return {0, 0, 0};  // a block has room for two pieces
  return {static_cast<int>(min_of(left, pieces)), static_cast<int>(blocks), kMostTeams};
}
// Partial results of a tile's pages then: whole splits of them.
TQ_HOST_DEVICE constexpr int64_t page_result_slots(int64_t page_columns) {
  return ceil_div(page_columns, kShortSplitPages) * kShortSplitPages;
}
// Partial results of a tile, however its pages are attended. units: rows and KV heads.
TQ_HOST_DEVICE constexpr int64_t max_slots(int64_t units, int64_t rows, int64_t num_kv_heads,
                                           int64_t page_columns, int64_t exact_pieces) {
  const int64_t slots = max_row_splits(num_kv_heads, page_columns) + exact_pieces;
  return plan_page_blocks(units, rows, page_columns, exact_pieces).pages > 0
             ? max_of(slots, page_result_slots(page_columns) + kShortSplitPages * exact_pieces)
             : slots;
}

// The exact tokens of a row in the order of their positions: sinks, ring, chunk.
struct ExactTokens {
  int64_t sinks;
  int64_t ring;
  int64_t chunk;
  TQ_HOST_DEVICE constexpr int64_t count() const { return sinks + ring + chunk; }
};
TQ_HOST_DEVICE constexpr ExactTokens exact_tokens(int64_t sink_tokens, const cache::RowState& row) {
  const int64_t sinks = min_of(row.length, sink_tokens);
  return {sinks, row.length - row.exact_begin, row.new_tokens};
}
TQ_HOST_DEVICE constexpr int exact_pieces(const ExactTokens& tokens) {
  constexpr int kShift = 8;
  static_assert(kExactPieceTokens == 1 << kShift);
  return static_cast<int>((tokens.count() + kExactPieceTokens - 1) >> kShift);
}
TQ_HOST_DEVICE constexpr int64_t max_exact_pieces(int64_t capacity, int64_t chunk_tokens) {
  return ceil_div(capacity + chunk_tokens, kExactPieceTokens);
}

// A partial result: outputs [8 rows][D], of a row the pairs of the accumulators in the order
// [D / 16][8 g], then the running maxima and sums of the eight rows. Scores are in units of log2.
TQ_HOST_DEVICE constexpr int64_t partial_floats(int head_dim) {
  return int64_t{kTileRows} * head_dim + 2 * kTileRows;
}

// Words of a tile's query operands: fp16 pairs of eight queries.
TQ_HOST_DEVICE constexpr int query_words(int head_dim) { return 32 * (head_dim / 8); }

// Parts of the workspace, each on 16 bytes.
struct Workspace {
  int64_t
      query_operands_offset;     // u32 [B, H, tiles, 32 lanes * D / 8]: rotated queries, fp16 pairs
  int64_t query_factors_offset;  // f32 [B, H, tiles, 8]
  int64_t entry_begins_offset;   // i32 [B, P]: position of an entry's first token (masked rows)
  int64_t partials_offset;       // f32 [B, H, tiles, page splits + exact pieces, partial_floats]
  int64_t bytes;
};
TQ_HOST_DEVICE constexpr Workspace workspace_layout(int64_t batch, int64_t num_kv_heads,
                                                    int64_t tiles, int head_dim,
                                                    int64_t page_columns, int64_t slots) {
  const auto align = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const int64_t units = batch * num_kv_heads * tiles;
  Workspace w{};
  w.query_factors_offset = w.query_operands_offset + align(units * query_words(head_dim) * 4);
  w.entry_begins_offset = w.query_factors_offset + align(units * kTileRows * 4);
  w.partials_offset = w.entry_begins_offset + align(batch * page_columns * 4);
  w.bytes = w.partials_offset + units * slots * align(partial_floats(head_dim) * 4);
  return w;
}

}  // namespace turboquant::cuda::detail
