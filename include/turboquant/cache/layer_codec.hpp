// What turns a layer's vectors into bytes and back, made from its spec alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/math/codebook.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/decode_table.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cache {

// Immutable; shared by every operator call and thread that uses the spec.
class LayerCodec {
 public:
  // Keys or values.
  struct Side {
    int bits;
    quant::ScaleRule rule;
    // One of the two; they live as long as the process.
    const math::Codebook* codebook;
    const math::VectorCodebook* vector_codebook;
    quant::DecodeTable table;
    std::vector<quant::SignHadamardRotation> rotations;  // per KV head
  };

  // Throws InvalidArgument for an invalid spec.
  explicit LayerCodec(const LayerSpec& spec);

  // The codec of a spec, made on first use and kept while anyone holds it (and a while longer).
  // Thread-safe.
  static std::shared_ptr<const LayerCodec> get(const LayerSpec& spec);

  const LayerSpec& spec() const { return spec_; }
  const BlockLayout& layout() const { return layout_; }
  const ExactLayout& exact() const { return exact_; }
  const Side& keys() const { return keys_; }
  const Side& values() const { return values_; }

 private:
  LayerSpec spec_;
  BlockLayout layout_;
  ExactLayout exact_;
  Side keys_;
  Side values_;
};

}  // namespace turboquant::cache
