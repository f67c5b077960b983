// Decode attention, first kernel (decode_attention.cuh): the queries of all tiles as operands.
#pragma once

#include "decode_attention_exact.cuh"
#include "decode_attention_rotation.cuh"

namespace turboquant::cuda::detail {

inline constexpr int kPrepareThreads = 32 * kTileRows;

// Largest magnitude's exponent as a power of two 2^-e that brings the row into [1, 2); 1 for rows
// of zeros and rows with NaN or infinity, which stay what they are.
TQ_DEVICE float normalising_factor(float magnitude) {
  const uint32_t exponent = ptx::bits_of(magnitude) & 0x7F800000u;
  if (exponent == 0 || exponent == 0x7F800000u) return 1.0f;
  return ptx::float_of((254u << 23) - (exponent < (253u << 23) ? exponent : 253u << 23));
}

// 1 / x for a power of two in [2^-126, 2^126].
TQ_DEVICE float inverse_power(float x) { return ptx::float_of((254u << 23) - ptx::bits_of(x)); }

// Over a warp.
template <int kCount>
TQ_DEVICE float row_magnitude(const float (&y)[kCount]) {
  float largest = 0.0f;
  TQ_UNROLL
  for (int k = 0; k < kCount; ++k) {
    const float magnitude = fabsf(y[k]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  TQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = ptx::shuffle_xor(largest, mask);
    largest = other > largest || other != other ? other : largest;
  }
  return largest;
}

TQ_DEVICE float load_element(const std::byte* row, int64_t index, cache::ElementType type) {
  switch (type) {
    case cache::ElementType::kFloat16:
      return ptx::f32_from_f16(load_as<uint16_t>(row + 2 * index));
    case cache::ElementType::kBFloat16:
      return ptx::float_of(uint32_t{load_as<uint16_t>(row + 2 * index)} << 16);
    default:
      return load_as<float>(row + 4 * index);
  }
}

// The pair of coordinates that operand register u of lane t holds.
template <int kDim>
TQ_DEVICE int key_pair(int k_bits, int u, int t) {
  switch (k_bits) {
    case 2:
      return key_pair_of<kDim, 2>(u, t);
    case 3:
      return key_pair_of<kDim, 3>(u, t);
    case 4:
      return key_pair_of<kDim, 4>(u, t);
    case 8:
      return key_pair_of<kDim, 8>(u, t);
    default:
      return key_pair_of<kDim, 6>(u, t);  // 5 too
  }
}

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

  // 1. q * s, brought into [1, 2) by powers of two before and after the rotation: nothing on the
  // way overflows for any finite query, and fp16 keeps 2^-11 of the row's largest coordinate (what
  // is below 2^-14 of it loses bits, but not more than 2^-25 of the largest). Every load is issued
  // before the first result is used.
  constexpr int kShare = kRowShare<kDim>;
  float* const x = reinterpret_cast<float*>(shared) + warp * kDim;
  const int r = tile * kTileRows + warp;
  const std::byte* const query = query_row(args, b, head, r);
  const cache::RowState row = load_row_state(args.row_table, b);
  float factor = 0.0f;
  float y[kShare];
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) y[k] = 0.0f;
  if (query != nullptr) {
    const RotationFactors<kDim> rotation(args.key_signs + int64_t{head} * 3 * kDim,
                                         args.key_turns + int64_t{head} * kDim, lane);
    float smoothing[kShare];
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const int i = k * kWarpLanes + lane;
      const bool exists = kDim % kWarpLanes == 0 || i < kDim;
      smoothing[k] = exists && args.smooth_keys
                         ? args.smoothing[(b * args.num_kv_heads + head) * kDim + i]
                         : 1.0f;
      if (exists) y[k] = load_element(query, i * args.query.elem_stride, args.type);
    }
    const float before = normalising_factor(row_magnitude(y));
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) y[k] = y[k] * before * smoothing[k];
    rotate_row<kDim, false>(y, x, rotation, lane);
    const float after = normalising_factor(row_magnitude(y));
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) y[k] *= after;
    factor = args.scaling * (args.softcap > 0.0f ? 1.0f : kLog2E) * inverse_power(before) *
             inverse_power(after);
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
  if (head == 0 && tile == 0 && row_splits(args.plan, row).masked) {
    ptx::sync_block();  // x is shared memory too
    write_entry_begins(args, b, row, reinterpret_cast<int*>(shared));
  }
}

}  // namespace turboquant::cuda::detail
