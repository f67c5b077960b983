// The key/value cache of a whole model in host memory, holding packed codes only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/layer_store.hpp"
#include "turboquant/parallel.hpp"

namespace turboquant {

// Layers have their own specs: head_dim, heads, key and value widths, recipe. Rows (sequences) are
// common to all layers; a row's length may differ between layers only while a step runs through
// the model. A call that throws leaves the whole cache as it was.
//
//   CompressedDynamicCache cache(std::vector(num_layers, spec), batch_size, ElementType::kFloat16);
//   for each layer: cache.attend(layer, {...});              // past and the chunk, exactly
//                   cache.update(layer, keys, values);       // then the chunk becomes past
class CompressedDynamicCache {
 public:
  // Specs that share a seed should differ in `layer`. parallel_for spreads all work of the cache.
  CompressedDynamicCache(std::span<const cache::LayerSpec> specs, int batch_size,
                         cache::ElementType element_type, ParallelFor parallel_for = threads());

  // keys, values [B, H, T, D], any strides, in the cache's element type: appends the last
  // new_tokens[b] of row b's T tokens (an empty span: all T).
  void update(int layer, const cache::ConstTensorView& keys, const cache::ConstTensorView& values,
              std::span<const int32_t> new_tokens = {});

  // Attention of args.query over the layer's tokens and the chunk in args, which is not yet part
  // of the cache.
  void attend(int layer, const cache::AttendArgs& args) const;

  // Dense copies of a layer's tokens, [B, H, past, D], rows right-aligned, zeros before.
  void dequantize(int layer, const cache::TensorView& out_keys,
                  const cache::TensorView& out_values) const;

  // Removes the last num_tokens tokens of every row in every layer.
  void crop(int64_t num_tokens);

  // Row i becomes a copy of row indices[i]; pages are shared until they differ.
  void select(std::span<const int64_t> indices);
  // The same with as many indices as rows (beam search).
  void reorder(std::span<const int64_t> indices);
  // Every row `times` times in sequence: rows 0, 0, ..., 1, 1, ...
  void repeat(int times);

  // Forgets every token and gives the pages back.
  void reset() noexcept;

  int num_layers() const { return static_cast<int>(layers_.size()); }
  int batch_size() const { return layers_.front().table().batch_size(); }
  // Tokens of a row in a layer.
  int64_t length(int layer, int row) const { return store(layer).table().length(row); }
  const cache::LayerStore& store(int layer) const;
  cache::CacheMemory memory() const;

 private:
  std::vector<cache::LayerStore> layers_;
  ParallelFor parallel_for_;
};

}  // namespace turboquant
