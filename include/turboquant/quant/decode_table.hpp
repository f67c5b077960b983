// The table that maps a code byte to its levels. It is data: decoders, on the CPU and on the GPU,
// take it and never rebuild it from scalar levels, so that a vector codebook, whose entries are
// pairs of coordinates that no scalar levels make, is another table and not another decoder.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "turboquant/error.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::quant {

// `entries` rows of `dims` levels: entry e holds the levels of the coordinates that byte (5 to 7
// bits: code) e stands for, lowest coordinate first.
//
//   bits      1      2      3 (bits 3 and 7 ignored)  4      5, 6, 7    8
//   entries   256    256    256                       256    2^bits     256
//   dims      8      4      2                         2      1          1
//
// Of a vector codebook: 2, 3 or 4 bits, entries 256, dims 2; entry e holds the levels of a pair of
// index e (quant/packing.hpp).
struct DecodeTable {
  int bits = 0;
  int entries = 0;
  int dims = 0;
  std::vector<float> levels;  // [entries, dims]
  // Up to 4 bits, where every entry combines levels of one scalar codebook: [16], entry n the level
  // of the code in the low bits of n, whatever the bits above it are. Vectorised decoders may use
  // it instead. Empty for a table of any other kind.
  std::vector<float> nibble_levels;
  // Of a vector codebook whose levels are multiples of its kUnit below 4: those multiples, [2,
  // 256]: of the entries' first level, then of their second. Vectorised decoders may look them up
  // instead. Empty for any other table.
  std::vector<int8_t> pair_planes;

  // 2 bits of a vector codebook: a byte is the index of one pair and half of the next one's.
  bool overlapping() const { return bits == 2 && dims == 2; }

  const float* entry(int index) const { return levels.data() + int64_t{index} * dims; }
};

// The table of a scalar codebook with 2^bits levels.
inline DecodeTable make_decode_table(int bits, std::span<const float> levels) {
  check_bits(bits);
  const int num_levels = 1 << bits;
  if (static_cast<int64_t>(levels.size()) != num_levels) {
    turboquant::detail::throw_invalid(
        "levels", std::to_string(num_levels) + " values for " + std::to_string(bits) + " bits",
        std::to_string(levels.size()));
  }
  DecodeTable table;
  table.bits = bits;
  const bool one_code = bits > 4;
  table.entries = one_code ? num_levels : 256;
  table.dims = one_code ? 1 : bits == 3 ? 2 : 8 / bits;
  const int code_stride_bits = bits == 3 ? 4 : bits;
  table.levels.reserve(int64_t{table.entries} * table.dims);
  for (int e = 0; e < table.entries; ++e) {
    for (int i = 0; i < table.dims; ++i) {
      table.levels.push_back(levels[(e >> (i * code_stride_bits)) & (num_levels - 1)]);
    }
  }
  for (int n = 0; n < 16 && !one_code; ++n) {
    table.nibble_levels.push_back(levels[n & (num_levels - 1)]);
  }
  return table;
}

inline DecodeTable make_decode_table(const math::VectorCodebook& codebook) {
  constexpr int kEntries = math::VectorCodebook::kEntries;
  DecodeTable table{.bits = codebook.bits(),
                    .entries = kEntries,
                    .dims = 2,
                    .levels = {codebook.levels().begin(), codebook.levels().end()},
                    .nibble_levels = {},
                    .pair_planes = std::vector<int8_t>(2 * kEntries)};
  for (int v = 0; v < 2 * kEntries; ++v) {
    const float units = table.levels[v] / math::VectorCodebook::kUnit;
    if (units != std::nearbyint(units) || std::fabs(units) > 127.0f) {
      table.pair_planes.clear();
      break;
    }
    table.pair_planes[v % 2 * kEntries + v / 2] = static_cast<int8_t>(units);
  }
  return table;
}

namespace detail {

// The pairs of kPairs indices of eight bits each, kStrideBits apart in a word: one load of a word
// for many of the table.
template <int kPairs, int kStrideBits>
inline void decode_word(const float* levels, uint64_t word, float* out) {
  for (int k = 0; k < kPairs; ++k) {
    std::memcpy(out + 2 * k, levels + 2 * (word >> (kStrideBits * k) & 0xFF), 2 * sizeof(float));
  }
}

template <int kDims>
void decode_bytes(const DecodeTable& table, const uint8_t* packed, int64_t dim, float* out) {
  const float* levels = table.levels.data();
  const int64_t whole = dim / kDims;
  int64_t i = 0;
  if constexpr (kDims == 2) {
    for (; i + 8 <= whole; i += 8)
      decode_word<8, 8>(levels, load_bytes<8>(packed + i), out + 2 * i);
  }
  for (; i < whole; ++i) {
    std::memcpy(out + i * kDims, levels + int64_t{packed[i]} * kDims, kDims * sizeof(float));
  }
  for (i *= kDims; i < dim; ++i) {
    out[i] = levels[int64_t{packed[whole]} * kDims + i % kDims];
  }
}

inline void decode_planes(const DecodeTable& table, const uint8_t* packed, int64_t dim,
                          float* out) {
  const int64_t segment_bytes = (dim + 7) / 8;
  // Three quarters as bytes of pairs (of the last one there may be less), the fourth from the bits
  // that they spare.
  const int64_t last = 6 * segment_bytes;
  decode_bytes<2>(table, packed, dim < last ? dim : last, out);
  const float* const levels = table.levels.data();
  int64_t i = 0;
  const auto word = [&](int j) { return load_bytes<8>(packed + j * segment_bytes + i); };
  for (; i + 8 <= segment_bytes && last + 2 * i + 16 <= dim; i += 8) {
    decode_word<8, 8>(levels, spare_bits_word(word(0), word(1), word(2)), out + last + 2 * i);
  }
  for (; last + 2 * i < dim; ++i) {
    const uint8_t byte =
        spare_bits_byte(packed[i], packed[segment_bytes + i], packed[2 * segment_bytes + i]);
    for (int k = 0; k < 2 && last + 2 * i + k < dim; ++k) {
      out[last + 2 * i + k] = levels[int64_t{byte} * 2 + k];
    }
  }
}

inline void decode_overlapping(const DecodeTable& table, const uint8_t* packed, int64_t dim,
                               float* out) {
  constexpr int kWordDims = 2 * kWordPairs;
  const float* const levels = table.levels.data();
  const int64_t whole = dim / kWordDims;
  for (int64_t w = 0; w < whole; ++w) {
    decode_word<kWordPairs, 4>(levels, load_bytes<4>(packed + 4 * w), out + kWordDims * w);
  }
  if (whole * kWordDims < dim) {
    decode_word<kWordPairs / 2, 4>(levels, load_bytes<2>(packed + 4 * whole),
                                   out + kWordDims * whole);
  }
}

template <int kBits>
void decode_codes(const DecodeTable& table, const uint8_t* packed, int64_t dim, float* out) {
  const float* levels = table.levels.data();
  const int64_t whole = dim / 8;
  for (int64_t g = 0; g < whole; ++g) {
    const uint64_t codes = split_eight(load_bytes<kBits>(packed + g * kBits), kBits);
    for (int i = 0; i < 8; ++i) out[8 * g + i] = levels[(codes >> (8 * i)) & 0xFF];
  }
  uint8_t rest[8] = {};
  unpack_stream<kBits>(packed + whole * kBits, dim - 8 * whole, rest);
  for (int64_t i = 8 * whole; i < dim; ++i) out[i] = levels[rest[i - 8 * whole]];
}

}  // namespace detail

// Writes the levels (unit variance: not yet multiplied by the row's scale) of one packed row.
inline void decode_row(const DecodeTable& table, const uint8_t* packed, int64_t dim, float* out) {
  switch (table.bits) {
    case 1:
      return detail::decode_bytes<8>(table, packed, dim, out);
    case 2:
      if (table.overlapping()) return detail::decode_overlapping(table, packed, dim, out);
      return detail::decode_bytes<4>(table, packed, dim, out);
    case 3:
      return detail::decode_planes(table, packed, dim, out);
    case 4:
      return detail::decode_bytes<2>(table, packed, dim, out);
    case 5:
      return detail::decode_codes<5>(table, packed, dim, out);
    case 6:
      return detail::decode_codes<6>(table, packed, dim, out);
    case 7:
      return detail::decode_codes<7>(table, packed, dim, out);
    default:
      return detail::decode_bytes<1>(table, packed, dim, out);
  }
}

}  // namespace turboquant::quant
