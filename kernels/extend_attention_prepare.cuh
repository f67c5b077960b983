// Extend attention, first kernel (extend_attention.cuh): queries and exact tokens in the rotated
// basis, positions of page table entries.
#pragma once

#include "decode_attention_prepare.cuh"
#include "extend_attention_traits.cuh"
#include "rotated_rows.cuh"

namespace turboquant::cuda::detail {

inline constexpr int kExtendPrepareWarps = kPrepareThreads / 32;

// Thread blocks: positions of each batch row, then a warp for each query row and each exact key and
// value.
TQ_HOST_DEVICE constexpr int64_t extend_prepare_tasks(const ExtendArgs& args) {
  return int64_t{args.call.batch} * args.call.num_kv_heads *
         (args.call.rows + int64_t{2} * args.exact_slots);
}
TQ_HOST_DEVICE constexpr int64_t extend_prepare_blocks(const ExtendArgs& args) {
  return args.call.batch + ceil_div(extend_prepare_tasks(args), kExtendPrepareWarps);
}
template <int kDim>
inline constexpr int kExtendPrepareBytes = kExtendPrepareWarps* kDim * 4;

// A warp's row to an operand row in stored order.
template <int kDim>
TQ_DEVICE void store_operand_row(const float (&y)[kRowShare<kDim>], int bits, float* scratch,
                                 uint16_t* to) {
  const int lane = ptx::lane_index();
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) scratch[i] = y[k];
  }
  ptx::sync_warp();
  for (int p = lane; p < kDim / 2; p += kWarpLanes) {
    const int pair = stored_pair<kDim>(bits, p);
    reinterpret_cast<uint32_t*>(to)[p] = ptx::pack_f16(scratch[2 * pair], scratch[2 * pair + 1]);
  }
}

template <int kDim>
TQ_DEVICE void prepare_query_row(const ExtendArgs& args, int64_t b, int head, int r,
                                 float* scratch) {
  const DecodeArgs& call = args.call;
  float y[kRowShare<kDim>];
  load_row_share<kDim>(query_row(call, b, head, r), call.query.elem_stride, call.type, y);
  float factor = rotate_scaled<kDim, false>(
      y, call.scaling * (call.softcap > 0.0f ? 1.0f : kLog2E),
      {call.key_signs + int64_t{head} * 3 * kDim, call.key_turns + int64_t{head} * kDim},
      call.smooth_keys ? call.smoothing + args.unit(b, head) * kDim : nullptr, scratch);
  if (factor < 0.0f) {  // the attention kernel compares scores before it multiplies
    factor = -factor;
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) y[k] = -y[k];
  }
  const int64_t at = args.unit(b, head) * call.rows + r;
  store_operand_row<kDim>(y, call.k_bits, scratch, args.queries + at * kDim);
  if (ptx::lane_index() == 0) args.query_factors[at] = factor;
}

// Exact token `slot` of a row. Slots behind the last token, up to a whole block, become zeros. A
// token with NaN or infinity is levels 0 with scale NaN: only who sees it meets the NaN.
template <int kDim>
TQ_DEVICE void prepare_exact_row(const ExtendArgs& args, int64_t b, int head, bool is_value,
                                 int slot, float* scratch) {
  const DecodeArgs& call = args.call;
  const cache::RowState row = load_row_state(call.row_table, b);
  const int64_t tokens = exact_tokens(call.plan.sink_tokens, row).count();
  if (slot >= ceil_div(tokens, cache::kBlockTokens) * cache::kBlockTokens) return;
  const TensorArg& exact = is_value ? call.exact_values : call.exact_keys;
  const TensorArg& chunk = is_value ? call.value_states : call.key_states;
  const ExactToken token = exact_token(call, exact, chunk, row, b, head, slot);
  float y[kRowShare<kDim>];
  load_row_share<kDim>(token.row, token.stride(exact, chunk), call.type, y);
  const float* const signs = is_value ? call.value_signs : call.key_signs;
  const float* const turns = is_value ? call.value_turns : call.key_turns;
  float scale = rotate_scaled<kDim, true>(
      y, 1.0f, {signs + int64_t{head} * 3 * kDim, turns + int64_t{head} * kDim},
      !is_value && call.smooth_keys ? call.smoothing + args.unit(b, head) * kDim : nullptr,
      scratch);
  if (token.row == nullptr) scale = 0.0f;
  const float magnitude = row_magnitude(y);
  if (!(magnitude < INFINITY)) {
    scale = magnitude - magnitude;  // NaN
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) y[k] = 0.0f;
  }
  const int64_t at = args.unit(b, head) * args.exact_slots + slot;
  store_operand_row<kDim>(y, is_value ? call.v_bits : call.k_bits, scratch,
                          (is_value ? args.exact_values : args.exact_keys) + at * kDim);
  if (ptx::lane_index() == 0) {
    const int64_t of_keys = int64_t{call.batch} * call.num_kv_heads * args.exact_slots;
    args.exact_scales[(is_value ? of_keys : 0) + at] = scale;
  }
}

template <int kDim>
TQ_DEVICE void extend_prepare(const ExtendArgs& args, std::byte* shared) {
  const DecodeArgs& call = args.call;
  if (ptx::block_index() < call.batch) {
    const int b = ptx::block_index();
    write_entry_begins(call, b, load_row_state(call.row_table, b), kPrepareThreads,
                       reinterpret_cast<int*>(shared));
    return;
  }
  const int warp = ptx::warp_index();
  const int64_t task = int64_t{ptx::block_index() - call.batch} * kExtendPrepareWarps + warp;
  if (task >= extend_prepare_tasks(args)) return;
  const int each = call.rows + 2 * args.exact_slots;
  const int unit = static_cast<int>(task / each), of_unit = static_cast<int>(task % each);
  const int head = unit % call.num_kv_heads;
  const int64_t b = unit / call.num_kv_heads;
  float* const scratch = reinterpret_cast<float*>(shared) + warp * kDim;
  if (of_unit < call.rows) {
    prepare_query_row<kDim>(args, b, head, of_unit, scratch);
  } else {
    const int of_exact = of_unit - call.rows;
    prepare_exact_row<kDim>(args, b, head, of_exact >= args.exact_slots,
                            of_exact % args.exact_slots, scratch);
  }
}

}  // namespace turboquant::cuda::detail
