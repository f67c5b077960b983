// What the CUDA kernels are built for, in one place: dispatch, the build, docs/kernels.md and the
// tests follow these lists.
#pragma once

#include <array>
#include <string>

namespace turboquant::cuda {

// Decode attention: X(head_dim, k_bits, v_bits). kernels/decode_attention_d<head_dim>_*.cu
// instantiate them.
// clang-format off
#define TQ_DECODE_ATTENTION_WIDTHS(X, dim) \
  X(dim, 4, 4) X(dim, 4, 3) X(dim, 4, 2)   \
  X(dim, 3, 4) X(dim, 3, 3) X(dim, 3, 2)   \
  X(dim, 2, 4) X(dim, 2, 3) X(dim, 2, 2)   \
  X(dim, 5, 4) X(dim, 5, 3)                \
  X(dim, 6, 4) X(dim, 6, 3)                \
  X(dim, 8, 4) X(dim, 8, 3)
// clang-format on
#define TQ_DECODE_ATTENTION_CONFIGS(X) \
  TQ_DECODE_ATTENTION_WIDTHS(X, 64)    \
  TQ_DECODE_ATTENTION_WIDTHS(X, 80)    \
  TQ_DECODE_ATTENTION_WIDTHS(X, 96)    \
  TQ_DECODE_ATTENTION_WIDTHS(X, 128)   \
  TQ_DECODE_ATTENTION_WIDTHS(X, 256)

struct DecodeAttentionConfig {
  int head_dim;
  int k_bits;
  int v_bits;
};
inline constexpr std::array kDecodeAttentionConfigs = {
#define TQ_ITEM(dim, k, v) DecodeAttentionConfig{dim, k, v},
    TQ_DECODE_ATTENTION_CONFIGS(TQ_ITEM)
#undef TQ_ITEM
};

// Longer queries take the dequantising path: more rows would read the codes more than once.
inline constexpr int kDecodeAttentionMaxQueries = 16;

// The kernels stage pages with the bulk copy engine and keep a 64 KB table in shared memory:
// compute capability 9.0, with 227 KB a block. (10.0 has both; the kernels spill registers there.)
constexpr bool decode_attention_runs_on(int compute_capability_major) {
  return compute_capability_major == 9;
}

constexpr bool decode_attention_supported(int head_dim, int k_bits, int v_bits) {
  for (const DecodeAttentionConfig c : kDecodeAttentionConfigs) {
    if (c.head_dim == head_dim && c.k_bits == k_bits && c.v_bits == v_bits) return true;
  }
  return false;
}

// The list in words, for error messages: every head_dim comes with the same widths.
inline std::string decode_attention_supported_text() {
  std::string dims, widths;
  int last_dim = 0;
  for (const DecodeAttentionConfig c : kDecodeAttentionConfigs) {
    if (c.head_dim != last_dim) dims.append(" ").append(std::to_string(c.head_dim));
    last_dim = c.head_dim;
    if (c.head_dim == kDecodeAttentionConfigs.front().head_dim) {
      widths.append(" ").append(std::to_string(c.k_bits));
      widths.append("+").append(std::to_string(c.v_bits));
    }
  }
  return "head_dim" + dims + " with k_bits+v_bits" + widths;
}

}  // namespace turboquant::cuda
