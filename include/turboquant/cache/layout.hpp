// Where every stored byte lies: the only place that computes an address (docs/cache_format.md).
// Host and device; 64-bit throughout.
#pragma once

#include <cassert>
#include <cstdint>

#include "turboquant/portability.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::cache {

// Tokens of one block. A constant of the format: blocks of another size are another format.
inline constexpr int kBlockTokens = 64;

// A block is 64 tokens of one KV head, one contiguous piece:
//   K mean  [head_dim] fp16 (absent without centring)
//   K codes [64, k_row_bytes]      token-major, a token's codes are whole bytes
//   K scales[64] fp32 or fp16
//   V codes [64, v_row_bytes]
//   V scales[64]
// Every part starts on a multiple of 16 bytes. A page is the block of every KV head, in order.
struct BlockLayout {
  int head_dim = 0;  // a multiple of 8, so that every width fills whole bytes
  int k_bits = 0;
  int v_bits = 0;
  int scale_bytes = 4;  // 4 (fp32) or 2 (fp16)
  bool has_mean = false;

  TQ_HOST_DEVICE constexpr int64_t k_row_bytes() const {
    return quant::packed_row_bytes(head_dim, k_bits);
  }
  TQ_HOST_DEVICE constexpr int64_t v_row_bytes() const {
    return quant::packed_row_bytes(head_dim, v_bits);
  }

  TQ_HOST_DEVICE constexpr int64_t k_mean_offset() const { return 0; }
  TQ_HOST_DEVICE constexpr int64_t k_codes_offset() const {
    return align16(has_mean ? int64_t{2} * head_dim : 0);
  }
  TQ_HOST_DEVICE constexpr int64_t k_scales_offset() const {
    return align16(k_codes_offset() + kBlockTokens * k_row_bytes());
  }
  TQ_HOST_DEVICE constexpr int64_t v_codes_offset() const {
    return align16(k_scales_offset() + int64_t{kBlockTokens} * scale_bytes);
  }
  TQ_HOST_DEVICE constexpr int64_t v_scales_offset() const {
    return align16(v_codes_offset() + kBlockTokens * v_row_bytes());
  }
  TQ_HOST_DEVICE constexpr int64_t block_bytes() const {
    return align16(v_scales_offset() + int64_t{kBlockTokens} * scale_bytes);
  }

  // Offsets of one token's parts from the start of its block; 0 <= token < 64.
  TQ_HOST_DEVICE constexpr int64_t k_row(int token) const {
    return k_codes_offset() + token * k_row_bytes();
  }
  TQ_HOST_DEVICE constexpr int64_t k_scale(int token) const {
    return k_scales_offset() + int64_t{token} * scale_bytes;
  }
  TQ_HOST_DEVICE constexpr int64_t v_row(int token) const {
    return v_codes_offset() + token * v_row_bytes();
  }
  TQ_HOST_DEVICE constexpr int64_t v_scale(int token) const {
    return v_scales_offset() + int64_t{token} * scale_bytes;
  }

  TQ_HOST_DEVICE constexpr int64_t block_offset(int head) const { return head * block_bytes(); }
  TQ_HOST_DEVICE constexpr int64_t page_bytes(int num_kv_heads) const {
    return num_kv_heads * block_bytes();
  }

 private:
  TQ_HOST_DEVICE static constexpr int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

// The dense buffers of exact tokens [batch, num_kv_heads, capacity(), head_dim]: first the sinks,
// then a ring that takes the recent window and the 64 tokens that wait for their block.
struct ExactLayout {
  int sink_tokens = 0;
  int window_tokens = 0;  // 0 or a multiple of 64

  TQ_HOST_DEVICE constexpr int64_t ring_tokens() const {
    return window_tokens > 0 ? int64_t{window_tokens} + kBlockTokens : 0;
  }
  TQ_HOST_DEVICE constexpr int64_t capacity() const { return sink_tokens + ring_tokens(); }

  // Slot of token t of a row; t must be a sink, or the ring must exist.
  TQ_HOST_DEVICE constexpr int64_t slot(int64_t t) const {
    assert(t < sink_tokens || window_tokens > 0);
    return t < sink_tokens ? t : sink_tokens + (t - sink_tokens) % ring_tokens();
  }
};

// int32 columns of the tables that every operator takes.
namespace tables {
inline constexpr int kPageColumns = 2;  // page_table [B, P, 2] = {page, tokens}
inline constexpr int kRowColumns = 4;   // rows [B, 4]
inline constexpr int kRowLength = 0;    //   committed real tokens
inline constexpr int kRowEntries = 1;   //   used entries of the row's page table
inline constexpr int kRowExactBegin = 2;
inline constexpr int kRowNewTokens = 3;     //  real tokens of the chunk that comes with the call
inline constexpr int kJobColumns = 6;       // jobs [N, 6] = EncodeJob
inline constexpr int kPositionColumns = 3;  // positions [B, 3], of a cache of fixed capacity
inline constexpr int kPositionFirst = 0;    //   where the row's tokens begin: padding is before
inline constexpr int kPositionSeen = 1;     //   positions that came, padding included
inline constexpr int kPositionRefused = 2;  //   tokens that the row had no room for
}  // namespace tables

}  // namespace turboquant::cache
