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

// q' = R (q * s) of query row r of a KV head, in the range of fp16, as column r % 8 of its tile's
// operand B (held by lanes 4 column + t), and what it has to be multiplied by; zeros where there is
// no such row. One warp; scratch: kDim floats of shared memory.
template <int kDim>
TQ_DEVICE void write_query_operands(const DecodeArgs& args, int64_t b, int head, int r,
                                    float* scratch, uint32_t* operands, float* factors) {
  const int lane = ptx::lane_index(), column = r % kTileRows;
  const std::byte* const query = query_row(args, b, head, r);
  float factor = 0.0f;
  float y[kRowShare<kDim>];
  load_row_share<kDim>(query, args.query.elem_stride, args.type, y);
  if (query != nullptr) {
    factor = rotate_scaled<kDim, false>(
        y, args.scaling * (args.softcap > 0.0f ? 1.0f : kLog2E),
        {args.key_signs + int64_t{head} * 3 * kDim, args.key_turns + int64_t{head} * kDim},
        args.smooth_keys ? args.smoothing + (b * args.num_kv_heads + head) * kDim : nullptr,
        scratch);
  }
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) scratch[i] = y[k];
  }
  ptx::sync_warp();
  if (lane == 0) factors[column] = factor;
  for (int i = lane; i < kDim / 2; i += kWarpLanes) {
    const int t = i % 4, u = i / 4;
    const int pair = key_pair<kDim>(args.k_bits, u, t);
    operands[QuerySteps<kDim>::operand(u, 4 * column + t)] =
        ptx::pack_f16(scratch[2 * pair], scratch[2 * pair + 1]);
  }
}

// Grid: one block for each (row, KV head, tile of 8 query rows); a warp for each query row.
template <int kDim>
TQ_DEVICE void prepare_queries(const DecodeArgs& args, std::byte* shared) {
  // In this order: attend_splits reads what the kernels before this one wrote as soon as it runs.
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const int warp = ptx::warp_index();
  const int tile = ptx::block_index() % args.tiles;
  const int head = ptx::block_index() / args.tiles % args.num_kv_heads;
  const int64_t b = ptx::block_index() / args.tiles / args.num_kv_heads;
  const int64_t unit = args.unit(b, head, tile);

  // 1. The queries.
  write_query_operands<kDim>(
      args, b, head, tile * kTileRows + warp, reinterpret_cast<float*>(shared) + warp * kDim,
      args.query_operands + unit * 32 * (kDim / 8), args.query_factors + unit * kTileRows);

  // 2. Where entries start, if masks need it.
  const cache::RowState row = load_row_state(args.row_table, b);
  if (head == 0 && tile == 0 && row_splits(args.plan, row).masked) {
    ptx::sync_block();  // x is shared memory too
    write_entry_begins(args, b, row, reinterpret_cast<int*>(shared));
  }
}

}  // namespace turboquant::cuda::detail
