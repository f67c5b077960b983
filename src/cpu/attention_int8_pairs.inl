// Attention straight from the indices of a vector codebook in 8-bit integers (AVX-512 VNNI and
// VBMI). Part of a kernel unit (attention_int16.inl, whose blocks, rows and numerics these are):
// internal linkage, no std:: function.
//
// A pair's levels are bytes, so two look-ups turn a register of 64 indices into 128 levels, as many
// as a register of nibbles holds, and one instruction multiplies and adds up four unsigned bytes by
// four signed ones: levels c as c + 128, queries and weights (16-bit integers n as elsewhere) as
// the signed digits of n = 2^8 high + low, which broadcast from memory,
//   sum n c = 2^8 sum high (c + 128) + sum low (c + 128) - 128 sum n.
// The last sum is one number for all tokens (all coordinates). Levels are exact. |sum n c| < 2^31
// as in attention_int16.inl (a row of levels has a norm of at most 127 sqrt(256) < 2^11); what its
// parts wrap comes back.
//   scores  a lane is a token and its four bytes are four pairs' levels: the transposed words;
//   values  a lane is a pair and its four bytes are four tokens' levels.
// Indices that overlap by half (2 bits) are taken where they lie: a 32-bit word's bytes are its
// even indices, those of the word shifted by four bits its odd ones.
#include <cstdint>

namespace turboquant::attention::detail {
namespace {

constexpr int kPlane = math::VectorCodebook::kEntries;

constexpr int kLevelBias = 128;

// The bytes of one level of every pair.
struct LevelPlane {
  explicit LevelPlane(const int8_t* levels) {
    for (int i = 0; i < 4; ++i) {
      table[i] = _mm512_xor_si512(load_512(levels + 64 * i), _mm512_set1_epi8(-kLevelBias));
    }
  }
  __m512i at(__m512i indices) const { return look_up_bytes(indices, table); }

  __m512i table[4];
};

// Adds up four levels by the four digits that lie at `digits`.
inline __m512i add_digits(__m512i sums, __m512i levels, const void* digits) {
  return _mm512_dpbusd_epi32(sums, levels, _mm512_set1_epi32(load<int32_t>(digits)));
}

// What a sum of low digits begins with.
inline __m512i less_bias(int32_t sum_n) {
  return _mm512_set1_epi32(
      static_cast<int32_t>(static_cast<uint32_t>(-kLevelBias) * static_cast<uint32_t>(sum_n)));
}
inline __m512i whole_sum(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// Digits of a packed query for the four pairs of a 32-bit word, as pack_pair_query lays them out.
constexpr int kXHigh = 0, kXLow = 4, kYHigh = 8, kYLow = 12, kWordQueryBytes = 16;

// A word's pairs are neighbours; of indices that overlap, every other one of eight.
void pack_pair_query(const int32_t* rounded, int64_t dim, bool overlap, int16_t* packed) {
  auto* const bytes = reinterpret_cast<int8_t*>(packed);
  for (int64_t i = 0; i < dim; ++i) {
    const auto low = static_cast<int8_t>(rounded[i]);
    const int64_t pair = i / 2;
    const int64_t word = overlap ? pair / 8 * 2 + pair % 2 : pair / 4;
    const int64_t place = overlap ? pair / 2 % 4 : pair % 4;
    int8_t* const to = bytes + word * kWordQueryBytes + place + (i % 2 == 0 ? 0 : kYHigh);
    to[0] = static_cast<int8_t>((rounded[i] - low) >> 8);
    to[kXLow] = low;
  }
}

// sum n of a packed query: lanes of four high digits and of four low ones take turns.
inline int32_t sum_of_query(const int16_t* packed, int64_t words) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < words; i += 4) {
    const auto mask = static_cast<__mmask16>((1u << 4 * (words - i < 4 ? words - i : 4)) - 1);
    const __m512i digits = _mm512_maskz_loadu_epi32(mask, packed + i * kWordQueryBytes / 2);
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), digits);
  }
  return _mm512_reduce_add_epi32(_mm512_mask_slli_epi32(sums, 0x5555, sums, 8));
}

// The even or the odd indices of words that hold both.
template <int kHalf>
inline __m512i half_of(__m512i words) {
  return kHalf == 0 ? words : _mm512_srli_epi32(words, 4);
}

// kHalves: 2 where indices overlap.
template <int kQueries, int kHalves>
void score_pairs(const AttendTileParams& p, const WordRows& keys, int r, int count, float* scores) {
  constexpr int kGroups = kQueries <= 2 ? 2 : 1;  // of 16 tokens
  const LevelPlane first(p.keys.planes), second(p.keys.planes + kPlane);
  const uint8_t* queries[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    queries[a] = reinterpret_cast<const uint8_t*>(p.packed_queries +
                                                  (r + (a < count ? a : count - 1)) * p.stride);
  }
  __m512i start[kQueries];
#pragma GCC unroll 8
  for (int a = 0; a < kQueries; ++a) {
    start[a] = less_bias(
        sum_of_query(reinterpret_cast<const int16_t*>(queries[a]), keys.row_bytes / 4 * kHalves));
  }
  for (int t = 0; t < p.num_tokens; t += 16 * kGroups) {
    __m512i high[kQueries][kGroups], low[kQueries][kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) {
        high[a][g] = _mm512_setzero_si512();
        low[a][g] = start[a];
      }
    }
    for (int64_t at = 0; at < keys.row_bytes; at += 16) {
      __m512i words[kGroups][4];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        transpose_words(keys.words + (t + 16 * g) * keys.row_bytes + at, keys.row_bytes, words[g]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        repeat<kHalves>([&]<int kHalf>() {
          const int64_t word = ((at / 4 + i) * kHalves + kHalf) * kWordQueryBytes;
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            const __m512i indices = half_of<kHalf>(words[g][i]);
            const __m512i x = first.at(indices), y = second.at(indices);
#pragma GCC unroll 8
            for (int a = 0; a < kQueries; ++a) {
              const uint8_t* const query = queries[a] + word;
              high[a][g] = add_digits(high[a][g], x, query + kXHigh);
              low[a][g] = add_digits(low[a][g], x, query + kXLow);
              high[a][g] = add_digits(high[a][g], y, query + kYHigh);
              low[a][g] = add_digits(low[a][g], y, query + kYLow);
            }
          }
        });
      }
    }
    for (int a = 0; a < kQueries && a < count; ++a) {
      const float unit = p.query_units[r + a] * math::VectorCodebook::kUnit;
      for (int g = 0; g < kGroups; ++g) {
        const __m512i sum = whole_sum(high[a][g], low[a][g]);
        store(scores + a * kTokens + t + 16 * g, unit * _mm512_cvtepi32_ps(sum));
      }
    }
  }
}

// Index p of four rows in lane p, of 16 indices each (every other one where indices overlap).
template <int kHalf>
inline __m512i four_tokens(const uint8_t* row, int64_t row_bytes) {
  __m512i rows = _mm512_castsi128_si512(load<__m128i>(row));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x00F0, load<__m128i>(row + row_bytes));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x0F00, load<__m128i>(row + 2 * row_bytes));
  rows = _mm512_mask_broadcast_i32x4(rows, 0xF000, load<__m128i>(row + 3 * row_bytes));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_epi8(
      _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101)),
                       _mm512_set1_epi32(0x30201000)),
      half_of<kHalf>(rows));
}

template <int kQueries, int kHalves>
void accumulate_pairs(const AttendTileParams& p, const WordRows& values, int r, int count,
                      const float* weights, const float* fade) {
  constexpr int kPlanes = kQueries <= 4 ? 2 : 1;  // of a pass: their sums fill the register file
  const int begin = p.begin[r], end = p.end[r];
  alignas(64) uint8_t high_digits[kQueries][kTokens], low_digits[kQueries][kTokens];
  float units[kQueries];
  int32_t sum_n[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    const int from = a < count ? a : count - 1;
    alignas(64) int16_t packed[kTokens];
    units[a] =
        pack_weights(weights + from * kTokens, begin, end, packed) * math::VectorCodebook::kUnit;
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < kTokens; i += 32) {
      const __m512i n = load_512(packed + i);
      const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(n, _mm512_set1_epi16(0x80)), 8);
      store(high_digits[a] + i, _mm512_cvtepi16_epi8(high));
      store(low_digits[a] + i, _mm512_cvtepi16_epi8(n));
      sums = _mm512_dpwssd_epi32(sums, n, _mm512_set1_epi16(1));
    }
    sum_n[a] = _mm512_reduce_add_epi32(sums);
  }
  for (int64_t at = 0; at < values.row_bytes; at += 16) {
    constexpr int kVectors = 2 * kHalves;
    alignas(64) int32_t total[kQueries][kVectors][16];
    repeat<kVectors / kPlanes>([&]<int kPass>() {
      constexpr int kHalf = kPass * kPlanes / 2, kFirst = kPass * kPlanes % 2;
      const LevelPlane planes[2] = {LevelPlane(p.values.planes),
                                    LevelPlane(p.values.planes + kPlane)};
      __m512i high[kQueries][kPlanes], low[kQueries][kPlanes];
#pragma GCC unroll 2
      for (int i = 0; i < kPlanes; ++i) {
#pragma GCC unroll 8
        for (int a = 0; a < kQueries; ++a) {
          high[a][i] = _mm512_setzero_si512();
          low[a][i] = less_bias(sum_n[a]);
        }
      }
      for (int t = begin & ~3; t < end; t += 4) {
        const __m512i indices =
            four_tokens<kHalf>(values.words + t * values.row_bytes + at, values.row_bytes);
#pragma GCC unroll 2
        for (int i = 0; i < kPlanes; ++i) {
          const __m512i level = planes[kFirst + i].at(indices);
#pragma GCC unroll 8
          for (int a = 0; a < kQueries; ++a) {
            high[a][i] = add_digits(high[a][i], level, high_digits[a] + t);
            low[a][i] = add_digits(low[a][i], level, low_digits[a] + t);
          }
        }
      }
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 2
        for (int i = 0; i < kPlanes; ++i) {
          store(total[a][kPass * kPlanes + i], whole_sum(high[a][i], low[a][i]));
        }
      }
    });
    for (int a = 0; a < kQueries && a < count; ++a) {
      __m512i sums[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) sums[i] = load_512(total[a][i]);
      interleave(sums);
      float* const output = p.output + (r + a) * p.stride + kVectors * at;
      for (int k = 0; k < kVectors; ++k) {
        const __m512 faded = _mm512_loadu_ps(output + 16 * k) * fade[a];
        store(output + 16 * k,
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[k]), _mm512_set1_ps(units[a]), faded));
      }
    }
  }
}

// Entry [kHalves - 1][i] serves up to 2^i queries.
constexpr ScoreWords kScorePairs[2][4] = {
    {score_pairs<1, 1>, score_pairs<2, 1>, score_pairs<4, 1>, score_pairs<8, 1>},
    {score_pairs<1, 2>, score_pairs<2, 2>, score_pairs<4, 2>, score_pairs<8, 2>}};
constexpr AccumulateWords kAccumulatePairs[2][4] = {
    {accumulate_pairs<1, 1>, accumulate_pairs<2, 1>, accumulate_pairs<4, 1>,
     accumulate_pairs<8, 1>},
    {accumulate_pairs<1, 2>, accumulate_pairs<2, 2>, accumulate_pairs<4, 2>,
     accumulate_pairs<8, 2>}};

}  // namespace
}  // namespace turboquant::attention::detail
