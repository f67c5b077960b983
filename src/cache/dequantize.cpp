// Compiled without FMA contraction (src/CMakeLists.txt): every backend returns the same bits.
#include "turboquant/cache/dequantize.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/stored_scale.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

class Dequantizer {
 public:
  Dequantizer(const DequantizeParams& params, const LayerCodec& codec)
      : p_(params), codec_(codec), layout_(codec.layout()), dim_(codec.spec().head_dim) {}

  int64_t first_out_token(const RowState& row) const { return p_.out_keys.shape[2] - row.length; }

  // Tokens [0, tokens) of a block to tokens [first_out, ...) of (b, head); rows is scratch [64, D].
  void page(int64_t b, int head, int64_t page, int64_t tokens, int64_t first_out,
            float* rows) const {
    const std::byte* const stored = p_.pages.block(page, head);
    decode(codec_.keys(), stored + layout_.k_row(0), layout_.k_row_bytes(),
           stored + layout_.k_scale(0), tokens, rows);
    if (layout_.has_mean) {
      for (int64_t c = 0; c < dim_; ++c) {
        uint16_t bits;
        std::memcpy(&bits, stored + layout_.k_mean_offset() + c * sizeof bits, sizeof bits);
        const float mean = math::fp32_from_fp16(bits);
        for (int64_t t = 0; t < tokens; ++t) rows[t * dim_ + c] += mean;
      }
    }
    codec_.keys().rotations[head].apply_transpose(rows, tokens);
    if (codec_.spec().smooth_keys) {
      const float* const s = p_.smoothing + (b * codec_.spec().num_kv_heads + head) * dim_;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < dim_; ++c) rows[t * dim_ + c] *= s[c];
      }
    }
    write(p_.out_keys, b, head, first_out, tokens, rows);

    decode(codec_.values(), stored + layout_.v_row(0), layout_.v_row_bytes(),
           stored + layout_.v_scale(0), tokens, rows);
    codec_.values().rotations[head].apply_transpose(rows, tokens);
    write(p_.out_values, b, head, first_out, tokens, rows);
  }

  // Padding, sinks and ring of (b, head); row_buffer is scratch [D].
  void exact(int64_t b, int head, float* row_buffer) const {
    const RowState row = row_state(p_.rows, b);
    const int64_t first_out = first_out_token(row);
    std::fill(row_buffer, row_buffer + dim_, 0.0f);
    for (int64_t t = 0; t < first_out; ++t) {
      store_row(p_.out_keys, b, head, t, row_buffer);
      store_row(p_.out_values, b, head, t, row_buffer);
    }
    const int64_t sinks = std::min<int64_t>(row.length, codec_.spec().sink_tokens);
    const auto copy = [&](int64_t t) {
      const int64_t slot = codec_.exact().slot(t);
      load_row(p_.exact_keys, b, head, slot, row_buffer);
      store_row(p_.out_keys, b, head, first_out + t, row_buffer);
      load_row(p_.exact_values, b, head, slot, row_buffer);
      store_row(p_.out_values, b, head, first_out + t, row_buffer);
    };
    for (int64_t t = 0; t < sinks; ++t) copy(t);
    for (int64_t t = row.exact_begin; t < row.length; ++t) copy(t);
  }

 private:
  void decode(const LayerCodec::Side& side, const std::byte* codes, int64_t row_bytes,
              const std::byte* scales, int64_t tokens, float* rows) const {
    for (int64_t t = 0; t < tokens; ++t) {
      float* const row = rows + t * dim_;
      quant::decode_row(side.table, reinterpret_cast<const uint8_t*>(codes) + t * row_bytes, dim_,
                        row);
      const float scale = load_scale(codec_.spec().scale_type, scales + t * layout_.scale_bytes);
      for (int64_t c = 0; c < dim_; ++c) row[c] *= scale;
    }
  }

  void write(const TensorView& out, int64_t b, int head, int64_t first_out, int64_t tokens,
             const float* rows) const {
    for (int64_t t = 0; t < tokens; ++t) store_row(out, b, head, first_out + t, rows + t * dim_);
  }

  const DequantizeParams& p_;
  const LayerCodec& codec_;
  const BlockLayout& layout_;
  int64_t dim_;
};

}  // namespace

void dequantize(const DequantizeParams& params, const ParallelFor& parallel_for) {
  const auto codec = LayerCodec::get(params.spec);
  const int64_t batch = params.out_keys.shape[0];
  const int64_t past = params.out_keys.shape[2];
  const std::array<int64_t, 4> out_shape = {batch, params.spec.num_kv_heads, past,
                                            params.spec.head_dim};
  check_shape("out_keys", params.out_keys, out_shape);
  check_shape("out_values", params.out_values, out_shape);
  check_exact(params.spec, batch, params.exact_keys, params.exact_values);
  check_pages(params.spec, params.pages);
  check_rows(params.spec, params.rows, batch, INT32_MAX);
  const int64_t columns =
      check_page_table(params.spec, params.page_table, params.rows, batch, params.pages);
  if (params.spec.smooth_keys && params.smoothing == nullptr) {
    turboquant::detail::throw_invalid("smoothing", "data", "null");
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (row_state(params.rows, b).length > past) {
      turboquant::detail::throw_invalid(
          "out_keys",
          "room for every row's tokens (" + std::to_string(row_state(params.rows, b).length) + ")",
          std::to_string(past));
    }
  }

  const Dequantizer dequantizer(params, *codec);
  const int64_t num_heads = params.spec.num_kv_heads;
  // Item (row, head, e): entry e, or, for e = columns, everything that is in no page.
  parallel_for(batch * num_heads * (columns + 1), [&](int64_t begin, int64_t end) {
    std::vector<float> rows(int64_t{kBlockTokens} * params.spec.head_dim);
    int64_t known_row = -1, known_entry = 0, known_token = 0;  // prefix sum of the row's entries
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = item % (columns + 1);
      const int head = static_cast<int>(item / (columns + 1) % num_heads);
      const int64_t b = item / ((columns + 1) * num_heads);
      const RowState row = row_state(params.rows, b);
      if (e == columns) {
        dequantizer.exact(b, head, rows.data());
        continue;
      }
      if (e >= row.num_entries) continue;
      const int32_t* const entries = params.page_table.data() + b * columns * tables::kPageColumns;
      if (known_row != b || known_entry > e) {
        known_row = b;
        known_entry = 0;
        known_token = std::min<int64_t>(row.length, params.spec.sink_tokens);
      }
      for (; known_entry < e; ++known_entry) known_token += entries[2 * known_entry + 1];
      dequantizer.page(b, head, entries[2 * e], entries[2 * e + 1],
                       dequantizer.first_out_token(row) + known_token, rows.data());
    }
  });
}

}  // namespace turboquant::cache
