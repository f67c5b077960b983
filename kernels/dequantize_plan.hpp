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
  // Of a scalar codebook; a vector codebook's 512 floats take no more.
  TQ_HOST_DEVICE static constexpr int decode_floats(int bits) {
    return bits > 4 ? 1 << bits : 256 * (bits == 3 ? 2 : 8 / bits);
  }
  // Neighbouring threads' pieces of 8 or 16 bytes in all banks; four threads hold 32 bytes of a
  // row.
  TQ_HOST_DEVICE static constexpr int out_pitch_bytes(int element_bytes) {
    const int pieces = kDim * element_bytes / 16;
    return Shape::kThreads == 4 && element_bytes == 2 ? (pieces + 2) * 16 : (pieces | 1) * 16;
  }
  // Parts: rows in the output's type (on the host also what threads exchange); normalisers of the
  // first and last round with the signs that follow them; turns with signs; smoothing; mean; first
  // token; scales; decode table; packed rows.
  static constexpr int kTileBytes = kThreads * Shape::kPitch * 4;
  static_assert(kTileBytes >= kBlockTokens * (kDim * 4 / 16 | 1) * 16);
  static_assert(!Shape::kTrades || kDim / 8 % 8 == 0);
  static constexpr int kFirst = kTileBytes;
  static constexpr int kLast = kFirst + kTableBytes;
  static constexpr int kTurns = kLast + kTableBytes;  // twice as long
  static constexpr int kSmoothing = kTurns + 2 * kTableBytes;
  static constexpr int kMean = kSmoothing + kTableBytes;
  static constexpr int kState = kMean + kTableBytes;
  static constexpr int kScales = kState + 16;  // [64] fp32
  static constexpr int kDecode = kScales + kBlockTokens * 4;
  TQ_HOST_DEVICE static constexpr int codes_offset(int bits) {
    return kDecode + decode_floats(bits) * 4;
  }
  TQ_HOST_DEVICE static constexpr int bytes(int bits) {
    return codes_offset(bits) + kBlockTokens * code_pitch(bits);
  }
};

}  // namespace turboquant::cuda::detail
