#include "turboquant/cache/layer_store.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "turboquant/attention/decode_attention.hpp"
#include "turboquant/cache/dequantize.hpp"
#include "turboquant/cache/encode_append.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {
namespace {

constexpr int64_t kDefaultSlabBytes = int64_t{1} << 20;

const LayerSpec& validated(const LayerSpec& spec) {
  spec.validate();
  return spec;
}

int64_t page_bytes(const LayerSpec& spec) {
  return spec.block_layout().page_bytes(spec.num_kv_heads);
}

int64_t slab_pages(const LayerSpec& spec, int64_t pages_per_slab) {
  return pages_per_slab > 0 ? pages_per_slab
                            : std::max<int64_t>(1, kDefaultSlabBytes / page_bytes(spec));
}

// Bytes of one row's exact keys. Each factor is bounded by LayerSpec::validate.
int64_t exact_row_bytes(const LayerSpec& spec, ElementType type) {
  return spec.exact_layout().capacity() * spec.head_dim * element_bytes(type) * spec.num_kv_heads;
}

int64_t checked_exact_bytes(const LayerSpec& spec, ElementType type, int64_t batch_size) {
  const int64_t row_bytes = exact_row_bytes(spec, type);
  if (row_bytes > 0 && batch_size > std::numeric_limits<int64_t>::max() / row_bytes) {
    turboquant::detail::throw_invalid("batch_size", "exact buffers whose size fits 64 bits",
                                      std::to_string(batch_size));
  }
  return batch_size * row_bytes;
}

template <class Element>
std::vector<Element> gather_rows(const std::vector<Element>& rows, int64_t row_elems,
                                 std::span<const int64_t> indices) {
  std::vector<Element> gathered(indices.size() * row_elems);
  for (size_t i = 0; i < indices.size(); ++i) {
    std::copy_n(rows.begin() + indices[i] * row_elems, row_elems, gathered.begin() + i * row_elems);
  }
  return gathered;
}

// The new tokens per row: as given, or the whole chunk in every row.
std::vector<int32_t> counts_or_all(std::span<const int32_t> new_tokens, int batch_size,
                                   int64_t chunk_tokens) {
  if (!new_tokens.empty()) return {new_tokens.begin(), new_tokens.end()};
  if (chunk_tokens > std::numeric_limits<int32_t>::max()) {
    turboquant::detail::throw_invalid("key_states", "at most 2^31 - 1 tokens",
                                      std::to_string(chunk_tokens));
  }
  return std::vector<int32_t>(batch_size, static_cast<int32_t>(chunk_tokens));
}

}  // namespace

LayerStore::LayerStore(const LayerSpec& spec, int batch_size, ElementType element_type,
                       int64_t pages_per_slab)
    : spec_(validated(spec)),
      element_type_(element_type),
      table_(batch_size, spec.sink_tokens, spec.window_tokens),
      pool_(page_bytes(spec), spec.block_layout().block_bytes(), slab_pages(spec, pages_per_slab)),
      exact_keys_(checked_exact_bytes(spec, element_type, batch_size)),
      exact_values_(exact_keys_.size()),
      smoothing_(spec.smooth_keys ? int64_t{batch_size} * spec.num_kv_heads * spec.head_dim : 0,
                 1.0f) {}

void LayerStore::append(const ConstTensorView& key_states, const ConstTensorView& value_states,
                        std::span<const int32_t> new_tokens, const ParallelFor& parallel_for) {
  check_shape("key_states", key_states,
              {table_.batch_size(), spec_.num_kv_heads, key_states.shape[2], spec_.head_dim});
  const std::vector<int32_t> counts =
      counts_or_all(new_tokens, table_.batch_size(), key_states.shape[2]);
  const AppendPlan plan = table_.plan_append(counts);
  const std::vector<int32_t> rows = table_.export_rows(counts);
  const int64_t pages_before = pool_.num_pages();
  try {
    table_.prepare(plan);
    pool_.reserve(plan.pages_needed);
    for (const PageCopy& copy : plan.copies) pool_.copy_page(copy.from_page, copy.to_page);
    static_assert(std::is_standard_layout_v<EncodeJob>);
    encode_append({.spec = spec_,
                   .key_states = key_states,
                   .value_states = value_states,
                   .exact_keys = exact_keys(),
                   .exact_values = exact_values(),
                   .smoothing = smoothing_.data(),
                   .pages = pool_.view(),
                   .rows = rows,
                   .jobs = {reinterpret_cast<const int32_t*>(plan.jobs.data()),
                            plan.jobs.size() * tables::kJobColumns},
                   .counters = counters_.data()},
                  parallel_for);
  } catch (...) {
    pool_.shrink(pages_before);
    throw;
  }
  table_.commit(plan);
}

void LayerStore::attend(const AttendArgs& args, const ParallelFor& parallel_for) const {
  const std::vector<int32_t> counts =
      counts_or_all(args.new_tokens, table_.batch_size(), args.key_states.shape[2]);
  const std::vector<int32_t> page_table = table_.export_page_table(table_.max_entries());
  const std::vector<int32_t> rows = table_.export_rows(counts);
  attention::decode_attention({.spec = spec_,
                               .query = args.query,
                               .key_states = args.key_states,
                               .value_states = args.value_states,
                               .exact_keys = exact_keys(),
                               .exact_values = exact_values(),
                               .smoothing = smoothing_.data(),
                               .pages = pool_.view(),
                               .page_table = page_table,
                               .rows = rows,
                               .sink_logits = args.sink_logits,
                               .scaling = args.scaling,
                               .softcap = args.softcap,
                               .sliding_window = args.sliding_window,
                               .out = args.out,
                               .lse = args.lse},
                              parallel_for);
}

void LayerStore::dequantize(const TensorView& out_keys, const TensorView& out_values,
                            const ParallelFor& parallel_for) const {
  const std::vector<int32_t> page_table = table_.export_page_table(table_.max_entries());
  const std::vector<int32_t> rows = table_.export_rows();
  cache::dequantize({.spec = spec_,
                     .exact_keys = exact_keys(),
                     .exact_values = exact_values(),
                     .smoothing = smoothing_.data(),
                     .pages = pool_.view(),
                     .page_table = page_table,
                     .rows = rows,
                     .past_tokens = out_keys.shape[2],
                     .out_keys = out_keys,
                     .out_values = out_values},
                    parallel_for);
}

void LayerStore::check_crop(int64_t num_tokens) const {
  int64_t shortest = table_.length(0);
  for (int b = 1; b < table_.batch_size(); ++b) shortest = std::min(shortest, table_.length(b));
  if (num_tokens < 0 || num_tokens > shortest) {
    turboquant::detail::throw_invalid(
        "num_tokens", "0 to " + std::to_string(shortest) + ", the shortest row's length",
        std::to_string(num_tokens));
  }
}

void LayerStore::crop(int64_t num_tokens) {
  check_crop(num_tokens);
  for (int b = 0; b < table_.batch_size(); ++b) table_.crop(b, table_.length(b) - num_tokens);
  pool_.shrink(table_.high_water_pages());
}

LayerStore::Selection LayerStore::prepare_select(std::span<const int64_t> indices) const {
  Selection selection{.table = table_, .exact_keys = {}, .exact_values = {}, .smoothing = {}};
  selection.table.select(indices);
  checked_exact_bytes(spec_, element_type_, static_cast<int64_t>(indices.size()));
  const int64_t row_bytes = exact_row_bytes(spec_, element_type_);
  selection.exact_keys = gather_rows(exact_keys_, row_bytes, indices);
  selection.exact_values = gather_rows(exact_values_, row_bytes, indices);
  if (spec_.smooth_keys) {
    selection.smoothing =
        gather_rows(smoothing_, int64_t{spec_.num_kv_heads} * spec_.head_dim, indices);
  }
  return selection;
}

void LayerStore::commit_select(Selection&& selection) noexcept {
  table_ = std::move(selection.table);
  exact_keys_ = std::move(selection.exact_keys);
  exact_values_ = std::move(selection.exact_values);
  smoothing_ = std::move(selection.smoothing);
  pool_.shrink(table_.high_water_pages());
}

void LayerStore::reset() noexcept {
  table_.reset();
  pool_.shrink(0);
}

CacheMemory LayerStore::memory() const {
  CacheMemory memory{.pages_bytes = pool_.allocated_bytes(),
                     .used_pages_bytes = table_.used_pages() * pool_.page_bytes(),
                     .exact_bytes = static_cast<int64_t>(exact_keys_.size() + exact_values_.size()),
                     .smoothing_bytes = static_cast<int64_t>(smoothing_.size() * sizeof(float))};
  for (int b = 0; b < table_.batch_size(); ++b) {
    memory.tables_bytes += table_.entries(b).size() * sizeof(PageEntry);
  }
  return memory;
}

std::array<int64_t, 4> LayerStore::exact_shape() const {
  return {table_.batch_size(), spec_.num_kv_heads, spec_.exact_layout().capacity(), spec_.head_dim};
}
ConstTensorView LayerStore::exact_keys() const {
  return ConstTensorView::contiguous(exact_keys_.data(), element_type_, exact_shape());
}
ConstTensorView LayerStore::exact_values() const {
  return ConstTensorView::contiguous(exact_values_.data(), element_type_, exact_shape());
}
TensorView LayerStore::exact_keys() {
  return TensorView::contiguous(exact_keys_.data(), element_type_, exact_shape());
}
TensorView LayerStore::exact_values() {
  return TensorView::contiguous(exact_values_.data(), element_type_, exact_shape());
}

}  // namespace turboquant::cache
