// What the dequantize kernel is launched with: the params of cuda/dequantize.hpp, flattened.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device_args.hpp"
#include "turboquant/cache/layout.hpp"
#include "turboquant/cuda/dequantize.hpp"
#include "turboquant/portability.hpp"
#include "turboquant/quant/codebook_kind.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::cuda::detail {

using cache::ElementType;

struct DequantizeSideArgs {
  TensorArg exact;  // [B, H, C, D]
  TensorArg out;    // [B, H, n, D]
  ElementType exact_type, out_type;
  SideTables tables;
  int bits;
  int32_t codes_offset, scales_offset;  // in a block
  bool has_mean;                        // at the start of the block
  bool vector;                          // codebook: indices of pairs, a byte each
  // 2^16 / p, rounded up, for packed rows of p <= 16 pieces of 16 bytes: v / p is the upper half of
  // v times it for the 64 p pieces v of a block, for v (p - 1) < 2^16.
  uint32_t pieces_inverse;
};

struct DequantizeArgs {
  DequantizeSideArgs sides[2];  // keys, values
  const float* smoothing;       // [B, H, D]; null without smooth_keys
  cache::PagePoolView pages;
  const int32_t* page_table;  // [B, P, 2]
  const int32_t* rows;        // [B, 4]
  cache::ExactLayout exact;
  bool half_scales;
  int32_t dim, batch, num_heads, page_columns;
  int32_t workers;         // blocks that share the entries of a row, head and side
  int32_t positions;       // n
  int32_t past_tokens;     // position of row b's token t in out: past_tokens - length + t -
  int32_t first_position;  //   first_position
};

// Of params that check_dequantize has passed.
inline DequantizeArgs make_dequantize_args(const DequantizeParams& p) {
  const cache::LayerSpec& spec = p.spec;
  const cache::BlockLayout layout = spec.block_layout();
  const auto side = [&](const cache::ConstTensorView& exact, const cache::TensorView& out,
                        const SideTables& tables, int bits, int64_t codes, int64_t scales,
                        bool mean) -> DequantizeSideArgs {
    const int64_t row_pieces =
        std::max<int64_t>(1, quant::packed_row_bytes(spec.head_dim, bits) / 16);
    return {.exact = tensor_arg(exact.data, exact.type, exact.strides, spec.head_dim),
            .out = tensor_arg(out.data, out.type, out.strides, spec.head_dim),
            .exact_type = exact.type,
            .out_type = out.type,
            .tables = tables,
            .bits = bits,
            .codes_offset = static_cast<int32_t>(codes),
            .scales_offset = static_cast<int32_t>(scales),
            .has_mean = mean,
            .vector = spec.codebook == quant::CodebookKind::kVector,
            .pieces_inverse = static_cast<uint32_t>((65536 + row_pieces - 1) / row_pieces)};
  };
  return {.sides = {side(p.exact_keys, p.out_keys, p.tables.keys, spec.k_bits,
                         layout.k_codes_offset(), layout.k_scales_offset(), layout.has_mean),
                    side(p.exact_values, p.out_values, p.tables.values, spec.v_bits,
                         layout.v_codes_offset(), layout.v_scales_offset(), false)},
          .smoothing = spec.smooth_keys ? p.smoothing : nullptr,
          .pages = p.pages,
          .page_table = p.page_table,
          .rows = p.rows,
          .exact = spec.exact_layout(),
          .half_scales = spec.scale_type == cache::ScaleType::kFloat16,
          .dim = spec.head_dim,
          .batch = static_cast<int32_t>(p.out_keys.shape[0]),
          .num_heads = spec.num_kv_heads,
          .page_columns = static_cast<int32_t>(p.page_columns),
          .workers = static_cast<int32_t>(p.page_columns),
          .positions = static_cast<int32_t>(p.out_keys.shape[2]),
          .past_tokens = static_cast<int32_t>(p.past_tokens),
          .first_position = static_cast<int32_t>(p.first_position)};
}

struct DequantizeRow {
  int32_t length, num_entries, exact_begin;
};
TQ_HOST_DEVICE inline DequantizeRow dequantize_row(const DequantizeArgs& args, int b) {
  const int32_t* const row = args.rows + int64_t{b} * cache::tables::kRowColumns;
  return {row[cache::tables::kRowLength], row[cache::tables::kRowEntries],
          row[cache::tables::kRowExactBegin]};
}

}  // namespace turboquant::cuda::detail
