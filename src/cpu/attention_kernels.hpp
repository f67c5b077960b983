// What a compiled instruction-set level offers decode attention. Private to src/. A level may
// replace any kernel by a hand-written one (say, one that attends straight from packed codes) as
// long as it keeps the contract here.
#pragma once

#include <cstdint>

#include "turboquant/cache/layout.hpp"

namespace turboquant::attention::detail {

// Rows of scratch and of queries are padded with zeros to whole vectors of every level.
inline constexpr int kRowAlign = 16;
constexpr int64_t padded_dim(int64_t dim) { return (dim + kRowAlign - 1) / kRowAlign * kRowAlign; }

// A tile of up to 64 tokens against a tile of queries, [begin[r], end[r]) of them visible to query
// r, merged into the queries' softmax states:
//   x_t = query . (mean + key_scale_t * key_t), softcapped; max, sum, output as in SoftmaxState,
//   with values value_scale_t * value_t.
// Contract: a query's result depends on its own row, its range and the tile only (not on the other
// queries, nor on the number of them); a query with an empty range is untouched; rows of keys and
// values outside a query's range may be NaN without effect on it.
struct AttendTileParams {
  int64_t stride;             // padded_dim(head_dim), of every row below
  int num_queries;            // 1 or more
  int num_tokens;             // 1 to kBlockTokens
  const float* queries;       // [num_queries, stride], softmax scaling folded in
  const float* keys;          // [kBlockTokens, stride]: readable to the end, whatever num_tokens
  const float* values;        // [kBlockTokens, stride]
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

struct AttentionKernels {
  void (*attend_tile)(const AttendTileParams&);
};

extern const AttentionKernels kPortableAttentionKernels;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2AttentionKernels;
extern const AttentionKernels kAvx512AttentionKernels;
#endif

// The kernels of quant::active_simd_level().
const AttentionKernels& active_attention_kernels();

}  // namespace turboquant::attention::detail
