// Decode attention's inner loops: one source, compiled once per instruction set by
// attention_{portable,avx2,avx512}.cpp, which define
//   TQ_VECTOR_FLOATS     floats in a native vector (4, 8, 16)
//   TQ_KERNEL_TABLE      the name of the AttentionKernels object to define.
// FMA contraction is allowed here, so levels differ in rounding.
//
// One definition rule: everything has internal linkage and no std:: function is used, so nothing
// compiled for a newer instruction set can be picked by the linker for a unit that must run
// without it.
#include <cstdint>
#include <cstring>

#include "cpu/attention_decode_rows.inl"
#include "cpu/attention_kernels.hpp"
#include "cpu/vectors.inl"

namespace turboquant::attention::detail {
namespace {

constexpr int kTokens = cache::kBlockTokens;
// Queries that share the loads (or look-ups) of a token row, tokens and vectors that share those
// of the queries: their accumulators fill the register file.
constexpr int kQueryBlock = kWidth == 4 ? 2 : 4;
constexpr int kTokenBlock = kWidth == 8 ? 2 : 4;
constexpr int kVectorBlock = kTokenBlock;
// Looking codes up again for every block of queries pays for so many blocks (docs/experiments/
// cpu-decode-attention.md).
constexpr int kPackedBits = kWidth == 16 ? 4 : 3;  // AVX2 has no permutation of 16 levels
constexpr int kPackedQueries = 2 * kQueryBlock;

typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef float EightFloats __attribute__((vector_size(32)));

// Sum and maximum of all lanes by halves.
#if TQ_VECTOR_FLOATS == 16
inline EightFloats lower(Floats v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline EightFloats upper(Floats v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif
#if TQ_VECTOR_FLOATS >= 8
inline FourFloats lower(EightFloats v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline FourFloats upper(EightFloats v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
#endif
inline float lane_sum(FourFloats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float lane_max(FourFloats v) {
  const float a = v[0] > v[2] ? v[0] : v[2];
  const float b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
#if TQ_VECTOR_FLOATS >= 8
inline float lane_sum(EightFloats v) { return lane_sum(lower(v) + upper(v)); }
inline float lane_max(EightFloats v) { return lane_max(lower(v) > upper(v) ? lower(v) : upper(v)); }
#endif
#if TQ_VECTOR_FLOATS == 16
inline float lane_sum(Floats v) { return lane_sum(lower(v) + upper(v)); }
inline float lane_max(Floats v) { return lane_max(lower(v) > upper(v) ? lower(v) : upper(v)); }
#endif

// exp(x) for x <= 0 within 2 units of the last place; 0 below ln of the smallest normal float; NaN
// stays NaN. x = n ln 2 + r, |r| <= ln(2) / 2; the Taylor remainder of degree 7 is
// r^8 / 8! < 5.3e-9, a tenth of half a unit.
inline Floats exp_nonpositive(Floats x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: n * kLn2High is exact for |n| <= 126
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float kUnderflow = -87.33654f;
  const Floats shifted = x * kLog2E + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * kLn2High) - n * kLn2Low;
  Floats p = Floats{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words exponent = (reinterpret_cast<Words>(shifted) << 23) + (127 << 23);
  const Floats power = reinterpret_cast<Floats>(exponent);
  return x < kUnderflow ? Floats{} : p * power;
}

// Rows of floats as vectors.
struct FloatSource {
  const float* rows;
  int64_t stride;

  Floats at(int64_t t, int64_t i) const { return load<Floats>(rows + t * stride + i); }
};

// scores[a][b] = query a . key rows[b] for kQueries x kTokenBlock rows. Each dot product is its own
// chain of additions over the vectors of a row, so its bits do not depend on the blocking.
template <int kQueries, class Source>
inline void dot_block(const float* queries, const Source& keys, const int64_t (&rows)[kTokenBlock],
                      int64_t stride, float* scores) {
  Floats acc[kQueries][kTokenBlock] = {};
  for (int64_t i = 0; i < stride; i += kWidth) {
    Floats key[kTokenBlock];
    for (int b = 0; b < kTokenBlock; ++b) key[b] = keys.at(rows[b], i);
    for (int a = 0; a < kQueries; ++a) {
      const auto query = load<Floats>(queries + a * stride + i);
      for (int b = 0; b < kTokenBlock; ++b) acc[a][b] += query * key[b];
    }
  }
  for (int a = 0; a < kQueries; ++a) {
    for (int b = 0; b < kTokenBlock; ++b) scores[a * kTokens + b] = lane_sum(acc[a][b]);
  }
}

inline float dot(const float* a, const float* b, int64_t stride) {
  Floats acc = {};
  for (int64_t i = 0; i < stride; i += kWidth) acc += load<Floats>(a + i) * load<Floats>(b + i);
  return lane_sum(acc);
}

// Scores of query r to weights: updates max and sum, returns what the output is multiplied by.
inline float soften(const AttendTileParams& p, int r, float* scores) {
  const int padded = (p.num_tokens + kWidth - 1) / kWidth * kWidth;
  if (p.key_scales != nullptr) {
    const float offset = p.mean ? dot(p.queries + r * p.stride, p.mean, p.stride) : 0.0f;
    for (int t = 0; t < padded; t += kWidth) {
      store(scores + t, offset + load<Floats>(p.key_scales + t) * load<Floats>(scores + t));
    }
  }
  if (p.softcap > 0.0f) {
    for (int t = p.begin[r]; t < p.end[r]; ++t) {
      scores[t] = p.softcap * __builtin_tanhf(scores[t] / p.softcap);
    }
  }
  for (int t = 0; t < p.begin[r]; ++t) scores[t] = -__builtin_inff();
  for (int t = p.end[r]; t < padded; ++t) scores[t] = -__builtin_inff();

  Floats highest = Floats{} - __builtin_inff();
  for (int t = 0; t < padded; t += kWidth) {
    const auto score = load<Floats>(scores + t);
    highest = score > highest ? score : highest;
  }
  const float tile_max = lane_max(highest);
  const float max = tile_max > p.max[r] ? tile_max : p.max[r];
  Floats total = {};
  for (int t = 0; t < padded; t += kWidth) {
    const Floats weight = exp_nonpositive(load<Floats>(scores + t) - max);
    total += weight;
    store(scores + t, p.value_scales ? weight * load<Floats>(p.value_scales + t) : weight);
  }
  const float fade = exp_nonpositive(Floats{} + (p.max[r] - max))[0];
  p.max[r] = max;
  p.sum[r] = p.sum[r] * fade + lane_sum(total);
  return fade;
}

// output[a][i...] = output * fade[a] + sum over tokens [begin, end) of weights[a][t] * values[t].
template <int kQueries, int kVectors, class Source>
inline void accumulate_columns(const float* weights, const float* fade, int begin, int end,
                               const Source& values, int64_t first, int64_t stride, float* output) {
  Floats acc[kQueries][kVectors];
  for (int a = 0; a < kQueries; ++a) {
    for (int v = 0; v < kVectors; ++v) {
      acc[a][v] = load<Floats>(output + a * stride + v * kWidth) * fade[a];
    }
  }
  for (int t = begin; t < end; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = values.at(t, first + v * kWidth);
      for (int a = 0; a < kQueries; ++a) acc[a][v] += weights[a * kTokens + t] * value;
    }
  }
  for (int a = 0; a < kQueries; ++a) {
    for (int v = 0; v < kVectors; ++v) store(output + a * stride + v * kWidth, acc[a][v]);
  }
}

template <int kQueries, class Source>
inline void accumulate(const AttendTileParams& p, const Source& values, int r, const float* weights,
                       const float* fade) {
  constexpr int kVectors = kVectorBlock;
  float* const output = p.output + r * p.stride;
  int64_t i = 0;
  for (; i + kVectors * kWidth <= p.stride; i += kVectors * kWidth) {
    accumulate_columns<kQueries, kVectors>(weights, fade, p.begin[r], p.end[r], values, i, p.stride,
                                           output + i);
  }
  for (; i < p.stride; i += kWidth) {
    accumulate_columns<kQueries, 1>(weights, fade, p.begin[r], p.end[r], values, i, p.stride,
                                    output + i);
  }
}

template <int kQueries, class Keys, class Values>
inline void attend_queries(const AttendTileParams& p, const Keys& keys, const Values& values,
                           int r) {
  // Zeros: dot_block writes whole blocks of tokens, soften reads whole vectors and masks them.
  alignas(64) float scores[kQueries * kTokens] = {};
  for (int t = 0; t < p.num_tokens; t += kTokenBlock) {
    int64_t rows[kTokenBlock];  // the last row again behind the end
    for (int b = 0; b < kTokenBlock; ++b) {
      rows[b] = t + b < p.num_tokens ? t + b : p.num_tokens - 1;
    }
    dot_block<kQueries>(p.queries + r * p.stride, keys, rows, p.stride, scores + t);
  }
  float fade[kQueries] = {};
  bool same_range = true;
  for (int a = 0; a < kQueries; ++a) {
    if (p.begin[r + a] < p.end[r + a]) fade[a] = soften(p, r + a, scores + a * kTokens);
    same_range = same_range && p.begin[r + a] == p.begin[r] && p.end[r + a] == p.end[r];
  }
  if (same_range) {
    if (p.begin[r] < p.end[r]) accumulate<kQueries>(p, values, r, scores, fade);
    return;
  }
  for (int a = 0; a < kQueries; ++a) {
    if (p.begin[r + a] >= p.end[r + a]) continue;
    accumulate<1>(p, values, r + a, scores + a * kTokens, fade + a);
  }
}

template <class Keys, class Values>
void attend_rows(const AttendTileParams& p, const Keys& keys, const Values& values) {
  int r = 0;
  for (; r + kQueryBlock <= p.num_queries; r += kQueryBlock) {
    attend_queries<kQueryBlock>(p, keys, values, r);
  }
  for (; r < p.num_queries; ++r) attend_queries<1>(p, keys, values, r);
}

void attend_tile(const AttendTileParams& p) {
  attend_rows(p, FloatSource{p.keys.floats, p.stride}, FloatSource{p.values.floats, p.stride});
}

#if TQ_VECTOR_FLOATS > 4
template <int kBits>
PackedSource<kBits> source_of(const TileRows& rows) {
  return {rows.codes, rows.row_bytes, rows.levels, rows.row_bytes / 3};
}

template <int kKeyBits>
void attend_packed_keys(const AttendTileParams& p) {
  const auto keys = source_of<kKeyBits>(p.keys);
  switch (p.values.bits) {
    case 1:
      return attend_rows(p, keys, source_of<1>(p.values));
    case 2:
      return attend_rows(p, keys, source_of<2>(p.values));
    case 3:
      return attend_rows(p, keys, source_of<3>(p.values));
    default:
      return attend_rows(p, keys, source_of<4>(p.values));
  }
}

void attend_packed_tile(const AttendTileParams& p) {
  switch (p.keys.bits) {
    case 1:
      return attend_packed_keys<1>(p);
    case 2:
      return attend_packed_keys<2>(p);
    case 3:
      return attend_packed_keys<3>(p);
    default:
      return attend_packed_keys<4>(p);
  }
}
#define TQ_ATTEND_PACKED_TILE attend_packed_tile
#else
#define TQ_ATTEND_PACKED_TILE nullptr
#endif

}  // namespace

const AttentionKernels TQ_KERNEL_TABLE = {attend_tile, TQ_ATTEND_PACKED_TILE, kWidth,
                                          kPackedBits, kPackedQueries,        TQ_DECODE_ROWS};

}  // namespace turboquant::attention::detail
