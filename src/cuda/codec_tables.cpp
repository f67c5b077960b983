#include "turboquant/cuda/codec_tables.hpp"

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "turboquant/error.hpp"
#include "turboquant/quant/decode_table.hpp"

namespace turboquant::cuda {
namespace {

// Hands out parts of a piece of memory in order.
class Parts {
 public:
  explicit Parts(const std::byte* memory) : memory_(memory) {}

  template <class Element>
  const Element* take(int64_t count) {
    const auto* part = reinterpret_cast<const Element*>(memory_ + bytes_);
    bytes_ += (count * int64_t{sizeof(Element)} + 15) / 16 * 16;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  const std::byte* memory_;
  int64_t bytes_ = 0;
};

// Floats of a DecodeTable.
int64_t decode_levels(int bits, bool vector) {
  const int64_t entries = bits > 4 ? int64_t{1} << bits : 256;
  return entries * (bits > 4 ? 1 : bits == 3 || vector ? 2 : 8 / bits);
}

SideTables take_side(const cache::LayerSpec& spec, int bits, Parts& parts) {
  const int64_t heads = spec.num_kv_heads, dim = spec.head_dim;
  const bool vector = spec.codebook == quant::CodebookKind::kVector;
  SideTables tables{.signs = parts.take<float>(heads * quant::SignHadamardRotation::kRounds * dim),
                    .turns = parts.take<float>(heads * dim),
                    .decode = parts.take<float>(decode_levels(bits, vector)),
                    .levels = nullptr,
                    .cells = nullptr,
                    .search_scale = nullptr,
                    .codewords = nullptr};
  if (vector) {
    tables.codewords = parts.take<Codeword>(math::VectorCodebook::kEntries);
  } else {
    tables.levels = parts.take<float>(int64_t{1} << bits);
    tables.cells = parts.take<quant::SearchCell>(quant::search_cells(bits));
    tables.search_scale = parts.take<float>(1);
  }
  return tables;
}

CodecTables take_all(const cache::LayerSpec& spec, Parts& parts) {
  const SideTables keys = take_side(spec, spec.k_bits, parts);
  return {.keys = keys, .values = take_side(spec, spec.v_bits, parts)};
}

template <class Element, class Source>
void put(const Element* part, const Source& source) {
  std::memcpy(const_cast<Element*>(part), source.data(), source.size() * sizeof(Element));
}

void fill_side(const cache::LayerCodec::Side& side, const SideTables& tables) {
  const float* signs = tables.signs;
  const float* turns = tables.turns;
  for (const quant::SignHadamardRotation& rotation : side.rotations) {
    put(signs, rotation.signs());
    put(turns, rotation.turns());
    signs += rotation.signs().size();
    turns += rotation.turns().size();
  }
  put(tables.decode, side.table.levels);
  if (side.vector_codebook != nullptr) {
    const std::span<const float> levels = side.vector_codebook->levels();
    const std::span<const float> half_squares = side.vector_codebook->half_squares();
    std::vector<Codeword> codewords;
    for (size_t e = 0; e < half_squares.size(); ++e) {
      codewords.push_back({{levels[2 * e], levels[2 * e + 1]}, half_squares[e], 0.0f});
    }
    put(tables.codewords, codewords);
    return;
  }
  const quant::CellSearch search = quant::make_cell_search(side.bits, side.codebook->boundaries());
  put(tables.levels, side.codebook->levels());
  put(tables.cells, search.cells);
  put(tables.search_scale, std::span(&search.scale, 1));
}

}  // namespace

int64_t codec_tables_bytes(const cache::LayerSpec& spec) {
  spec.validate();
  Parts parts(nullptr);
  take_all(spec, parts);
  return parts.bytes();
}

void fill_codec_tables(const cache::LayerCodec& codec, std::span<std::byte> memory) {
  const int64_t bytes = codec_tables_bytes(codec.spec());
  if (static_cast<int64_t>(memory.size()) != bytes) {
    turboquant::detail::throw_invalid("memory", std::to_string(bytes) + " bytes",
                                      std::to_string(memory.size()));
  }
  std::memset(memory.data(), 0, memory.size());
  const CodecTables tables = codec_tables_at(codec.spec(), memory.data());
  fill_side(codec.keys(), tables.keys);
  fill_side(codec.values(), tables.values);
}

CodecTables codec_tables_at(const cache::LayerSpec& spec, const void* memory) {
  Parts parts(static_cast<const std::byte*>(memory));
  return take_all(spec, parts);
}

}  // namespace turboquant::cuda
