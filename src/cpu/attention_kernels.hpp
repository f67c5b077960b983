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

// Rows of a tile, one per token: floats, or packed codes of a scalar or a vector codebook, which a
// kernel may look up as it goes (attend_packed_tile).
struct TileRows {
  const float* floats;   // [kBlockTokens, stride]: readable to the end, whatever num_tokens
  int bits;              // packed
  const float* levels;   // packed: scalar_levels() of the table
  const uint8_t* codes;  // packed: [kBlockTokens, row_bytes], readable to the end as well
  int64_t row_bytes;
  const int8_t* planes = nullptr;  // packed, of a vector codebook: DecodeTable::pair_planes
};

// A tile of up to 64 tokens against a tile of queries, [begin[r], end[r]) of them visible to query
// r, merged into the queries' softmax states:
//   x_t = query . (mean + key_scale_t * key_t), softcapped; max, sum, output as in SoftmaxState,
//   with values value_scale_t * value_t.
// Contract: a query's result depends on its own row, its range and the tile only (not on the other
// queries, nor on the number of them); a query with an empty range is untouched; rows of keys and
// values outside a query's range may be NaN without effect on it.
struct AttendTileParams {
  int64_t stride;                 // padded_dim(head_dim), of every row below
  int num_queries;                // 1 or more
  int num_tokens;                 // 1 to kBlockTokens
  const float* queries;           // [num_queries, stride], softmax scaling folded in
  const int16_t* packed_queries;  // [num_queries, stride] and
  const float* query_units;       // [num_queries], of pack_queries where that is offered
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
  const float* levels;  // scalar_levels() of the table
  int64_t dim;          // a multiple of 8
  const uint8_t* rows;  // [num_rows, row_bytes]
  int64_t row_bytes;
  int num_rows;
  float* out;      // [num_rows, stride]
  int64_t stride;  // at least dim
};

// Queries for integer products with packed keys: multiples of a unit per query, in the kernel's own
// order of dimensions.
struct PackQueriesParams {
  int64_t stride;
  int k_bits;
  bool pairs;  // keys of a vector codebook
  int64_t num_queries;
  const float* queries;  // [num_queries, stride]
  int16_t* packed;       // out [num_queries, stride]
  float* units;          // out [num_queries]
};

struct AttentionKernels {
  void (*attend_tile)(const AttendTileParams&);  // rows as floats
  // Keys and values both packed, without writing decoded rows. Without pack_queries it gives the
  // bits of attend_tile of the decoded rows; with it, products are of integers (attention_int16.inl
  // says how exact they are), and packed_queries is the most there are, for a query's bits may not
  // depend on the number of queries.
  void (*attend_packed_tile)(const AttendTileParams&);
  // Whether it takes rows of this kind (pairs: of a vector codebook), and up to how many queries.
  bool (*takes_packed)(int64_t dim, int bits, bool pairs);
  int packed_queries;
  void (*pack_queries)(const PackQueriesParams&);
  // Up to decode_bits bits; above, and where it is null, quant::decode_row serves.
  void (*decode_rows)(const DecodeRowsParams&);
  int decode_bits;
  // fp16 numbers as they lie in a block to fp32; count is a multiple of 8.
  void (*widen_halves)(const std::byte* halves, int64_t count, float* out);
};

// The levels a vectorised look-up takes: [16] as DecodeTable::nibble_levels up to 4 bits, else
// [2^bits]. Empty for a table of no scalar codebook.
inline const std::vector<float>& scalar_levels(const quant::DecodeTable& table) {
  return table.bits > 4 ? table.levels : table.nibble_levels;
}

// Rows by any decode table: the kernel where it serves, else quant::decode_row.
inline void decode_table_rows(const AttentionKernels& kernels, const quant::DecodeTable& table,
                              const uint8_t* rows, int64_t row_bytes, int num_rows, int64_t dim,
                              float* out, int64_t stride) {
  const std::vector<float>& levels = scalar_levels(table);
  if (kernels.decode_rows != nullptr && table.bits <= kernels.decode_bits && !levels.empty() &&
      dim % 8 == 0) {
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
extern const AttentionKernels kAvx512VnniAttentionKernels;
#elif defined(__aarch64__)
extern const AttentionKernels kNeonAttentionKernels;
#endif

// The kernels of quant::active_simd_level().
const AttentionKernels& active_attention_kernels();

}  // namespace turboquant::attention::detail
