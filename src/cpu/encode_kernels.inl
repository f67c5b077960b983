// The vectorised part of rotating and quantising rows: one source, compiled once per instruction
// set by encode_{portable,neon,avx2,avx512}.cpp, which define
//   TQ_VECTOR_FLOATS     floats in a native vector (4, 8, 16)
//   TQ_NEON              (NEON alone) that its intrinsics may be used
//   TQ_KERNEL_TABLE      the name of the EncodeKernels object to define.
//
// Bit identity. A tile holds up to 16 rows interleaved, [dim][16] (fewer than kMinTileRows: one row
// at a time, [dim][1]), so a vector operation is the same scalar operation on neighbouring rows or
// on neighbouring sum lanes and no instruction set changes the order of a row's additions. The
// files are compiled with -ffp-contract=off, and tests/kernel_objects.cmake looks for a fused
// multiply-add in what came out.
//
// One definition rule. Everything here has internal linkage, and templates from headers are
// instantiated with the local tag `Isa`, so no function compiled for a newer instruction set can
// be picked by the linker for a unit that must run without it. Keep std:: functions out.
#include <cstdint>
#include <cstring>

#include "cpu/encode_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::quant::detail {
namespace {

struct Isa {};

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef uint8_t SixteenBytes __attribute__((vector_size(16)));

// The code of x: a binary search for the number of boundaries below x. Level k of the tree holds
// 2^k boundaries; `code` is the search's path so far.
template <int kBits, int kLevel = 0>
inline Ints search(const float* tree, Floats x, Ints code) {
  if constexpr (kLevel == kBits) {
    return code;
  } else {
    constexpr int kNodes = 1 << kLevel;
    const Ints above = x > lookup<kNodes>(tree + kNodes, code);  // -1 where true
    return search<kBits, kLevel + 1>(tree, x, code + code - above);
  }
}

// Rows (duplicates of the last one behind the end) to a tile [dim][16].
void load_tile(const float* rows, int64_t stride, int num_rows, int dim, float* tile) {
  const float* from[kTileRows];
  for (int r = 0; r < kTileRows; ++r) from[r] = rows + (r < num_rows ? r : num_rows - 1) * stride;
  int i = 0;
  for (; i + 4 <= dim; i += 4) {
    for (int r = 0; r < kTileRows; r += 4) {
      const auto a = load<FourFloats>(from[r] + i);
      const auto b = load<FourFloats>(from[r + 1] + i);
      const auto c = load<FourFloats>(from[r + 2] + i);
      const auto d = load<FourFloats>(from[r + 3] + i);
      const FourFloats ac_low = __builtin_shufflevector(a, c, 0, 4, 1, 5);
      const FourFloats ac_high = __builtin_shufflevector(a, c, 2, 6, 3, 7);
      const FourFloats bd_low = __builtin_shufflevector(b, d, 0, 4, 1, 5);
      const FourFloats bd_high = __builtin_shufflevector(b, d, 2, 6, 3, 7);
      float* const to = tile + i * kTileRows + r;
      store(to, __builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5));
      store(to + kTileRows, __builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7));
      store(to + 2 * kTileRows, __builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5));
      store(to + 3 * kTileRows, __builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7));
    }
  }
  for (; i < dim; ++i) {
    for (int r = 0; r < kTileRows; ++r) tile[i * kTileRows + r] = from[r][i];
  }
}

// The first num_rows rows of a tile [dim][16] back to rows.
void store_tile(const float* tile, int64_t stride, int num_rows, int dim, float* rows) {
  int i = 0;
  for (; i + 4 <= dim; i += 4) {
    for (int r = 0; r < num_rows; r += 4) {
      const float* const from = tile + i * kTileRows + r;
      const auto a = load<FourFloats>(from);
      const auto b = load<FourFloats>(from + kTileRows);
      const auto c = load<FourFloats>(from + 2 * kTileRows);
      const auto d = load<FourFloats>(from + 3 * kTileRows);
      const FourFloats ac_low = __builtin_shufflevector(a, c, 0, 4, 1, 5);
      const FourFloats ac_high = __builtin_shufflevector(a, c, 2, 6, 3, 7);
      const FourFloats bd_low = __builtin_shufflevector(b, d, 0, 4, 1, 5);
      const FourFloats bd_high = __builtin_shufflevector(b, d, 2, 6, 3, 7);
      float* const to = rows + r * stride + i;
      store(to, __builtin_shufflevector(ac_low, bd_low, 0, 4, 1, 5));
      if (r + 1 < num_rows) store(to + stride, __builtin_shufflevector(ac_low, bd_low, 2, 6, 3, 7));
      if (r + 2 < num_rows) {
        store(to + 2 * stride, __builtin_shufflevector(ac_high, bd_high, 0, 4, 1, 5));
      }
      if (r + 3 < num_rows) {
        store(to + 3 * stride, __builtin_shufflevector(ac_high, bd_high, 2, 6, 3, 7));
      }
    }
  }
  for (; i < dim; ++i) {
    for (int r = 0; r < num_rows; ++r) rows[r * stride + i] = tile[i * kTileRows + r];
  }
}

// Codes [dim padded to 16][16] to codes [16][dim padded]: 16 x 16 byte blocks, transposed by four
// rounds of interleaving.
void transpose_codes(const uint8_t* tile, int64_t padded_dim, uint8_t* codes) {
  for (int64_t i = 0; i < padded_dim; i += 16) {
    SixteenBytes block[16];
    for (int k = 0; k < 16; ++k) block[k] = load<SixteenBytes>(tile + (i + k) * kTileRows);
    for (int round = 0; round < 4; ++round) {
      SixteenBytes mixed[16];
      for (int k = 0; k < 8; ++k) {
        mixed[2 * k] = __builtin_shufflevector(block[k], block[k + 8], 0, 16, 1, 17, 2, 18, 3, 19,
                                               4, 20, 5, 21, 6, 22, 7, 23);
        mixed[2 * k + 1] = __builtin_shufflevector(block[k], block[k + 8], 8, 24, 9, 25, 10, 26, 11,
                                                   27, 12, 28, 13, 29, 14, 30, 15, 31);
      }
      for (int k = 0; k < 16; ++k) block[k] = mixed[k];
    }
    for (int r = 0; r < kTileRows; ++r) store(codes + r * padded_dim + i, block[r]);
  }
}

// The documented sum: kSumLanes lanes, then a binary tree. acc is [kSumLanes][lanes], total
// [lanes].
void add_up(float* acc, int lanes, float* total) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half * lanes; ++i) acc[i] += acc[half * lanes + i];
  }
  for (int i = 0; i < lanes; ++i) total[i] = acc[i];
}

void sum_squares(const float* tile, int dim, int lanes, float* total) {
  alignas(64) float acc[kSumLanes * kTileRows] = {};
  const int chunk = kSumLanes * lanes;
  int start = 0;
  for (; start + chunk <= dim * lanes; start += chunk) {
    for (int i = 0; i < chunk; ++i) acc[i] += tile[start + i] * tile[start + i];
  }
  for (int i = 0; start + i < dim * lanes; ++i) acc[i] += tile[start + i] * tile[start + i];
  add_up(acc, lanes, total);
}

// Brings row `lane`, whose squares are out of range, into range (or finds it zero or not finite);
// fills its unit and squares.
void rescue_row(float* tile, int dim, int lanes, int lane, float* unit, float* squares) {
  const bool tiny = *squares < kMinSquares;
  *unit = tiny ? kTinyUnit : kHugeUnit;
  const float factor = tiny ? 1 / kTinyUnit : 1 / kHugeUnit;
  float acc[kSumLanes] = {};
  for (int i = 0; i < dim; ++i) {
    float& y = tile[i * lanes + lane];
    y *= factor;
    acc[i % kSumLanes] += y * y;
  }
  add_up(acc, 1, squares);
  if (!(*squares <= __FLT_MAX__)) {
    *squares = __builtin_nanf("");
    for (int i = 0; i < dim; ++i) tile[i * lanes + lane] = 0.0f;
  }
}

// Codes of the tile, and the sums <y,c> and <c,c>. `factor` holds 16 lanes; with one row they are
// equal. The tile's padding (one row, dim no multiple of 16) is zero and adds nothing.
template <int kBits>
void quantize_chunks(const QuantizeTileParams& p, int lanes, const float* factor, uint8_t* codes,
                     float* row_dot_level, float* level_squares) {
  alignas(64) float dot_acc[kSumLanes * kTileRows] = {};
  alignas(64) float square_acc[kSumLanes * kTileRows] = {};
  const int real = p.dim * lanes;
  for (int start = 0; start < real; start += 16) {
    const int lane = start & (kSumLanes * lanes - 1);
    for (int k = 0; k < 16; k += kWidth) {
      const auto y = load<Floats>(p.tile + start + k);
      const Ints code = search<kBits>(p.tree, y * load<Floats>(factor + k), Ints{});
      Floats level = lookup<(1 << kBits)>(p.levels, code);
      store(codes + start + k, __builtin_convertvector(code, Bytes));
      if (start + 16 > real) {
        for (int i = 0; i < kWidth; ++i) {
          if (start + k + i >= real) level[i] = 0.0f;
        }
      }
      store(dot_acc + lane + k, load<Floats>(dot_acc + lane + k) + y * level);
      store(square_acc + lane + k, load<Floats>(square_acc + lane + k) + level * level);
    }
  }
  add_up(dot_acc, lanes, row_dot_level);
  add_up(square_acc, lanes, level_squares);
}

using QuantizeChunks = void (*)(const QuantizeTileParams&, int, const float*, uint8_t*, float*,
                                float*);
constexpr QuantizeChunks kQuantizeChunks[] = {nullptr,
                                              quantize_chunks<1>,
                                              quantize_chunks<2>,
                                              quantize_chunks<3>,
                                              quantize_chunks<4>,
                                              quantize_chunks<5>,
                                              quantize_chunks<6>,
                                              quantize_chunks<7>,
                                              quantize_chunks<8>};

}  // namespace
}  // namespace turboquant::quant::detail

#include "cpu/encode_pairs.inl"

namespace turboquant::quant::detail {
namespace {

// The rows that are loaded in p.tile, `lanes` of them interleaved; row r of the tile is row
// first + r of the outputs.
void quantize_loaded(QuantizeTileParams& p, int lanes, int first, uint8_t* codes) {
  float* const squares = p.squares + first;
  sum_squares(p.tile, p.dim, lanes, squares);
  alignas(64) float factor[16];
  for (int r = 0; r < lanes; ++r) {
    p.unit[first + r] = 1.0f;
    if (!(squares[r] >= kMinSquares && squares[r] <= kMaxSquares)) {
      rescue_row(p.tile, p.dim, lanes, r, &p.unit[first + r], &squares[r]);
    }
    factor[r] = squares[r] > 0.0f ? p.sqrt_dim / __builtin_sqrtf(squares[r]) : 0.0f;
  }
  for (int i = lanes; i < 16; ++i) factor[i] = factor[0];
  if (p.pair_levels != nullptr) {
    quantize_pairs(p, factor, codes);
    return;
  }
  kQuantizeChunks[p.bits](p, lanes, factor, codes, p.row_dot_level + first,
                          p.level_squares + first);
}

// Below this many rows, one row at a time is quicker than a tile that is mostly padding.
constexpr int kMinTileRows = 6;

void quantize_tile(QuantizeTileParams& p) {
  const int64_t padded_dim = round_up_16(p.dim);
  if (p.num_rows < kMinTileRows && p.pair_levels == nullptr) {
    for (int r = 0; r < p.num_rows; ++r) {
      std::memcpy(p.tile, p.rows + r * p.row_stride_elems, p.dim * sizeof(float));
      for (int64_t i = p.dim; i < padded_dim; ++i) p.tile[i] = 0.0f;
      quantize_loaded(p, 1, r, p.codes + r * padded_dim);
    }
    return;
  }
  load_tile(p.rows, p.row_stride_elems, p.num_rows, p.dim, p.tile);
  quantize_loaded(p, kTileRows, 0, p.code_tile);
  const int64_t columns =
      p.pair_levels != nullptr ? round_up_16(packed_row_bytes(p.dim, p.bits)) : padded_dim;
  transpose_codes(p.code_tile, columns, p.codes);
}

void multiply_signs(const float* signs, int dim, int lanes, float* tile) {
  if (lanes == 1) {
    for (int i = 0; i < dim; ++i) tile[i] *= signs[i];
    return;
  }
  for (int i = 0; i < dim; ++i) {
    for (int r = 0; r < kTileRows; ++r) tile[i * kTileRows + r] *= signs[i];
  }
}

// The second round's turns of neighbouring coordinates, or (sign -1) their inverse. Written without
// a subtraction: g++ 12 fuses an add beside a subtract to FMADDSUB, whatever -ffp-contract says.
void turn_pairs(const float* turns, float sign, int dim, int lanes, float* tile) {
  for (int i = 0; i + 1 < dim; i += 2) {
    const float c = turns[i];
    const float s = sign * turns[i + 1];
    const float minus_s = -s;
    float* const even = tile + i * lanes;
    float* const odd = even + lanes;
    const auto turn = [&](int r) {
      const float x = even[r];
      const float y = odd[r];
      even[r] = c * x + minus_s * y;
      odd[r] = s * x + c * y;
    };
    if (lanes == 1) {
      turn(0);
    } else {
      TQ_NO_LOOP_DEPENDENCE
      for (int r = 0; r < kTileRows; ++r) turn(r);
    }
  }
}

void rotate_loaded(const RotateTileParams& p, int lanes, float* tile) {
  constexpr int kTurnRound = SignHadamardRotation::kTurnRound;
  if (p.transpose) {
    for (int round = SignHadamardRotation::kRounds - 1; round >= 0; --round) {
      math::detail::hadamard_kernel<Isa, true>(tile, p.dim, lanes);
      if (round == kTurnRound) turn_pairs(p.turns, -1.0f, p.dim, lanes, tile);
      multiply_signs(p.signs + round * p.dim, p.dim, lanes, tile);
    }
  } else {
    for (int round = 0; round < SignHadamardRotation::kRounds; ++round) {
      multiply_signs(p.signs + round * p.dim, p.dim, lanes, tile);
      if (round == kTurnRound) turn_pairs(p.turns, 1.0f, p.dim, lanes, tile);
      math::detail::hadamard_kernel<Isa, false>(tile, p.dim, lanes);
    }
  }
}

void rotate_tile(const RotateTileParams& p) {
  if (p.num_rows < kMinTileRows) {
    for (int r = 0; r < p.num_rows; ++r) rotate_loaded(p, 1, p.rows + r * p.row_stride_elems);
    return;
  }
  load_tile(p.rows, p.row_stride_elems, p.num_rows, p.dim, p.tile);
  rotate_loaded(p, kTileRows, p.tile);
  store_tile(p.tile, p.row_stride_elems, p.num_rows, p.dim, p.rows);
}

}  // namespace

const EncodeKernels TQ_KERNEL_TABLE = {rotate_tile, quantize_tile};

}  // namespace turboquant::quant::detail
