// Positions of dequantize that no page holds: padding, sinks, ring. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dequantize_args.hpp"
#include "exact_math.hpp"
#include "turboquant/math/half.hpp"

namespace turboquant::cuda::detail {

// One number in and out of an element type.
TQ_HOST_DEVICE inline float load_element(const std::byte* from, ElementType type) {
  if (type == ElementType::kFloat32) return *reinterpret_cast<const float*>(from);
  const uint16_t half = *reinterpret_cast<const uint16_t*>(from);
  return type == ElementType::kBFloat16 ? math::fp32_from_bf16(half) : half_to_float(half);
}
TQ_HOST_DEVICE inline uint32_t to_half(float x, ElementType type) {
#if defined(__CUDA_ARCH__)
  return type == ElementType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                        : __half_as_ushort(__float2half_rn(x));
#else
  return type == ElementType::kBFloat16 ? math::bf16_from_fp32(x) : math::fp16_from_fp32(x);
#endif
}
TQ_HOST_DEVICE inline void store_element(float x, ElementType type, std::byte* to) {
  if (type == ElementType::kFloat32) {
    *reinterpret_cast<float*>(to) = x;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(to_half(x, type));
  }
}

// Positions that no page holds, of one row of the batch, head and side: zeros before the row,
// sinks, ring.
class UnpagedBlock {
 public:
  static constexpr int kPositions = 256;

  TQ_HOST_DEVICE static int parts(const DequantizeArgs& args) {
    return (args.positions + kPositions - 1) / kPositions;
  }

  // place.item: the part.
  TQ_HOST_DEVICE UnpagedBlock(const DequantizeArgs& args, int row, BlockPlace place, int thread,
                              int threads)
      : args_(args), row_(row), place_(place), thread_(thread), threads_(threads) {}

  TQ_HOST_DEVICE void run() const {
    const DequantizeSideArgs& side = args_.sides[place_.side];
    const int head = place_.head, b = row_;
    const DequantizeRow row = dequantize_row(args_, b);
    const int32_t first = place_.item * kPositions;
    const int32_t count =
        args_.positions - first < kPositions ? args_.positions - first : kPositions;
    // Paged positions are neighbours: most parts hold no others.
    if (slot_of(row, first) == kPaged && slot_of(row, first + count - 1) == kPaged) return;
    const std::byte* const from = side.exact.head(b, head);
    std::byte* const to = side.out.head(b, head);
    const bool whole =
        side.exact_type == side.out_type && side.exact.whole_vectors && side.out.whole_vectors;
    const auto out_bytes = static_cast<int>(cache::element_bytes(side.out_type));
    const int pieces = whole ? args_.dim * out_bytes / 16 : args_.dim;
    for (int v = thread_; v < count * pieces; v += threads_) {
      const int32_t position = first + v / pieces;
      const int piece = v % pieces;
      const int64_t slot = slot_of(row, position);
      if (slot == kPaged) continue;
      const std::byte* const source =
          slot == kPadding ? from : from + slot * side.exact.token_stride;
      std::byte* const target = to + position * side.out.token_stride;
      if (whole) {
        reinterpret_cast<Vector*>(target)[piece] =
            slot == kPadding ? Vector{} : reinterpret_cast<const Vector*>(source)[piece];
      } else {
        const float x = slot == kPadding ? 0.0f
                                         : load_element(source + piece * side.exact.elem_stride,
                                                        side.exact_type);
        store_element(x, side.out_type, target + piece * side.out.elem_stride);
      }
    }
  }

 private:
  static constexpr int64_t kPadding = -1, kPaged = -2;

  TQ_HOST_DEVICE int64_t slot_of(const DequantizeRow& row, int32_t position) const {
    const int64_t token =
        int64_t{position} + args_.first_position - (int64_t{args_.past_tokens} - row.length);
    if (token < 0) return kPadding;
    if (token < args_.exact.sink_tokens) return token;
    if (token < row.exact_begin) return kPaged;
    return args_.exact.sink_tokens + ring_index(args_.exact, static_cast<int32_t>(token));
  }

  const DequantizeArgs& args_;
  int row_;
  BlockPlace place_;
  int thread_, threads_;
};

}  // namespace turboquant::cuda::detail
