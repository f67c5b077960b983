// Attention over the same codes in double precision: what every backend is judged against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "turboquant/attention/decode_attention.hpp"
#include "turboquant/attention/split_plan.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/stored_scale.hpp"
#include "turboquant/cache/table_checks.hpp"

namespace turboquant::attention {

struct ReferenceAttention {
  std::vector<double> out;  // [B, Hq, q, D]
  std::vector<double> lse;  // [B, Hq, q]
  // [B, Hq, q] 2-norm of the softmax weights: independent errors of the weights reach the output
  // reduced by it (1 when one token takes everything, 1 / sqrt(n) when n share it).
  std::vector<double> weight_norm;
};

namespace detail {

// All tokens of one row and head, committed and new, as dense doubles [length + new_tokens, D].
struct DenseRow {
  std::vector<double> keys;
  std::vector<double> values;
};

inline DenseRow dense_row(const DecodeAttentionParams& p, const cache::LayerCodec& codec, int64_t b,
                          int head) {
  const int64_t dim = p.spec.head_dim;
  const cache::BlockLayout& layout = codec.layout();
  const cache::RowState row = cache::row_state(p.rows, b);
  const int64_t total = row.length + row.new_tokens;
  DenseRow dense{std::vector<double>(total * dim), std::vector<double>(total * dim)};
  std::vector<float> buffer(dim);
  const auto copy = [&](const cache::ConstTensorView& from, int64_t from_token, double* to) {
    cache::load_row(from, b, head, from_token, buffer.data());
    std::copy(buffer.begin(), buffer.end(), to);
  };
  const auto decode = [&](const cache::LayerCodec::Side& side, const std::byte* codes,
                          const std::byte* scale_at, double* to) {
    quant::decode_row(side.table, reinterpret_cast<const uint8_t*>(codes), dim, buffer.data());
    const double scale = cache::load_scale(p.spec.scale_type, scale_at);
    for (int64_t i = 0; i < dim; ++i) to[i] = scale * buffer[i];
  };

  const int64_t sinks = std::min<int64_t>(row.length, p.spec.sink_tokens);
  for (int64_t t = 0; t < total; ++t) {
    if (t >= sinks && t < row.exact_begin) continue;
    const bool committed = t < row.length;
    const int64_t from = committed
                             ? codec.exact().slot(t)
                             : cache::first_new_token(row, p.key_states.shape[2]) + t - row.length;
    copy(committed ? p.exact_keys : p.key_states, from, &dense.keys[t * dim]);
    copy(committed ? p.exact_values : p.value_states, from, &dense.values[t * dim]);
  }
  const auto batch = static_cast<int64_t>(p.rows.size()) / cache::tables::kRowColumns;
  const int64_t columns = static_cast<int64_t>(p.page_table.size()) / (batch * 2);
  int64_t t = sinks;
  for (int64_t e = 0; e < row.num_entries; ++e) {
    const int32_t* entry = p.page_table.data() + (b * columns + e) * 2;
    const std::byte* stored = p.pages.block(entry[0], head);
    for (int slot = 0; slot < entry[1]; ++slot, ++t) {
      double* const key = &dense.keys[t * dim];
      decode(codec.keys(), stored + layout.k_row(slot), stored + layout.k_scale(slot), key);
      for (int64_t i = 0; layout.has_mean && i < dim; ++i) {
        uint16_t bits;
        std::memcpy(&bits, stored + layout.k_mean_offset() + i * sizeof bits, sizeof bits);
        key[i] += math::fp32_from_fp16(bits);
      }
      codec.keys().rotations[head].apply_transpose(key, 1);
      for (int64_t i = 0; p.spec.smooth_keys && i < dim; ++i) {
        key[i] *= p.smoothing[(b * p.spec.num_kv_heads + head) * dim + i];
      }
      double* const value = &dense.values[t * dim];
      decode(codec.values(), stored + layout.v_row(slot), stored + layout.v_scale(slot), value);
      codec.values().rotations[head].apply_transpose(value, 1);
    }
  }
  return dense;
}

}  // namespace detail

// Dequantises every key and value in double and takes a plain softmax: no rotated queries, no
// splits, no online state. `out` and `lse` of the params are not touched. Trusts the tables.
inline ReferenceAttention reference_attention(const DecodeAttentionParams& p) {
  const auto codec = cache::LayerCodec::get(p.spec);
  const auto [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t group = num_heads / p.spec.num_kv_heads;
  ReferenceAttention result{std::vector<double>(batch * num_heads * num_queries * dim),
                            std::vector<double>(batch * num_heads * num_queries),
                            std::vector<double>(batch * num_heads * num_queries)};
  std::vector<float> query(dim);
  for (int64_t b = 0; b < batch; ++b) {
    const cache::RowState row = cache::row_state(p.rows, b);
    for (int64_t h = 0; h < num_heads; ++h) {
      if (h % group != 0) continue;  // dense rows are shared by a group
      const detail::DenseRow dense = detail::dense_row(p, *codec, b, static_cast<int>(h / group));
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t j = 0; j < num_queries; ++j) {
          const int64_t at = (b * num_heads + h + g) * num_queries + j;
          const auto [begin, end] =
              visible_tokens(query_position(row, num_queries, j), p.sliding_window);
          if (begin == end) {
            result.lse[at] = -INFINITY;
            continue;
          }
          cache::load_row(p.query, b, h + g, j, query.data());
          std::vector<double> scores(end - begin);
          double max = p.sink_logits ? p.sink_logits[h + g] : -INFINITY;
          for (int64_t t = begin; t < end; ++t) {
            double score = 0.0;
            for (int64_t i = 0; i < dim; ++i) score += query[i] * dense.keys[t * dim + i];
            score *= p.scaling;
            if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
            scores[t - begin] = score;
            max = std::max(max, score);
          }
          double sum = p.sink_logits ? std::exp(p.sink_logits[h + g] - max) : 0.0;
          double squares = 0.0;
          double* const out = &result.out[at * dim];
          for (int64_t t = begin; t < end; ++t) {
            const double weight = std::exp(scores[t - begin] - max);
            sum += weight;
            squares += weight * weight;
            for (int64_t i = 0; i < dim; ++i) out[i] += weight * dense.values[t * dim + i];
          }
          for (int64_t i = 0; i < dim; ++i) out[i] /= sum;
          result.lse[at] = max + std::log(sum);
          result.weight_norm[at] = std::sqrt(squares) / sum;
        }
      }
    }
  }
  return result;
}

}  // namespace turboquant::attention
