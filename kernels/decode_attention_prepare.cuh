// Decode attention, first kernel (decode_attention.cuh): the queries of all tiles as operands.
#pragma once

#include "decode_attention_exact.cuh"
#include "rotated_rows.cuh"

namespace turboquant::cuda::detail {

// A warp for each query row of a tile.
inline constexpr int kPrepareThreads = 32 * kTileRows;

// Tiles that a block takes: one, or a pair (row_tiles). attend_splits needs whole multiprocessors,
// and starts late on those where prepare_queries still runs: pairs are on half as many.
inline constexpr int kMaxPrepareTiles = 2;
TQ_HOST_DEVICE constexpr int prepare_tiles(const DecodeArgs& args) {
  return args.tiles == 1 ? 1 : kMaxPrepareTiles;
}
TQ_HOST_DEVICE constexpr int64_t prepare_blocks(const DecodeArgs& args) {
  return int64_t{args.batch} * args.num_kv_heads * (args.tiles / prepare_tiles(args));
}
TQ_HOST_DEVICE constexpr int prepare_bytes(const DecodeArgs& args, int head_dim) {
  return prepare_tiles(args) * kTileRows * head_dim * 4;
}

// Positions of the first tokens of a row's entries: an exclusive prefix sum by the whole block of
// `threads`. shared: that many integers.
TQ_DEVICE void write_entry_begins(const DecodeArgs& args, int64_t b, const cache::RowState& row,
                                  int threads, int* shared) {
  const int thread = ptx::thread_index();
  const int32_t* const entries =
      args.page_table + b * args.page_columns * cache::tables::kPageColumns;
  int32_t* const begins = args.entry_begins + b * args.page_columns;
  int position = static_cast<int>(min_of(row.length, args.plan.sink_tokens));
  for (int64_t start = 0; start < row.num_entries; start += threads) {
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
    for (int w = 0; w < threads / 32; ++w) {
      if (w < thread / 32) before += shared[w];
      total += shared[w];
    }
    if (e < row.num_entries) begins[e] = position + before + sum - tokens;
    position += total;
    ptx::sync_block();
  }
}

// Query row `row` of a KV head, by one warp: R (q * s) in the range of fp16, as column row % 8 of
// its tile's operands, and the factor that this leaves; zeros where there is no such row. x: kDim
// floats of scratch in shared memory.
template <int kDim>
TQ_DEVICE void prepare_row(const DecodeArgs& args, int k_bits, int64_t b, int head, int row,
                           float* x, uint32_t* operands, float* factors) {
  const int lane = ptx::lane_index(), column = row % kTileRows;
  constexpr int kShare = kRowShare<kDim>;
  const std::byte* const query = query_row(args, b, head, row);
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
  if (lane == 0) factors[column] = factor;

  // Operand B: column g is held by lanes 4 g + t.
  for (int i = lane; i < kDim / 2; i += kWarpLanes) {
    const int t = i % 4, u = i / 4;
    const int pair = key_pair<kDim>(k_bits, u, t);
    operands[QuerySteps<kDim>::operand(u, 4 * column + t)] =
        ptx::pack_f16(x[2 * pair], x[2 * pair + 1]);
  }
}

// Grid: prepare_blocks(), each of prepare_tiles() tiles of 8 query rows of a (row, KV head); a warp
// for each query row.
template <int kDim>
TQ_DEVICE void prepare_queries(const DecodeArgs& args, std::byte* shared) {
  // In this order: attend_splits reads what the kernels before this one wrote as soon as it runs.
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const int tiles = prepare_tiles(args), warp = ptx::warp_index();
  const int first_unit = ptx::block_index() * tiles, unit = first_unit + warp / kTileRows;
  const auto [of_tiles, first_tile] = args.by_tiles(first_unit);
  const auto [b, head] = args.by_heads(of_tiles);
  prepare_row<kDim>(args, args.k_bits, b, head, first_tile * kTileRows + warp,
                    reinterpret_cast<float*>(shared) + warp * kDim,
                    args.query_operands + int64_t{unit} * query_words(kDim),
                    args.query_factors + int64_t{unit} * kTileRows);

  // Where entries start, if masks need it.
  if (!args.may_mask || head != 0 || first_tile != 0) return;
  const cache::RowState row = load_row_state(args.row_table, b);
  if (row_splits(args.plan, row).masked) {
    ptx::sync_block();  // x is shared memory too
    write_entry_begins(args, b, row, tiles * kPrepareThreads, reinterpret_cast<int*>(shared));
  }
}

}  // namespace turboquant::cuda::detail
