// The drivers around the encode kernels: tiles of rows, scratch memory, scales and packing.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "cpu/encode_kernels.hpp"
#include "turboquant/error.hpp"
#include "turboquant/math/hadamard.hpp"
#include "turboquant/quant/packing.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::quant {
namespace {

using detail::kTileRows;
using detail::round_up_16;
using turboquant::detail::throw_invalid;

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kAlignment); }
};

template <class Element>
std::unique_ptr<Element[], AlignedDelete> aligned_scratch(int64_t count) {
  return std::unique_ptr<Element[], AlignedDelete>(
      static_cast<Element*>(::operator new(count * sizeof(Element), kAlignment)));
}

// The boundaries as a binary search visits them: entry 2^k + p is the boundary between the codes
// with leading bits p0... and p1....
std::array<float, 256> search_tree(std::span<const float> boundaries, int bits) {
  std::array<float, 256> tree{};
  for (int k = 0; k < bits; ++k) {
    for (int p = 0; p < 1 << k; ++p) {
      tree[(1 << k) + p] = boundaries[(p << (bits - k)) + (1 << (bits - k - 1)) - 1];
    }
  }
  return tree;
}

void check_params(const QuantizeRowsParams& p) {
  check_bits(p.bits);
  auto check = [](const char* argument, bool good, const std::string& expected, int64_t actual) {
    if (!good) throw_invalid(argument, expected, std::to_string(actual));
  };
  const bool vectors = p.vector_codebook != nullptr;
  const int64_t levels = vectors ? 0 : int64_t{1} << p.bits;
  const auto num_levels = static_cast<int64_t>(p.levels.size());
  const auto num_boundaries = static_cast<int64_t>(p.boundaries.size());
  const int64_t row_bytes = packed_row_bytes(p.dim, p.bits);
  check("dim", p.dim >= 1 && p.dim <= math::kMaxHadamardDim,
        "1 to " + std::to_string(math::kMaxHadamardDim), p.dim);
  check("levels", num_levels == levels, std::to_string(levels) + " values", num_levels);
  const int64_t boundaries = vectors ? 0 : levels - 1;
  check("boundaries", num_boundaries == boundaries, std::to_string(boundaries) + " values",
        num_boundaries);
  if (vectors) {
    check("bits", p.bits == p.vector_codebook->bits(),
          "the vector codebook's " + std::to_string(p.vector_codebook->bits()), p.bits);
    check("dim", p.dim % 8 == 0, "a multiple of 8 with a vector codebook", p.dim);
  }
  check("num_rows", p.num_rows >= 0, "0 or more", p.num_rows);
  check("row_stride_elems", p.row_stride_elems >= p.dim, "at least dim " + std::to_string(p.dim),
        p.row_stride_elems);
  check("codes_stride_bytes", p.codes_stride_bytes >= row_bytes,
        "at least the packed row's " + std::to_string(row_bytes) + " bytes", p.codes_stride_bytes);
}

void rotate(const SignHadamardRotation& rotation, bool transpose, float* rows, int64_t num_rows,
            int64_t row_stride_elems) {
  const int dim = rotation.dim();
  const int64_t stride = row_stride_elems == 0 ? dim : row_stride_elems;
  const auto tile = aligned_scratch<float>(round_up_16(dim) * kTileRows);
  const detail::EncodeKernels& kernels = detail::active_encode_kernels();
  for (int64_t row = 0; row < num_rows; row += kTileRows) {
    kernels.rotate_tile({.dim = dim,
                         .signs = rotation.signs().data(),
                         .turns = rotation.turns().data(),
                         .transpose = transpose,
                         .rows = rows + row * stride,
                         .row_stride_elems = stride,
                         .num_rows = static_cast<int>(std::min<int64_t>(kTileRows, num_rows - row)),
                         .tile = tile.get()});
  }
}

}  // namespace

int64_t quantize_rows(const QuantizeRowsParams& params) {
  check_params(params);
  const int64_t padded_dim = round_up_16(params.dim);
  const auto tile = aligned_scratch<float>(padded_dim * kTileRows);
  const auto code_tile = aligned_scratch<uint8_t>(padded_dim * kTileRows);
  const auto codes = aligned_scratch<uint8_t>(padded_dim * kTileRows);
  const int64_t row_bytes = packed_row_bytes(params.dim, params.bits);
  const detail::EncodeKernels& kernels = detail::active_encode_kernels();

  detail::QuantizeTileParams t{};
  // Vector look-ups read whole registers.
  std::array<float, 256> levels{};
  std::array<float, 256> tree{};
  const bool vectors = params.vector_codebook != nullptr;
  const auto pairs = aligned_scratch<uint8_t>(vectors ? params.dim / 2 * kTileRows : 0);
  if (vectors) {
    t.pair_levels = params.vector_codebook->levels().data();
    t.half_squares = params.vector_codebook->half_squares().data();
    t.pair_tile = pairs.get();
  } else {
    std::copy(params.levels.begin(), params.levels.end(), levels.begin());
    tree = search_tree(params.boundaries, params.bits);
  }
  t.dim = params.dim;
  t.bits = params.bits;
  t.sqrt_dim = static_cast<float>(std::sqrt(static_cast<double>(params.dim)));
  t.levels = levels.data();
  t.tree = tree.data();
  t.row_stride_elems = params.row_stride_elems;
  t.tile = tile.get();
  t.code_tile = code_tile.get();
  t.codes = codes.get();
  // The tile kernel moves whole 16 x 16 blocks of codes: define those behind the last dimension.
  std::memset(t.code_tile, 0, padded_dim * kTileRows);

  int64_t non_finite_rows = 0;
  for (int64_t row = 0; row < params.num_rows; row += kTileRows) {
    t.rows = params.rows + row * params.row_stride_elems;
    t.num_rows = static_cast<int>(std::min<int64_t>(kTileRows, params.num_rows - row));
    kernels.quantize_tile(t);
    for (int r = 0; r < t.num_rows; ++r) {
      uint8_t* const packed = params.codes + (row + r) * params.codes_stride_bytes;
      float& scale = params.scales[row + r];
      if (t.squares[r] > 0.0f) {
        if (vectors) {
          std::memcpy(packed, t.codes + r * round_up_16(row_bytes), row_bytes);
        } else {
          pack_row(t.codes + r * padded_dim, params.dim, params.bits, packed);
        }
        const RowSums sums = {t.squares[r], t.row_dot_level[r], t.level_squares[r]};
        scale = std::min(scale_from_sums(params.rule, sums, t.sqrt_dim) * t.unit[r],
                         std::numeric_limits<float>::max());
      } else {
        const bool zero = t.squares[r] == 0.0f;
        std::memset(packed, 0, row_bytes);
        scale = zero ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        non_finite_rows += !zero;
      }
    }
  }
  return non_finite_rows;
}

void SignHadamardRotation::apply(float* rows, int64_t num_rows, int64_t row_stride_elems) const {
  rotate(*this, false, rows, num_rows, row_stride_elems);
}

void SignHadamardRotation::apply_transpose(float* rows, int64_t num_rows,
                                           int64_t row_stride_elems) const {
  rotate(*this, true, rows, num_rows, row_stride_elems);
}

}  // namespace turboquant::quant
