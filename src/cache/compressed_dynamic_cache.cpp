#include "turboquant/cache/compressed_dynamic_cache.hpp"

#include <limits>
#include <string>
#include <utility>

#include "turboquant/error.hpp"

namespace turboquant {

using cache::LayerStore;

CompressedDynamicCache::CompressedDynamicCache(std::span<const cache::LayerSpec> specs,
                                               int batch_size, cache::ElementType element_type,
                                               ParallelFor parallel_for)
    : parallel_for_(std::move(parallel_for)) {
  if (specs.empty()) detail::throw_invalid("specs", "1 or more layers", "none");
  layers_.reserve(specs.size());
  for (const cache::LayerSpec& spec : specs) layers_.emplace_back(spec, batch_size, element_type);
}

void CompressedDynamicCache::update(int layer, const cache::ConstTensorView& keys,
                                    const cache::ConstTensorView& values,
                                    std::span<const int32_t> new_tokens) {
  store(layer);  // checks the index
  layers_[layer].append(keys, values, new_tokens, parallel_for_);
}

void CompressedDynamicCache::attend(int layer, const cache::AttendArgs& args) const {
  store(layer).attend(args, parallel_for_);
}

void CompressedDynamicCache::dequantize(int layer, const cache::TensorView& out_keys,
                                        const cache::TensorView& out_values) const {
  store(layer).dequantize(out_keys, out_values, parallel_for_);
}

void CompressedDynamicCache::crop(int64_t num_tokens) {
  for (const LayerStore& layer : layers_) layer.check_crop(num_tokens);
  for (LayerStore& layer : layers_) layer.crop(num_tokens);
}

void CompressedDynamicCache::select(std::span<const int64_t> indices) {
  std::vector<LayerStore::Selection> selections;
  selections.reserve(layers_.size());
  for (const LayerStore& layer : layers_) selections.push_back(layer.prepare_select(indices));
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].commit_select(std::move(selections[i]));
}

void CompressedDynamicCache::reorder(std::span<const int64_t> indices) {
  if (static_cast<int64_t>(indices.size()) != batch_size()) {
    detail::throw_invalid("indices", std::to_string(batch_size()) + " rows, as the batch",
                          std::to_string(indices.size()));
  }
  select(indices);
}

void CompressedDynamicCache::repeat(int times) {
  if (times < 1 || times > std::numeric_limits<int32_t>::max() / batch_size()) {
    detail::throw_invalid("times", "1 or more, with a batch below 2^31", std::to_string(times));
  }
  std::vector<int64_t> indices;
  indices.reserve(int64_t{batch_size()} * times);
  for (int64_t row = 0; row < batch_size(); ++row) indices.insert(indices.end(), times, row);
  select(indices);
}

void CompressedDynamicCache::reset() noexcept {
  for (LayerStore& layer : layers_) layer.reset();
}

const LayerStore& CompressedDynamicCache::store(int layer) const {
  if (layer < 0 || layer >= num_layers()) {
    detail::throw_invalid("layer", "0 to " + std::to_string(num_layers() - 1),
                          std::to_string(layer));
  }
  return layers_[layer];
}

cache::CacheMemory CompressedDynamicCache::memory() const {
  cache::CacheMemory memory;
  for (const LayerStore& layer : layers_) memory += layer.memory();
  return memory;
}

}  // namespace turboquant
