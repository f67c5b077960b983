// How the attention over a row's pages is cut into pieces of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::attention {

// Pages of a split. Fixed, so that a row's splits, and with them its bits, depend on nothing but
// the row.
inline constexpr int kSplitPages = 8;

TQ_HOST_DEVICE constexpr int64_t num_splits(int64_t num_entries) {
  return (num_entries + kSplitPages - 1) / kSplitPages;
}

// Query rows of one piece of work: a KV head's queries, flattened [q][group], in tiles. Bounds the
// memory of partial results; a query's bits do not depend on its tile.
inline constexpr int kQueryTileRows = 64;

// Position of query j of a row; negative for padding.
TQ_HOST_DEVICE constexpr int64_t query_position(const cache::RowState& row, int64_t num_queries,
                                                int64_t j) {
  return row.length + row.new_tokens - num_queries + j;
}

// The tokens a query at `position` sees, [begin, end).
struct VisibleTokens {
  int64_t begin;
  int64_t end;
};
TQ_HOST_DEVICE constexpr VisibleTokens visible_tokens(int64_t position, int64_t sliding_window) {
  const int64_t end = position < 0 ? 0 : position + 1;
  if (sliding_window <= 0 || end <= sliding_window) return {0, end};
  return {end - sliding_window, end};
}

// The work of one (row, KV head, query tile): `splits` page splits and the exact tokens, whose
// partial results lie at first_partial ... first_partial + splits.
struct QueryTile {
  int64_t row;
  int kv_head;
  int first_query;  // flattened query rows of the head
  int num_queries;
  int64_t splits;
  int64_t first_partial;
};

// Every tile of a call, in the order (row, head, tile), cut into waves of bounded memory: partials
// count from 0 in each wave.
struct SplitPlan {
  std::vector<QueryTile> tiles;
  std::vector<int64_t> wave_ends;  // ends of the waves in `tiles`

  static SplitPlan make(std::span<const int32_t> rows, int64_t batch, int num_kv_heads,
                        int64_t queries_per_head, int64_t partial_budget) {
    SplitPlan plan;
    int64_t partials = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t splits = num_splits(cache::row_state(rows, b).num_entries);
      for (int head = 0; head < num_kv_heads; ++head) {
        for (int64_t first = 0; first < queries_per_head; first += kQueryTileRows) {
          if (partials > 0 && partials + splits + 1 > partial_budget) {
            plan.wave_ends.push_back(static_cast<int64_t>(plan.tiles.size()));
            partials = 0;
          }
          plan.tiles.push_back({.row = b,
                                .kv_head = head,
                                .first_query = static_cast<int>(first),
                                .num_queries = static_cast<int>(
                                    std::min<int64_t>(kQueryTileRows, queries_per_head - first)),
                                .splits = splits,
                                .first_partial = partials});
          partials += splits + 1;
        }
      }
    }
    if (!plan.tiles.empty()) plan.wave_ends.push_back(static_cast<int64_t>(plan.tiles.size()));
    return plan;
  }
};

}  // namespace turboquant::attention
