// From packed codes in shared memory to operands of tensor cores: the look-up table and its uses.
#pragma once

#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// One lane's copy of the look-up table of a side: entry e is at 256 e. The address of a look-up is
// one byte permutation: {lane * 4, index, 0, 0}.
struct LaneTable {
  const std::byte* table;   // of the side
  uint32_t lane_bytes = 0;  // 4 lane

  TQ_DEVICE uint32_t at_byte(uint32_t word, int byte) const {
    return load_as<uint32_t>(table +
                             ptx::permute_bytes(word, lane_bytes, 0x7604u | unsigned(byte) << 4));
  }
  TQ_DEVICE uint32_t at_code(uint32_t code) const {
    return load_as<uint32_t>(table + (code << 8 | lane_bytes));
  }
};

// The same where the table's place in shared memory is known when the kernel is compiled: the
// address of a look-up takes no addition.
template <int kOffset>
struct FixedLaneTable {
  const std::byte* shared;
  uint32_t lane_bytes;

  TQ_DEVICE uint32_t at_byte(uint32_t word, int byte) const {
    return ptx::load_shared_word<kOffset>(
        shared, ptx::permute_bytes(word, lane_bytes, 0x7604u | unsigned(byte) << 4));
  }
  TQ_DEVICE uint32_t at_code(uint32_t code) const {
    return ptx::load_shared_word<kOffset>(shared, code << 8 | lane_bytes);
  }
};

// One lane's copy of a table of eight-byte entries, for both sides: entry e is at 256 e.
struct WideLaneTable {
  const std::byte* shared;
  uint32_t lane_bytes;  // 8 lane

  TQ_DEVICE Words2 at_byte(uint32_t word, int byte) const {
    Words2 entry;
    ptx::load_shared_words<0>(
        shared, ptx::permute_bytes(word, lane_bytes, 0x7604u | unsigned(byte) << 4), entry.w);
    return entry;
  }
};

// The two levels that entry `entry` of a side's look-up table stands for; levels are
// DecodeTable::levels.
TQ_DEVICE Words2 table_levels(const float* levels, uint32_t entry, int bits, bool vector) {
  const auto* const bytes = reinterpret_cast<const std::byte*>(levels);
  if (vector || index_kind(bits) == IndexKind::kByte) {
    return load_as<Words2>(bytes + 8 * entry);
  } else if (index_kind(bits) == IndexKind::kNibble) {
    // Entries below 16 have no codes in their upper half.
    return load_as<Words2>(bytes + 16 * (entry % 16));
  } else {
    const uint32_t level = entry < 1u << bits ? load_as<uint32_t>(bytes + 4 * entry) : 0;
    return {{level, level}};
  }
}
TQ_DEVICE uint32_t pack_levels(const Words2& levels) {
  return ptx::pack_f16(ptx::float_of(levels.w[0]), ptx::float_of(levels.w[1]));
}

// The fp16 pair of pair u of a key row (of a value row: the same order of coordinates).
template <int kDim, int kBits, class Table>
TQ_DEVICE uint32_t key_levels(const KeyRow<kDim, kBits>& row, int u, const Table& table) {
  if constexpr (index_kind(kBits) == IndexKind::kCode) {
    return ptx::permute_bytes(table.at_code(row.code(2 * u)), table.at_code(row.code(2 * u + 1)),
                              0x5410);
  } else {
    const auto [word, byte] = row.index(u);
    return table.at_byte(word, byte);
  }
}

// The operand registers of pair v of a value row: its even coordinate in both tokens, then its odd
// one.
template <int kDim, int kBits, class Table>
TQ_DEVICE void value_levels(const ValuePairs<kDim, kBits>& pairs, int v, const Table& table,
                            uint32_t (&levels)[2]) {
  const auto even = pairs.index(v, false), odd = pairs.index(v, true);
  levels[0] = table.at_byte(even.word, even.byte);
  levels[1] = table.at_byte(odd.word, odd.byte);
}
template <int kDim, int kBits, class Table>
TQ_DEVICE void value_levels(const VectorValuePairs<kDim, kBits>& pairs, int v, const Table& table,
                            uint32_t (&levels)[2]) {
  const auto first = pairs.index(v, 0), second = pairs.index(v, 1);
  const uint32_t a = table.at_byte(first.word, first.byte);
  const uint32_t b = table.at_byte(second.word, second.byte);
  levels[0] = ptx::permute_bytes(a, b, 0x5410);
  levels[1] = ptx::permute_bytes(a, b, 0x7632);
}

// A side's table in a block's shared memory, as this lane sees it. kOffset: of the side, where the
// sides do not share a wide one.
template <class Traits, int kOffset>
TQ_DEVICE auto lane_table(const std::byte* shared, int lane) {
  if constexpr (Traits::kWideTable) {
    return WideLaneTable{shared, static_cast<uint32_t>(8 * lane)};
  } else {
    return FixedLaneTable<kOffset>{shared, static_cast<uint32_t>(4 * lane)};
  }
}

// Operands A of the first product: of two rows of keys, the pairs of a k-step.
template <class Traits>
class KeyOperands {
  using Row = typename Traits::Key;
  using Steps = QuerySteps<Traits::kDim>;

 public:
  TQ_DEVICE void load(const std::byte* codes, int slot, int t) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) rows_[k].load(codes, slot + 8 * k, t);
  }
  template <class Table>
  TQ_DEVICE void take(int step, const Table& table, uint32_t (&a)[4]) const {
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = key_levels(rows_[i % 2], Steps::pair(step, i / 2), table);
  }

 private:
  Row rows_[2];
};
// Wide: a look-up finds a pair of both rows.
template <class Traits>
class WideKeyOperands {
  using Row = typename Traits::Key;
  using Steps = QuerySteps<Traits::kDim>;

 public:
  TQ_DEVICE void load(const std::byte* codes, int slot, int t) {
    Row first, second;
    first.load(codes, slot, t);
    second.load(codes, slot + 8, t);
    halves_.take(first.words, second.words);
  }
  TQ_DEVICE void take(int step, const WideLaneTable& table, uint32_t (&a)[4]) const {
    TQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int u = Steps::pair(step, i);
      const auto [word, byte] = Row::half_byte_of(u);
      const Words2 levels =
          table.at_byte(u % 2 == 0 ? halves_.even[word] : halves_.odd[word], byte);
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) a[2 * i + k] = levels.w[k];
    }
  }

 private:
  DigitPairs<Row::kWords, 4> halves_;
};

template <class Traits>
using KeyOperandsOf =
    std::conditional_t<Traits::kWideTable, WideKeyOperands<Traits>, KeyOperands<Traits>>;

// Operands A of the second product, of two pairs of tokens each: for m-tile v a pair's even
// coordinate in both tokens, then its odd one.
template <class Traits>
class ValueOperands {
 public:
  TQ_DEVICE void take(const typename Traits::Pairs (&pairs)[2]) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) pairs_[k] = pairs[k];
  }
  template <class Table>
  TQ_DEVICE void take(int v, const Table& table, uint32_t (&a)[4]) const {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) {
      uint32_t levels[2];
      value_levels(pairs_[k], v, table, levels);
      a[2 * k] = levels[0];
      a[2 * k + 1] = levels[1];
    }
  }

 private:
  typename Traits::Pairs pairs_[2];
};
// Wide: a look-up finds both coordinates.
template <class Traits>
class WideValueOperands {
 public:
  TQ_DEVICE void take(const typename Traits::Pairs (&pairs)[2]) {
    TQ_UNROLL
    for (int k = 0; k < 2; ++k) halves_[k].take(pairs[k].even, pairs[k].odd);
  }
  TQ_DEVICE void take(int v, const WideLaneTable& table, uint32_t (&a)[4]) const {
    TQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Words2 levels =
          table.at_byte(v % 2 == 0 ? halves_[i].even[v / 8] : halves_[i].odd[v / 8], v % 8 / 2);
      TQ_UNROLL
      for (int k = 0; k < 2; ++k) a[2 * i + k] = levels.w[k];
    }
  }

 private:
  DigitPairs<Traits::Value::kWords, 4> halves_[2];
};

}  // namespace turboquant::cuda::detail
