// Vectors of a kernel unit's instruction set, TQ_VECTOR_FLOATS floats wide, and what they share.
// A unit with 4 floats is portable unless it defines TQ_NEON.
// Internal linkage throughout: see the units' note on the one definition rule.
#pragma once

#include <cstdint>
#include <cstring>

#if TQ_VECTOR_FLOATS > 4
#include <immintrin.h>
#elif defined(TQ_NEON)
#include <arm_neon.h>
#endif

namespace turboquant {
namespace {

constexpr int kWidth = TQ_VECTOR_FLOATS;
#if defined(TQ_NEON)
constexpr bool kNeon = true;
#else
constexpr bool kNeon = false;
#endif
typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef float FourFloats __attribute__((vector_size(16)));

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(Vector));
  return v;
}

template <class Vector, class Element>
inline void store(Element* to, Vector v) {
  std::memcpy(to, &v, sizeof(Vector));
}

// f<0>() to f<kCount - 1>().
template <int kCount, class F>
inline void repeat(const F& f) {
  if constexpr (kCount > 0) {
    repeat<kCount - 1>(f);
    f.template operator()<kCount - 1>();
  }
}

// table[index] for a table of kSize floats, index < kSize in every lane. Tables below one vector
// are read as a whole vector. On x86, up to 32 entries, higher bits of an index are ignored where
// the table fills whole vectors.
template <int kSize>
inline Floats lookup(const float* table, Ints index) {
  if constexpr (kSize == 1) {
    return Floats{} + table[0];
  } else {
#if TQ_VECTOR_FLOATS == 16
    const __m512i lanes = reinterpret_cast<__m512i>(index);
    if constexpr (kSize <= 16) {
      return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(table));
    } else if constexpr (kSize == 32) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(table), lanes, _mm512_loadu_ps(table + 16));
    } else if constexpr (kSize <= 128) {
      const __mmask16 upper = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(kSize / 2));
      return _mm512_mask_blend_ps(upper, lookup<kSize / 2>(table, index),
                                  lookup<kSize / 2>(table + kSize / 2, index));
    } else {
      return _mm512_i32gather_ps(lanes, table, 4);
    }
#elif TQ_VECTOR_FLOATS == 8
    const __m256i lanes = reinterpret_cast<__m256i>(index);
    if constexpr (kSize <= 8) {
      return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), lanes);
    } else if constexpr (kSize <= 32) {
      const __m256 low = lookup<kSize / 2>(table, index);
      const __m256 high = lookup<kSize / 2>(table + kSize / 2, index);
      // The sign bit selects: bring the index's top bit there.
      constexpr int kShift = kSize == 16 ? 28 : 27;
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, kShift)));
    } else {
      return _mm256_i32gather_ps(table, lanes, 4);
    }
#else
#if defined(TQ_NEON)
    if constexpr (kSize <= 16) {
      // The bytes of table[n] are bytes 4 n to 4 n + 3 of the registers looked up in.
      const auto bytes = reinterpret_cast<const uint8_t*>(table);
      const uint8x16_t at = vreinterpretq_u8_u32(
          vmlaq_n_u32(vdupq_n_u32(0x03020100u), reinterpret_cast<uint32x4_t>(index), 0x04040404u));
      uint8x16_t levels;
      if constexpr (kSize <= 4) {
        levels = vqtbl1q_u8(vld1q_u8(bytes), at);
      } else if constexpr (kSize <= 8) {
        levels = vqtbl2q_u8(vld1q_u8_x2(bytes), at);
      } else {
        levels = vqtbl4q_u8(vld1q_u8_x4(bytes), at);
      }
      return reinterpret_cast<Floats>(levels);
    }
#endif
    Floats v;
    for (int i = 0; i < kWidth; ++i) v[i] = table[index[i]];
    return v;
#endif
  }
}

}  // namespace
}  // namespace turboquant
