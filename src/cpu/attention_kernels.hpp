// What a compiled instruction-set level offers decode attention. Private to src/. A level may
// replace any kernel by a hand-written one (say, one that attends straight from packed codes) as
// long as it keeps the contract here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/cache/layout.hpp"
#include "turboquant/quant/decode_table.hpp"

namespace turboquant::attention::detail {

// Rows of scratch and of queries are padded with zeros to whole vectors of every level.
inline constexpr int kRowAlign = 16;
constexpr int64_t padded_dim(int64_t dim) { return (dim + kRowAlign - 1) / kRowAlign * kRowAlign; }

// Rows of a tile, one per token: floats, or packed codes of a scalar codebook of at most 4 bits,
// which a kernel may look up as it goes (attend_packed_tile).
struct TileRows {
  const float* floats;   // [kBlockTokens, stride]: readable to the end, whatever num_tokens
  int bits;              // packed: 1 to 4
  const float* levels;   // packed: DecodeTable::nibble_levels
  const uint8_t* codes;  // packed: [num_tokens, row_bytes]
  int64_t row_bytes;
};

// A tile of up to 64 tokens against a tile of queries, [begin[r], end[r]) of them visible to query
// r, merged into the queries' softmax states:
//   x_t = query . (mean + key_scale_t * key_t), softcapped; max, sum, output as in SoftmaxState,
//   with values value_scale_t * value_t.
// Contract: a query's result depends on its own row, its range and the tile only (not on the other
// queries, nor on the number of them); a query with an empty range is untouched; rows of keys and
// values outside a query's range may be NaN without effect on it.
struct AttendTileParams {
  int64_t stride;        // padded_dim(head_dim), of every row below
  int num_queries;       // 1 or more
  int num_tokens;        // 1 to kBlockTokens
  const float* queries;  // [num_queries, stride], softmax scaling folded in
  TileRows keys;
  TileRows values;
  const float* mean;          // [stride] or null
  const float* key_scales;    // [kBlockTokens] or null: all 1
  const float* value_scales;  // [kBlockTokens] or null: all 1
  float softcap;              // 0: none
  const int32_t* begin;       // [num_queries]
  const int32_t* end;         // [num_queries]
  float* max;                 // [num_queries]
  float* sum;                 // [num_queries]
  float* output;              // [num_queries, stride]
};

// Packed rows of a scalar codebook to floats. Reads the rows' own bytes only; leaves what lies
// behind a row's dim in `out` alone. The same bits as quant::decode_row.
struct DecodeRowsParams {
  int bits;             // 1 to 8
  const float* levels;  // up to 4 bits: DecodeTable::nibble_levels; above: DecodeTable::levels
  int64_t dim;          // a multiple of 8
  const uint8_t* rows;  // [num_rows, row_bytes]
  int64_t row_bytes;
  int num_rows;
  float* out;      // [num_rows, stride]
  int64_t stride;  // at least dim
};

struct AttentionKernels {
  void (*attend_tile)(const AttendTileParams&);  // rows as floats
  // Keys and values both packed, with whole_vectors() of this level: the same bits as
  // attend_tile of the decoded rows, without writing those. Null: not offered.
  void (*attend_packed_tile)(const AttendTileParams&);
  int vector_floats;
  // Where it is quicker than decode_rows and attend_tile: up to so many bits and so many queries.
  int packed_bits;
  int packed_queries;
  void (*decode_rows)(const DecodeRowsParams&);  // null: use quant::decode_row
  // fp16 numbers as they lie in a block to fp32; count is a multiple of 8.
  void (*widen_halves)(const std::byte* halves, int64_t count, float* out);
};

// Whether rows can be looked up vector by vector: no vector crosses the end of a row, or of a
// quarter of a 3-bit row.
constexpr bool whole_vectors(int64_t dim, int bits, int vector_floats) {
  return bits <= 4 && (bits == 3 ? dim / 4 : dim) % vector_floats == 0;
}

// Rows by any decode table: the kernel where it serves, else quant::decode_row.
inline void decode_table_rows(const AttentionKernels& kernels, const quant::DecodeTable& table,
                              const uint8_t* rows, int64_t row_bytes, int num_rows, int64_t dim,
                              float* out, int64_t stride) {
  const std::vector<float>& levels = table.bits > 4 ? table.levels : table.nibble_levels;
  if (kernels.decode_rows != nullptr && !levels.empty() && dim % 8 == 0) {
    kernels.decode_rows({table.bits, levels.data(), dim, rows, row_bytes, num_rows, out, stride});
    return;
  }
  for (int r = 0; r < num_rows; ++r) {
    quant::decode_row(table, rows + r * row_bytes, dim, out + r * stride);
  }
}

extern const AttentionKernels kPortableAttentionKernels;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2AttentionKernels;
extern const AttentionKernels kAvx512AttentionKernels;
#endif

// The kernels of quant::active_simd_level().
const AttentionKernels& active_attention_kernels();

}  // namespace turboquant::attention::detail
