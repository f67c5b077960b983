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

// Half-open range of output positions or of tokens.
struct Range {
  int64_t begin, end;
};

Range intersection(Range a, Range b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

class Dequantizer {
 public:
  Dequantizer(const DequantizeParams& params, const LayerCodec& codec)
      : p_(params),
        codec_(codec),
        layout_(codec.layout()),
        dim_(codec.spec().head_dim),
        rows_(int64_t{kBlockTokens} * dim_),
        mean_(dim_) {}

  // Tokens [first_token, first_token + tokens) of row b, which a page holds: those that are asked.
  void page(int64_t b, int head, int64_t page, int64_t tokens, int64_t first_token) {
    const int64_t first_out = out_position(b, first_token);
    const Range out = intersection({first_out, first_out + tokens}, {0, p_.out_keys.shape[2]});
    const Range asked = {out.begin - first_out, out.end - first_out};
    const int64_t num_rows = asked.end - asked.begin;
    if (num_rows == 0) return;
    const std::byte* const stored = p_.pages.block(page, head);

    decode(codec_.keys(), stored + layout_.k_row(asked.begin), layout_.k_row_bytes(),
           stored + layout_.k_scale(asked.begin), num_rows);
    if (layout_.has_mean) add_mean(stored + layout_.k_mean_offset(), num_rows);
    codec_.keys().rotations[head].apply_transpose(rows_.data(), num_rows);
    if (codec_.spec().smooth_keys) {
      multiply(p_.smoothing + (b * codec_.spec().num_kv_heads + head) * dim_, num_rows);
    }
    write(p_.out_keys, b, head, out);

    decode(codec_.values(), stored + layout_.v_row(asked.begin), layout_.v_row_bytes(),
           stored + layout_.v_scale(asked.begin), num_rows);
    codec_.values().rotations[head].apply_transpose(rows_.data(), num_rows);
    write(p_.out_values, b, head, out);
  }

  // Padding, sinks and ring of (b, head).
  void exact(int64_t b, int head) {
    const RowState row = row_state(p_.rows, b);
    const Range all = {0, p_.out_keys.shape[2]};
    const Range padding = intersection({0, out_position(b, 0)}, all);
    std::fill(rows_.begin(), rows_.begin() + dim_, 0.0f);
    for (int64_t out = padding.begin; out < padding.end; ++out) {
      store_row(p_.out_keys, b, head, out, rows_.data());
      store_row(p_.out_values, b, head, out, rows_.data());
    }
    const int64_t sinks = std::min<int64_t>(row.length, codec_.spec().sink_tokens);
    for (const Range tokens : {Range{0, sinks}, Range{row.exact_begin, row.length}}) {
      const Range out =
          intersection({out_position(b, tokens.begin), out_position(b, tokens.end)}, all);
      for (int64_t position = out.begin; position < out.end; ++position) {
        const int64_t slot =
            codec_.exact().slot(tokens.begin + position - out_position(b, tokens.begin));
        load_row(p_.exact_keys, b, head, slot, rows_.data());
        store_row(p_.out_keys, b, head, position, rows_.data());
        load_row(p_.exact_values, b, head, slot, rows_.data());
        store_row(p_.out_values, b, head, position, rows_.data());
      }
    }
  }

 private:
  // Where token t of row b goes; below 0 or behind the last position: it was not asked for.
  int64_t out_position(int64_t b, int64_t t) const {
    return p_.past_tokens - row_state(p_.rows, b).length + t - p_.first_position;
  }

  // rows_ = scale * levels.
  void decode(const LayerCodec::Side& side, const std::byte* codes, int64_t row_bytes,
              const std::byte* scales, int64_t num_rows) {
    for (int64_t t = 0; t < num_rows; ++t) {
      float* const row = rows_.data() + t * dim_;
      quant::decode_row(side.table, reinterpret_cast<const uint8_t*>(codes) + t * row_bytes, dim_,
                        row);
      const float scale = load_scale(codec_.spec().scale_type, scales + t * layout_.scale_bytes);
      for (int64_t c = 0; c < dim_; ++c) row[c] *= scale;
    }
  }

  void add_mean(const std::byte* stored, int64_t num_rows) {
    for (int64_t c = 0; c < dim_; ++c) {
      uint16_t bits;
      std::memcpy(&bits, stored + c * sizeof bits, sizeof bits);
      mean_[c] = math::fp32_from_fp16(bits);
    }
    const float* const mean = mean_.data();
    for (int64_t t = 0; t < num_rows; ++t) {
      float* const row = rows_.data() + t * dim_;
      for (int64_t c = 0; c < dim_; ++c) row[c] += mean[c];
    }
  }

  void multiply(const float* smoothing, int64_t num_rows) {
    for (int64_t t = 0; t < num_rows; ++t) {
      float* const row = rows_.data() + t * dim_;
      for (int64_t c = 0; c < dim_; ++c) row[c] *= smoothing[c];
    }
  }

  void write(const TensorView& out, int64_t b, int head, Range positions) const {
    for (int64_t t = positions.begin; t < positions.end; ++t) {
      store_row(out, b, head, t, rows_.data() + (t - positions.begin) * dim_);
    }
  }

  const DequantizeParams& p_;
  const LayerCodec& codec_;
  const BlockLayout& layout_;
  int64_t dim_;
  std::vector<float> rows_;  // scratch [kBlockTokens, D]
  std::vector<float> mean_;  // scratch [D]
};

void check_positions(const DequantizeParams& params, int64_t batch, int64_t positions) {
  const auto check = [](const char* argument, bool fits, const char* expected, int64_t bound,
                        int64_t actual) {
    if (!fits) {
      turboquant::detail::throw_invalid(argument, expected + std::to_string(bound),
                                        std::to_string(actual));
    }
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    longest = std::max<int64_t>(longest, row_state(params.rows, b).length);
  }
  check("past_tokens", params.past_tokens >= longest, "at least the longest row's length ", longest,
        params.past_tokens);
  const int64_t last_first = params.past_tokens - positions;
  check("out_keys", last_first >= 0, "at most past_tokens positions, ", params.past_tokens,
        positions);
  check("first_position", params.first_position >= 0 && params.first_position <= last_first,
        "0 to past_tokens less the positions of out_keys, ", last_first, params.first_position);
}

}  // namespace

void dequantize(const DequantizeParams& params, const ParallelFor& parallel_for) {
  const auto codec = LayerCodec::get(params.spec);
  const int64_t batch = params.out_keys.shape[0];
  const int64_t positions = params.out_keys.shape[2];
  const std::array<int64_t, 4> out_shape = {batch, params.spec.num_kv_heads, positions,
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
  check_positions(params, batch, positions);

  const int64_t num_heads = params.spec.num_kv_heads;
  // Item (row, head, e): entry e, or, for e = columns, everything that is in no page.
  parallel_for(batch * num_heads * (columns + 1), [&](int64_t begin, int64_t end) {
    Dequantizer dequantizer(params, *codec);
    int64_t known_row = -1, known_entry = 0, known_token = 0;  // prefix sum of the row's entries
    for (int64_t item = begin; item < end; ++item) {
      const int64_t e = item % (columns + 1);
      const int head = static_cast<int>(item / (columns + 1) % num_heads);
      const int64_t b = item / ((columns + 1) * num_heads);
      const RowState row = row_state(params.rows, b);
      if (e == columns) {
        dequantizer.exact(b, head);
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
      dequantizer.page(b, head, entries[2 * e], entries[2 * e + 1], known_token);
    }
  });
}

}  // namespace turboquant::cache
