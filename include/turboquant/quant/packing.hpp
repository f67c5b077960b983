// How the codes of one row become bytes, for every width from 1 to 8 bits.
//
// 1, 2, 4, 5, 6, 7, 8 bits: a little-endian bit stream; code i occupies bits [i*b, (i+1)*b) of the
// row, so at 4 bits the even dimension is the low nibble. Bits after the last code are zero.
//
// 3 bits, "spare-bit planes": with S = ceil(dim / 8) the row is three segments of S bytes, and the
// dimensions (padded with code 0 to 8 S) fall into four quarters of 2 S.
//   - Byte i of segment j holds dimensions 2(jS+i) and 2(jS+i)+1 in the low three bits of its low
//     and high nibble: quarters 0 to 2.
//   - The last quarter sits in the spare bits 3 and 7: bit j of dimension 6S+2i is bit 3, and bit j
//     of dimension 6S+2i+1 is bit 7, of segment j, byte i.
// A decoder forms the last quarter's byte as ((s0>>3)&0x11)|((s1>>2)&0x22)|((s2>>1)&0x44) and looks
// every byte up in one 256-entry table that ignores bits 3 and 7: 3 bits cost as much as 4.
//
// Under a vector codebook (math/vector_codebook.hpp) the same bytes hold an index of 8 bits for
// every pair of dimensions (2p, 2p+1); dim is a multiple of 8.
//   - 4 bits: byte p of the row.
//   - 3 bits: the bytes of the spare-bit planes, bits 3 and 7 included; the last quarter's pairs
//     have 0 there.
//   - 2 bits: the row is little-endian words of eight pairs (the last one may be of four). The
//     index of pair k of a word is bits 4k ... 4k+7 of the word; those behind its end are 0.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

#include "turboquant/error.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::quant {

inline constexpr int kMinBits = 1;
inline constexpr int kMaxBits = 8;

inline void check_bits(int bits, const char* argument = "bits") {
  if (bits < kMinBits || bits > kMaxBits) {
    turboquant::detail::throw_invalid(argument, "a width from 1 to 8", std::to_string(bits));
  }
}

// Bytes of one packed row of `dim` codes.
TQ_HOST_DEVICE constexpr int64_t packed_row_bytes(int64_t dim, int bits) {
  return bits == 3 ? 3 * ((dim + 7) / 8) : (dim * bits + 7) / 8;
}

namespace detail {

static_assert(std::endian::native == std::endian::little, "packing assumes little-endian words");

// Eight codes, one a byte, to the low 8 * bits bits, and back.
constexpr uint64_t join_eight(uint64_t x, int bits) {
  x = (x & 0x00FF00FF00FF00FFu) | ((x & 0xFF00FF00FF00FF00u) >> (8 - bits));
  x = (x & 0x0000FFFF0000FFFFu) | ((x & 0xFFFF0000FFFF0000u) >> (16 - 2 * bits));
  return (x & 0x00000000FFFFFFFFu) | ((x & 0xFFFFFFFF00000000u) >> (32 - 4 * bits));
}

TQ_ALWAYS_INLINE constexpr uint64_t split_eight(uint64_t x, int bits) {
  const uint64_t byte = (uint64_t{1} << bits) - 1;
  const uint64_t pair = (uint64_t{1} << (2 * bits)) - 1;
  const uint64_t quad = (uint64_t{1} << (4 * bits)) - 1;
  x = (x & quad) | ((x & (quad << (4 * bits))) << (32 - 4 * bits));
  x = (x & (pair * 0x0000000100000001u)) |
      ((x & ((pair << (2 * bits)) * 0x0000000100000001u)) << (16 - 2 * bits));
  return (x & (byte * 0x0001000100010001u)) |
         ((x & ((byte << bits) * 0x0001000100010001u)) << (8 - bits));
}

// At most eight bytes as a word and back: rows end anywhere.
TQ_ALWAYS_INLINE uint64_t load_bytes(const uint8_t* from, int64_t count) {
  uint64_t word = 0;
  std::memcpy(&word, from, count);
  return word;
}

// The same for a constant count, from whole loads: bytes copied into a word on the stack would
// have to wait for its stores.
template <class Piece>
TQ_ALWAYS_INLINE uint64_t load_piece(const uint8_t* from, int at) {
  Piece piece;
  std::memcpy(&piece, from + at, sizeof(piece));
  return uint64_t{piece} << (8 * at);
}

template <int kCount>
TQ_ALWAYS_INLINE uint64_t load_bytes(const uint8_t* from) {
  uint64_t word = 0;
  if constexpr (kCount == 8) word |= load_piece<uint64_t>(from, 0);
  if constexpr ((kCount & 4) != 0) word |= load_piece<uint32_t>(from, 0);
  if constexpr ((kCount & 2) != 0) word |= load_piece<uint16_t>(from, kCount & 4);
  if constexpr ((kCount & 1) != 0) word |= load_piece<uint8_t>(from, kCount & 6);
  return word;
}

inline void store_bytes(uint8_t* to, uint64_t word, int64_t count) {
  std::memcpy(to, &word, count);
}

// Groups of eight codes start at whole bytes for every width. The width is a template argument so
// that the copies have constant sizes.
template <int kBits>
void pack_stream(const uint8_t* codes, int64_t dim, uint8_t* packed) {
  const int64_t whole = dim / 8;
  for (int64_t g = 0; g < whole; ++g) {
    store_bytes(packed + g * kBits, join_eight(load_bytes<8>(codes + 8 * g), kBits), kBits);
  }
  if (const int64_t rest = dim - 8 * whole; rest > 0) {
    store_bytes(packed + whole * kBits, join_eight(load_bytes(codes + 8 * whole, rest), kBits),
                (rest * kBits + 7) / 8);
  }
}

template <int kBits>
void unpack_stream(const uint8_t* packed, int64_t dim, uint8_t* codes) {
  const int64_t whole = dim / 8;
  for (int64_t g = 0; g < whole; ++g) {
    store_bytes(codes + 8 * g, split_eight(load_bytes<kBits>(packed + g * kBits), kBits), 8);
  }
  if (const int64_t rest = dim - 8 * whole; rest > 0) {
    const uint64_t word = load_bytes(packed + whole * kBits, (rest * kBits + 7) / 8);
    store_bytes(codes + 8 * whole, split_eight(word, kBits), rest);
  }
}

// Two codes of a row, padded with code 0 behind its end, as one byte of nibbles.
inline uint8_t nibble_pair(const uint8_t* codes, int64_t dim, int64_t first) {
  const unsigned low = first < dim ? codes[first] : 0u;
  const unsigned high = first + 1 < dim ? codes[first + 1] : 0u;
  return static_cast<uint8_t>(low | high << 4);
}

inline void pack_planes(const uint8_t* codes, int64_t dim, uint8_t* packed) {
  const int64_t segment_bytes = (dim + 7) / 8;
  for (int64_t i = 0; i < segment_bytes; ++i) {
    const unsigned last = nibble_pair(codes, dim, 6 * segment_bytes + 2 * i);
    for (int j = 0; j < 3; ++j) {
      const unsigned own = nibble_pair(codes, dim, 2 * (j * segment_bytes + i));
      packed[j * segment_bytes + i] = static_cast<uint8_t>(own | ((last >> j) & 0x11u) << 3);
    }
  }
}

}  // namespace detail

// The last quarter's bytes that ride in the spare bits of three segments, eight bytes (or one) of
// each at a time.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr uint64_t spare_bits_word(uint64_t s0, uint64_t s1,
                                                                   uint64_t s2) {
  return ((s0 >> 3) & 0x1111111111111111u) | ((s1 >> 2) & 0x2222222222222222u) |
         ((s2 >> 1) & 0x4444444444444444u);
}
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr uint8_t spare_bits_byte(uint8_t s0, uint8_t s1,
                                                                  uint8_t s2) {
  return static_cast<uint8_t>(spare_bits_word(s0, s1, s2));
}

namespace detail {

inline void unpack_planes(const uint8_t* packed, int64_t dim, uint8_t* codes) {
  const int64_t segment_bytes = (dim + 7) / 8;
  auto put = [&](int64_t first, unsigned pair) {
    if (first < dim) codes[first] = pair & 7;
    if (first + 1 < dim) codes[first + 1] = (pair >> 4) & 7;
  };
  for (int64_t i = 0; i < segment_bytes; ++i) {
    for (int j = 0; j < 3; ++j) {
      put(2 * (j * segment_bytes + i), packed[j * segment_bytes + i]);
    }
    put(6 * segment_bytes + 2 * i,
        spare_bits_byte(packed[i], packed[segment_bytes + i], packed[2 * segment_bytes + i]));
  }
}

}  // namespace detail

// Packs `dim` codes, one a byte and each below 2^bits, into packed_row_bytes(dim, bits) bytes.
inline void pack_row(const uint8_t* codes, int64_t dim, int bits, uint8_t* packed) {
  switch (bits) {
#define TQ_CASE(b) \
  case b:          \
    return detail::pack_stream<b>(codes, dim, packed)
    TQ_CASE(1);
    TQ_CASE(2);
    TQ_CASE(4);
    TQ_CASE(5);
    TQ_CASE(6);
    TQ_CASE(7);
    TQ_CASE(8);
#undef TQ_CASE
    default:
      return detail::pack_planes(codes, dim, packed);
  }
}

// The inverse of pack_row: writes `dim` codes.
inline void unpack_row(const uint8_t* packed, int64_t dim, int bits, uint8_t* codes) {
  switch (bits) {
#define TQ_CASE(b) \
  case b:          \
    return detail::unpack_stream<b>(packed, dim, codes)
    TQ_CASE(1);
    TQ_CASE(2);
    TQ_CASE(4);
    TQ_CASE(5);
    TQ_CASE(6);
    TQ_CASE(7);
    TQ_CASE(8);
#undef TQ_CASE
    default:
      return detail::unpack_planes(packed, dim, codes);
  }
}

// ---- vector codebooks

// Pairs whose indices share a word of a 2-bit row.
inline constexpr int kWordPairs = 8;

// The index of pair p of a packed row of `dim` dimensions.
inline uint8_t pair_index(const uint8_t* packed, int64_t dim, int bits, int64_t pair) {
  if (bits == 4) return packed[pair];
  if (bits == 3) {
    const int64_t segment_bytes = dim / 8;
    if (pair < 3 * segment_bytes) return packed[pair];
    const uint8_t* const spare = packed + (pair - 3 * segment_bytes);
    return spare_bits_byte(spare[0], spare[segment_bytes], spare[2 * segment_bytes]);
  }
  const unsigned low = packed[pair / 2];
  if (pair % 2 == 0) return static_cast<uint8_t>(low);
  const bool last = pair % kWordPairs == kWordPairs - 1 || pair == dim / 2 - 1;
  return static_cast<uint8_t>(low >> 4 | (last ? 0u : (packed[pair / 2 + 1] & 0xFu) << 4));
}

}  // namespace turboquant::quant
