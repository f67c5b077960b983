// Shared memory of a thread block of dequantize.
#pragma once

#include "row_rotation.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::cuda::detail {

using cache::kBlockTokens;

template <int kDim>
struct DequantizePlan {
  using Shape = RowShape<kDim>;
  static constexpr int kThreads = kBlockTokens * Shape::kThreads;
  static constexpr int kTableBytes = Shape::kTableFloats * 4;

  // Packed rows as they are stored, or (rows of whole 16-byte pieces) an odd number of pieces
  // apart, for otherwise eight threads would read one bank.
  TQ_HOST_DEVICE static constexpr int row_bytes(int bits) {
    return static_cast<int>(quant::packed_row_bytes(kDim, bits));
  }
  TQ_HOST_DEVICE static constexpr int code_pitch(int bits) {
    return row_bytes(bits) % 16 == 0 ? (row_bytes(bits) / 16 | 1) * 16 : row_bytes(bits);
  }
  // In shared memory: levels of more than 4 bits, or a vector codebook's.
  static constexpr int kDecodeFloats = 512;
  // Neighbouring threads' pieces of 8 or 16 bytes in all banks; four threads hold 32 bytes of a
  // row.
  TQ_HOST_DEVICE static constexpr int out_pitch_bytes(int element_bytes) {
    const int pieces = kDim * element_bytes / 16;
    return Shape::kThreads == 4 && element_bytes == 2 ? (pieces + 2) * 16 : (pieces | 1) * 16;
  }
  // Parts: normalisers of the first and last round with the signs that follow them; turns with
  // signs; smoothing; mean; scales; states of entries; decode table; rows in the output's type; two
  // buffers of an entry's packed rows, scales and mean as they are stored.
  static constexpr int kFirst = 0;
  static constexpr int kLast = kFirst + kTableBytes;
  static constexpr int kTurns = kLast + kTableBytes;  // twice as long
  static constexpr int kSmoothing = kTurns + 2 * kTableBytes;
  static constexpr int kMean = kSmoothing + kTableBytes;
  static constexpr int kScales = kMean + kTableBytes;  // [64] fp32
  static constexpr int kStates = 8, kStateBytes = 16;
  static constexpr int kState = kScales + kBlockTokens * 4;
  static constexpr int kDecode = kState + kStates * kStateBytes;
  // In a buffer.
  static constexpr int kRawScales = 0;
  static constexpr int kRawMean = kRawScales + kBlockTokens * 4;
  static constexpr int kCodes = kRawMean + (2 * kDim + 15) / 16 * 16;
  TQ_HOST_DEVICE static constexpr int buffer_bytes(int bits) {
    return kCodes + kBlockTokens * code_pitch(bits);
  }
  static constexpr int kTile = kDecode + kDecodeFloats * 4;
  TQ_HOST_DEVICE static constexpr int buffers(int element_bytes) {
    return kTile + kBlockTokens * out_pitch_bytes(element_bytes);
  }
  TQ_HOST_DEVICE static constexpr int bytes(int bits, int element_bytes) {
    return buffers(element_bytes) + 2 * buffer_bytes(bits);
  }
  static constexpr int kExchangedBytes = kThreads * Shape::kPitch * 4;  // on the host
  static_assert(!Shape::kTrades || kDim / 8 % 8 == 0);
};

}  // namespace turboquant::cuda::detail
