// Attention straight from packed codes in 16-bit integers (AVX-512 VNNI and VBMI): twice the
// products of fp32 in an instruction. Part of a kernel unit (attention_kernels.inl): internal
// linkage, no std:: function.
//
// A row's codes are taken as 16-bit words of kCodes codes each: nibbles for 3 and 4 bits, bytes for
// 5 to 8, to which 3, 5, 6 and 7 bits are spread first; for a vector codebook two indices of a
// byte. A look-up turns the words of a register into kCodes registers of int16 levels, and one
// instruction multiplies pairs of them and adds up in int32:
//   scores  a lane is a token and a pair two dimensions of it, so nothing is left to add up across
//           lanes: rows are transposed by 32-bit words, and the pairs of the queries are broadcast;
//   values  a lane is a dimension and a pair two neighbouring tokens; weights are broadcast.
//
// Numerics. Levels are rounded to multiples of (largest level) / n, queries and the weights of a
// tile to multiples of a unit of their own; the rest of an integer sum is exact, whatever its
// order. No sum leaves int32 (dim = d, 64 tokens):
//   scores  n = floor(2^16 / sqrt(d)), so that a row of levels has a norm of 2^16 at most; a query
//           is given the norm kQueryNorm, after rounding at most kQueryNorm + sqrt(d) / 2, which
//           is below kMaxWeight too.
//           Cauchy-Schwarz: |sum| < 2^31, and what wraps on the way comes back.
//   values  n = 2^13; weights are at most kMaxWeight and add up to at most 2^18 - 32 after
//   rounding.
// At d = 128 and 4 bits levels, queries and weights are off by some 1e-4 of their rms, and so is
// the output; docs/experiments/cpu-decode-attention.md has the figures.
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/quant/packing.hpp"

namespace turboquant::attention::detail {
namespace {

constexpr int kMaxPackedDim = 256;
constexpr int kIntegerQueries = 8;  // that share look-ups
constexpr int kScratchBytes = kTokens * kMaxPackedDim + 16;
constexpr float kQueryNorm = 32600.0f;
constexpr float kMaxWeight = 32639.0f;  // the high digit of attention_int8_pairs.inl is at most 127
constexpr float kWeightSum = 0x1p18f - 64.0f;
constexpr float kValueLevel = 0x1p13f;
constexpr float kMaxScale = 0x1p126f;  // its inverse is a normal number

inline float key_level(int64_t dim) {
  return static_cast<float>(static_cast<int>(65536.0f / __builtin_sqrtf(static_cast<float>(dim))));
}

// Bits of a code in a word: 2, 4 or 8. A pair's index is a byte whatever its bits.
constexpr int word_bits(int bits, bool pairs) {
  return pairs ? 4 : bits <= 2 ? 2 : bits <= 4 ? 4 : 8;
}

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

// Levels of codes in words. kEntries = 16 (of codes of up to 4 bits, kBits apart), 64 or 256.
template <int kBits, int kEntries>
class WordLevels;

template <int kBits>
class WordLevels<kBits, 16> {
 public:
  static constexpr int kCodes = 16 / kBits;

  WordLevels(const TileRows& rows, float limit) {
    const __m512 levels = _mm512_loadu_ps(rows.levels);
    const float largest = lane_max(_mm512_abs_ps(levels));
    const __m512i scaled = _mm512_cvtps_epi32(levels * (limit / largest));
    // Twice: the permutation looks at five bits of a word, the fifth is the next code's.
    table_ = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(scaled));
    unit_ = largest / limit;
  }

  float unit() const { return unit_; }

  // The levels of code kCode of every word.
  template <int kCode>
  __m512i at(__m512i words) const {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, kCode * kBits), table_);
  }

 private:
  __m512i table_;
  float unit_;
};

// A byte for every byte.
inline __m512i look_up_bytes(__m512i codes, const __m512i (&table)[1]) {
  return _mm512_permutexvar_epi8(codes, table[0]);
}
inline __m512i look_up_bytes(__m512i codes, const __m512i (&table)[4]) {
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes),
                                _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

// The int16 levels of the words' even (odd) bytes, from the low and the high bytes of all levels.
constexpr __mmask64 kOddBytes = 0xAAAAAAAAAAAAAAAAu;
inline __m512i even_bytes(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi8(kOddBytes, low, _mm512_slli_epi16(high, 8));
}
inline __m512i odd_bytes(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi16(low, 8), high);
}

// Bytes: their levels' low and high halves are looked up apart.
template <int kEntries>
class WordLevels<8, kEntries> {
 public:
  static constexpr int kCodes = 2;

  WordLevels(const TileRows& rows, float limit) {
    const int entries = 1 << rows.bits;
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < entries; i += 16) {
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(rows.levels + i)));
    }
    const float largest = lane_max(most);
    alignas(64) uint8_t bytes[2][kEntries] = {};
    for (int i = 0; i < entries; i += 16) {
      const __m512i scaled =
          _mm512_cvtps_epi32(_mm512_loadu_ps(rows.levels + i) * (limit / largest));
      store(bytes[0] + i, _mm512_cvtepi32_epi8(scaled));
      store(bytes[1] + i, _mm512_cvtepi32_epi8(_mm512_srai_epi32(scaled, 8)));
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kRegisters; ++i) table_[half][i] = load_512(bytes[half] + 64 * i);
    }
    unit_ = largest / limit;
  }

  float unit() const { return unit_; }

  template <int kCode>
  __m512i at(__m512i words) const {
    const __m512i low = look_up_bytes(words, table_[0]), high = look_up_bytes(words, table_[1]);
    return kCode == 0 ? even_bytes(low, high) : odd_bytes(low, high);
  }

 private:
  static constexpr int kRegisters = kEntries / 64;

  __m512i table_[2][kRegisters];
  float unit_;
};

// Rows of words: [kTokens, row_bytes], of any content behind num_tokens.
struct WordRows {
  const uint8_t* words;
  int64_t row_bytes;
};

// Whether attention_int8_pairs.inl takes a vector codebook's indices where they lie although they
// overlap by half (2 bits): in whole pieces of 16 bytes.
constexpr bool takes_overlapping(int64_t dim, int bits) { return bits == 2 && dim % 64 == 0; }

// A row of the spare-bit planes of quant/packing.hpp, three segments of `segment` bytes, as
// nibbles: the segments as they are (their spare bits do no harm) and the fourth that is spread
// over them. Writes up to 15 bytes too many, which later rows overwrite.
inline void spread_planes(const uint8_t* from, int64_t segment, uint8_t* to) {
  const auto spare = [&](int64_t i, auto piece) {
    const __m128i low = _mm_srli_epi16(piece(from + i), 3);
    const __m128i middle = _mm_srli_epi16(piece(from + segment + i), 2);
    const __m128i high = _mm_srli_epi16(piece(from + 2 * segment + i), 1);
    store(to + 3 * segment + i, (low & _mm_set1_epi8(0x11)) | (middle & _mm_set1_epi8(0x22)) |
                                    (high & _mm_set1_epi8(0x44)));
  };
  const auto some = [](int64_t bytes) {
    const auto mask = static_cast<__mmask16>((1u << bytes) - 1);
    return [mask](const uint8_t* at) { return _mm_maskz_loadu_epi8(mask, at); };
  };
  const int64_t bytes = 3 * segment;
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) store(to + i, load<__m128i>(from + i));
  if (i < bytes) store(to + i, some(bytes - i)(from + i));
  for (i = 0; i + 16 <= segment; i += 16) spare(i, load<__m128i, uint8_t>);
  if (i < segment) spare(i, some(segment - i));
}

// A row of indices that overlap by half, `bytes` long (a multiple of 8), as bytes: those of a
// 32-bit word are its even indices, those four bits on its odd ones.
inline void spread_overlapping(const uint8_t* from, int64_t bytes, uint8_t* to) {
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const auto even = load<__m128i>(from + i);
    const __m128i odd = _mm_srli_epi32(even, 4);
    store(to + 2 * i, _mm_unpacklo_epi8(even, odd));
    store(to + 2 * i + 16, _mm_unpackhi_epi8(even, odd));
  }
  if (i < bytes) {
    const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    store(to + 2 * i, _mm_unpacklo_epi8(even, _mm_srli_epi32(even, 4)));
  }
}

// Codes as words: where they lie if their width is that of words, else spread into `scratch`
// [kScratchBytes].
WordRows open_words(const TileRows& rows, int64_t dim, int num_tokens, uint8_t* scratch) {
  const int bits = rows.bits;
  const bool pairs = rows.planes != nullptr;
  if (bits == word_bits(bits, pairs) || (pairs && takes_overlapping(dim, bits))) {
    return {rows.codes, rows.row_bytes};
  }
  const int64_t row_bytes = dim * word_bits(bits, pairs) / 8;
  for (int t = 0; t < num_tokens; ++t) {
    const uint8_t* const from = rows.codes + t * rows.row_bytes;
    uint8_t* const to = scratch + t * row_bytes;
    if (bits == 3) {
      spread_planes(from, dim / 8, to);
      continue;
    }
    if (bits == 2) {
      spread_overlapping(from, dim / 4, to);
      continue;
    }
    const auto spread = [&]<int kBits>() {
      constexpr uint64_t kByte = (1u << kBits) - 1;
      for (int64_t i = 0; i < dim / 8; ++i) {
        const uint64_t codes = quant::detail::load_bytes<kBits>(from + i * kBits);
        store(to + 8 * i, _pdep_u64(codes, kByte * 0x0101010101010101u));
      }
    };
    if (bits == 5) spread.operator()<5>();
    if (bits == 6) spread.operator()<6>();
    if (bits == 7) spread.operator()<7>();
  }
  return {scratch, row_bytes};
}

// Word i of the four words at row + j * row_bytes, j < 16, in lane j of words[i].
inline void transpose_words(const uint8_t* row, int64_t row_bytes, __m512i (&words)[4]) {
  const int64_t step = 4 * row_bytes;
  const auto four = [&](int j) {  // rows j, j + 4, j + 8, j + 12
    const uint8_t* const from = row + j * row_bytes;
    __m512i v = _mm512_castsi128_si512(load<__m128i>(from));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, load<__m128i>(from + step));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, load<__m128i>(from + 2 * step));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, load<__m128i>(from + 3 * step));
  };
  const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  words[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  words[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  words[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  words[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

inline __m512i add_products(__m512i sum, __m512i levels, const int16_t* pair) {
  return _mm512_dpwssd_epi32(sum, levels, _mm512_set1_epi32(load<int32_t>(pair)));
}

// scores[a][t] of queries r + a, a < count <= kQueries.
template <int kQueries, class Levels>
void score_words(const AttendTileParams& p, const WordRows& keys, int r, int count, float* scores) {
  constexpr int kGroups = kQueries <= 4 ? 2 : 1;  // of 16 tokens: enough sums to hide their latency
  const Levels levels(p.keys, key_level(p.stride));
  const int16_t* queries[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    queries[a] = p.packed_queries + (r + (a < count ? a : count - 1)) * p.stride;
  }
  for (int t = 0; t < p.num_tokens; t += 16 * kGroups) {
    __m512i sums[kQueries][kGroups];
#pragma GCC unroll 8
    for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) sums[a][g] = _mm512_setzero_si512();
    }
    int64_t pair = 0;
    for (int64_t at = 0; at < keys.row_bytes; at += 16) {
      __m512i words[kGroups][4];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        transpose_words(keys.words + (t + 16 * g) * keys.row_bytes + at, keys.row_bytes, words[g]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        repeat<Levels::kCodes>([&]<int kCode>() {
          __m512i level[kGroups];
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) level[g] = levels.template at<kCode>(words[g][i]);
#pragma GCC unroll 8
          for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; ++g) {
              sums[a][g] = add_products(sums[a][g], level[g], queries[a] + pair);
            }
          }
          pair += 2;
        });
      }
    }
    for (int a = 0; a < kQueries && a < count; ++a) {
      const float unit = p.query_units[r + a] * levels.unit();
      for (int g = 0; g < kGroups; ++g) {
        store(scores + a * kTokens + t + 16 * g, unit * _mm512_cvtepi32_ps(sums[a][g]));
      }
    }
  }
}

// Weights of tokens [begin, end) in multiples of the unit that is returned; 0 outside.
inline float pack_weights(const float* weights, int begin, int end, int16_t* packed) {
  const uint64_t visible = (~uint64_t{0} >> (kTokens - end)) & (~uint64_t{0} << begin);
  __m512 kept[kTokens / 16];
  __m512 most = _mm512_setzero_ps(), total = _mm512_setzero_ps();
  for (int i = 0; i < kTokens / 16; ++i) {
    const auto mask = static_cast<__mmask16>(visible >> (16 * i));
    kept[i] = _mm512_maskz_loadu_ps(mask, weights + 16 * i);
    most = _mm512_max_ps(most, _mm512_abs_ps(kept[i]));
    total += _mm512_abs_ps(kept[i]);
  }
  const float largest = lane_max(most), sum = lane_sum(total);
  float scale = kMaxScale;
  if (scale * largest > kMaxWeight) scale = kMaxWeight / largest;
  if (scale * sum > kWeightSum) scale = kWeightSum / sum;
  for (int i = 0; i < kTokens / 16; ++i) {
    store(packed + 16 * i, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(kept[i] * scale)));
  }
  return sum <= __FLT_MAX__ ? 1.0f / scale : __builtin_nanf("");
}

// kCount registers of 16, one after the other, from vectors[i][lane] to [lane][i]: every round
// interleaves the first half with the second.
template <int kCount>
inline void interleave(__m512i (&vectors)[kCount]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 3
  for (int round = 1; round < kCount; round *= 2) {
    __m512i mixed[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount / 2; ++i) {
      mixed[2 * i] = _mm512_permutex2var_epi32(vectors[i], low, vectors[i + kCount / 2]);
      mixed[2 * i + 1] = _mm512_permutex2var_epi32(vectors[i], high, vectors[i + kCount / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) vectors[i] = mixed[i];
  }
}

// output of queries r + a, a < count <= kQueries, which all see tokens [begin, end).
template <int kQueries, class Levels>
void accumulate_words(const AttendTileParams& p, const WordRows& values, int r, int count,
                      const float* weights, const float* fade) {
  constexpr int kCodes = Levels::kCodes;
  constexpr int kVectors = kQueries <= 4 && kCodes >= 4 ? 4 : 2;  // sums of a pass
  const Levels levels(p.values, kValueLevel);
  const int begin = p.begin[r], end = p.end[r];
  alignas(64) int16_t packed[kQueries][kTokens];
  float units[kQueries];
  for (int a = 0; a < kQueries; ++a) {
    const int from = a < count ? a : count - 1;
    units[a] = pack_weights(weights + from * kTokens, begin, end, packed[a]) * levels.unit();
  }
  // Words of token t in the even, of token t + 1 in the odd 16-bit lanes.
  const __m512i pairs = _mm512_setr_epi32(
      0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007, 0x280008,
      0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F);
  for (int64_t at = 0; at < values.row_bytes; at += 32) {  // 16 words of the rows
    const int64_t left = values.row_bytes - at;
    const auto there = static_cast<__mmask8>(left < 32 ? (1u << (left / 4)) - 1 : 0xFFu);
    alignas(64) int32_t total[kQueries][kCodes][16];
    repeat<kCodes / kVectors>([&]<int kPass>() {
      __m512i sums[kQueries][kVectors];
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[a][v] = _mm512_setzero_si512();
      }
      for (int t = begin & ~1; t < end; t += 2) {
        const uint8_t* const row = values.words + t * values.row_bytes + at;
        const __m256i even = _mm256_maskz_loadu_epi32(there, row);
        const __m256i odd = _mm256_maskz_loadu_epi32(there, row + values.row_bytes);
        const __m512i words = _mm512_permutex2var_epi16(_mm512_castsi256_si512(even), pairs,
                                                        _mm512_castsi256_si512(odd));
        repeat<kVectors>([&]<int kVector>() {
          const __m512i level = levels.template at<kPass * kVectors + kVector>(words);
#pragma GCC unroll 8
          for (int a = 0; a < kQueries; ++a) {
            sums[a][kVector] = add_products(sums[a][kVector], level, packed[a] + t);
          }
        });
      }
#pragma GCC unroll 8
      for (int a = 0; a < kQueries; ++a) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(total[a][kPass * kVectors + v], sums[a][v]);
      }
    });
    const int64_t first = at / 2 * kCodes;
    for (int a = 0; a < kQueries && a < count; ++a) {
      __m512i sums[kCodes];
#pragma GCC unroll 8
      for (int k = 0; k < kCodes; ++k) sums[k] = load_512(total[a][k]);
      interleave(sums);
      float* const output = p.output + (r + a) * p.stride + first;
      for (int k = 0; k < kCodes && first + 16 * k < p.stride; ++k) {
        const __m512 faded = _mm512_loadu_ps(output + 16 * k) * fade[a];
        store(output + 16 * k,
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[k]), _mm512_set1_ps(units[a]), faded));
      }
    }
  }
}

using ScoreWords = void (*)(const AttendTileParams&, const WordRows&, int, int, float*);
using AccumulateWords = void (*)(const AttendTileParams&, const WordRows&, int, int, const float*,
                                 const float*);
// Entry i serves up to 2^i queries.
template <class Levels>
constexpr ScoreWords kScoreWords[4] = {score_words<1, Levels>, score_words<2, Levels>,
                                       score_words<4, Levels>, score_words<8, Levels>};
template <class Levels>
constexpr AccumulateWords kAccumulateWords[4] = {
    accumulate_words<1, Levels>, accumulate_words<2, Levels>, accumulate_words<4, Levels>,
    accumulate_words<8, Levels>};
// Entry bits - 2.
constexpr const ScoreWords* kScoreOfBits[] = {
    kScoreWords<WordLevels<2, 16>>, kScoreWords<WordLevels<4, 16>>, kScoreWords<WordLevels<4, 16>>,
    kScoreWords<WordLevels<8, 64>>, kScoreWords<WordLevels<8, 64>>, kScoreWords<WordLevels<8, 256>>,
    kScoreWords<WordLevels<8, 256>>};
constexpr const AccumulateWords* kAccumulateOfBits[] = {
    kAccumulateWords<WordLevels<2, 16>>, kAccumulateWords<WordLevels<4, 16>>,
    kAccumulateWords<WordLevels<4, 16>>, kAccumulateWords<WordLevels<8, 64>>,
    kAccumulateWords<WordLevels<8, 64>>, kAccumulateWords<WordLevels<8, 256>>,
    kAccumulateWords<WordLevels<8, 256>>};

}  // namespace
}  // namespace turboquant::attention::detail

#include "cpu/attention_int8_pairs.inl"

namespace turboquant::attention::detail {
namespace {

// Whole 16-byte pieces of words.
bool int16_takes(int64_t dim, int bits, bool pairs) {
  return bits >= 2 && dim <= kMaxPackedDim && dim * word_bits(bits, pairs) % 128 == 0;
}

void attend_int16_tile(const AttendTileParams& p) {
  alignas(64) uint8_t key_words[kScratchBytes];
  alignas(64) uint8_t value_words[kScratchBytes];
  const WordRows keys = open_words(p.keys, p.stride, p.num_tokens, key_words);
  const WordRows values = open_words(p.values, p.stride, p.num_tokens, value_words);
  const ScoreWords* const score_of = p.keys.planes != nullptr
                                         ? kScorePairs[takes_overlapping(p.stride, p.keys.bits)]
                                         : kScoreOfBits[p.keys.bits - 2];
  const AccumulateWords* const accumulate_of =
      p.values.planes != nullptr ? kAccumulatePairs[takes_overlapping(p.stride, p.values.bits)]
                                 : kAccumulateOfBits[p.values.bits - 2];
  const auto size = [](int queries) { return queries > 4 ? 3 : queries > 2 ? 2 : queries - 1; };
  attend_blocks<kIntegerQueries>(
      p, [&](int r, int n, float* scores) { score_of[size(n)](p, keys, r, n, scores); },
      [&](int r, int n, const float* weights, const float* fade) {
        accumulate_of[size(n)](p, values, r, n, weights, fade);
      });
}

// Scalar codebooks, in the order of score_words: pair (w, c) of a query is dimensions 2 w kCodes +
// c and (2 w + 1) kCodes + c.
void pack_int16_queries(const PackQueriesParams& p) {
  const int codes = 16 / word_bits(p.k_bits, p.pairs);
  for (int r = 0; r < p.num_queries; ++r) {
    const float* const query = p.queries + r * p.stride;
    int16_t* const packed = p.packed + r * p.stride;
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < p.stride; i += 16) {
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(query + i)));
    }
    // In units of the largest coordinate, whose square is out of no float's range.
    const float largest = lane_max(most);
    const float inverse = 1.0f / largest <= __FLT_MAX__ ? 1.0f / largest : 0.0f;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < p.stride; i += 16) {
      const __m512 x = _mm512_loadu_ps(query + i) * inverse;
      squares += x * x;
    }
    const float norm = __builtin_sqrtf(lane_sum(squares));
    const float scale = norm > 0.0f ? kQueryNorm / norm : 0.0f;
    p.units[r] = norm > 0.0f ? largest / scale : norm;  // NaN where the query holds one
    alignas(64) int32_t rounded[kMaxPackedDim];
    for (int64_t i = 0; i < p.stride; i += 16) {
      const __m512 x = _mm512_loadu_ps(query + i) * inverse;
      store(rounded + i, _mm512_cvtps_epi32(x * scale));
    }
    if (p.pairs) {
      pack_pair_query(rounded, p.stride, takes_overlapping(p.stride, p.k_bits), packed);
      continue;
    }
    for (int64_t i = 0; i < p.stride; ++i) {
      const int64_t word = i / codes, code = i % codes;
      packed[(word / 2 * codes + code) * 2 + word % 2] = static_cast<int16_t>(rounded[i]);
    }
  }
}

}  // namespace
}  // namespace turboquant::attention::detail
