// Packed rows to levels with whole-vector look-ups; defines TQ_DECODE_ROWS, the kernel or null.
// Part of a kernel unit (attention_kernels.inl): internal linkage, no std:: function.
//
// Widths up to 4 bits: a word of packed codes is broadcast, every lane shifts its own code to the
// bottom, and a register of levels is permuted by it. The permutation looks at the lowest 3 or 4
// bits, so the next codes in the word need no mask (DecodeTable::nibble_levels says why).
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/quant/packing.hpp"

#if TQ_VECTOR_FLOATS == 4
// One load per byte of quant::decode_row is as quick.
#define TQ_DECODE_ROWS nullptr
namespace turboquant::attention::detail {
namespace {
constexpr int kDecodeBits = 0;
}  // namespace
}  // namespace turboquant::attention::detail
#else
#define TQ_DECODE_ROWS decode_rows

namespace turboquant::attention::detail {
namespace {

constexpr int kDecodeBits = 8;

inline void store_some(float* to, Floats v, int64_t count) {
#if TQ_VECTOR_FLOATS == 16
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
#else
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes), v);
#endif
}

// The codes of kWidth dimensions, each in the lowest bits of its lane, from a word of them that lie
// kStride bits apart.
template <int kStride>
inline Ints spread(uint64_t word) {
#if TQ_VECTOR_FLOATS == 16
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (kStride == 4) {  // 64 bits: lanes 8 to 15 take the word's upper half
    const __m512i halves = _mm512_permutexvar_epi32(
        _mm512_srli_epi32(lanes, 3),
        _mm512_castsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(word))));
    const __m512i shifts = _mm512_slli_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(7)), 2);
    return reinterpret_cast<Ints>(_mm512_srlv_epi32(halves, shifts));
  } else {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(word));
    return reinterpret_cast<Ints>(
        _mm512_srlv_epi32(all, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(kStride))));
  }
#else
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return reinterpret_cast<Ints>(
      _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)),
                        _mm256_mullo_epi32(lanes, _mm256_set1_epi32(kStride))));
#endif
}

// `count` levels from words of kWidth codes that lie kStride bits apart; word_at(i, n) returns the
// n bytes of the run from byte i on.
template <int kStride, int kLevels, class WordAt>
inline void decode_run(const float* levels, int64_t count, float* out, const WordAt& word_at) {
  constexpr int64_t kWordBytes = kWidth * kStride / 8;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(out + i, lookup<kLevels>(levels, spread<kStride>(word_at(i * kStride / 8, kWordBytes))));
  }
  if (const int64_t rest = count - i; rest > 0) {
    const uint64_t word = word_at(i * kStride / 8, (rest * kStride + 7) / 8);
    store_some(out + i, lookup<kLevels>(levels, spread<kStride>(word)), rest);
  }
}

template <int kBytes>
inline uint64_t load_word(const uint8_t* from, int64_t bytes) {
  return bytes == kBytes ? quant::detail::load_bytes<kBytes>(from)
                         : quant::detail::load_bytes(from, bytes);
}

template <int kBits>
inline void decode_stream(const float* levels, int64_t dim, const uint8_t* row, float* out) {
  // AVX2 looks up 8 entries at once: the levels repeat with the period of the codebook.
  constexpr int kLevels = kBits == 4 ? 16 : 8;
  decode_run<kBits, kLevels>(levels, dim, out, [row](int64_t i, int64_t bytes) {
    return load_word<kWidth * kBits / 8>(row + i, bytes);
  });
}

// The spare-bit planes of quant/packing.hpp: four runs of nibbles.
inline void decode_planes(const float* levels, int64_t dim, const uint8_t* row, float* out) {
  constexpr int kWordBytes = kWidth / 2;
  const int64_t segment_bytes = dim / 8;
  const int64_t quarter = dim / 4;
  for (int j = 0; j < 3; ++j) {
    const uint8_t* const segment = row + j * segment_bytes;
    decode_run<4, 8>(levels, quarter, out + j * quarter, [segment](int64_t i, int64_t bytes) {
      return load_word<kWordBytes>(segment + i, bytes);
    });
  }
  decode_run<4, 8>(levels, quarter, out + 3 * quarter, [=](int64_t i, int64_t bytes) {
    return quant::spare_bits_word(load_word<kWordBytes>(row + i, bytes),
                                  load_word<kWordBytes>(row + segment_bytes + i, bytes),
                                  load_word<kWordBytes>(row + 2 * segment_bytes + i, bytes));
  });
}

// Row t of packed rows as vectors of levels, where whole_vectors() holds.
template <int kBits>
struct PackedSource {
  static constexpr int kStride = kBits + (kBits == 3 ? 1 : 0);
  static constexpr int kWordBytes = kWidth * kStride / 8;

  const uint8_t* codes;
  int64_t row_bytes;
  const float* levels;
  int64_t segment_bytes;  // 3 bits

  Floats at(int64_t t, int64_t i) const {
    const uint8_t* const row = codes + t * row_bytes;
    uint64_t word;
    if (kBits != 3 || i < 6 * segment_bytes) {
      word = quant::detail::load_bytes<kWordBytes>(row + i * kStride / 8);
    } else {
      const uint8_t* const from = row + (i / 2 - 3 * segment_bytes);
      word =
          quant::spare_bits_word(quant::detail::load_bytes<kWordBytes>(from),
                                 quant::detail::load_bytes<kWordBytes>(from + segment_bytes),
                                 quant::detail::load_bytes<kWordBytes>(from + 2 * segment_bytes));
    }
    return lookup < kBits == 4 ? 16 : 8 > (levels, spread<kStride>(word));
  }
};

// 5 to 8 bits: eight codes at a time to bytes, bytes to lanes.
template <int kBits>
inline void decode_codes(const float* levels, int64_t dim, const uint8_t* row, float* out) {
  const auto eight = [row](int64_t i) {
    const uint64_t codes = quant::detail::load_bytes<kBits>(row + i / 8 * kBits);
    return static_cast<long long>(kBits == 8 ? codes : quant::detail::split_eight(codes, kBits));
  };
#if TQ_VECTOR_FLOATS == 16
  const auto look_up = [levels](__m128i codes) {
    return lookup<(1 << kBits)>(levels, reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(codes)));
  };
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) store(out + i, look_up(_mm_set_epi64x(eight(i + 8), eight(i))));
  if (i < dim) store_some(out + i, look_up(_mm_cvtsi64_si128(eight(i))), 8);
#else
  for (int64_t i = 0; i < dim; i += 8) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight(i)));
    store(out + i, lookup<(1 << kBits)>(levels, reinterpret_cast<Ints>(codes)));
  }
#endif
}

using DecodeOneRow = void (*)(const float*, int64_t, const uint8_t*, float*);

template <DecodeOneRow kDecode>
inline void decode_each(const DecodeRowsParams& p) {
  for (int r = 0; r < p.num_rows; ++r) {
    kDecode(p.levels, p.dim, p.rows + r * p.row_bytes, p.out + r * p.stride);
  }
}

void decode_rows(const DecodeRowsParams& p) {
  switch (p.bits) {
    case 1:
      return decode_each<decode_stream<1> >(p);
    case 2:
      return decode_each<decode_stream<2> >(p);
    case 3:
      return decode_each<decode_planes>(p);
    case 4:
      return decode_each<decode_stream<4> >(p);
    case 5:
      return decode_each<decode_codes<5> >(p);
    case 6:
      return decode_each<decode_codes<6> >(p);
    case 7:
      return decode_each<decode_codes<7> >(p);
    default:
      return decode_each<decode_codes<8> >(p);
  }
}

}  // namespace
}  // namespace turboquant::attention::detail
#endif
