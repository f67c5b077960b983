// The work of one thread block of dequantize: entries of one row's page table, of one KV head, keys
// or values. Host and device, as kernels/encode_block.hpp, whose layout of rows over threads it
// shares.
//
//   begin      tables                                                   global -> shared
//   fetch_next packed rows, scales, mean of the next entry; the place of the one behind it
//   land       scales and mean to fp32                                  shared -> shared
//   decode     scale * level (+ mean)                                   shared -> registers
//   rotate     R^T, times smoothing                                     registers
//   put, store rows in the output's type, coalesced                     shared -> global
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dequantize_args.hpp"
#include "dequantize_groups.hpp"
#include "dequantize_plan.hpp"
#include "dequantize_unpaged.hpp"
#include "exact_math.hpp"
#include "row_rotation.hpp"
#include "row_thread.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cuda::detail {

template <int kDim>
class DequantizeBlock : public RowThread<kDim> {
  using Base = RowThread<kDim>;
  using Base::kElems;
  using Base::kPitch;
  using Base::memory_;
  using Base::part;
  using Base::part_table;
  using Base::table;
  using Base::thread;
  using Base::thread_;
  using Base::token;
  using Base::x_;
  using typename Base::Shape;
  using Plan = DequantizePlan<kDim>;
  static constexpr int kThreads = Plan::kThreads;
  static constexpr int kRounds = quant::SignHadamardRotation::kRounds;

 public:
  // Entries of the row's page table: place.item and every workers'th behind it.
  TQ_HOST_DEVICE DequantizeBlock(const DequantizeArgs& args, std::byte* memory, int row,
                                 BlockPlace place, int thread)
      : Base(memory, thread),
        args_(args),
        row_(row),
        place_(place),
        num_entries_(uniform(dequantize_row(args, row).num_entries)) {}

  TQ_HOST_DEVICE bool empty() const { return place_.item >= num_entries_; }
  TQ_HOST_DEVICE bool last() const { return place_.item + args_.workers >= num_entries_; }
  TQ_HOST_DEVICE void advance() {
    place_.item += args_.workers;
    ++turn_;
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void begin() {
    if (thread_ < Plan::kStates) state(thread_).first_position = 0;
    fetch_tables();
  }
  // Of the entry `ahead` turns from now: where it is, and where in the output its tokens are, from
  // the entry of the turn before it on.
  TQ_HOST_DEVICE void locate(int ahead) {
    const int entry = place_.item + ahead * args_.workers;
    if (entry >= num_entries_) return;
    State& to = state(turn_ + ahead);
    const int before = ahead == 0 ? 0 : entry - args_.workers;
    int32_t tokens = 0;
    for (int e = before + thread(); e < entry; e += kThreads) tokens += entries()[2 * e + 1];
    if (thread_ == 0) {
      if (ahead > 0) {
        tokens += state(turn_ + ahead - 1).first_position;
      } else {
        const int32_t length = dequantize_row(args_, row_).length;
        const auto sinks = static_cast<int32_t>(args_.exact.sink_tokens);
        tokens +=
            args_.past_tokens - length + (length < sinks ? length : sinks) - args_.first_position;
      }
      to.tokens = entries()[2 * entry + 1];
      to.block = args_.pages.block(entries()[2 * entry], place_.head);
    }
    if (tokens != 0) add_shared(&to.first_position, tokens);
  }
  // The entry's packed rows, scales and mean as they are stored, on their way.
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch(int ahead, Copies copies) {
    if (place_.item + ahead * args_.workers < num_entries_) {
      const int bits = side().bits;
      const std::byte* const block = state(turn_ + ahead).block;
      const std::byte* const codes = block + side().codes_offset;
      const int row_bytes = Plan::row_bytes(bits), pitch = Plan::code_pitch(bits);
      std::byte* const to = buffer(bits, turn_ + ahead);
      for (int v = thread(); v < kBlockTokens * row_bytes / 16; v += kThreads) {
        const int token = static_cast<int>(static_cast<uint32_t>(v) * side().pieces_inverse >> 16);
        const int padding = pitch == row_bytes ? 0 : token * (pitch - row_bytes);
        copies.copy16(to + Plan::kCodes + v * 16 + padding, codes + v * 16);
      }
      for (int v = thread(); v < scale_pieces(); v += kThreads) {
        copies.copy16(to + Plan::kRawScales + v * 16, block + side().scales_offset + v * 16);
      }
      if (side().has_mean) {
        for (int v = thread(); v < kMeanPieces; v += kThreads) {
          copies.copy16(to + Plan::kRawMean + v * 16, block + v * 16);
        }
      }
    }
    copies.commit();
  }
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_next(Copies copies) {
    this->renew_thread();
    if (thread_ == 0) state(turn_ + 3).first_position = 0;
    fetch(1, copies);
    locate(2);
  }
  // Every thread converts what it has copied.
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void land(Copies copies) {
    copies.wait();
    const std::byte* const landed = buffer(side().bits, turn_);
    for (int v = thread(); v < scale_pieces(); v += kThreads) {
      const std::byte* const raw = landed + Plan::kRawScales + v * 16;
      if (args_.half_scales) {
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          table(Plan::kScales)[v * 8 + i] =
              half_to_float(reinterpret_cast<const uint16_t*>(raw)[i]);
        }
      } else {
        store_four(table(Plan::kScales) + v * 4, load_four(reinterpret_cast<const float*>(raw)).at);
      }
    }
    if (!side().has_mean) return;
    for (int v = thread(); v < kMeanPieces; v += kThreads) {
      const auto* const raw = reinterpret_cast<const uint16_t*>(landed + Plan::kRawMean + v * 16);
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        table(Plan::kMean)[Shape::table_slot(0, v * 8 + i)] = half_to_float(raw[i]);
      }
    }
  }
  // The entry's tokens [first, end) that are asked for; first >= end where none is.
  struct Asked {
    int32_t first, end;
    int64_t out;  // position of the entry's token 0
  };
  TQ_HOST_DEVICE Asked asked() const {
    const int32_t out = state(turn_).first_position;
    const int32_t first = out < 0 ? -out : 0;
    const int32_t end = args_.positions - out;
    const int32_t tokens = state(turn_).tokens;
    return {first < kBlockTokens ? first : kBlockTokens, end < tokens ? end : tokens, out};
  }
  TQ_HOST_DEVICE bool wanted() const { return asked().first < asked().end; }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void decode() {
    const bool vector = side().vector;
    switch (side().bits) {
      case 1:
        decode_row<1, kShuffled>();
        break;
      case 2:
        vector ? decode_row<2, kOverlapping>() : decode_row<2, kShuffled>();
        break;
      case 3:
        vector ? decode_row<3, kTable>() : decode_row<3, kShuffled>();
        break;
      case 4:
        vector ? decode_row<4, kTable>() : decode_row<4, kShuffled>();
        break;
      case 5:
        decode_row<5, kTable>();
        break;
      case 6:
        decode_row<6, kTable>();
        break;
      case 7:
        decode_row<7, kTable>();
        break;
      default:
        decode_row<8, kTable>();
    }
    if (side().has_mean) {
      apply_table(part_table(Plan::kMean), x_, [](float y, float mean) { return add_rn(y, mean); });
    }
  }

  // The kNth inverse round up to the stage that crosses, and from there.
  template <int kNth>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_begin() {
    if constexpr (kNth == 1) multiply(part_table(Plan::kFirst), x_);
    if constexpr (kNth == 2) {
      Base::template normalise<1>();
      turn_pairs_back(table(Plan::kTurns) + part() * 2 * kPitch, x_);
    }
    Base::template transform_begin<kNth>();
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void offer_row() { Base::offer(x_); }
  template <int kRound, int kNth>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_cross() {
    Base::template transform_cross<kRound, kNth>();
  }
  template <int kNth>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_end() {
    Base::template transform_end<kNth, true>();
  }

  // The row in the output's type.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void put_out() {
    multiply(part_table(Plan::kLast), x_);
    if (smooths()) multiply(part_table(Plan::kSmoothing), x_);
    const ElementType type = side().out_type;
    const auto bytes = static_cast<int>(cache::element_bytes(type));
    std::byte* const row = memory_ + Plan::kTile + token() * Plan::out_pitch_bytes(bytes);
    if (type == ElementType::kFloat32) {
      TQ_UNROLL
      for (int e = 0; e < kElems; e += 4) {
        store_four(reinterpret_cast<float*>(row) + Shape::coordinate(kRounds, part(), e), x_ + e);
      }
      return;
    }
    constexpr int kPiece = Shape::kThreads == 1 ? 8 : 4;  // neighbours in a row
    struct alignas(2 * kPiece) Halves {
      uint32_t word[kPiece / 2];
    };
    TQ_UNROLL
    for (int e = 0; e < kElems; e += kPiece) {
      Halves halves;
      TQ_UNROLL
      for (int i = 0; i < kPiece / 2; ++i) {
        halves.word[i] = two_halves(x_[e + 2 * i], x_[e + 2 * i + 1], type);
      }
      *reinterpret_cast<Halves*>(row + Shape::coordinate(kRounds, part(), e) * 2) = halves;
    }
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store() const {
    const Asked range = asked();
    const auto bytes = static_cast<int>(cache::element_bytes(side().out_type));
    const int pitch = Plan::out_pitch_bytes(bytes);
    std::byte* const to = side().out.head(row_, place_.head);
    const int64_t token_stride = side().out.token_stride;
    if (side().out.whole_vectors) {
      const auto copy_rows = [&](auto element_bytes, int first, int end) {
        constexpr int kPieces = kDim * decltype(element_bytes)::value / 16;
        each_piece<kPieces, kThreads>(thread(), first, end, [&](int t, int piece) {
          *reinterpret_cast<Vector*>(to + (range.out + t) * token_stride + piece * 16) =
              *reinterpret_cast<const Vector*>(memory_ + Plan::kTile + t * pitch + piece * 16);
        });
      };
      using Two = std::integral_constant<int, 2>;
      if (bytes == 4) {
        copy_rows(std::integral_constant<int, 4>{}, range.first, range.end);
      } else if (range.first == 0 && range.end == kBlockTokens) {  // as most are: unrolled
        copy_rows(Two{}, 0, kBlockTokens);
      } else {
        copy_rows(Two{}, range.first, range.end);
      }
      return;
    }
    for (int v = thread(); v < (range.end - range.first) * kDim; v += kThreads) {
      const int t = range.first + v / kDim, e = v % kDim;
      copy_element(memory_ + Plan::kTile + t * pitch + e * bytes,
                   to + (range.out + t) * token_stride + e * side().out.elem_stride, bytes);
    }
  }

 private:
  TQ_HOST_DEVICE const int32_t* entries() const {
    return args_.page_table + int64_t{row_} * args_.page_columns * cache::tables::kPageColumns;
  }
  TQ_HOST_DEVICE const DequantizeSideArgs& side() const { return args_.sides[place_.side]; }
  TQ_HOST_DEVICE bool smooths() const { return place_.side == 0 && args_.smoothing != nullptr; }
  // Where levels are looked up: codes (up to 4 bits) across the lanes of a warp, for a shuffle
  // takes a code as it is, whatever is above it in the word, and has no bank conflicts; bytes or
  // codes in a table; a byte at every nibble in a table.
  enum LevelSource { kShuffled, kTable, kOverlapping };
  // Of the entry of a turn.
  struct State {
    int32_t first_position;  // in the output, of its token 0; a sum until its turn
    int32_t tokens;
    const std::byte* block;
  };
  static_assert(sizeof(State) <= Plan::kStateBytes);
  TQ_HOST_DEVICE State& state(unsigned turn) const {
    return *reinterpret_cast<State*>(memory_ + Plan::kState +
                                     turn % Plan::kStates * Plan::kStateBytes);
  }
  static constexpr int kMeanPieces = (2 * kDim + 15) / 16;
  TQ_HOST_DEVICE int scale_pieces() const {
    return kBlockTokens * (args_.half_scales ? 2 : 4) / 16;
  }
  TQ_HOST_DEVICE std::byte* buffer(int bits, unsigned turn) const {
    return memory_ +
           (cache::element_bytes(side().out_type) == 2 ? Plan::buffers(2) : Plan::buffers(4)) +
           (turn % 2 != 0 ? Plan::buffer_bytes(bits) : 0);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_tables() {
    const SideTables& tables = side().tables;
    const int bits = side().bits;
    const int decode_floats = side().vector ? Plan::kDecodeFloats : bits <= 4 ? 0 : 1 << bits;
    for (int v = thread(); v < decode_floats; v += kThreads) {
      table(Plan::kDecode)[v] = tables.decode[v];
    }
    const float* const signs = tables.signs + int64_t{place_.head} * kRounds * kDim;
    const float* const turns = tables.turns + int64_t{place_.head} * kDim;
    const float* const smoothing =
        smooths() ? args_.smoothing + (int64_t{row_} * args_.num_heads + place_.head) * kDim
                  : nullptr;
    for (int i = thread(); i < kDim; i += kThreads) {
      table(Plan::kFirst)[Shape::table_slot(1, i)] =
          Base::signed_normaliser(0, i, signs[2 * kDim + i]);
      table(Plan::kLast)[Shape::table_slot(kRounds, i)] =
          Base::signed_normaliser(kRounds - 1, i, signs[i]);
      const float sign = signs[quant::SignHadamardRotation::kTurnRound * kDim + i];
      float* const turn = table(Plan::kTurns) + Shape::part_of(2, i) * 2 * kPitch +
                          Shape::elem_of(2, i) / 2 * 4 + i % 2 * 2;
      turn[0] = mul_rn(sign, turns[i / 2 * 2]);
      turn[1] = mul_rn(sign, turns[i / 2 * 2 + 1]);
      if (smoothing != nullptr) {
        table(Plan::kSmoothing)[Shape::table_slot(kRounds, i)] = smoothing[i];
      }
    }
    static_assert(kRounds == 3 && quant::SignHadamardRotation::kTurnRound == 1);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static uint32_t two_halves(float low, float high,
                                                             ElementType type) {
#if defined(__CUDA_ARCH__)
    if (type == ElementType::kBFloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return to_half(low, type) | to_half(high, type) << 16;
#endif
  }

  // x_ = scale * level, a group of eight coordinates at a time; a thread takes all of it, or (two
  // threads that do not trade) its half.
  template <int kBits, LevelSource kFrom>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void decode_row() {
    const std::byte* const row =
        buffer(kBits, turn_) + Plan::kCodes + token() * Plan::code_pitch(kBits);
    const float scale = table(Plan::kScales)[token()];
    const float lane_level = kFrom == kShuffled ? level_of<kBits>(thread_) : 0.0f;
    TQ_UNROLL
    for (int g = 0; g < kElems / kTaken; ++g) {
      hold_loads(g * 8);
      const int group = Shape::coordinate(0, part(), g * kTaken) / 8;
      float* const x = x_ + g * kTaken;
      if constexpr (kFrom == kOverlapping) {
        take_pairs(overlapping_bytes<kDim>(row, group), x);
      } else if constexpr (kFrom == kShuffled) {
        shuffle_levels<kBits>(group_bytes<kDim, kBits>(row, group), lane_level, x);
      } else {
        take_levels<kBits>(group_bytes<kDim, kBits>(row, group), x);
      }
      TQ_UNROLL
      for (int i = 0; i < kTaken; ++i) x[i] = mul_rn(x[i], scale);
    }
  }
  static constexpr int kTaken = Shape::kThreads == 1 || Shape::kTrades ? 8 : 4;  // of a group
  TQ_HOST_DEVICE int first_taken() const { return kTaken == 8 ? 0 : part() * kTaken; }
  // Entry c of a table of bytes begins with the level of code c.
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float level_of(uint32_t code) const {
    constexpr int kByteCodes = kBits == 3 ? 2 : 8 / kBits;
    return side().tables.decode[(code & ((1u << kBits) - 1)) * kByteCodes];
  }
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void shuffle_levels(uint64_t word, float lane_level,
                                                      float* x) const {
    constexpr int kStride = kBits == 3 ? 4 : kBits;
    const auto codes = static_cast<uint32_t>(word >> (kStride * first_taken()));
    TQ_UNROLL
    for (int i = 0; i < kTaken; ++i) {
      const uint32_t code = codes >> (kStride * i);
#if defined(__CUDA_ARCH__)
      x[i] = __shfl_sync(0xFFFFFFFFu, lane_level, static_cast<int>(code), 1 << kBits);
#else
      (void)lane_level;
      x[i] = level_of<kBits>(code);
#endif
    }
  }
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take_levels(uint64_t word, float* x) const {
    const float* const levels = table(Plan::kDecode);
    if constexpr (kBits > 4) {
      TQ_UNROLL
      for (int i = 0; i < kTaken; ++i) {
        x[i] = levels[static_cast<uint32_t>(word >> (kBits * (first_taken() + i))) &
                      ((1u << kBits) - 1)];
      }
    } else {
      constexpr int kByteCodes = kBits == 3 ? 2 : 8 / kBits;
      constexpr int kTogether = kByteCodes < kTaken ? kByteCodes : kTaken;  // codes of one look-up
      TQ_UNROLL
      for (int i = 0; i < kTaken; i += kTogether) {
        const int code = first_taken() + i;
        const uint32_t byte = static_cast<uint32_t>(word >> (8 * (code / kByteCodes))) & 0xFF;
        const float* const entry = levels + byte * kByteCodes + code % kByteCodes;
        struct alignas(kTogether >= 4 ? 16 : 4 * kTogether) Levels {
          float at[kTogether];
        };
        const Levels found = *reinterpret_cast<const Levels*>(entry);
        TQ_UNROLL
        for (int k = 0; k < kTogether; ++k) x[i + k] = found.at[k];
      }
    }
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take_pairs(uint32_t word, float* x) const {
    constexpr int kPairs = kTaken / 2;
    struct alignas(8) Pair {
      float at[2];
    };
    TQ_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t index = word >> (4 * (first_taken() / 2 + i)) & 0xFF;
      const Pair pair = reinterpret_cast<const Pair*>(table(Plan::kDecode))[index];
      x[2 * i] = pair.at[0];
      x[2 * i + 1] = pair.at[1];
    }
  }

  const DequantizeArgs& args_;
  int row_;
  BlockPlace place_;
  int num_entries_;  // of the row
  unsigned turn_ = 0;
};

// As encode_steps() (kernels/encode_steps.hpp); copies.wait() waits for all but the copies since
// the last copies.commit() but one.
template <int kDim, class Block, class Each, class EachWarp, class Copies>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void dequantize_steps(const Block& block, Each each,
                                                      EachWarp each_warp, Copies copies) {
  each([](auto& thread) { thread.begin(); });
  each([](auto& thread) { thread.locate(0); });
  each([&](auto& thread) {
    thread.fetch(0, copies);
    thread.locate(1);
  });
  TQ_NO_UNROLL
  while (true) {
    each_warp([&](auto& thread) { thread.fetch_next(copies); });
    each([&](auto& thread) { thread.land(copies); });
    if (block.wanted()) {
      each_warp([](auto& thread) { thread.decode(); });
      const auto rotate = [&](auto nth) { rotate_steps<kDim, decltype(nth)::value>(each_warp); };
      rotate(std::integral_constant<int, 0>{});
      rotate(std::integral_constant<int, 1>{});
      rotate(std::integral_constant<int, 2>{});
      each([](auto& thread) { thread.put_out(); });
      each_warp([](auto& thread) { thread.store(); });
    }
    if (block.last()) break;
    each_warp([](auto& thread) { thread.advance(); });
  }
}

}  // namespace turboquant::cuda::detail
