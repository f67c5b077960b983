// Extend attention, third kernel (extend_attention.cuh): partial results to outputs.
#pragma once

#include "decode_attention_combine.cuh"
#include "extend_attention_traits.cuh"

namespace turboquant::cuda::detail {

inline constexpr int kExtendCombineWarps = 8;

TQ_HOST_DEVICE constexpr int64_t extend_combine_blocks(const ExtendArgs& args) {
  return ceil_div(int64_t{args.call.batch} * args.call.num_kv_heads * args.call.rows,
                  kExtendCombineWarps);
}
// A row of floats for each warp, and where the stored pairs lie: u8 [kDim / 2].
template <int kDim>
inline constexpr int kExtendCombineBytes = kExtendCombineWarps* kDim * 4 + kDim / 2;

// A warp for each query row: splits in ascending order, the sink logit, R^T.
template <int kDim>
TQ_DEVICE void extend_combine(const ExtendArgs& args, std::byte* shared) {
  const DecodeArgs& call = args.call;
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  float* const scratch = reinterpret_cast<float*>(shared) + warp * kDim;
  auto* const stored = reinterpret_cast<uint8_t*>(shared + kExtendCombineWarps * kDim * 4);
  for (int p = ptx::thread_index(); p < kDim / 2; p += 32 * kExtendCombineWarps) {
    stored[stored_pair<kDim>(call.v_bits, p)] = static_cast<uint8_t>(p);
  }
  ptx::sync_block();
  const int64_t query = int64_t{ptx::block_index()} * kExtendCombineWarps + warp;
  if (query >= int64_t{call.batch} * call.num_kv_heads * call.rows) return;
  const int r = static_cast<int>(query % call.rows);
  const int head = static_cast<int>(query / call.rows % call.num_kv_heads);
  const int64_t b = query / call.rows / call.num_kv_heads;
  const int j = r / call.group, query_head = head * call.group + r % call.group;

  // 1. Weights.
  const float* const stats = args.stats + query * args.splits * 2;
  const bool padding =
      attention::query_position(load_row_state(call.row_table, b), call.num_queries, j) < 0;
  const bool has_sink = call.sink_logits != nullptr && !padding;
  const float sink = has_sink ? call.sink_logits[query_head] * kLog2E : kNoScore;
  float largest = sink;
  for (int i = 0; i < args.splits; ++i) {
    if (stats[2 * i + 1] != 0.0f) largest = fmaxf(largest, stats[2 * i]);
  }

  // 2. Sums.
  float y[kRowShare<kDim>];
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) y[k] = 0.0f;
  float total = has_sink ? exp2f(sink - largest) : 0.0f;
  for (int i = 0; i < args.splits; ++i) {
    if (stats[2 * i + 1] == 0.0f) continue;
    const float weight = exp2f(stats[2 * i] - largest);
    total = fmaf(weight, stats[2 * i + 1], total);
    const float* const from = args.partials + (query * args.splits + i) * kDim;
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const int c = k * kWarpLanes + lane;
      if (kDim % kWarpLanes == 0 || c < kDim) {
        y[k] = fmaf(weight, from[2 * stored[c / 2] + c % 2], y[k]);
      }
    }
  }

  // 3. Back to the model's basis.
  rotate_row<kDim, true>(y, scratch,
                         RotationFactors<kDim>(call.value_signs + int64_t{head} * 3 * kDim,
                                               call.value_turns + int64_t{head} * kDim, lane),
                         lane);
  std::byte* const out = const_cast<std::byte*>(call.out.row(b, query_head, j));
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int c = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || c < kDim) {
      store_element(out, c * call.out.elem_stride, call.out_type, y[k] * inverse);
    }
  }
  if (lane == 0 && call.lse != nullptr) {
    call.lse[(b * call.num_kv_heads * call.group + query_head) * call.num_queries + j] =
        total == 0.0f ? -INFINITY : (largest + log2f(total)) * kLn2;
  }
}

}  // namespace turboquant::cuda::detail
