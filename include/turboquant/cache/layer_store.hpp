// One layer's cache in host memory: page table, pages and exact buffers together.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/page_pool.hpp"
#include "turboquant/cache/page_table.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant::cache {

// Bytes a cache holds, measured from its storage.
struct CacheMemory {
  int64_t pages_bytes = 0;       // slabs, used or not
  int64_t used_pages_bytes = 0;  // of which in pages that rows use
  int64_t exact_bytes = 0;       // sinks and rings
  int64_t smoothing_bytes = 0;
  int64_t tables_bytes = 0;  // entries of the page table

  int64_t total_bytes() const { return pages_bytes + exact_bytes + smoothing_bytes + tables_bytes; }
  CacheMemory& operator+=(const CacheMemory& other) {
    pages_bytes += other.pages_bytes;
    used_pages_bytes += other.used_pages_bytes;
    exact_bytes += other.exact_bytes;
    smoothing_bytes += other.smoothing_bytes;
    tables_bytes += other.tables_bytes;
    return *this;
  }
};

// Arguments of attend() that are not the layer's own; meanings as in
// attention/decode_attention.hpp. B rows, Hq query heads, q query tokens, T = q or 0 chunk tokens.
struct AttendArgs {
  ConstTensorView query;                  // [B, Hq, q, D]
  ConstTensorView key_states{};           // [B, H, T, D], not yet appended; empty: T = 0
  ConstTensorView value_states{};         // [B, H, T, D]
  std::span<const int32_t> new_tokens{};  // per row, of the chunk; empty: all T
  float scaling = 1.0f;
  float softcap = 0.0f;
  int64_t sliding_window = 0;
  const float* sink_logits = nullptr;  // [Hq] or null
  TensorView out;                      // [B, Hq, q, D]
  float* lse = nullptr;                // [B, Hq, q] or null
};

// Every throwing call leaves the layer as it was (std::bad_alloc and a failing ParallelFor
// included). Not thread-safe; const calls may run beside each other.
class LayerStore {
 public:
  // element_type is the model's: exact tokens are stored in it and chunks must come in it.
  // pages_per_slab 0: about 1 MiB a slab.
  LayerStore(const LayerSpec& spec, int batch_size, ElementType element_type,
             int64_t pages_per_slab = 0);

  // key_states, value_states [B, H, T, D], any strides: the last new_tokens[b] of row b's T tokens
  // are appended to it (an empty span: all T).
  void append(const ConstTensorView& key_states, const ConstTensorView& value_states,
              std::span<const int32_t> new_tokens, const ParallelFor& parallel_for);

  void attend(const AttendArgs& args, const ParallelFor& parallel_for) const;

  // out_keys, out_values [B, H, past, D]; see cache/dequantize.hpp.
  void dequantize(const TensorView& out_keys, const TensorView& out_values,
                  const ParallelFor& parallel_for) const;

  // Removes the last num_tokens tokens of every row; each must have as many.
  void crop(int64_t num_tokens);
  void check_crop(int64_t num_tokens) const;

  // Row i becomes a copy of row indices[i], sharing its pages. In two steps, so that many layers
  // can change together or not at all: commit_select cannot fail.
  struct Selection;
  Selection prepare_select(std::span<const int64_t> indices) const;
  void commit_select(Selection&& selection) noexcept;

  // Forgets every token and gives the pages back.
  void reset() noexcept;

  const LayerSpec& spec() const { return spec_; }
  const PageTable& table() const { return table_; }
  ElementType element_type() const { return element_type_; }
  CacheMemory memory() const;
  // Since construction: fp16 numbers that saturated, key or value vectors with NaN or inf.
  int64_t saturated_numbers() const { return counters_[0]; }
  int64_t non_finite_vectors() const { return counters_[1]; }

  // The storage itself, for operators and tests.
  PagePoolView pages() const { return pool_.view(); }
  ConstTensorView exact_keys() const;
  ConstTensorView exact_values() const;
  TensorView exact_keys();
  TensorView exact_values();
  const float* smoothing() const { return smoothing_.data(); }

 private:
  std::array<int64_t, 4> exact_shape() const;

  LayerSpec spec_;
  ElementType element_type_;
  PageTable table_;
  PagePool pool_;
  std::vector<std::byte> exact_keys_;    // [B, H, C, D]
  std::vector<std::byte> exact_values_;  // [B, H, C, D]
  std::vector<float> smoothing_;         // [B, H, D], or empty without smooth_keys
  std::array<int64_t, 2> counters_{};
};

struct LayerStore::Selection {
  PageTable table;
  std::vector<std::byte> exact_keys;
  std::vector<std::byte> exact_values;
  std::vector<float> smoothing;
};

}  // namespace turboquant::cache
