// How CUDA extend attention cuts a call into thread blocks and its workspace. Host and device.
#pragma once

#include <cstdint>

#include "decode_attention_plan.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// Which sizes and which tensor-core instructions the kernels have (extend_attention_traits.cuh).
enum class ExtendSizes {
  kWarpgroup,  // 227 KB of shared memory a block, wgmma: compute capability 9.0
  kLarge,      // 227 KB, mma.sync: 9.0 and 10.0
  kCompact,    // 99 KB, mma.sync: all others from 8.0 on
};
inline constexpr int kExtendLargeSharedBytes = 227 * 1024;
inline constexpr int kExtendCompactSharedBytes = 99 * 1024;

// Query rows of a tile: a KV head's queries, flattened [q][group]; each warp has 16 or 32 of them.
TQ_HOST_DEVICE constexpr int extend_warp_rows(int head_dim) { return head_dim <= 128 ? 32 : 16; }
TQ_HOST_DEVICE constexpr int extend_warps(int head_dim, ExtendSizes sizes) {
  if (sizes != ExtendSizes::kCompact) return 8;
  return head_dim <= 128 ? 4 : 2;
}
TQ_HOST_DEVICE constexpr int extend_tile_rows(int head_dim, ExtendSizes sizes) {
  return extend_warp_rows(head_dim) * extend_warps(head_dim, sizes);
}

// Thread blocks that a lone sequence is cut into where its tiles are fewer: about one for each
// multiprocessor of an H100. A constant of the numerics, not a property of the device.
inline constexpr int64_t kExtendBlocksPerRow = 128;
// Blocks of 64 tokens below which a split costs more than it gains.
inline constexpr int64_t kExtendSplitBlocks = 8;
// Thread blocks of a launch from which on more batch rows go into a next launch, which takes the
// same workspace.
inline constexpr int64_t kExtendLaunchBlocks = 512;

// What a call's shapes decide. rows = group * q.
struct ExtendShape {
  int64_t num_kv_heads;
  int64_t rows;
  int64_t tiles;
  int64_t splits;        // of a tile, at most; a short row has fewer that are not empty
  int64_t launch_batch;  // batch rows of a launch
  int64_t exact_slots;   // a row's exact tokens in whole blocks of 64
};
TQ_HOST_DEVICE constexpr ExtendShape extend_shape(int64_t batch, int64_t num_kv_heads,
                                                  int64_t group, int64_t num_queries,
                                                  int64_t exact_tokens, int head_dim,
                                                  ExtendSizes sizes) {
  ExtendShape shape{};
  shape.num_kv_heads = num_kv_heads;
  shape.rows = group * num_queries;
  shape.tiles = ceil_div(shape.rows, extend_tile_rows(head_dim, sizes));
  shape.splits = max_of(1, kExtendBlocksPerRow / (num_kv_heads * shape.tiles));
  shape.launch_batch =
      min_of(batch, ceil_div(kExtendLaunchBlocks, num_kv_heads * shape.tiles * shape.splits));
  shape.exact_slots = ceil_div(exact_tokens, cache::kBlockTokens) * cache::kBlockTokens;
  return shape;
}

// What one tile attends: table entries [first_entry, first_entry + entries), then blocks of 64 of
// its exact tokens [first_exact, first_exact + exact_blocks).
struct ExtendRange {
  int first_entry, entries;
  int first_exact, exact_blocks;
  // Tokens [every_begin, every_end) are seen by every query of the tile.
  int every_begin, every_end;
  TQ_HOST_DEVICE int blocks() const { return entries + exact_blocks; }
};
// first_query, last_query: of the tile.
TQ_HOST_DEVICE inline ExtendRange extend_range(const PlanShape& plan, const cache::RowState& row,
                                               int64_t first_query, int64_t last_query) {
  const auto visible = [&](int64_t j) {
    return attention::visible_tokens(attention::query_position(row, plan.num_queries, j),
                                     plan.sliding_window);
  };
  const attention::VisibleTokens first = visible(first_query), last = visible(last_query);
  ExtendRange range{};
  range.every_begin = static_cast<int>(last.begin);
  range.every_end = static_cast<int>(first.end);
  if (last.begin >= last.end) return range;
  const EntryRange entries = visible_entries(row, plan.sink_tokens, first.begin, last.end);
  range.first_entry = static_cast<int>(entries.begin);
  range.entries = static_cast<int>(max_of(0, entries.end - entries.begin));
  // Exact token x is at position x below the sinks, and at exact_begin + x - sinks from there on.
  const ExactTokens tokens = exact_tokens(plan.sink_tokens, row);
  const auto index_of = [&](int64_t position) {
    return min_of(position, tokens.sinks) +
           max_of(0, position - max_of(row.exact_begin, tokens.sinks));
  };
  const int64_t begin = index_of(first.begin) / cache::kBlockTokens;
  const int64_t end = ceil_div(min_of(index_of(last.end), tokens.count()), cache::kBlockTokens);
  range.first_exact = static_cast<int>(begin);
  range.exact_blocks = static_cast<int>(max_of(0, end - begin));
  return range;
}

// Split `index` of `splits`: blocks [begin, end) of a tile's; short tiles are cut into fewer.
struct ExtendSplit {
  int begin, end;
};
TQ_HOST_DEVICE inline ExtendSplit extend_split(int64_t blocks, int64_t splits, int64_t index) {
  const int64_t used = max_of(1, min_of(splits, blocks / kExtendSplitBlocks));
  if (index >= used) return {0, 0};
  return {static_cast<int>(blocks * index / used), static_cast<int>(blocks * (index + 1) / used)};
}

// Parts of the workspace of a launch, each on 16 bytes. N = launch_batch, E = exact_slots. Rows of
// D fp16 numbers are in stored order (extend_attention_traits.cuh).
struct ExtendWorkspace {
  int64_t queries_offset;        // f16 [N, H, rows, D]
  int64_t query_factors_offset;  // f32 [N, H, rows]
  int64_t exact_keys_offset;     // f16 [N, H, E, D]
  int64_t exact_values_offset;   // f16 [N, H, E, D]
  int64_t exact_scales_offset;   // f32 [2, N, H, E]: of keys, of values
  int64_t entry_begins_offset;   // i32 [N, P]
  int64_t partials_offset;       // f32 [N, H, rows, splits, D]
  int64_t stats_offset;          // f32 [N, H, rows, splits, 2]: reference, sum
  int64_t bytes;
};
TQ_HOST_DEVICE constexpr ExtendWorkspace extend_workspace(const ExtendShape& shape, int head_dim,
                                                          int64_t page_columns) {
  const auto align = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const int64_t heads = shape.launch_batch * shape.num_kv_heads;
  const int64_t query_rows = heads * shape.rows;
  const int64_t exact_rows = heads * shape.exact_slots;
  ExtendWorkspace w{};
  w.query_factors_offset = w.queries_offset + align(query_rows * head_dim * 2);
  w.exact_keys_offset = w.query_factors_offset + align(query_rows * 4);
  w.exact_values_offset = w.exact_keys_offset + align(exact_rows * head_dim * 2);
  w.exact_scales_offset = w.exact_values_offset + align(exact_rows * head_dim * 2);
  w.entry_begins_offset = w.exact_scales_offset + align(exact_rows * 2 * 4);
  w.partials_offset = w.entry_begins_offset + align(shape.launch_batch * page_columns * 4);
  w.stats_offset = w.partials_offset + query_rows * shape.splits * head_dim * 4;
  w.bytes = w.stats_offset + align(query_rows * shape.splits * 2 * 4);
  return w;
}

}  // namespace turboquant::cuda::detail
