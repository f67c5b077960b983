// Building and poisoning of layers for tests.
#pragma once

#include <cstring>
#include <set>
#include <vector>

#include "tensor.hpp"
#include "turboquant/cache/layer_store.hpp"

namespace turboquant::testing_support {

// Fills everything that holds no committed token with NaN (scales, means, exact numbers) or with
// ones (codes): pages of no row, slots behind a page's fill, dead slots of sinks and ring.
inline void poison_unused(cache::LayerStore& store) {
  const cache::LayerSpec& spec = store.spec();
  const cache::BlockLayout layout = spec.block_layout();
  const cache::PageTable& table = store.table();
  std::vector<int> fill(store.pages().num_pages(), 0);
  for (int b = 0; b < table.batch_size(); ++b) {
    for (const cache::PageEntry& entry : table.entries(b)) {
      fill[entry.page] = std::max(fill[entry.page], int{entry.tokens});
    }
  }
  for (size_t page = 0; page < fill.size(); ++page) {
    for (int head = 0; head < spec.num_kv_heads; ++head) {
      std::byte* const block = store.pages().block(page, head);
      if (fill[page] == 0) std::memset(block, 0xFF, layout.block_bytes());
      for (int t = fill[page]; t < cache::kBlockTokens; ++t) {
        std::memset(block + layout.k_row(t), 0xFF, layout.k_row_bytes());
        std::memset(block + layout.v_row(t), 0xFF, layout.v_row_bytes());
        std::memset(block + layout.k_scale(t), 0xFF, layout.scale_bytes);
        std::memset(block + layout.v_scale(t), 0xFF, layout.scale_bytes);
      }
    }
  }
  const cache::ExactLayout exact = spec.exact_layout();
  const std::vector<float> nan(spec.head_dim, kNan);
  for (int b = 0; b < table.batch_size(); ++b) {
    std::set<int64_t> live;
    for (int64_t t = 0; t < std::min<int64_t>(spec.sink_tokens, table.length(b)); ++t) {
      live.insert(t);
    }
    for (int64_t t = table.exact_begin(b); t < table.length(b); ++t) live.insert(exact.slot(t));
    for (int64_t slot = 0; slot < exact.capacity(); ++slot) {
      if (live.contains(slot)) continue;
      for (int head = 0; head < spec.num_kv_heads; ++head) {
        cache::store_row(store.exact_keys(), b, head, slot, nan.data());
        cache::store_row(store.exact_values(), b, head, slot, nan.data());
      }
    }
  }
}

// The bytes that row `row` of a layer stands on, in the order of its tokens.
inline std::vector<std::byte> row_bytes(const cache::LayerStore& store, int row) {
  const cache::LayerSpec& spec = store.spec();
  const cache::BlockLayout layout = spec.block_layout();
  std::vector<std::byte> bytes;
  const auto add = [&](const void* from, int64_t count) {
    const auto* start = static_cast<const std::byte*>(from);
    bytes.insert(bytes.end(), start, start + count);
  };
  const auto add_exact = [&](int64_t t) {
    const int64_t slot = spec.exact_layout().slot(t);
    const int64_t row_size = spec.head_dim * cache::element_bytes(store.element_type());
    for (int head = 0; head < spec.num_kv_heads; ++head) {
      add(store.exact_keys().row(row, head, slot), row_size);
      add(store.exact_values().row(row, head, slot), row_size);
    }
  };
  const cache::PageTable& table = store.table();
  for (int64_t t = 0; t < std::min<int64_t>(spec.sink_tokens, table.length(row)); ++t) add_exact(t);
  for (const cache::PageEntry& entry : table.entries(row)) {
    for (int head = 0; head < spec.num_kv_heads; ++head) {
      const std::byte* const block = store.pages().block(entry.page, head);
      if (layout.has_mean) add(block + layout.k_mean_offset(), 2 * spec.head_dim);
      for (int t = 0; t < entry.tokens; ++t) {
        add(block + layout.k_row(t), layout.k_row_bytes());
        add(block + layout.k_scale(t), layout.scale_bytes);
        add(block + layout.v_row(t), layout.v_row_bytes());
        add(block + layout.v_scale(t), layout.scale_bytes);
      }
    }
  }
  for (int64_t t = table.exact_begin(row); t < table.length(row); ++t) add_exact(t);
  if (spec.smooth_keys && !table.entries(row).empty()) {
    const int64_t elems = int64_t{spec.num_kv_heads} * spec.head_dim;
    add(store.smoothing() + row * elems, elems * sizeof(float));
  }
  return bytes;
}

}  // namespace turboquant::testing_support
