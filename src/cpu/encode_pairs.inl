// Rows to the indices of a vector codebook: part of a kernel unit (encode_kernels.inl). The order
// of every operation and comparison is quant/quantize_rows.hpp's; lanes are rows, so no instruction
// set changes it.
#include <cstdint>

#include "cpu/encode_kernels.hpp"
#include "cpu/vectors.inl"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/packing.hpp"

namespace turboquant::quant::detail {
namespace {

constexpr int kEntries = math::VectorCodebook::kEntries;
constexpr int kStates = 16;  // of the trellis at 2 bits: values of a nibble

// The least cost so far, in each lane, and what it belongs to.
struct Cheapest {
  Floats cost;
  Ints entry;

  void consider(Floats other_cost, int other) {
    const auto less = other_cost < cost;
    entry = less ? Ints{} + other : entry;
    cost = less ? other_cost : cost;
  }
};

// The pairs of kWidth rows.
struct PairTile {
  const QuantizeTileParams& p;
  int lane;  // the first row
  Floats factor;

  Floats coordinate(int i) const { return load<Floats>(p.tile + i * kTileRows + lane) * factor; }
  struct Pair {
    Floats x, y;
  };
  Pair pair(int index) const { return {coordinate(2 * index), coordinate(2 * index + 1)}; }

  Floats cost(const Pair& pair, int entry) const {
    return (p.half_squares[entry] - pair.x * p.pair_levels[2 * entry]) -
           pair.y * p.pair_levels[2 * entry + 1];
  }
  Cheapest first(const Pair& pair, int entry) const { return {cost(pair, entry), Ints{} + entry}; }

  void put(uint8_t* row, const Ints& bytes) const {
    store(row + lane, __builtin_convertvector(bytes, Bytes));
  }
};

// 4 bits.
void encode_bytes(const PairTile& tile, uint8_t* codes) {
  for (int n = 0; n < tile.p.dim / 2; ++n) {
    const PairTile::Pair pair = tile.pair(n);
    Cheapest best = tile.first(pair, 0);
    for (int e = 1; e < kEntries; ++e) best.consider(tile.cost(pair, e), e);
    tile.put(codes + n * kTileRows, best.entry);
    tile.put(tile.p.pair_tile + n * kTileRows, best.entry);
  }
}

// Bits 3 and 7 of a byte as a number below 4, and the other way round.
constexpr int spare_bits(int byte) { return (byte >> 3 & 1) | (byte >> 6 & 2); }
constexpr int with_spare_bits(int own, int spare) {
  return (own & 7) | (own & 0x38) << 1 | (spare & 1) << 3 | (spare & 2) << 6;
}

// 3 bits.
void encode_planes(const PairTile& tile, uint8_t* codes) {
  constexpr int kOwn = 64;    // values of a byte's six own bits, in ascending order of the byte
  constexpr int kSpares = 4;  // and of its two spare ones
  const int segment_bytes = tile.p.dim / 8;
  for (int i = 0; i < segment_bytes; ++i) {
    Cheapest own[3][kSpares];
    for (int j = 0; j < 3; ++j) {
      const PairTile::Pair pair = tile.pair(j * segment_bytes + i);
      for (int spare = 0; spare < kSpares; ++spare) {
        Cheapest best = tile.first(pair, with_spare_bits(0, spare));
        for (int e = 1; e < kOwn; ++e) {
          const int entry = with_spare_bits(e, spare);
          best.consider(tile.cost(pair, entry), entry);
        }
        own[j][spare] = best;
      }
    }
    const PairTile::Pair last = tile.pair(3 * segment_bytes + i);
    const auto sum = [&](int entry) {
      Floats cost = tile.cost(last, entry);
      for (int j = 0; j < 3; ++j) {
        cost += own[j][(entry >> j & 1) | (entry >> (3 + j) & 2)].cost;
      }
      return cost;
    };
    Cheapest best{sum(0), Ints{}};
    for (int e = 1; e < kOwn; ++e) {
      const int entry = with_spare_bits(e, 0);
      best.consider(sum(entry), entry);
    }
    tile.put(tile.p.pair_tile + (3 * segment_bytes + i) * kTileRows, best.entry);
    for (int j = 0; j < 3; ++j) {
      const Ints spare = (best.entry >> j & 1) | (best.entry >> (3 + j) & 2);
      Ints entry = own[j][0].entry;
      for (int k = 1; k < kSpares; ++k) entry = spare == k ? own[j][k].entry : entry;
      tile.put(codes + (j * segment_bytes + i) * kTileRows, entry);
      tile.put(tile.p.pair_tile + (j * segment_bytes + i) * kTileRows, entry);
    }
  }
}

// 2 bits: pairs [first, first + count), the pairs of a word.
void encode_word(const PairTile& tile, int first, int count, uint8_t* codes) {
  Floats best[kStates] = {};  // of the pairs so far, by the next pair's low nibble
  // The low nibble of pair k on the best way to each low nibble of pair k + 1.
  alignas(64) int32_t from[kWordPairs][kStates][kWidth];
  for (int k = 0; k < count; ++k) {
    const PairTile::Pair pair = tile.pair(first + k);
    Floats next_best[kStates];
    const int nexts = k + 1 < count ? kStates : 1;
    for (int next = 0; next < nexts; ++next) {
      Cheapest way{best[0] + tile.cost(pair, next * kStates), Ints{}};
      for (int n = 1; n < kStates; ++n) {
        way.consider(best[n] + tile.cost(pair, n + next * kStates), n);
      }
      next_best[next] = way.cost;
      store(from[k][next], way.entry);
    }
    for (int next = 0; next < nexts; ++next) best[next] = next_best[next];
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    const int row = tile.lane + lane;
    int32_t next = 0;
    for (int k = count - 1; k >= 0; --k) {
      const int32_t nibble = from[k][next][lane];
      tile.p.pair_tile[(first + k) * kTileRows + row] =
          static_cast<uint8_t>(nibble + next * kStates);
      next = nibble;
    }
    for (int k = 0; k < count; k += 2) {  // the even pairs' indices are the row's bytes
      const int byte = (first + k) / 2;
      codes[byte * kTileRows + row] = tile.p.pair_tile[(first + k) * kTileRows + row];
    }
  }
}

// Packed rows [bytes][16] of the tile that is loaded, and the sums.
void quantize_pairs(QuantizeTileParams& p, const float* factor, uint8_t* codes) {
  for (int lane = 0; lane < kTileRows; lane += kWidth) {
    const PairTile tile{p, lane, load<Floats>(factor + lane)};
    if (p.bits == 4) {
      encode_bytes(tile, codes);
    } else if (p.bits == 3) {
      encode_planes(tile, codes);
    } else {
      for (int n = 0; n < p.dim / 2; n += kWordPairs) {
        encode_word(tile, n, p.dim / 2 - n < kWordPairs ? p.dim / 2 - n : kWordPairs, codes);
      }
    }
  }
  alignas(64) float dot_acc[kSumLanes * kTileRows] = {};
  alignas(64) float square_acc[kSumLanes * kTileRows] = {};
  for (int i = 0; i < p.dim; ++i) {
    const uint8_t* const indices = p.pair_tile + i / 2 * kTileRows;
    float* const dots = dot_acc + i % kSumLanes * kTileRows;
    float* const squares = square_acc + i % kSumLanes * kTileRows;
    for (int k = 0; k < kTileRows; k += kWidth) {
      const Ints index = __builtin_convertvector(load<Bytes>(indices + k), Ints);
      const Floats level = lookup<2 * kEntries>(p.pair_levels, index + index + (i & 1));
      store(dots + k, load<Floats>(dots + k) + load<Floats>(p.tile + i * kTileRows + k) * level);
      store(squares + k, load<Floats>(squares + k) + level * level);
    }
  }
  add_up(dot_acc, kTileRows, p.row_dot_level);
  add_up(square_acc, kTileRows, p.level_squares);
}

}  // namespace
}  // namespace turboquant::quant::detail
