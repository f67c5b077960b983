// How a block fills its look-up table (DecodeTraits: what lies where).
#pragma once

#include "decode_attention_pages.cuh"

namespace turboquant::cuda::detail {

// Level pairs of every byte, for every lane: 16 bytes (four lanes, or two of a wide table) at a
// time. A thread's entries are loaded all at once, before anything else of the kernel.
template <class Traits>
class TableShare {
 public:
  TQ_DEVICE void load(const DecodeArgs& args) {
    constexpr int kPiecesPerSide = Traits::kValueTableOffset / 16;
    TQ_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int n = i * Traits::kThreads + ptx::thread_index();
      const int entry = n / kPiecesPerEntry, side = n / kPiecesPerSide % 2;
      if constexpr (Traits::kWideTable) {
        levels_[i] = table_entry(args.key_levels, entry / 16, Traits::kKeyBits, false);
        low_ = table_entry(args.key_levels, entry % 16, Traits::kKeyBits, false);
      } else {
        levels_[i] =
            side == 0 ? table_entry(args.key_levels, entry, Traits::kKeyBits, Traits::kVector)
                      : table_entry(args.value_levels, entry, Traits::kValueBits, Traits::kVector);
      }
    }
  }
  TQ_DEVICE void fill(std::byte* shared) const {
    TQ_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int n = i * Traits::kThreads + ptx::thread_index();
      const uint32_t high = levels_[i], low = Traits::kWideTable ? low_ : high;
      *reinterpret_cast<Words4*>(shared + 16 * n) = Words4{{low, high, low, high}};
    }
  }

 private:
  static constexpr int kPieces = Traits::kTableBytes / 16 / Traits::kThreads;
  static constexpr int kPiecesPerEntry = 16;
  static_assert(Traits::kTableBytes % (16 * Traits::kThreads) == 0);
  static_assert(!Traits::kWideTable || Traits::kThreads % (16 * kPiecesPerEntry) == 0);

  uint32_t levels_[kPieces];
  uint32_t low_;  // of a wide table: the lower halves' pair, all entries' the same
};

}  // namespace turboquant::cuda::detail
