// Which codes a lane of a warp decodes for which element of an mma operand, and how it gets at them
// in a page that lies in shared memory. Host and device.
//
// First product, S [16 tokens, 8 queries] = K q': lane 4 g + t holds of mma rows g and g + 8 the
// coordinate *pairs* key_pair(u, t), u = 0 ... D / 8 - 1; k-step s takes u = 2 s and 2 s + 1. The
// order of coordinates inside a dot product is free, so it is chosen for the loads: a lane's share
// of a row is whole 16-byte (8-, 4-, ...) pieces.
//
// Second product, O^T [D, 8 queries] = V^T P: lane 4 g + t holds of columns (tokens) 2t, 2t + 1,
// 2t + 8, 2t + 9 the pairs value_pair(v, g), v = 0 ... D / 16 - 1; m-tile v has the pair's even
// coordinate in row g and its odd one in row g + 8.
//
// Both number a tile's tokens alike: mma row (column) r is the token of slot tile_slot(r). Natural
// order but for the parity of the upper half: lanes t = 0 ... 3 then read values of slots 0, 2, 5,
// 7 (1, 3, 4, 6), which are odd and even, and different modulo 4: different banks for rows of 32,
// 48 and (with the swap of words below) 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/cache/layout.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::cuda::detail {

inline constexpr int kTileTokens = 16;
inline constexpr int kTilesPerPage = cache::kBlockTokens / kTileTokens;

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int tile_slot(int r) { return r ^ (r >> 2 & 1); }

template <class Word>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE Word load_as(const std::byte* from) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Word*>(from);
#else
  Word word;
  __builtin_memcpy(&word, from, sizeof word);
  return word;
#endif
}

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

// A lane's share of kBytes bytes dealt out to kLanes lanes in pieces: as large as the share, kAlign
// (of the rows' starts) and kMaxPiece allow, all first pieces first.
template <int kBytes, int kLanes, int kAlign, int kMaxPiece>
struct Share {
  static constexpr int kShare = kBytes / kLanes;  // the rest is the caller's
  static constexpr int kWords = (kShare + 3) / 4;

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int piece_at(int i) {
    int piece = kMaxPiece;
    while (piece > kAlign || piece > kShare - i) piece /= 2;
    return piece;
  }
  // Where byte i of the share lies. As many loops as there are sizes, so that they are unrolled: a
  // loop over the pieces is not, and runs on the device.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int byte(int i, int lane) {
    int start = 0, at = 0;
    TQ_UNROLL
    for (int piece = kAlign < kMaxPiece ? kAlign : kMaxPiece; piece > 0; piece /= 2) {
      const int end = start + (kShare - start) / piece * piece;
      if (i >= start && i < end) {
        at = kLanes * ((i - start) / piece * piece + start) + lane * piece + (i - start) % piece;
      }
      start = end;
    }
    return at;
  }

  // The share, byte i in byte i % 4 of words[i / 4]; or, kWithNext, in byte byte_of(i) of
  // words[word_of(i)], with the row's bits that follow a piece of less than four bytes behind it
  // (zeros behind the row's word).
  template <bool kWithNext = false, int kStart = 0>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static void load(const std::byte* from, int lane,
                                                   uint32_t* words) {
    if constexpr (kStart < kShare) {
      constexpr int kPiece = piece_at(kStart);
      const std::byte* const at = from + kLanes * kStart + lane * kPiece;
      if constexpr (kWithNext && kPiece < 4) {
        static_assert(kBytes % 4 == 0);
        const int offset = kLanes * kStart + lane * kPiece;
        words[word_of(kStart)] = load_as<uint32_t>(from + offset / 4 * 4) >> (8 * (offset % 4));
      } else if constexpr (kPiece == 16) {
        const Words4 loaded = load_as<Words4>(at);
        TQ_UNROLL
        for (int i = 0; i < 4; ++i) words[kStart / 4 + i] = loaded.w[i];
      } else if constexpr (kPiece == 8) {
        const Words2 loaded = load_as<Words2>(at);
        TQ_UNROLL
        for (int i = 0; i < 2; ++i) words[kStart / 4 + i] = loaded.w[i];
      } else if constexpr (kPiece == 4) {
        words[kStart / 4] = load_as<uint32_t>(at);
      } else {
        uint32_t bits;
        if constexpr (kPiece == 2) {
          bits = load_as<uint16_t>(at);
        } else {
          bits = load_as<uint8_t>(at);
        }
        if constexpr (kStart % 4 == 0) {
          words[kStart / 4] = bits;
        } else {
          words[kStart / 4] |= bits << (8 * (kStart % 4));
        }
      }
      load<kWithNext, kStart + kPiece>(from, lane, words);
    }
  }

  // Pieces of less than four bytes are words of their own under kWithNext.
  static constexpr int kWordsWithNext = kShare / 4 + (kShare % 4 + 1) / 2;
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int word_of(int i) {
    return i / 4 + (i < kShare / 4 * 4 ? 0 : i % 4 / 2);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int byte_of(int i) {
    return i < kShare / 4 * 4 ? i % 4 : i % 2;
  }
};

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int alignment_of(int bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int power_of_two_above(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// A lane's share of a row of 3-bit codes as bytes of two nibbles, as if the row were 4 bits wide:
// from every segment, and from the bytes that the spare bits form, an equal share; what does not
// divide goes to whole lanes, a fourth of the lanes to each segment.
template <int kDim, int kLanes, int kMaxPiece>
struct PlaneShare {
  static constexpr int kSegment = kDim / 8;
  using Part = Share<kSegment, kLanes, alignment_of(kSegment), kMaxPiece>;
  static constexpr int kPart = Part::kShare;                // bytes of a segment for every lane
  static constexpr int kPitch = power_of_two_above(kPart);  // their room in the words
  static constexpr int kRest = 4 * (kSegment % kLanes) / kLanes;
  static constexpr int kWords = (4 * kPitch + kRest + 3) / 4;

  // Which byte of the words is byte v of the share, and which pair of coordinates it is.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int place(int v) {
    return v < 4 * kPart ? v / kPart * kPitch + v % kPart : 4 * kPitch + v - 4 * kPart;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int pair(int v, int lane) {
    if (v < 4 * kPart) return v / kPart * kSegment + Part::byte(v % kPart, lane);
    return rest_segment(lane) * kSegment + rest_byte(lane) + v - 4 * kPart;
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static void load(const std::byte* row, int lane,
                                                   uint32_t* words) {
    uint32_t parts[4][(kPitch + 3) / 4];
    TQ_UNROLL
    for (int j = 0; j < 3; ++j) Part::load(row + j * kSegment, lane, parts[j]);
    TQ_UNROLL
    for (int i = 0; i < (kPitch + 3) / 4; ++i) {
      parts[3][i] = spare(parts[0][i], parts[1][i], parts[2][i]);
    }
    if constexpr (kPitch >= 4) {
      TQ_UNROLL
      for (int j = 0; j < 4; ++j) {
        TQ_UNROLL
        for (int i = 0; i < kPitch / 4; ++i) words[j * kPitch / 4 + i] = parts[j][i];
      }
    } else if constexpr (kPitch == 2) {
      words[0] = parts[0][0] | parts[1][0] << 16;
      words[1] = parts[2][0] | parts[3][0] << 16;
    } else {
      words[0] = parts[0][0] | parts[1][0] << 8 | parts[2][0] << 16 | parts[3][0] << 24;
    }
    if constexpr (kRest > 0) {
      uint32_t rest[3];
      TQ_UNROLL
      for (int j = 0; j < 3; ++j) {
        const std::byte* const at = row + j * kSegment + rest_byte(lane);
        if constexpr (kRest == 2) {
          rest[j] = load_as<uint16_t>(at);
        } else {
          rest[j] = load_as<uint8_t>(at);
        }
      }
      static_assert(kRest == 1 || kRest == 2);
      const int segment = rest_segment(lane);
      words[kPitch] = segment == 0   ? rest[0]
                      : segment == 1 ? rest[1]
                      : segment == 2 ? rest[2]
                                     : spare(rest[0], rest[1], rest[2]);
    }
  }

 private:
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int rest_segment(int lane) {
    return lane * 4 / kLanes;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int rest_byte(int lane) {
    return kLanes * kPart + lane % (kLanes / 4) * kRest;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static uint32_t spare(uint32_t s0, uint32_t s1, uint32_t s2) {
    return (s0 >> 3 & 0x11111111u) | (s1 >> 2 & 0x22222222u) | (s2 >> 1 & 0x44444444u);
  }
};

// Bits of `ones` where the mask has ones, of `zeros` elsewhere. In one instruction: the compiler
// takes two where the mask is a constant.
TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t merge_bits(uint32_t mask, uint32_t ones, uint32_t zeros) {
#if defined(__CUDA_ARCH__)
  uint32_t merged;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(merged) : "r"(mask), "r"(ones), "r"(zeros));
  return merged;
#else
  return (ones & mask) | (zeros & ~mask);
#endif
}

// What a lane's index in the look-up table is: kByte: a byte stands for a pair; kNibble: the byte
// from a half of a byte on does (of a scalar codebook only its lower half has a say); kCode: a byte
// or a bit field stands for one coordinate.
enum class IndexKind { kByte, kNibble, kCode };

TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr IndexKind index_kind(int bits) {
  return bits == 2 ? IndexKind::kNibble : bits <= 4 ? IndexKind::kByte : IndexKind::kCode;
}

// An index of the table: a byte of a word.
struct ByteIndex {
  uint32_t word;
  int byte;
};

// Words of digits of kWidth bits, two by two: field i, twice as wide, of even[w] is digit 2 i of
// word w of both, field i of odd[w] digit 2 i + 1, the first one's below.
template <int kWords, int kWidth>
struct DigitPairs {
  static_assert(kWidth == 2 || kWidth == 4);
  uint32_t even[kWords];
  uint32_t odd[kWords];

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take(const uint32_t (&first)[kWords],
                                            const uint32_t (&second)[kWords]) {
    constexpr uint32_t kLow = kWidth == 2 ? 0x33333333u : 0x0F0F0F0Fu;
    TQ_UNROLL
    for (int i = 0; i < kWords; ++i) {
      even[i] = merge_bits(kLow, first[i], second[i] << kWidth);
      odd[i] = merge_bits(kLow, first[i] >> kWidth, second[i]);
    }
  }
};

// ---- keys

template <int kDim, int kBits>
struct KeyRow {
  static constexpr int kRowBytes = static_cast<int>(quant::packed_row_bytes(kDim, kBits));
  static constexpr int kPairs = kDim / 8;  // of a lane
  static constexpr bool kStream = kBits == 5 || kBits == 6;
  static constexpr int kStreamBits = kDim / 4 * kBits;  // of a lane
  // Whether every lane's part of every row starts on a whole word.
  static constexpr bool kAligned = kStreamBits % 32 == 0 && kRowBytes % 4 == 0;
  using Bytes = Share<kRowBytes, 4, alignment_of(kRowBytes), 16>;
  using Planes = PlaneShare<kDim, 4, 16>;
  static constexpr int kWords = kStream      ? (kStreamBits + 31) / 32
                                : kBits == 3 ? Planes::kWords
                                : kBits == 2 ? Bytes::kWordsWithNext
                                             : Bytes::kWords;

  uint32_t words[kWords];

  // Lane t's share of the row of `slot`; codes start on 16 bytes. Reads at most 4 bytes beyond the
  // row (they are the page's own: scales follow).
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load(const std::byte* codes, int slot, int t) {
    if constexpr (kStream) {
      const int first_bit = slot * kRowBytes * 8 + t * kStreamBits;
      const std::byte* const from = codes + first_bit / 32 * 4;
      if constexpr (kAligned) {
        TQ_UNROLL
        for (int i = 0; i < kWords; ++i) words[i] = load_as<uint32_t>(from + 4 * i);
      } else {
        const int shift = first_bit % 32;
        uint32_t low = load_as<uint32_t>(from);
        TQ_UNROLL
        for (int i = 0; i < kWords; ++i) {
          const uint32_t high = load_as<uint32_t>(from + 4 * i + 4);
          words[i] = static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
          low = high;
        }
      }
    } else if constexpr (kBits == 3) {
      Planes::load(codes + slot * kRowBytes, t, words);
    } else {
      Bytes::template load<kBits == 2>(codes + slot * kRowBytes, t, words);
    }
  }

  // kNibble: pair u's half byte: of byte `byte` of words[word] the lower one where u is even.
  struct Place {
    int word, byte;
  };
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr Place half_byte_of(int u) {
    return {Bytes::word_of(u / 2), Bytes::byte_of(u / 2)};
  }
  // kByte, kNibble: the index for pair u.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE ByteIndex index(int u) const {
    if constexpr (kBits == 2) {
      const Place place = half_byte_of(u);
      return {u % 2 == 0 ? words[place.word] : words[place.word] >> 4, place.byte};
    } else {
      const int place = kBits == 3 ? Planes::place(u) : u;
      return {words[place / 4], place % 4};
    }
  }
  // kCode: the code of coordinate i of the lane's pairs, i = 2 u or 2 u + 1.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t code(int i) const {
    const int word = i * kBits / 32, shift = i * kBits % 32;
    uint32_t bits = words[word] >> shift;
    if (shift + kBits > 32) bits |= words[word + 1] << (32 - shift);
    return bits & ((1u << kBits) - 1);
  }
};

// The pair of coordinates (2 p, 2 p + 1) that is pair u of lane t.
template <int kDim, int kBits>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int key_pair_of(int u, int t) {
  using Row = KeyRow<kDim, kBits>;
  if constexpr (Row::kStream) return t * Row::kPairs + u;
  if constexpr (kBits == 8) return Row::Bytes::byte(2 * u, t) / 2;
  if constexpr (kBits == 4) return Row::Bytes::byte(u, t);
  if constexpr (kBits == 3) return Row::Planes::pair(u, t);
  return 2 * Row::Bytes::byte(u / 2, t) + u % 2;
}
// The same for a width that is known at run time.
template <int kDim>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int key_pair(int k_bits, int u, int t) {
  switch (k_bits) {
    case 2:
      return key_pair_of<kDim, 2>(u, t);
    case 3:
      return key_pair_of<kDim, 3>(u, t);
    case 4:
      return key_pair_of<kDim, 4>(u, t);
    case 8:
      return key_pair_of<kDim, 8>(u, t);
    default:
      return key_pair_of<kDim, 6>(u, t);  // 5 too
  }
}

// ---- values

// kVector: of a vector codebook, whose 2-bit indices reach into the half byte behind them.
template <int kDim, int kBits, bool kVector = false>
struct ValueRow {
  static_assert(kBits >= 2 && kBits <= 4);
  static constexpr bool kOverlaps = kVector && kBits == 2;
  static constexpr int kRowBytes = static_cast<int>(quant::packed_row_bytes(kDim, kBits));
  static constexpr int kPairs = kDim / 16;  // of a lane
  using Bytes = Share<kRowBytes, 8, alignment_of(kRowBytes), 4>;
  using Planes = PlaneShare<kDim, 8, 4>;
  // At 2 bits and D = 80 a lane's share ends in half a byte: nibble g of the last four bytes.
  static constexpr bool kHalfByte = kBits == 2 && kRowBytes % 8 == 4;
  static constexpr int kWords = kBits == 3  ? Planes::kWords
                                : kOverlaps ? Bytes::kWordsWithNext + (kHalfByte ? 1 : 0)
                                            : (kPairs * (kBits == 2 ? 1 : 2) + 7) / 8;
  // Rows of 64 and 128 bytes start in two (one) of the 32-byte groups of banks: lanes with
  // different t take their words in different order, and put them right in registers.
  static constexpr int kSwaps =
      kBits != 3 && kRowBytes % 64 == 0 && (kWords == 2 || kWords == 4) ? kWords : 1;

  uint32_t words[kWords];

  // Lane 4 g + t's share of the row of `slot`.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load(const std::byte* codes, int slot, int g, int t) {
    const std::byte* const row = codes + slot * kRowBytes;
    if constexpr (kBits == 3) {
      Planes::load(row, g, words);
    } else if constexpr (kSwaps > 1) {
      const int swap = t % kSwaps;
      TQ_UNROLL
      for (int k = 0; k < kWords; ++k) words[k] = load_as<uint32_t>(row + 32 * (k ^ swap) + 4 * g);
      exchange<1>(swap);
      if constexpr (kSwaps == 4) exchange<2>(swap);
    } else {
      Bytes::template load<kOverlaps>(row, g, words);
      if constexpr (kHalfByte && kOverlaps) {
        words[kWords - 1] = load_as<uint32_t>(row + 8 * Bytes::kShare) >> (4 * g);
      } else if constexpr (kHalfByte) {
        const uint32_t last = load_as<uint8_t>(row + 8 * Bytes::kShare + g / 2);
        words[0] |= (g % 2 == 0 ? last & 0xFu : last >> 4) << (8 * Bytes::kShare);
      }
    }
  }

 private:
  template <int kDistance>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void exchange(int swap) {
    TQ_UNROLL
    for (int k = 0; k < kWords; ++k) {
      if ((k & kDistance) != 0) continue;
      const uint32_t low = words[k], high = words[k + kDistance];
      words[k] = (swap & kDistance) != 0 ? high : low;
      words[k + kDistance] = (swap & kDistance) != 0 ? low : high;
    }
  }
};

// Digits of values: codes of 3 bits lie in half bytes too.
template <int kDim, int kBits>
using ValueDigits = DigitPairs<ValueRow<kDim, kBits>::kWords, kBits == 2 ? 2 : 4>;

// Table indices for two tokens at once, scalar codebooks: a byte (nibble) of `even` holds the codes
// of a pair's even coordinate in both tokens, of `odd` those of its odd coordinate.
template <int kDim, int kBits>
struct ValuePairs : ValueDigits<kDim, kBits> {
  using Row = ValueRow<kDim, kBits>;

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take(const Row& first, const Row& second) {
    ValueDigits<kDim, kBits>::take(first.words, second.words);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE ByteIndex index(int v, bool is_odd) const {
    if constexpr (kBits == 2) {
      const uint32_t word = is_odd ? this->odd[v / 8] : this->even[v / 8];
      return {v % 2 == 0 ? word : word >> 4, v % 8 / 2};
    } else {
      const int place = kBits == 3 ? Row::Planes::place(v) : v;
      return {is_odd ? this->odd[place / 4] : this->even[place / 4], place % 4};
    }
  }
};

// The same for vector codebooks: an index is a pair of one token's.
template <int kDim, int kBits>
struct VectorValuePairs {
  using Row = ValueRow<kDim, kBits, true>;
  Row rows[2];

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take(const Row& first, const Row& second) {
    rows[0] = first;
    rows[1] = second;
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE ByteIndex index(int v, int token) const {
    const uint32_t* const words = rows[token].words;
    if constexpr (kBits == 2) {
      if (Row::kHalfByte && v == Row::kPairs - 1) return {words[Row::kWords - 1], 0};
      const uint32_t word = words[Row::Bytes::word_of(v / 2)];
      return {v % 2 == 0 ? word : word >> 4, Row::Bytes::byte_of(v / 2)};
    } else {
      const int place = kBits == 3 ? Row::Planes::place(v) : v;
      return {words[place / 4], place % 4};
    }
  }
};

// The pair of coordinates that is pair v of lanes with this g.
template <int kDim, int kBits>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE constexpr int value_pair_of(int v, int g) {
  using Row = ValueRow<kDim, kBits>;
  if constexpr (kBits == 3) return Row::Planes::pair(v, g);
  if constexpr (kBits == 4) return Row::Bytes::byte(v, g);
  if (Row::kHalfByte && v == Row::kPairs - 1) return kDim / 2 - 8 + g;
  return 2 * Row::Bytes::byte(v / 2, g) + v % 2;
}

// ---- exact tokens: elements of the model's type instead of codes

// Coordinates of a lane in runs of kRun: keys in four lanes, values in eight.
template <int kDim, int kLanes, int kRun>
struct ExactShare {
  static constexpr int kRuns = kDim / (kRun * kLanes);
  static constexpr int kRest = kDim % (kRun * kLanes) / kLanes;  // length of a last, short run
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int first(int run, int lane) {
    return kRun * kLanes * run + (run < kRuns ? kRun : kRest) * lane;
  }
  // Coordinate i of the share.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int coordinate(int i, int lane) {
    return first(i / kRun, lane) + i % kRun;
  }
};

}  // namespace turboquant::cuda::detail
