// Shared memory of a thread block of encode_append.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encode_args.hpp"
#include "encode_pack.hpp"
#include "row_rotation.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/cell_search.hpp"

namespace turboquant::cuda::detail {

using cache::kBlockTokens;

// What a kernel's codes are: code that a kernel does not have is not between that which it runs.
enum class EncodeCodes { kNarrow, kScalar, kVector };  // kNarrow: scalar, at most 4 bits

// Of a job, what a block's threads share and need not hold in registers.
struct EncodeState {
  JobArg job;
  RowArg row;
  int32_t non_finite_tokens;
  int32_t encoded_end;  // of the row; 0 until scanned
  bool under_way;       // its rows, while the job before is worked on
  bool new_row;         // of the batch: another smoothing than the job before
  std::byte* block;     // where codes go; once the rows have landed
};

// Shared memory of a block.
template <int kDim>
struct EncodePlan {
  using Shape = RowShape<kDim>;
  static constexpr int kThreads = kBlockTokens * Shape::kThreads;

  // Raw rows (a thread's part of rows that threads trade): an odd number of 16-byte pieces.
  static constexpr int kRawRows = Shape::kTrades ? Shape::kThreads : 1;
  TQ_HOST_DEVICE static constexpr int raw_pitch_bytes(int element_bytes) {
    return (kDim / kRawRows * element_bytes / 16 | 1) * 16;
  }
  // Of a token's coordinate.
  TQ_HOST_DEVICE static constexpr int raw_offset(int token, int i, int element_bytes) {
    return kRawRows == 1
               ? token * raw_pitch_bytes(element_bytes) + i * element_bytes
               : (token * kRawRows + Shape::part_of(0, i)) * raw_pitch_bytes(element_bytes) +
                     Shape::elem_of(0, i) * element_bytes;
  }

  static constexpr int kTableBytes = Shape::kTableFloats * 4;
  static constexpr int kTileBytes = kThreads * Shape::kPitch * 4;
  static_assert(kTileBytes >= kBlockTokens * kRawRows * (kDim / kRawRows * 4 / 16 | 1) * 16,
                "a raw tile of fp32 fits");
  // In the tile packed codes lie behind raw rows of 2-byte elements, which the next job's may be.
  static constexpr int kPacked = kBlockTokens * kRawRows * (kDim / kRawRows * 2 / 16 | 1) * 16;
  static_assert(kPacked + kBlockTokens * group_row_pitch<8>(kDim) <= kTileBytes);
  // Parts: the tile; what coordinates are first multiplied by (without smoothing: signs; with it:
  // signed smoothing and, in the next part, its reciprocals); the mean; the normalisers after
  // the first two rounds, with the signs of the next one; the turns; the states of two jobs.
  static constexpr int kFirst = kTileBytes;
  static constexpr int kReciprocal = kFirst + kTableBytes;
  static constexpr int kMean = kReciprocal + kTableBytes;
  static constexpr int kNormaliser = kMean + kTableBytes;  // [2]
  static constexpr int kTurns = kNormaliser + 2 * kTableBytes;
  static constexpr int kState = kTurns + kTableBytes;  // [2]
  static constexpr int kStateBytes = 64;
  static constexpr int kSearchScale = kState + 2 * kStateBytes;
  static constexpr int kNonFinite = kSearchScale + 16;      // [64] bytes
  static constexpr int kFlags = kNonFinite + kBlockTokens;  // [kThreads] bytes
  static_assert(sizeof(EncodeState) <= kStateBytes);
  // Scalar codebooks: search cells, levels.
  static constexpr int kCells = kFlags + kThreads;
  TQ_HOST_DEVICE static constexpr int levels_offset(int bits) {
    return kCells + quant::search_cells(bits) * static_cast<int>(sizeof(quant::SearchCell));
  }
  // Vector codebooks: codewords; rows of the pairs' indices, an odd number of words apart.
  static constexpr int kCodewords = (kFlags + kThreads + 15) / 16 * 16;
  static constexpr int kIndices =
      kCodewords + math::VectorCodebook::kEntries * static_cast<int>(sizeof(Codeword));
  static constexpr int kIndexPitch = (kDim / 8 | 1) * 4;
  TQ_HOST_DEVICE static constexpr int bytes(int bits, bool vector) {
    return vector ? kIndices + kBlockTokens * kIndexPitch : levels_offset(bits) + (4 << bits);
  }
};

}  // namespace turboquant::cuda::detail
