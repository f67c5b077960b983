// What the decode attention kernels are given: DecodeAttentionParams as plain numbers and device
// addresses, and how a kernel finds its piece of work in them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode_attention_plan.hpp"
#include "divider.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// A tensor [batch, heads, tokens, D] of the caller; strides in elements.
struct TensorArg {
  const std::byte* data;
  int64_t batch_stride, head_stride, token_stride, elem_stride;
  int elem_bytes;

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE const std::byte* row(int64_t b, int64_t head,
                                                       int64_t token) const {
    return data + (b * batch_stride + head * head_stride + token * token_stride) * elem_bytes;
  }
};

struct DecodeArgs {
  // Shapes. rows = group * num_queries, tiles = row_tiles(rows).
  int batch, num_kv_heads, group, num_queries, rows, tiles;
  int chunk_tokens;
  int page_columns;
  int page_slots, exact_slots;  // partial results of a tile: page splits, then exact pieces
  int slots;                    // both
  // attend_pages instead of attend_splits: of a split a result for each page (by table entry), of a
  // piece one for each warp; page_slots and slots count them.
  bool page_results;
  int passes_of_tiles[2];  // how often a page is read, one tile or two at a time
  // From numbers of items and rows to what they are of.
  Divider by_heads, by_group, by_rows, by_tiles, by_passes[2], by_exact_slots, by_ring;
  PlanShape plan;
  int k_bits, v_bits;
  // A block's key part [0, key_part_bytes) (mean, codes, scales) and, behind it, its value part.
  uint32_t key_part_bytes, value_part_bytes;
  bool has_mean, half_scales;
  cache::ExactLayout exact;
  cache::ElementType type;  // of query, chunk and exact tokens
  cache::ElementType out_type;
  bool smooth_keys;
  float scaling;
  float softcap;        // what kernels compare with 0: by the next one, 8+3 bits spill at d = 80
  float softcap_scale;  // softcap log2(e)
  float softcap_rate;   // 2 log2(e) / softcap
  uint32_t pages_per_slab;  // at most INT32_MAX, as page numbers are: then there is but one slab

  // A row's pages may hold tokens that a query does not see.
  bool may_mask;

  // Queries, chunk and exact tokens are bf16 or fp16, contiguous along D, rows on 16 bytes.
  bool plain_exact;

  TensorArg query, key_states, value_states, exact_keys, exact_values, out;
  const float* smoothing;  // [B, H, D]
  const float* key_signs;  // [H, 3, D]
  const float* key_turns;  // [H, D / 2, 2]
  const float* value_signs;
  const float* value_turns;
  const float* key_levels;  // DecodeTable::levels [entries, dims]
  const float* value_levels;
  cache::PagePoolView pages;
  const int32_t* page_table;  // [B, P, 2]
  const int32_t* row_table;   // [B, 4]
  const float* sink_logits;   // [Hq] or null
  float* lse;                 // [B, Hq, q] or null

  // Workspace.
  uint32_t* query_operands;  // [B, H, tiles, 32 * D / 8], see QuerySteps
  float* query_factors;      // [B, H, tiles, 8]
  int32_t* entry_begins;     // [B, P]
  float* partials;           // [B, H, tiles, slots, partial_floats(D)]

  // The block of a KV head in a page.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE const std::byte* block(uint32_t page, int head) const {
    const std::byte* slab = pages.only_slab;
    if (slab == nullptr) {  // divisions
      slab = pages.slabs[page / pages_per_slab];
      page = page % pages_per_slab;
    }
    return slab + page * pages.page_bytes + head * pages.block_bytes;
  }
  // How often a page is read: kRowTiles tiles at a time.
  template <int kRowTiles>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE int passes() const {
    return passes_of_tiles[kRowTiles - 1];
  }
  // (row, KV head, tile) as one number.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE int64_t unit(int64_t b, int head, int tile) const {
    return (b * num_kv_heads + head) * tiles + tile;
  }
  // From a unit's partial results to the next one's.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE int64_t partial_stride(int head_dim) const {
    return slots * partial_floats(head_dim);
  }
  // Of a partial result among all, where a unit has that many slots.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int64_t partial_offset(int64_t unit_index,
                                                                          int slot, int slots,
                                                                          int head_dim) {
    return (unit_index * slots + slot) * partial_floats(head_dim);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float* partial(int64_t unit_index, int slot, int head_dim) const {
    return partials + partial_offset(unit_index, slot, slots, head_dim);
  }
};

// Of attend_pages.
struct SharedPagesArgs {
  DecodeArgs call;
  PageBlocks blocks;
  Divider by_unit_blocks;  // blocks with pages of a (row, KV head)
};

// Which of a lane's key pairs u the k-steps of the first product take. Four neighbours are two
// steps, the even ones and the odd ones, so that four words of a mean are an operand A as they are:
// in rows g its even pairs meet the even step, in rows g + 8 its odd pairs the odd step.
template <int kDim>
struct QuerySteps {
  static constexpr int kInFours = kDim / 8 / 4 * 4;
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int pair(int step, int k) {
    return step < kInFours / 2 ? step / 2 * 4 + step % 2 + 2 * k : 2 * step + k;
  }
  // Place of operand register u of a lane among its unit's: a warp reads a step's two of every lane
  // at once.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int operand(int u, int lane) {
    const int step = u < kInFours ? u / 4 * 2 + u % 2 : u / 2;
    const int k = u < kInFours ? u % 4 / 2 : u % 2;
    return (step * 32 + lane) * 2 + k;
  }
};

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Rows of a batch that one launch takes: their plans lie in shared memory.
inline constexpr int kMaxLaunchRows = 192;

}  // namespace turboquant::cuda::detail
