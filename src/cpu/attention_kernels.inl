// Decode attention's inner loops: one source, compiled once per instruction set by
// attention_{portable,neon,avx2,avx512}.cpp, which define
//   TQ_VECTOR_FLOATS     floats in a native vector (4, 8, 16)
//   TQ_NEON              (NEON alone) that its intrinsics may be used
//   TQ_VNNI              (avx512vnni alone) the same: packed rows meet integer products
//   TQ_KERNEL_TABLE      the name of the AttentionKernels object to define.
// FMA contraction is allowed here, so levels differ in rounding.
//
// One definition rule: everything has internal linkage and no std:: function is used, so nothing
// compiled for a newer instruction set can be picked by the linker for a unit that must run
// without it.
#include <cstdint>
#include <cstring>

#if defined(TQ_NEON)
#include "cpu/attention_decode_rows_neon.inl"
#else
#include "cpu/attention_decode_rows.inl"
#endif
#include "cpu/attention_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/attention/split_plan.hpp"
#include "turboquant/math/half.hpp"

namespace turboquant::attention::detail {
namespace {

constexpr int kTokens = cache::kBlockTokens;
// Queries that share the loads (or look-ups) of a token row, tokens and vectors that share those
// of the queries: their accumulators fill the register file.
constexpr int kQueryBlock = kWidth == 4 && !kNeon ? 2 : 4;
constexpr int kTokenBlock = kWidth == 8 ? 2 : 4;
constexpr int kVectorBlock = kTokenBlock;

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
#if defined(TQ_NEON)
inline float lane_sum(FourFloats v) { return vaddvq_f32(v); }  // (v0 + v1) + (v2 + v3)
#else
inline float lane_sum(FourFloats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif
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

#if TQ_VECTOR_FLOATS >= 8
// Steps of lane_sum for two vectors at once: a's sums end up before b's (in every 128 bits for
// fold_pairs and fold_odd).
#if TQ_VECTOR_FLOATS == 16
inline Floats fold_halves(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                 31);
}
// In every 128 bits: elements I and J of a, then of b.
template <int I, int J>
inline Floats pick(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, I, J, I + 16, J + 16, I + 4, J + 4, I + 20, J + 20, I + 8,
                                 J + 8, I + 24, J + 24, I + 12, J + 12, I + 28, J + 28);
}
#else
inline Floats fold_halves(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
template <int I, int J>
inline Floats pick(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, I, J, I + 8, J + 8, I + 4, J + 4, I + 12, J + 12);
}
#endif
inline Floats fold_pairs(Floats a, Floats b) { return pick<0, 1>(a, b) + pick<2, 3>(a, b); }
inline Floats fold_odd(Floats a, Floats b) { return pick<0, 2>(a, b) + pick<1, 3>(a, b); }
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

// The lane sums of acc[a][b] to scores[a * kTokens + b], added up while they are transposed: a
// third of the work of one sum after the other. The additions of a sum, and so its bits, are those
// of lane_sum. Where there are fewer than four queries the last one stands in for the rest.
template <int kQueries>
inline void store_sums(const Floats (&acc)[kQueries][kTokenBlock], float* scores) {
#if TQ_VECTOR_FLOATS > 4
  const auto of = [&acc](int query, int token) {
    return acc[query < kQueries ? query : kQueries - 1][token];
  };
#endif
#if TQ_VECTOR_FLOATS == 16
  Floats quarters[4];  // of token b: four partial sums of query a in quarter a
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const Floats q01 = fold_halves(of(0, b), of(1, b));
    const Floats q23 = fold_halves(of(2, b), of(3, b));
    quarters[b] = __builtin_shufflevector(q01, q23, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                          25, 26, 27) +
                  __builtin_shufflevector(q01, q23, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28,
                                          29, 30, 31);
  }
  const Floats sums =
      fold_odd(fold_pairs(quarters[0], quarters[1]), fold_pairs(quarters[2], quarters[3]));
  store(scores, lower(lower(sums)));
  if (kQueries > 1) store(scores + kTokens, upper(lower(sums)));
  if (kQueries > 2) store(scores + 2 * kTokens, lower(upper(sums)));
  if (kQueries > 3) store(scores + 3 * kTokens, upper(upper(sums)));
#elif TQ_VECTOR_FLOATS == 8
  Floats halves[2];  // half a of [i]: two partial sums each of tokens 0 and 1, query 2 i + a
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    halves[i] = fold_pairs(fold_halves(of(2 * i, 0), of(2 * i + 1, 0)),
                           fold_halves(of(2 * i, 1), of(2 * i + 1, 1)));
  }
  const Floats sums = fold_odd(halves[0], halves[1]);
#pragma GCC unroll 4
  for (int a = 0; a < kQueries; ++a) {
    const int lane = (a & 1) * 4 + (a >> 1) * 2;
    scores[a * kTokens] = sums[lane];
    scores[a * kTokens + 1] = sums[lane + 1];
  }
#elif defined(TQ_NEON)
#pragma GCC unroll 4
  for (int a = 0; a < kQueries; ++a) {
    store(scores + a * kTokens,
          vpaddq_f32(vpaddq_f32(acc[a][0], acc[a][1]), vpaddq_f32(acc[a][2], acc[a][3])));
  }
#else
#pragma GCC unroll 4
  for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 4
    for (int b = 0; b < kTokenBlock; ++b) scores[a * kTokens + b] = lane_sum(acc[a][b]);
  }
#endif
}

// scores[a][b] = query a . key rows[b] for kQueries x kTokenBlock rows. Each dot product is its own
// chain of additions over the vectors of a row, so its bits do not depend on the blocking.
template <int kQueries, class Source>
inline void dot_block(const float* queries, const Source& keys, const int64_t (&rows)[kTokenBlock],
                      int64_t stride, float* scores) {
  Floats acc[kQueries][kTokenBlock] = {};
  for (int64_t i = 0; i < stride; i += kWidth) {
    Floats key[kTokenBlock];
#pragma GCC unroll 4
    for (int b = 0; b < kTokenBlock; ++b) key[b] = keys.at(rows[b], i);
#pragma GCC unroll 4
    for (int a = 0; a < kQueries; ++a) {
      const auto query = load<Floats>(queries + a * stride + i);
#pragma GCC unroll 4
      for (int b = 0; b < kTokenBlock; ++b) acc[a][b] += query * key[b];
    }
  }
  store_sums(acc, scores);
}

// offsets[a] = query r + a . mean for `count` queries. The mean stands where a query does in
// dot_block and queries where tokens do: kTokenBlock chains of additions run side by side, where
// one query after the other would wait for its own.
inline void mean_scores(const AttendTileParams& p, int r, int count, float* offsets) {
  const FloatSource queries{p.queries, p.stride};
  for (int a = 0; a < count; a += kTokenBlock) {
    int64_t rows[kTokenBlock];  // the last query again behind the end
#pragma GCC unroll 4
    for (int b = 0; b < kTokenBlock; ++b) rows[b] = r + (a + b < count ? a + b : count - 1);
    dot_block<1>(p.mean, queries, rows, p.stride, offsets + a);
  }
}

// Scores of query r to weights: updates max and sum, returns what the output is multiplied by.
// `offset` is what the mean adds to all of them.
inline float soften(const AttendTileParams& p, int r, float offset, float* scores) {
  const int padded = (p.num_tokens + kWidth - 1) / kWidth * kWidth;
  if (p.key_scales != nullptr) {
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
#pragma GCC unroll 4
  for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[a][v] = load<Floats>(output + a * stride + v * kWidth) * fade[a];
    }
  }
  for (int t = begin; t < end; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = values.at(t, first + v * kWidth);
#pragma GCC unroll 4
      for (int a = 0; a < kQueries; ++a) acc[a][v] += weights[a * kTokens + t] * value;
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(output + a * stride + v * kWidth, acc[a][v]);
  }
}

// The two passes over a tile for queries [r, r + kQueries). Instantiated apart for keys and values,
// so that their widths add up instead of multiplying.
template <int kQueries, class Source>
void score_queries(const AttendTileParams& p, const Source& keys, int r, float* scores) {
  for (int t = 0; t < p.num_tokens; t += kTokenBlock) {
    int64_t rows[kTokenBlock];  // the last row again behind the end
#pragma GCC unroll 4
    for (int b = 0; b < kTokenBlock; ++b) {
      rows[b] = t + b < p.num_tokens ? t + b : p.num_tokens - 1;
    }
    dot_block<kQueries>(p.queries + r * p.stride, keys, rows, p.stride, scores + t);
  }
}

template <int kQueries, class Source>
void accumulate_queries(const AttendTileParams& p, const Source& values, int r,
                        const float* weights, const float* fade) {
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

// Queries in blocks of up to kBlock: scores, softmax weights, outputs. score_block(r, n, scores)
// and accumulate_block(r, n, weights, fade) serve queries [r, r + n); those of the latter see the
// same tokens.
template <int kBlock, class ScoreBlock, class AccumulateBlock>
inline void attend_blocks(const AttendTileParams& p, const ScoreBlock& score_block,
                          const AccumulateBlock& accumulate_block) {
  // Zeros: a block of tokens is written whole, soften reads whole vectors and masks them.
  alignas(64) float scores[kBlock * kTokens] = {};
  float offsets[(kBlock + kTokenBlock - 1) / kTokenBlock * kTokenBlock] = {};
  for (int r = 0; r < p.num_queries; r += kBlock) {
    const int queries = p.num_queries - r < kBlock ? p.num_queries - r : kBlock;
    score_block(r, queries, scores);
    if (p.mean != nullptr) mean_scores(p, r, queries, offsets);
    float fade[kBlock] = {};
    bool same_range = true;
    for (int a = 0; a < queries; ++a) {
      if (p.begin[r + a] < p.end[r + a])
        fade[a] = soften(p, r + a, offsets[a], scores + a * kTokens);
      same_range = same_range && p.begin[r + a] == p.begin[r] && p.end[r + a] == p.end[r];
    }
    if (same_range) {
      if (p.begin[r] < p.end[r]) accumulate_block(r, queries, scores, fade);
      continue;
    }
    for (int a = 0; a < queries; ++a) {
      if (p.begin[r + a] >= p.end[r + a]) continue;
      accumulate_block(r + a, 1, scores + a * kTokens, fade + a);
    }
  }
}

// Rows of keys or values as `Rows` says: floats, or codes of a width.
struct AsFloats {
  static FloatSource open(const TileRows& rows, int64_t stride) { return {rows.floats, stride}; }
};

template <class Rows, int kQueries>
void score(const AttendTileParams& p, int r, float* scores) {
  score_queries<kQueries>(p, Rows::open(p.keys, p.stride), r, scores);
}

template <class Rows, int kQueries>
void accumulate(const AttendTileParams& p, int r, const float* weights, const float* fade) {
  accumulate_queries<kQueries>(p, Rows::open(p.values, p.stride), r, weights, fade);
}

// Entry n - 1 serves n queries.
using Score = void (*)(const AttendTileParams&, int, float*);
using Accumulate = void (*)(const AttendTileParams&, int, const float*, const float*);
template <class Rows>
constexpr Score kScore[4] = {score<Rows, 1>, score<Rows, 2>, score<Rows, 3>, score<Rows, 4>};
template <class Rows>
constexpr Accumulate kAccumulate[4] = {accumulate<Rows, 1>, accumulate<Rows, 2>,
                                       accumulate<Rows, 3>, accumulate<Rows, 4>};
static_assert(kQueryBlock <= 4);

void attend_rows(const AttendTileParams& p, const Score* score_of,
                 const Accumulate* accumulate_of) {
  attend_blocks<kQueryBlock>(
      p, [&](int r, int n, float* scores) { score_of[n - 1](p, r, scores); },
      [&](int r, int n, const float* weights, const float* fade) {
        accumulate_of[n - 1](p, r, weights, fade);
      });
}

void attend_tile(const AttendTileParams& p) {
  attend_rows(p, kScore<AsFloats>, kAccumulate<AsFloats>);
}

// What the level offers for packed rows: fields of AttentionKernels.
struct PackedKernels {
  void (*attend_tile)(const AttendTileParams&);
  bool (*takes)(int64_t dim, int bits, bool pairs);
  int queries;
  void (*pack_queries)(const PackQueriesParams&);
};

}  // namespace
}  // namespace turboquant::attention::detail

#if defined(TQ_VNNI)
#include "cpu/attention_int16.inl"
#endif

namespace turboquant::attention::detail {
namespace {

#if defined(TQ_VNNI)
constexpr PackedKernels kPackedKernels = {attend_int16_tile, int16_takes, kQueryTileRows,
                                          pack_int16_queries};
#elif TQ_VECTOR_FLOATS > 4
template <int kBits>
struct AsCodes {
  static PackedSource<kBits> open(const TileRows& rows, int64_t /*stride*/) {
    return {rows.codes, rows.row_bytes, rows.levels, rows.row_bytes / 3};
  }
};

constexpr const Score* kPackedScore[] = {kScore<AsCodes<1> >, kScore<AsCodes<2> >,
                                         kScore<AsCodes<3> >,
#if TQ_VECTOR_FLOATS == 16  // AVX2 permutes 8 levels at most
                                         kScore<AsCodes<4> >
#endif
};
constexpr const Accumulate* kPackedAccumulate[] = {
    kAccumulate<AsCodes<1> >, kAccumulate<AsCodes<2> >, kAccumulate<AsCodes<3> >,
#if TQ_VECTOR_FLOATS == 16
    kAccumulate<AsCodes<4> >
#endif
};
constexpr int kPackedBits = static_cast<int>(sizeof kPackedScore / sizeof *kPackedScore);

void attend_packed_tile(const AttendTileParams& p) {
  attend_rows(p, kPackedScore[p.keys.bits - 1], kPackedAccumulate[p.values.bits - 1]);
}

// No vector may cross the end of a row, or of a quarter of a 3-bit row.
bool takes_packed(int64_t dim, int bits, bool pairs) {
  return !pairs && bits <= kPackedBits && (bits == 3 ? dim / 4 : dim) % kWidth == 0;
}

// Looking codes up again for every block of queries pays for so many blocks (docs/experiments/
// cpu-decode-attention.md).
constexpr PackedKernels kPackedKernels = {attend_packed_tile, takes_packed, 2 * kQueryBlock,
                                          nullptr};
#else
constexpr PackedKernels kPackedKernels = {nullptr, [](int64_t, int, bool) { return false; }, 0,
                                          nullptr};
#endif

void widen_halves(const std::byte* halves, int64_t count, float* out) {
#if TQ_VECTOR_FLOATS > 4
  for (int64_t i = 0; i < count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load<__m128i>(halves + i * sizeof(uint16_t))));
  }
#elif defined(TQ_NEON)
  for (int64_t i = 0; i < count; i += 4) {
    const auto four = load<uint16x4_t>(halves + i * sizeof(uint16_t));
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(four)));
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, halves + i * sizeof bits, sizeof bits);
    out[i] = math::fp32_from_fp16(bits);
  }
#endif
}

}  // namespace

const AttentionKernels TQ_KERNEL_TABLE = {
    .attend_tile = attend_tile,
    .attend_packed_tile = kPackedKernels.attend_tile,
    .takes_packed = kPackedKernels.takes,
    .packed_queries = kPackedKernels.queries,
    .pack_queries = kPackedKernels.pack_queries,
    .decode_rows = TQ_DECODE_ROWS,
    .decode_bits = kDecodeBits,
    .widen_halves = widen_halves,
};

}  // namespace turboquant::attention::detail
