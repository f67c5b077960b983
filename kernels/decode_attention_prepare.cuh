// Decode attention, first kernel (decode_attention.cuh): the queries of all tiles as operands.
#pragma once

#include "decode_attention_exact.cuh"
#include "rotated_rows.cuh"

namespace turboquant::cuda::detail {

inline constexpr int kPrepareThreads = 32 * kTileRows;

// Positions of the first tokens of a row's entries: an exclusive prefix sum by the whole block.
// shared: kPrepareThreads integers.
TQ_DEVICE void write_entry_begins(const DecodeArgs& args, int64_t b, const cache::RowState& row,
                                  int* shared) {
  const int thread = ptx::thread_index();
  const int32_t* const entries =
      args.page_table + b * args.page_columns * cache::tables::kPageColumns;
  int32_t* const begins = args.entry_begins + b * args.page_columns;
  int position = static_cast<int>(min_of(row.length, args.plan.sink_tokens));
  for (int64_t start = 0; start < row.num_entries; start += kPrepareThreads) {
    const int64_t e = start + thread;
    const int tokens = e < row.num_entries ? entries[cache::tables::kPageColumns * e + 1] : 0;
    int sum = tokens;
    TQ_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = ptx::shuffle_up(sum, delta);
      if (thread % 32 >= delta) sum += other;
    }
    if (thread % 32 == 31) shared[thread / 32] = sum;
    ptx::sync_block();
    int before = 0, total = 0;
    for (int w = 0; w < kPrepareThreads / 32; ++w) {
      if (w < thread / 32) before += shared[w];
      total += shared[w];
    }
    if (e < row.num_entries) begins[e] = position + before + sum - tokens;
    position += total;
    ptx::sync_block();
  }
}

// Grid: one block for each (row, KV head, tile of 8 query rows); a warp for each query row.
template <int kDim>
TQ_DEVICE void prepare_queries(const DecodeArgs& args, std::byte* shared) {
  // In this order: attend_splits reads what the kernels before this one wrote as soon as it runs.
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int tile = ptx::block_index() % args.tiles;
  const int head = ptx::block_index() / args.tiles % args.num_kv_heads;
  const int64_t b = ptx::block_index() / args.tiles / args.num_kv_heads;
  const int64_t unit = args.unit(b, head, tile);

  // 1. R (q * s), in the range of fp16; zeros where there is no query row.
  constexpr int kShare = kRowShare<kDim>;
  float* const x = reinterpret_cast<float*>(shared) + warp * kDim;
  const int r = tile * kTileRows + warp;
  const std::byte* const query = query_row(args, b, head, r);
  float factor = 0.0f;
  float y[kShare];
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) y[k] = 0.0f;
  if (query != nullptr) {
    load_row_share<kDim>(query, args.query.elem_stride, args.type, y);
    factor = rotate_scaled<kDim, false>(
        y, args.scaling * (args.softcap > 0.0f ? 1.0f : kLog2E),
        {args.key_signs + int64_t{head} * 3 * kDim, args.key_turns + int64_t{head} * kDim},
        args.smooth_keys ? args.smoothing + (b * args.num_kv_heads + head) * kDim : nullptr, x);
  }
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) x[i] = y[k];
  }
  ptx::sync_warp();
  if (lane == 0) args.query_factors[unit * kTileRows + warp] = factor;

  // 2. Operand B: row `warp` is column g = warp, held by lanes 4 g + t.
  uint32_t* const operands = args.query_operands + unit * 32 * (kDim / 8);
  for (int i = lane; i < kDim / 2; i += kWarpLanes) {
    const int t = i % 4, u = i / 4;
    const int pair = key_pair<kDim>(args.k_bits, u, t);
    operands[QuerySteps<kDim>::operand(u, 4 * warp + t)] =
        ptx::pack_f16(x[2 * pair], x[2 * pair + 1]);
  }

  // 3. Where entries start, if masks need it.
  if (!args.may_mask || head != 0 || tile != 0) return;
  const cache::RowState row = load_row_state(args.row_table, b);
  if (row_splits(args.plan, row).masked) {
    ptx::sync_block();  // x is shared memory too
    write_entry_begins(args, b, row, reinterpret_cast<int*>(shared));
  }
}

}  // namespace turboquant::cuda::detail
