// What a compiled instruction-set level offers the encoder: work on one tile of up to 16 rows.
// Private to src/: the drivers in encode_rows.cpp do everything that need not be vectorised.
#pragma once

#include <cstdint>

namespace turboquant::quant::detail {

inline constexpr int kTileRows = 16;

constexpr int64_t round_up_16(int64_t n) { return (n + 15) / 16 * 16; }

struct RotateTileParams {
  int dim;
  const float* signs;  // SignHadamardRotation's [kRounds, dim]
  const float* turns;  // and [dim / 2, 2]
  bool transpose;
  float* rows;  // [num_rows, dim], rotated in place
  int64_t row_stride_elems;
  int num_rows;  // 1 to kTileRows
  float* tile;   // scratch, round_up_16(dim) * kTileRows floats, 64-byte aligned
};

struct QuantizeTileParams {
  int dim;
  int bits;
  float sqrt_dim;
  // Scalar codebooks.
  const float* levels;  // [2^bits]
  const float*
      tree;  // [256], entry 2^k + p: the boundary that the codes with leading bits p part at
  // Vector codebooks, else null; rows are then always 16 to a tile, dim a multiple of 8.
  const float* pair_levels;   // [256, 2]
  const float* half_squares;  // [256]
  const float* rows;          // [num_rows, dim]
  int64_t row_stride_elems;
  int num_rows;
  float* tile;         // scratch, as above
  uint8_t* code_tile;  // scratch, round_up_16(dim) * kTileRows bytes
  uint8_t* pair_tile;  // scratch of vector codebooks, dim / 2 * kTileRows bytes
  // Out [kTileRows, round_up_16(dim)], one code a byte; vector codebooks: packed rows
  // [kTileRows, round_up_16(packed_row_bytes)].
  uint8_t* codes;
  // Out, per row, in units of `unit`: the row was multiplied by 1 / unit before anything else.
  // squares is 0 for a zero row and NaN for a row with NaN or inf; its other sums mean nothing.
  float unit[kTileRows];
  float squares[kTileRows];
  float row_dot_level[kTileRows];
  float level_squares[kTileRows];
};

struct EncodeKernels {
  void (*rotate_tile)(const RotateTileParams&);
  void (*quantize_tile)(QuantizeTileParams&);
};

extern const EncodeKernels kPortableEncodeKernels;
#if defined(__x86_64__)
extern const EncodeKernels kAvx2EncodeKernels;
extern const EncodeKernels kAvx512EncodeKernels;
#elif defined(__aarch64__)
extern const EncodeKernels kNeonEncodeKernels;
#endif

// The kernels of active_simd_level().
const EncodeKernels& active_encode_kernels();

}  // namespace turboquant::quant::detail
