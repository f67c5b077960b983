// A layer's codec as device code reads it: rotations, codebooks and decode tables in one piece of
// memory, filled on the host, copied once to the device and shared by every kernel of the layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/cache/layer_codec.hpp"
#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/quant/cell_search.hpp"

namespace turboquant::cuda {

// A codeword of a vector codebook as the search for the nearest one reads it.
struct alignas(16) Codeword {
  float level[2];     // c
  float half_square;  // |c|^2 / 2
  float unused;
};

// Keys or values; H = spec.num_kv_heads, D = spec.head_dim, b the side's bits. Every part starts on
// 16 bytes.
struct SideTables {
  const float* signs;   // [H, 3, D] SignHadamardRotation::signs(), +1 or -1
  const float* turns;   // [H, D / 2, 2] SignHadamardRotation::turns(): cos, sin
  const float* decode;  // [entries, dims] DecodeTable::levels
  // Scalar codebooks; null with a vector codebook.
  const float* levels;             // [2^b] ascending
  const quant::SearchCell* cells;  // [search_cells(b)]
  const float* search_scale;       // [1]
  // Vector codebooks; null with a scalar one.
  const Codeword* codewords;  // [256]
};

struct CodecTables {
  SideTables keys;
  SideTables values;
};

// Size of the piece of memory.
int64_t codec_tables_bytes(const cache::LayerSpec& spec);

// Fills host memory of codec_tables_bytes(spec). Throws InvalidArgument for another size.
void fill_codec_tables(const cache::LayerCodec& codec, std::span<std::byte> memory);

// The parts of memory that fill_codec_tables filled or will fill, on the host or (where a copy of
// it lies) on the device. `memory` starts on 16 bytes.
CodecTables codec_tables_at(const cache::LayerSpec& spec, const void* memory);

}  // namespace turboquant::cuda
