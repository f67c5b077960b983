// Sizes of the extend attention kernels and the order of numbers in their operands.
#pragma once

#include "decode_attention_exact.cuh"
#include "decode_attention_operands.hpp"
#include "extend_attention_args.hpp"
#include "ptx.cuh"

namespace turboquant::cuda::detail {

// Operand rows (queries, keys, values) hold the coordinates in *stored order*: four lanes decode a
// token's row, lane t the pairs key_pair_of(u, t), and lay down kPiecePairs pairs each in turn. The
// order inside a dot product is free, and outputs are put back in order at the end.
template <int kDim>
struct StoredRow {
  static constexpr int kLanePairs = kDim / 8;
  static constexpr int kPiecePairs = kLanePairs % 4 == 0 ? 4 : 2;
  static constexpr int kPieces = kLanePairs / kPiecePairs;
  static_assert(kLanePairs % kPiecePairs == 0);
  static constexpr int kPieceBytes = 4 * kPiecePairs;

  // Stored pair p is pair u of lane t.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int lane_of(int p) {
    return p / kPiecePairs % 4;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int pair_of(int p) {
    return p / kPiecePairs / 4 * kPiecePairs + p % kPiecePairs;
  }
  // Byte offset of piece j of lane t.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int piece(int j, int t) {
    return (4 * j + t) * kPieceBytes;
  }
};

// The pair of coordinates that stored pair p holds, of keys or values of that width.
template <int kDim>
TQ_DEVICE int stored_pair(int bits, int p) {
  return key_pair<kDim>(bits, StoredRow<kDim>::pair_of(p), StoredRow<kDim>::lane_of(p));
}

// Page blocks whose means are multiplied at once: the columns of an mma.
inline constexpr int kMeanBlocks = 8;

// A table entry of the tile's range.
struct PagedBlock {
  const std::byte* data;  // of this head
  int first;              // position of its first token
  int tokens;
};
inline constexpr int kPagedBlocks = 2 * kMeanBlocks;  // known at a time

// What a thread block works on. In shared memory: in registers it would push the accumulators out.
struct ExtendWork {
  ExtendItem item;
  cache::RowState row;
  ExtendRange range;
  ExtendSplit split;
  int first_row, rows;  // of the tile
};

// A query row of a tile: the tokens [begin, end) that it sees, the factor of its scores; what its
// weights refer to (extend_attention_rows.cuh), which changes seldom.
struct TileRow {
  int begin, end;
  float factor;
  float reference, unit;
};

// Shared memory of a block, in this order:
//   table    levels of every index; kLarge: as DecodeTraits has it, a copy for every lane;
//   kCompact:
//            256 pairs for keys, then for values
//   queries  [kTileRows] rows
//   tiles    kBuffers times keys [64], values [64]: rows
//   means    f32 [kTileRows, 8]: q'.m of eight pages
//   scales   kScaleBuffers times f32 keys [64], values [64]; u32 largest value scale of each warp
//   that decodes blocks   PagedBlock [16] work     ExtendWork rows     TileRow [kTileRows] pairs u8
//   [kDim / 2]: stored_pair of keys
//   barriers of stages, kWarpgroups: full [kStages], empty [kStages]
//
// Operand rows. mma.sync: kPitch bytes apart, an odd number of 16-byte pieces: eight rows' pieces
// of one column lie in different banks. wgmma: in columns of 128 bytes (the last one may be part of
// one), each all rows one after the other, the 16-byte pieces of a row in an order that its number
// modulo 8 turns (the 128-byte swizzle of the PTX manual).
template <int kDim_, ExtendSizes kSizes>
struct ExtendTraits {
  static constexpr int kDim = kDim_;
  static constexpr bool kWarpgroups = kSizes == ExtendSizes::kWarpgroup;
  static constexpr int kWarps = extend_warps(kDim, kSizes);
  static constexpr int kTileRows = extend_tile_rows(kDim, kSizes);
  // Rows whose scores are in registers at once: of a warp, and of the threads that multiply them
  // together; sets of them, one after the other.
  static constexpr int kWarpRows = kWarpgroups ? 16 : extend_warp_rows(kDim);
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kGroupWarps = kWarpgroups ? 4 : 1;
  static constexpr int kGroupRows = kGroupWarps * kWarpRows;
  static constexpr int kRowSets = kTileRows / (kWarps * kWarpRows);
  static constexpr int kScoreTokens = kWarpgroups ? cache::kBlockTokens : 32;  // likewise
  static constexpr int kPitch = (kDim / 8 | 1) * 16;
  static constexpr int kSteps = kDim / 16;
  static constexpr bool kLaneTable = kSizes != ExtendSizes::kCompact;
  static constexpr int kBuffers = kLaneTable && kDim <= 128 ? 2 : 1;
  // What the warps that decode fill, apart: both tiles of a buffer, or keys and values.
  static constexpr int kStages = 2;
  // Warps that decode: four behind those that attend, or all.
  static constexpr int kFillWarps = kWarpgroups ? 4 : kWarps;
  static constexpr int kFirstFillWarp = kWarpgroups ? kWarps : 0;
  static constexpr int kThreads = 32 * (kFirstFillWarp + kFillWarps);
  static constexpr int kScaleBuffers = kWarpgroups ? 2 : kBuffers;
  // Registers of a thread: together those that a block of kThreads starts with, in steps of 8. One
  // more, and the warps that attend wait for it for ever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kAttendRegisters = 224, kFillRegisters = 56;
  static_assert(!kWarpgroups || kWarps * kAttendRegisters + kFillWarps * kFillRegisters <=
                                    (kWarps + kFillWarps) * kStartRegisters);

  // Of `rows` operand rows: bytes, and where byte `at` of a row is.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int operand_bytes(int rows) {
    return rows * (kWarpgroups ? static_cast<int>(ceil_div(2 * kDim, 128)) * 128 : kPitch);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static constexpr int operand_at(int rows, int row, int at) {
    if constexpr (kWarpgroups) {
      return at / 128 * 128 * rows + row * 128 + (at % 128 ^ row % 8 * 16);
    } else {
      return row * kPitch + at;
    }
  }

  static constexpr int kTableBytes = kLaneTable ? 256 * 256 : 2 * 256 * 4;
  static constexpr int kValueTableOffset = kLaneTable ? 128 : 256 * 4;
  static constexpr int kSideBytes = operand_bytes(cache::kBlockTokens);
  static constexpr int kScalesBytes = (2 * cache::kBlockTokens + kFillWarps) * 4;
  static constexpr int kQueriesOffset = kTableBytes;
  static constexpr int kTilesOffset = kQueriesOffset + operand_bytes(kTileRows);
  static constexpr int kMeansOffset = kTilesOffset + kBuffers * 2 * kSideBytes;
  static constexpr int kScalesOffset = kMeansOffset + kTileRows * kMeanBlocks * 4;
  static constexpr int kBlocksOffset = kScalesOffset + kScaleBuffers * kScalesBytes;
  static constexpr int kWorkOffset =
      kBlocksOffset + kPagedBlocks * static_cast<int>(sizeof(PagedBlock));
  static constexpr int kRowsOffset = kWorkOffset + static_cast<int>(sizeof(ExtendWork));
  static constexpr int kPairsOffset = kRowsOffset + kTileRows * static_cast<int>(sizeof(TileRow));
  static constexpr int kBarriersOffset = kPairsOffset + kDim / 2;
  static constexpr int kSharedBytes = kBarriersOffset + (kWarpgroups ? 2 * kStages * 8 : 0);
  static_assert(!kWarpgroups || kBarriersOffset % 8 == 0);
  static_assert(kScalesBytes % 8 == 0);
  static_assert(!kWarpgroups || (kQueriesOffset % 1024 == 0 && kTilesOffset % 1024 == 0));
  static_assert(kSharedBytes <= (kSizes == ExtendSizes::kCompact ? kExtendCompactSharedBytes
                                                                 : kExtendLargeSharedBytes));
};

}  // namespace turboquant::cuda::detail
