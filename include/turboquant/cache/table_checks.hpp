// Checks of the int32 tables that operators take. They come from the caller (through Python too),
// so nothing in them may lead an operator out of its buffers.
#pragma once

#include <cstdint>
#include <span>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cache/tensor_view.hpp"

namespace turboquant::cache {

// One row of the `rows` table.
struct RowState {
  int64_t length;
  int64_t num_entries;
  int64_t exact_begin;
  int64_t new_tokens;
};

inline RowState row_state(std::span<const int32_t> rows, int64_t b) {
  const int32_t* row = rows.data() + b * tables::kRowColumns;
  return {row[tables::kRowLength], row[tables::kRowEntries], row[tables::kRowExactBegin],
          row[tables::kRowNewTokens]};
}

inline EncodeJob job_at(std::span<const int32_t> jobs, int64_t n) {
  const int32_t* job = jobs.data() + n * tables::kJobColumns;
  return {job[0], job[1], job[2], job[3], job[4], job[5]};
}

// All throw InvalidArgument that names the table, the row and the column.

// rows [batch, 4] with at most chunk_tokens new tokens in a row.
void check_rows(const LayerSpec& spec, std::span<const int32_t> rows, int64_t batch,
                int64_t chunk_tokens);

// page_table [batch, P, 2]: each row's entries are pages of the pool and add up to its paged
// tokens. Returns P.
int64_t check_page_table(const LayerSpec& spec, std::span<const int32_t> page_table,
                         std::span<const int32_t> rows, int64_t batch, const PagePoolView& pages);

// jobs [N, 6]: pages of the pool, tokens that exist, rows ascending, and within a row contiguous
// tokens from the start of the ring (or of what follows the pages), so many that the ring holds the
// rest; only the first job of a row without entries fits smoothing. Jobs of 0 tokens are room for
// more, their other columns mean nothing. Returns N.
int64_t check_jobs(const LayerSpec& spec, std::span<const int32_t> jobs,
                   std::span<const int32_t> rows, int64_t batch, const PagePoolView& pages);

// The pool's blocks are the spec's, and it is not larger than its slabs.
void check_pages(const LayerSpec& spec, const PagePoolView& pages);

// exact_keys and exact_values are [batch, num_kv_heads, capacity, head_dim].
void check_exact(const LayerSpec& spec, int64_t batch, const ConstTensorView& exact_keys,
                 const ConstTensorView& exact_values);

// Where a row's new tokens start in the chunk: its real tokens are the last of chunk_tokens.
inline int64_t first_new_token(const RowState& row, int64_t chunk_tokens) {
  return chunk_tokens - row.new_tokens;
}

}  // namespace turboquant::cache
