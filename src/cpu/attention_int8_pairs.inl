// Attention straight from the indices of a vector codebook in 8-bit integers (AVX-512 VNNI and
// VBMI). Part of a kernel unit (attention_int16.inl, whose blocks, rows and numerics these are):
// internal linkage, no std:: function.
//
// A pair's levels are bytes, so two look-ups turn a register of 64 indices into 128 levels, as many
// as a register of nibbles holds, and one instruction multiplies and adds up four bytes: queries
// and weights are 16-bit integers n as elsewhere, taken as the bytes of n + 2^15,
//   sum n c = 2^8 sum high c + sum low c - 2^15 sum c,
// where the last sum serves all queries. Levels are exact. |sum n c| < 2^31 as in
// attention_int16.inl (a row of levels has a norm of at most 127 sqrt(256) < 2^11); what its parts
// wrap comes back.
//   scores  a lane is a token and its four bytes are four pairs' levels: the transposed words;
//   values  a lane is a pair and its four bytes are four tokens' levels.
#include <cstdint>

namespace turboquant::attention::detail {
namespace {

constexpr int kPlane = math::VectorCodebook::kEntries;

// The bytes of one level of every pair.
struct LevelPlane {
  explicit LevelPlane(const int8_t* levels) {
    for (int i = 0; i < 4; ++i) table[i] = load_512(levels + 64 * i);
  }
  __m512i at(__m512i indices) const { return look_up_bytes(indices, table); }

  __m512i table[4];
};

// sum n c of the three sums.
inline __m512i signed_sum(__m512i high, __m512i low, __m512i levels) {
  return _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low),
                          _mm512_slli_epi32(levels, 15));
}

inline __m512i four_bytes(const void* from) { return _mm512_set1_epi32(load<int32_t>(from)); }

// Bytes of a packed query for the four pairs of a 32-bit word, as pack_pair_query lays them out.
constexpr int kXHigh = 0, kXLow = 4, kYHigh = 8, kYLow = 12, kWordQueryBytes = 16;

void pack_pair_query(const int32_t* rounded, int64_t dim, int16_t* packed) {
  auto* const bytes = reinterpret_cast<uint8_t*>(packed);
  for (int64_t i = 0; i < dim; ++i) {
    const auto n = static_cast<uint32_t>(rounded[i] + 0x8000);
    uint8_t* const to = bytes + i / 8 * kWordQueryBytes + i / 2 % 4 + (i % 2 == 0 ? 0 : kYHigh);
    to[0] = static_cast<uint8_t>(n >> 8);
    to[kXLow] = static_cast<uint8_t>(n);
  }
}

template <int kQueries>
void score_pairs(const AttendTileParams& p, const WordRows& keys, int r, int count, float* scores) {
  constexpr int kGroups = kQueries <= 2 ? 2 : 1;  // of 16 tokens
  const LevelPlane first(p.keys.planes), second(p.keys.planes + kPlane);
  const uint8_t* queries[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    queries[a] = reinterpret_cast<const uint8_t*>(p.packed_queries +
                                                  (r + (a < count ? a : count - 1)) * p.stride);
  }
  for (int t = 0; t < p.num_tokens; t += 16 * kGroups) {
    __m512i high[kQueries][kGroups], low[kQueries][kGroups], levels[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      levels[g] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) high[a][g] = low[a][g] = _mm512_setzero_si512();
    }
    for (int64_t at = 0; at < keys.row_bytes; at += 16) {
      __m512i words[kGroups][4];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        transpose_words(keys.words + (t + 16 * g) * keys.row_bytes + at, keys.row_bytes, words[g]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t word = (at / 4 + i) * kWordQueryBytes;
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const __m512i x = first.at(words[g][i]), y = second.at(words[g][i]);
          const __m512i ones = _mm512_set1_epi8(1);
          levels[g] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(levels[g], ones, x), ones, y);
#pragma GCC unroll 8
          for (int a = 0; a < kQueries; ++a) {
            const uint8_t* const query = queries[a] + word;
            high[a][g] = _mm512_dpbusd_epi32(high[a][g], four_bytes(query + kXHigh), x);
            low[a][g] = _mm512_dpbusd_epi32(low[a][g], four_bytes(query + kXLow), x);
            high[a][g] = _mm512_dpbusd_epi32(high[a][g], four_bytes(query + kYHigh), y);
            low[a][g] = _mm512_dpbusd_epi32(low[a][g], four_bytes(query + kYLow), y);
          }
        }
      }
    }
    for (int a = 0; a < kQueries && a < count; ++a) {
      const float unit = p.query_units[r + a] * math::VectorCodebook::kUnit;
      for (int g = 0; g < kGroups; ++g) {
        const __m512i sum = signed_sum(high[a][g], low[a][g], levels[g]);
        store(scores + a * kTokens + t + 16 * g, unit * _mm512_cvtepi32_ps(sum));
      }
    }
  }
}

// Index p of four rows in lane p, of 16 indices each.
inline __m512i four_tokens(const uint8_t* row, int64_t row_bytes) {
  __m512i rows = _mm512_castsi128_si512(load<__m128i>(row));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x00F0, load<__m128i>(row + row_bytes));
  rows = _mm512_mask_broadcast_i32x4(rows, 0x0F00, load<__m128i>(row + 2 * row_bytes));
  rows = _mm512_mask_broadcast_i32x4(rows, 0xF000, load<__m128i>(row + 3 * row_bytes));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_epi8(
      _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101)),
                       _mm512_set1_epi32(0x30201000)),
      rows);
}

template <int kQueries>
void accumulate_pairs(const AttendTileParams& p, const WordRows& values, int r, int count,
                      const float* weights, const float* fade) {
  constexpr int kPlanes = kQueries <= 4 ? 2 : 1;  // of a pass: their sums fill the register file
  const int begin = p.begin[r], end = p.end[r];
  alignas(64) uint8_t high_bytes[kQueries][kTokens], low_bytes[kQueries][kTokens];
  float units[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    const int from = a < count ? a : count - 1;
    alignas(64) int16_t packed[kTokens];
    units[a] =
        pack_weights(weights + from * kTokens, begin, end, packed) * math::VectorCodebook::kUnit;
    for (int i = 0; i < kTokens; i += 32) {
      const __m512i n = _mm512_xor_si512(load_512(packed + i), _mm512_set1_epi16(-0x8000));
      store(high_bytes[a] + i, _mm512_cvtepi16_epi8(_mm512_srli_epi16(n, 8)));
      store(low_bytes[a] + i, _mm512_cvtepi16_epi8(n));
    }
  }
  for (int64_t at = 0; at < values.row_bytes; at += 16) {
    alignas(64) int32_t total[kQueries][2][16];
    repeat<2 / kPlanes>([&]<int kPass>() {
      const LevelPlane planes[2] = {LevelPlane(p.values.planes),
                                    LevelPlane(p.values.planes + kPlane)};
      __m512i high[kQueries][kPlanes], low[kQueries][kPlanes], levels[kPlanes];
#pragma GCC unroll 2
      for (int i = 0; i < kPlanes; ++i) {
        levels[i] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int a = 0; a < kQueries; ++a) high[a][i] = low[a][i] = _mm512_setzero_si512();
      }
      for (int t = begin & ~3; t < end; t += 4) {
        const __m512i indices =
            four_tokens(values.words + t * values.row_bytes + at, values.row_bytes);
#pragma GCC unroll 2
        for (int i = 0; i < kPlanes; ++i) {
          const __m512i level = planes[kPass + i].at(indices);
          levels[i] = _mm512_dpbusd_epi32(levels[i], _mm512_set1_epi8(1), level);
#pragma GCC unroll 8
          for (int a = 0; a < kQueries; ++a) {
            high[a][i] = _mm512_dpbusd_epi32(high[a][i], four_bytes(high_bytes[a] + t), level);
            low[a][i] = _mm512_dpbusd_epi32(low[a][i], four_bytes(low_bytes[a] + t), level);
          }
        }
      }
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 2
        for (int i = 0; i < kPlanes; ++i) {
          store(total[a][kPass + i], signed_sum(high[a][i], low[a][i], levels[i]));
        }
      }
    });
    for (int a = 0; a < kQueries && a < count; ++a) {
      __m512i sums[2] = {load_512(total[a][0]), load_512(total[a][1])};
      interleave(sums);
      float* const output = p.output + (r + a) * p.stride + 2 * at;
      for (int k = 0; k < 2; ++k) {
        const __m512 faded = _mm512_loadu_ps(output + 16 * k) * fade[a];
        store(output + 16 * k,
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[k]), _mm512_set1_ps(units[a]), faded));
      }
    }
  }
}

// Entry i serves up to 2^i queries.
constexpr ScoreWords kScorePairs[4] = {score_pairs<1>, score_pairs<2>, score_pairs<4>,
                                       score_pairs<8>};
constexpr AccumulateWords kAccumulatePairs[4] = {accumulate_pairs<1>, accumulate_pairs<2>,
                                                 accumulate_pairs<4>, accumulate_pairs<8>};

}  // namespace
}  // namespace turboquant::attention::detail
