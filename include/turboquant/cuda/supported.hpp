// What the CUDA kernels are built for, in one place: dispatch, the build, docs/kernels.md and the
// tests follow these lists.
#pragma once

#include <array>
#include <string>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/quant/codebook_kind.hpp"

namespace turboquant::cuda {

// Encoding and dequantising: X(head_dim). kernels/encode_append_to_*.cu and dequantize_to_*.cu
// instantiate them.
// clang-format off
#define TQ_CODEC_HEAD_DIMS(X) \
  X(8) X(16) X(24) X(32) X(40) X(48) X(64) X(80) X(96) X(128) X(160) X(192) X(256)
// clang-format on

// Attention of either kind: X(head_dim). kernels/extend_attention_d<head_dim>.cu instantiate them.
#define TQ_ATTENTION_HEAD_DIMS(X) X(64) X(80) X(96) X(128) X(256)

// Decode attention: X(head_dim, k_bits, v_bits, codebook).
// kernels/decode_attention_d<head_dim>_*.cu instantiate them.
// clang-format off
#define TQ_DECODE_ATTENTION_WIDTHS(X, dim)                                  \
  X(dim, 4, 4, kScalar) X(dim, 4, 3, kScalar) X(dim, 4, 2, kScalar)         \
  X(dim, 3, 4, kScalar) X(dim, 3, 3, kScalar) X(dim, 3, 2, kScalar)         \
  X(dim, 2, 4, kScalar) X(dim, 2, 3, kScalar) X(dim, 2, 2, kScalar)         \
  X(dim, 5, 4, kScalar) X(dim, 5, 3, kScalar)                               \
  X(dim, 6, 4, kScalar) X(dim, 6, 3, kScalar)                               \
  X(dim, 8, 4, kScalar) X(dim, 8, 3, kScalar)                               \
  X(dim, 4, 4, kVector) X(dim, 3, 3, kVector) X(dim, 2, 2, kVector)
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
  quant::CodebookKind codebook;
  bool operator==(const DecodeAttentionConfig&) const = default;
};
inline constexpr std::array kDecodeAttentionConfigs = {
#define TQ_ITEM(dim, k, v, codebook) \
  DecodeAttentionConfig{dim, k, v, quant::CodebookKind::codebook},
    TQ_DECODE_ATTENTION_CONFIGS(TQ_ITEM)
#undef TQ_ITEM
};

// Longer queries are extend attention's: more rows would read the codes more than once.
inline constexpr int kDecodeAttentionMaxQueries = 16;

// The kernels stage pages with the bulk copy engine and keep a 64 KB table in shared memory:
// compute capability 9.0, with 227 KB a block. (10.0 has both; the kernels spill registers there.)
constexpr bool decode_attention_runs_on(int compute_capability_major) {
  return compute_capability_major == 9;
}

// Extend attention takes the same widths and any number of query tokens, on every device with 99 KB
// of shared memory a block.
constexpr bool extend_attention_runs_on(int compute_capability_major) {
  return compute_capability_major >= 8;
}

constexpr bool decode_attention_supported(const cache::LayerSpec& spec) {
  const DecodeAttentionConfig wanted{spec.head_dim, spec.k_bits, spec.v_bits, spec.codebook};
  for (const DecodeAttentionConfig& config : kDecodeAttentionConfigs) {
    if (config == wanted) return true;
  }
  return false;
}

// What the kernels take and what they are asked for, in words, for error messages: every head_dim
// comes with the same widths.
struct DecodeAttentionSupport {
  std::string expected, actual;
};
inline DecodeAttentionSupport decode_attention_support(const cache::LayerSpec& spec) {
  const auto widths = [](int k_bits, int v_bits) {
    return std::to_string(k_bits) + "+" + std::to_string(v_bits);
  };
  const bool vector = spec.codebook == quant::CodebookKind::kVector;
  const std::string of_codebook = vector ? " of a vector codebook" : "";
  DecodeAttentionSupport text{"head_dim", "head_dim " + std::to_string(spec.head_dim) + " with " +
                                              widths(spec.k_bits, spec.v_bits) + of_codebook};
  // append(), for GCC 12 warns of `" " + string` (its bug 105651).
  std::string all_widths;
  int last_dim = 0;
  for (const DecodeAttentionConfig& config : kDecodeAttentionConfigs) {
    if (config.head_dim != last_dim) {
      text.expected.append(" ").append(std::to_string(config.head_dim));
    }
    last_dim = config.head_dim;
    if (config.head_dim == kDecodeAttentionConfigs.front().head_dim &&
        config.codebook == spec.codebook) {
      all_widths.append(" ").append(widths(config.k_bits, config.v_bits));
    }
  }
  text.expected += " with k_bits+v_bits" + all_widths + of_codebook;
  return text;
}

}  // namespace turboquant::cuda
