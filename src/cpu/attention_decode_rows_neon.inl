// Packed rows to levels with NEON's byte look-ups; defines TQ_DECODE_ROWS. Part of a kernel unit
// (attention_kernels.inl).
//
// Up to 4 bits: 16 codes, one a byte, select from four registers that hold the first, second, third
// and fourth byte of the 16 levels; the bytes found are put together again. Above 4 bits the levels
// outgrow the registers, and loading them one by one is as quick.
#include <cstdint>
#include <cstring>

#include "cpu/attention_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/quant/packing.hpp"

#define TQ_DECODE_ROWS decode_rows

namespace turboquant::attention::detail {
namespace {

constexpr int kDecodeBits = 4;

struct SixteenFloats {
  uint8x16_t quarter[4];
};

class NibbleLevels {
 public:
  explicit NibbleLevels(const float* levels)
      : bytes_(vld4q_u8(reinterpret_cast<const uint8_t*>(levels))) {}

  // levels[codes & 15]
  SixteenFloats operator()(uint8x16_t codes) const {
    const uint8x16_t at = vandq_u8(codes, vdupq_n_u8(15));
    const uint8x16_t byte0 = vqtbl1q_u8(bytes_.val[0], at), byte1 = vqtbl1q_u8(bytes_.val[1], at);
    const uint8x16_t byte2 = vqtbl1q_u8(bytes_.val[2], at), byte3 = vqtbl1q_u8(bytes_.val[3], at);
    const auto low01 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
    const auto low23 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
    const auto high01 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    const auto high23 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    return {{vreinterpretq_u8_u16(vzip1q_u16(low01, low23)),
             vreinterpretq_u8_u16(vzip2q_u16(low01, low23)),
             vreinterpretq_u8_u16(vzip1q_u16(high01, high23)),
             vreinterpretq_u8_u16(vzip2q_u16(high01, high23))}};
  }

 private:
  uint8x16x4_t bytes_;
};

// Sixteen codes that lie kStride bits apart, each at the bottom of a byte; what is above them is
// left there.
template <int kStride>
inline uint8x16_t spread(uint64_t word) {
  alignas(16) uint8_t byte_of[16];
  alignas(16) int8_t shift_of[16];
  for (int i = 0; i < 16; ++i) {
    byte_of[i] = static_cast<uint8_t>(i * kStride / 8);
    shift_of[i] = static_cast<int8_t>(-(i * kStride % 8));
  }
  const uint8x16_t bytes = vreinterpretq_u8_u64(vdupq_n_u64(word));
  return vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(byte_of)), vld1q_s8(shift_of));
}

// `count` levels from words of 16 codes that lie kStride bits apart; word_at(i, n) returns the n
// bytes of the run from byte i on.
template <int kStride, class WordAt>
inline void decode_run(const NibbleLevels& levels, int64_t count, float* out,
                       const WordAt& word_at) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    store(out + i, levels(spread<kStride>(word_at(i * kStride / 8, 2 * kStride))));
  }
  if (const int64_t rest = count - i; rest > 0) {
    const uint64_t word = word_at(i * kStride / 8, (rest * kStride + 7) / 8);
    const SixteenFloats last = levels(spread<kStride>(word));
    std::memcpy(out + i, &last, rest * sizeof(float));
  }
}

template <int kBytes>
inline uint64_t load_word(const uint8_t* from, int64_t bytes) {
  return bytes == kBytes ? quant::detail::load_bytes<kBytes>(from)
                         : quant::detail::load_bytes(from, bytes);
}

template <int kBits>
inline void decode_stream(const NibbleLevels& levels, int64_t dim, const uint8_t* row, float* out) {
  decode_run<kBits>(levels, dim, out, [row](int64_t i, int64_t bytes) {
    return load_word<2 * kBits>(row + i, bytes);
  });
}

// The spare-bit planes of quant/packing.hpp: four runs of nibbles.
inline void decode_planes(const NibbleLevels& levels, int64_t dim, const uint8_t* row, float* out) {
  const int64_t segment_bytes = dim / 8;
  const int64_t quarter = dim / 4;
  for (int j = 0; j < 3; ++j) {
    const uint8_t* const segment = row + j * segment_bytes;
    decode_run<4>(levels, quarter, out + j * quarter,
                  [segment](int64_t i, int64_t bytes) { return load_word<8>(segment + i, bytes); });
  }
  decode_run<4>(levels, quarter, out + 3 * quarter, [=](int64_t i, int64_t bytes) {
    return quant::spare_bits_word(load_word<8>(row + i, bytes),
                                  load_word<8>(row + segment_bytes + i, bytes),
                                  load_word<8>(row + 2 * segment_bytes + i, bytes));
  });
}

using DecodeOneRow = void (*)(const NibbleLevels&, int64_t, const uint8_t*, float*);

template <DecodeOneRow kDecode>
inline void decode_each(const DecodeRowsParams& p) {
  const NibbleLevels levels(p.levels);
  for (int r = 0; r < p.num_rows; ++r) {
    kDecode(levels, p.dim, p.rows + r * p.row_bytes, p.out + r * p.stride);
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
    default:
      return decode_each<decode_stream<4> >(p);
  }
}

}  // namespace
}  // namespace turboquant::attention::detail
