// How a block fills its look-up table (DecodeTraits: what lies where).
#pragma once

#include "decode_attention_codes.cuh"

namespace turboquant::cuda::detail {

// Level pairs of every byte, for every lane: 16 bytes (four lanes, or two of a wide table) at a
// time. A thread's entries are loaded all at once, before anything else of the kernel, and waited
// for when the table is filled.
// kThreads: that do this, of_thread one of them.
template <class Traits, int kThreads = Traits::kThreads>
class TableShare {
 public:
  TQ_DEVICE void load(const DecodeArgs& args, int of_thread = ptx::thread_index()) {
    constexpr uint32_t kPiecesPerSide = Traits::kValueTableOffset / 16;
    static_assert(kThreads % kPiecesPerEntry == 0);
    const auto thread = static_cast<uint32_t>(of_thread);
    const bool of_values = thread / kPiecesPerSide % 2 != 0;
    TQ_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t entry = (i * kThreads + thread) / kPiecesPerEntry;
      if constexpr (Traits::kWideTable) {
        levels_[i] = table_levels(args.key_levels, entry / 16, Traits::kKeyBits, false);
        low_ = table_levels(args.key_levels, entry % 16, Traits::kKeyBits, false);
      } else {
        levels_[i] =
            of_values ? table_levels(args.value_levels, entry, Traits::kValueBits, Traits::kVector)
                      : table_levels(args.key_levels, entry, Traits::kKeyBits, Traits::kVector);
      }
    }
  }
  TQ_DEVICE void fill(std::byte* shared, int of_thread = ptx::thread_index()) const {
    TQ_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int n = i * kThreads + of_thread;
      const uint32_t high = pack_levels(levels_[i]);
      const uint32_t low = Traits::kWideTable ? pack_levels(low_) : high;
      *reinterpret_cast<Words4*>(shared + 16 * n) = Words4{{low, high, low, high}};
    }
  }

 private:
  static constexpr int kPieces = Traits::kTableBytes / 16 / kThreads;
  static constexpr uint32_t kPiecesPerEntry = 16;
  static_assert(Traits::kTableBytes % (16 * kThreads) == 0);
  static_assert(!Traits::kWideTable || kThreads % (16 * kPiecesPerEntry) == 0);

  Words2 levels_[kPieces];
  Words2 low_;  // of a wide table: the lower halves' pair, all entries' the same
};

}  // namespace turboquant::cuda::detail
