// What the extend attention kernels are given.
#pragma once

#include <cstdint>

#include "decode_attention_args.hpp"
#include "extend_attention_plan.hpp"

namespace turboquant::cuda::detail {

struct ExtendArgs {
  DecodeArgs
      call;  // entry_begins points into this launch's workspace; its other workspace is unused
  int tiles, splits, exact_slots;
  bool vector_codebook;
  uint16_t* queries;       // [B, H, rows, D] q' as fp16
  float* query_factors;    // [B, H, rows] a score is factor (q'.k'), factor >= 0
  uint16_t* exact_keys;    // [B, H, E, D] k' of exact tokens as fp16, brought into [1, 2)
  uint16_t* exact_values;  // [B, H, E, D]
  float* exact_scales;     // [2, B, H, E] what they have to be multiplied by
  float* partials;         // [B, H, rows, splits, D]
  float* stats;            // [B, H, rows, splits, 2]

  // (row, KV head) as one number.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE int64_t unit(int64_t b, int head) const {
    return b * call.num_kv_heads + head;
  }
};

// One thread block of the attention kernel.
struct ExtendItem {
  int64_t b;
  int head, tile, split;
};
TQ_HOST_DEVICE inline ExtendItem extend_item(const ExtendArgs& args, int index) {
  return {index / args.tiles / args.splits / args.call.num_kv_heads,
          index / args.tiles / args.splits % args.call.num_kv_heads, index % args.tiles,
          index / args.tiles % args.splits};
}

}  // namespace turboquant::cuda::detail
