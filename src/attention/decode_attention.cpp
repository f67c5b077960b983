#include "turboquant/attention/decode_attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/attention_kernels.hpp"
#include "turboquant/attention/softmax_state.hpp"
#include "turboquant/attention/split_plan.hpp"
#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/table_checks.hpp"
#include "turboquant/error.hpp"

namespace turboquant::attention {
namespace {

using cache::kBlockTokens;
using cache::RowState;
using turboquant::detail::throw_invalid;

constexpr int64_t kPartialBytes = int64_t{32} << 20;  // memory of partial results at a time

// Waking threads takes some microseconds: loops over fewer numbers than this run where they are.
constexpr int64_t kParallelFloats = 16384;

void for_all(int64_t count, int64_t floats, const ParallelFor& parallel_for,
             const ParallelBody& body) {
  if (floats < kParallelFloats) {
    body(0, count);
  } else {
    parallel_for(count, body);
  }
}

// Shapes of a call, derived once.
struct Shape {
  int64_t batch, num_heads, num_queries, dim, stride;
  int64_t num_kv_heads, group, queries_per_head;
  int64_t chunk_tokens, columns;
};

// What one thread needs while it works.
struct Scratch {
  explicit Scratch(int64_t stride) : mean(stride) {}
  std::vector<float> keys, values;  // [64, stride], padding stays zero; empty until needed
  std::vector<float> mean;          // [stride]
  alignas(64) std::array<float, kBlockTokens> key_scales{}, value_scales{};
  std::array<int32_t, kQueryTileRows> begin{}, end{};
};

class DecodeAttention {
 public:
  DecodeAttention(const DecodeAttentionParams& params, const cache::LayerCodec& codec,
                  const Shape& shape)
      : p_(params),
        codec_(codec),
        layout_(codec.layout()),
        shape_(shape),
        kernels_(detail::active_attention_kernels()),
        exact_queries_(shape.batch * shape.num_heads * shape.num_queries * shape.stride),
        page_queries_(exact_queries_.size()),
        packed_(takes_packed(codec.keys()) && takes_packed(codec.values())),
        first_paged_token_(shape.batch * (shape.columns + 1)) {
    if (packed_ && kernels_.pack_queries != nullptr) {
      packed_queries_.resize(page_queries_.size());
      query_units_.resize(page_queries_.size() / shape.stride);
    }
    for (int64_t b = 0; b < shape_.batch; ++b) {
      const RowState row = cache::row_state(p_.rows, b);
      int64_t* const first = &first_paged_token_[b * (shape_.columns + 1)];
      first[0] = std::min<int64_t>(row.length, p_.spec.sink_tokens);
      for (int64_t e = 0; e < row.num_entries; ++e) first[e + 1] = first[e] + entry(b, e)[1];
    }
  }

  void run(const ParallelFor& parallel_for) {
    const int64_t floats_per_partial = kQueryTileRows * (shape_.stride + 2);
    const SplitPlan plan = SplitPlan::make(
        p_.rows, shape_.batch, static_cast<int>(shape_.num_kv_heads), shape_.queries_per_head,
        kPartialBytes / (floats_per_partial * int64_t{sizeof(float)}));
    const auto num_query_floats = static_cast<int64_t>(page_queries_.size());
    for_all(shape_.batch * shape_.num_kv_heads, num_query_floats, parallel_for,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                prepare_queries(i / shape_.num_kv_heads, static_cast<int>(i % shape_.num_kv_heads));
              }
            });
    int64_t first_tile = 0;
    for (const int64_t end_tile : plan.wave_ends) {
      const std::span wave(plan.tiles.data() + first_tile, end_tile - first_tile);
      run_wave(wave, parallel_for);
      first_tile = end_tile;
    }
  }

 private:
  // One partial result: the states of a query tile and its outputs [kQueryTileRows, stride].
  struct Partial {
    float* max;
    float* sum;
    float* output;
  };

  const int32_t* entry(int64_t b, int64_t e) const {
    return p_.page_table.data() + (b * shape_.columns + e) * cache::tables::kPageColumns;
  }

  // Query rows of a head are flattened [q][group]: row r is query r / group, head r % group.
  int64_t query_index(int64_t b, int head, int64_t r) const {
    return (b * shape_.num_kv_heads + head) * shape_.queries_per_head + r;
  }
  int64_t query_row(int64_t b, int head, int64_t r) const {
    return query_index(b, head, r) * shape_.stride;
  }

  // q * scaling for the exact tokens, R (q * s) * scaling for the pages.
  void prepare_queries(int64_t b, int head) {
    const float* const s = p_.spec.smooth_keys
                               ? p_.smoothing + (b * shape_.num_kv_heads + head) * shape_.dim
                               : nullptr;
    for (int64_t r = 0; r < shape_.queries_per_head; ++r) {
      float* const exact = &exact_queries_[query_row(b, head, r)];
      float* const paged = &page_queries_[query_row(b, head, r)];
      cache::load_row(p_.query, b, head * shape_.group + r % shape_.group, r / shape_.group, exact);
      for (int64_t i = 0; i < shape_.dim; ++i) {
        exact[i] *= p_.scaling;
        paged[i] = s != nullptr ? exact[i] * s[i] : exact[i];
      }
    }
    codec_.keys().rotations[head].apply(&page_queries_[query_row(b, head, 0)],
                                        shape_.queries_per_head, shape_.stride);
    if (!packed_queries_.empty()) {
      kernels_.pack_queries({.stride = shape_.stride,
                             .k_bits = p_.spec.k_bits,
                             .pairs = !codec_.keys().table.pair_planes.empty(),
                             .num_queries = shape_.queries_per_head,
                             .queries = &page_queries_[query_row(b, head, 0)],
                             .packed = &packed_queries_[query_row(b, head, 0)],
                             .units = &query_units_[query_index(b, head, 0)]});
    }
  }

  void run_wave(std::span<const QueryTile> wave, const ParallelFor& parallel_for) {
    const int64_t num_partials = wave.back().first_partial + wave.back().splits + 1;
    int64_t most_queries = 0;
    for (const QueryTile& tile : wave) {
      most_queries = std::max<int64_t>(most_queries, tile.num_queries);
    }
    const int64_t partial_floats = most_queries * (shape_.stride + 2);
    std::vector<float> memory(num_partials * partial_floats);
    const auto partial = [&](int64_t i) {
      float* const start = memory.data() + i * partial_floats;
      return Partial{start + most_queries * shape_.stride,
                     start + most_queries * (shape_.stride + 1), start};
    };
    parallel_for(num_partials, [&](int64_t begin, int64_t end) {
      Scratch scratch(shape_.stride);
      // The tile that holds partial `begin`; partials ascend through the tiles.
      auto tile =
          std::upper_bound(wave.begin(), wave.end(), begin,
                           [](int64_t i, const QueryTile& t) { return i < t.first_partial; });
      --tile;
      for (int64_t i = begin; i < end; ++i) {
        if (i > tile->first_partial + tile->splits) ++tile;
        const Partial result = partial(i);
        std::fill(result.max, result.max + tile->num_queries, -INFINITY);
        const int64_t split = i - tile->first_partial;
        if (split < tile->splits) {
          attend_split(*tile, split, result, scratch);
          if (tile->splits == 1) rotate_back(*tile, result);  // nothing to merge before
        } else {
          attend_exact(*tile, result, scratch);
        }
      }
    });
    const auto merge = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const QueryTile& tile = wave[i];
        const Partial first = partial(tile.first_partial);
        for (int64_t split = 1; split < tile.splits; ++split) {
          merge_into(tile, first, partial(tile.first_partial + split));
        }
        const Partial exact = partial(tile.first_partial + tile.splits);
        if (tile.splits > 1) rotate_back(tile, first);
        if (tile.splits > 0) merge_into(tile, first, exact);
        finish(tile, first);
      }
    };
    for_all(static_cast<int64_t>(wave.size()), static_cast<int64_t>(memory.size()), parallel_for,
            merge);
  }

  void rotate_back(const QueryTile& tile, const Partial& paged) const {
    codec_.values().rotations[tile.kv_head].apply_transpose(paged.output, tile.num_queries,
                                                            shape_.stride);
  }

  void attend_split(const QueryTile& tile, int64_t split, const Partial& result,
                    Scratch& scratch) const {
    const int64_t num_entries = cache::row_state(p_.rows, tile.row).num_entries;
    const int64_t end = std::min<int64_t>(num_entries, (split + 1) * kSplitPages);
    for (int64_t e = split * kSplitPages; e < end; ++e) {
      const int64_t first_token = first_paged_token_[tile.row * (shape_.columns + 1) + e];
      const int tokens = entry(tile.row, e)[1];
      if (!mark_visible(tile, first_token, tokens, scratch)) continue;
      const std::byte* const stored = p_.pages.block(entry(tile.row, e)[0], tile.kv_head);
      if (e + 1 < end) {  // pages lie anywhere: the processor cannot guess the next one
        const std::byte* const next = p_.pages.block(entry(tile.row, e + 1)[0], tile.kv_head);
        for (int64_t i = 0; i < layout_.block_bytes(); i += 64) __builtin_prefetch(next + i, 0, 3);
      }
      const bool packed = packed_ && tile.num_queries <= kernels_.packed_queries;
      const detail::TileRows keys =
          open_rows(codec_.keys(), packed, stored + layout_.k_row(0), layout_.k_row_bytes(),
                    stored + layout_.k_scale(0), tokens, scratch.keys, scratch.key_scales);
      const detail::TileRows values =
          open_rows(codec_.values(), packed, stored + layout_.v_row(0), layout_.v_row_bytes(),
                    stored + layout_.v_scale(0), tokens, scratch.values, scratch.value_scales);
      if (layout_.has_mean) {
        kernels_.widen_halves(stored + layout_.k_mean_offset(), shape_.dim, scratch.mean.data());
      }
      attend(tile, page_queries_, tokens, true, keys, values, result, scratch);
    }
  }

  // Sinks, ring and chunk, in the order of their positions.
  void attend_exact(const QueryTile& tile, const Partial& result, Scratch& scratch) const {
    const RowState row = cache::row_state(p_.rows, tile.row);
    const int64_t chunk_start = cache::first_new_token(row, shape_.chunk_tokens);
    const auto range = [&](int64_t begin, int64_t end, const cache::ConstTensorView& keys,
                           const cache::ConstTensorView& values, auto slot_of) {
      for (int64_t t = begin; t < end; t += kBlockTokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(kBlockTokens, end - t));
        if (!mark_visible(tile, t, tokens, scratch)) continue;
        const auto rows = [&](const cache::ConstTensorView& tensor, std::vector<float>& copy) {
          const float* const stored =
              rows_in_place(tensor, tile, slot_of(t), slot_of(t + tokens - 1), tokens);
          if (stored != nullptr) return floats(stored);
          float* const rows_of_copy = tile_floats(copy);
          for (int i = 0; i < tokens; ++i) {
            cache::load_row(tensor, tile.row, tile.kv_head, slot_of(t + i),
                            rows_of_copy + i * shape_.stride);
          }
          return floats(rows_of_copy);
        };
        attend(tile, exact_queries_, tokens, false, rows(keys, scratch.keys),
               rows(values, scratch.values), result, scratch);
      }
    };
    const auto exact_slot = [&](int64_t t) { return codec_.exact().slot(t); };
    range(0, std::min<int64_t>(row.length, p_.spec.sink_tokens), p_.exact_keys, p_.exact_values,
          exact_slot);
    range(row.exact_begin, row.length, p_.exact_keys, p_.exact_values, exact_slot);
    range(row.length, row.length + row.new_tokens, p_.key_states, p_.value_states,
          [&](int64_t t) { return chunk_start + t - row.length; });
  }

  // The part of tokens [first_token, first_token + tokens) that each query of the tile sees.
  // False if none sees any.
  bool mark_visible(const QueryTile& tile, int64_t first_token, int tokens,
                    Scratch& scratch) const {
    const RowState row = cache::row_state(p_.rows, tile.row);
    bool any = false;
    for (int r = 0; r < tile.num_queries; ++r) {
      const int64_t j = (tile.first_query + r) / shape_.group;
      const auto [begin, end] =
          visible_tokens(query_position(row, shape_.num_queries, j), p_.sliding_window);
      const auto relative = [&](int64_t t) {
        return static_cast<int32_t>(std::clamp<int64_t>(t - first_token, 0, tokens));
      };
      scratch.begin[r] = relative(begin);
      scratch.end[r] = relative(end);
      any = any || scratch.begin[r] < scratch.end[r];
    }
    return any;
  }

  static detail::TileRows floats(const float* rows) { return {rows, 0, nullptr, nullptr, 0}; }

  float* tile_floats(std::vector<float>& rows) const {
    rows.resize(kBlockTokens * shape_.stride);  // does nothing but for the first time
    return rows.data();
  }

  // The rows of slots first_slot to last_slot where they lie, if they lie there as kernels take
  // them: fp32, one after the other without padding, a whole tile readable. Null if not.
  const float* rows_in_place(const cache::ConstTensorView& tensor, const QueryTile& tile,
                             int64_t first_slot, int64_t last_slot, int tokens) const {
    const bool fits = tensor.type == cache::ElementType::kFloat32 && tensor.strides[3] == 1 &&
                      tensor.strides[2] == shape_.stride && shape_.dim == shape_.stride &&
                      last_slot - first_slot == tokens - 1 &&
                      first_slot + kBlockTokens <= tensor.shape[2];
    if (!fits) return nullptr;
    return reinterpret_cast<const float*>(tensor.row(tile.row, tile.kv_head, first_slot));
  }

  // Whether the kernels take the pages' codes of keys or values as they are.
  bool takes_packed(const cache::LayerCodec::Side& side) const {
    const bool pairs = !side.table.pair_planes.empty();
    return kernels_.takes_packed(shape_.dim, side.bits, pairs) &&
           (pairs || !detail::scalar_levels(side.table).empty());
  }

  // A page's rows as the kernel takes them, and their scales.
  detail::TileRows open_rows(const cache::LayerCodec::Side& side, bool packed,
                             const std::byte* stored, int64_t row_bytes,
                             const std::byte* stored_scales, int tokens,
                             std::vector<float>& decoded,
                             std::array<float, kBlockTokens>& scales) const {
    // Whole blocks: what lies behind `tokens` is storage too, and is masked.
    if (p_.spec.scale_type == cache::ScaleType::kFloat16) {
      kernels_.widen_halves(stored_scales, kBlockTokens, scales.data());
    } else {
      std::memcpy(scales.data(), stored_scales, sizeof scales);
    }
    const auto* const codes = reinterpret_cast<const uint8_t*>(stored);
    if (packed) {
      const std::vector<int8_t>& planes = side.table.pair_planes;
      return {nullptr, side.bits, detail::scalar_levels(side.table).data(),
              codes,   row_bytes, planes.empty() ? nullptr : planes.data()};
    }
    float* const rows = tile_floats(decoded);
    detail::decode_table_rows(kernels_, side.table, codes, row_bytes, tokens, shape_.dim, rows,
                              shape_.stride);
    return floats(rows);
  }

  void attend(const QueryTile& tile, const std::vector<float>& queries, int tokens, bool paged,
              const detail::TileRows& keys, const detail::TileRows& values, const Partial& result,
              const Scratch& scratch) const {
    const bool packed = keys.floats == nullptr;
    const auto attend_tile = packed ? kernels_.attend_packed_tile : kernels_.attend_tile;
    const int64_t first = query_index(tile.row, tile.kv_head, tile.first_query);
    const bool integers = packed && !packed_queries_.empty();
    attend_tile({.stride = shape_.stride,
                 .num_queries = tile.num_queries,
                 .num_tokens = tokens,
                 .queries = &queries[first * shape_.stride],
                 .packed_queries = integers ? &packed_queries_[first * shape_.stride] : nullptr,
                 .query_units = integers ? &query_units_[first] : nullptr,
                 .keys = keys,
                 .values = values,
                 .mean = paged && layout_.has_mean ? scratch.mean.data() : nullptr,
                 .key_scales = paged ? scratch.key_scales.data() : nullptr,
                 .value_scales = paged ? scratch.value_scales.data() : nullptr,
                 .softcap = p_.softcap,
                 .begin = scratch.begin.data(),
                 .end = scratch.end.data(),
                 .max = result.max,
                 .sum = result.sum,
                 .output = result.output});
  }

  void merge_into(const QueryTile& tile, const Partial& into, const Partial& other) const {
    for (int r = 0; r < tile.num_queries; ++r) {
      SoftmaxState<float> state{into.max[r], into.sum[r]};
      merge(state, into.output + r * shape_.stride, {other.max[r], other.sum[r]},
            other.output + r * shape_.stride, shape_.dim);
      into.max[r] = state.max;
      into.sum[r] = state.sum;
    }
  }

  // Divides by the sum and writes output and lse.
  void finish(const QueryTile& tile, const Partial& result) const {
    const RowState row = cache::row_state(p_.rows, tile.row);
    for (int r = 0; r < tile.num_queries; ++r) {
      const int64_t flat = tile.first_query + r;
      const int64_t j = flat / shape_.group;
      const int64_t head = tile.kv_head * shape_.group + flat % shape_.group;
      SoftmaxState<float> state{result.max[r], result.sum[r]};
      float* const output = result.output + r * shape_.stride;
      const bool padding = query_position(row, shape_.num_queries, j) < 0;
      if (p_.sink_logits != nullptr && !padding) {
        const float weight = merge(state, SoftmaxState<float>{p_.sink_logits[head], 1.0f}).first;
        for (int64_t i = 0; i < shape_.dim; ++i) output[i] *= weight;
      }
      for (int64_t i = 0; i < shape_.dim; ++i) {
        output[i] = state.empty() ? 0.0f : output[i] / state.sum;
      }
      cache::store_row(p_.out, tile.row, head, j, output);
      if (p_.lse != nullptr) {
        p_.lse[(tile.row * shape_.num_heads + head) * shape_.num_queries + j] = state.log_sum_exp();
      }
    }
  }

  const DecodeAttentionParams& p_;
  const cache::LayerCodec& codec_;
  const cache::BlockLayout& layout_;
  const Shape& shape_;
  const detail::AttentionKernels& kernels_;
  std::vector<float> exact_queries_;  // [B, H, q * group, stride]
  std::vector<float> page_queries_;
  const bool packed_;                       // pages' codes go to the kernels as they are
  std::vector<int16_t> packed_queries_;     // of pack_queries, where the kernels offer it
  std::vector<float> query_units_;          // [B, H, q * group]
  std::vector<int64_t> first_paged_token_;  // [B, columns + 1]: position of an entry's first token
};

Shape check(const DecodeAttentionParams& p) {
  const auto [batch, num_heads, num_queries, dim] = p.query.shape;
  const int64_t num_kv_heads = p.spec.num_kv_heads;
  if (num_heads < 1 || num_heads % num_kv_heads != 0) {
    throw_invalid("query", "a multiple of " + std::to_string(num_kv_heads) + " heads",
                  std::to_string(num_heads));
  }
  if (num_queries < 1 || num_queries > INT32_MAX / num_heads) {
    throw_invalid("query", "1 or more tokens", std::to_string(num_queries));
  }
  cache::check_shape("query", p.query, {batch, num_heads, num_queries, p.spec.head_dim});
  const int64_t chunk_tokens = p.key_states.shape[2];
  if (chunk_tokens != 0 && chunk_tokens != num_queries) {
    throw_invalid("key_states", "0 or " + std::to_string(num_queries) + " tokens, as the query",
                  std::to_string(chunk_tokens));
  }
  if (chunk_tokens > 0) {
    const std::array<int64_t, 4> chunk = {batch, num_kv_heads, chunk_tokens, dim};
    cache::check_shape("key_states", p.key_states, chunk);
    cache::check_shape("value_states", p.value_states, chunk);
  }
  cache::check_shape("out", p.out, {batch, num_heads, num_queries, dim});
  cache::check_exact(p.spec, batch, p.exact_keys, p.exact_values);
  if (p.spec.smooth_keys && p.smoothing == nullptr) throw_invalid("smoothing", "data", "null");
  cache::check_pages(p.spec, p.pages);
  cache::check_rows(p.spec, p.rows, batch, chunk_tokens);
  const int64_t columns = cache::check_page_table(p.spec, p.page_table, p.rows, batch, p.pages);
  if (!std::isfinite(p.scaling)) {
    throw_invalid("scaling", "a finite number", std::to_string(p.scaling));
  }
  if (!(p.softcap >= 0.0f) || std::isinf(p.softcap)) {
    throw_invalid("softcap", "0 (none) or a positive number", std::to_string(p.softcap));
  }
  if (p.sliding_window < 0) {
    throw_invalid("sliding_window", "0 (none) or more", std::to_string(p.sliding_window));
  }
  const int64_t group = num_heads / num_kv_heads;
  return {.batch = batch,
          .num_heads = num_heads,
          .num_queries = num_queries,
          .dim = dim,
          .stride = detail::padded_dim(dim),
          .num_kv_heads = num_kv_heads,
          .group = group,
          .queries_per_head = num_queries * group,
          .chunk_tokens = chunk_tokens,
          .columns = columns};
}

}  // namespace

void decode_attention(const DecodeAttentionParams& params, const ParallelFor& parallel_for) {
  const auto codec = cache::LayerCodec::get(params.spec);
  const Shape shape = check(params);
  DecodeAttention(params, *codec, shape).run(parallel_for);
}

}  // namespace turboquant::attention
