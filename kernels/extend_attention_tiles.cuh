// Extend attention: how blocks of 64 tokens become fp16 tiles in shared memory.
#pragma once

#include "decode_attention_codes.cuh"
#include "decode_attention_pages.cuh"
#include "extend_attention_traits.cuh"

namespace turboquant::cuda::detail {

// The levels of a side where shared memory has no room for a copy for every lane: entry e is at 4
// e.
struct SharedTable {
  const std::byte* table;

  TQ_DEVICE uint32_t at_byte(uint32_t word, int byte) const {
    return load_as<uint32_t>(table + (word >> (8 * byte) & 0xFFu) * 4);
  }
  TQ_DEVICE uint32_t at_code(uint32_t code) const { return load_as<uint32_t>(table + code * 4); }
};

template <class Traits>
class TileFiller {
  static constexpr int kDim = Traits::kDim;
  using Stored = StoredRow<kDim>;

 public:
  TQ_DEVICE TileFiller(const ExtendArgs& args, std::byte* shared) : args_(args), shared_(shared) {}

  TQ_DEVICE void fill_table() const {
    for (int e = ptx::thread_index(); e < 2 * 256; e += Traits::kThreads) {
      const int entry = e % 256;
      const bool is_value = e >= 256;
      const DecodeArgs& call = args_.call;
      const uint32_t levels = pack_levels(
          is_value ? table_levels(call.value_levels, entry, call.v_bits, args_.vector_codebook)
                   : table_levels(call.key_levels, entry, call.k_bits, args_.vector_codebook));
      std::byte* const to = shared_ + (is_value ? Traits::kValueTableOffset : 0);
      if constexpr (Traits::kLaneTable) {
        for (int i = 0; i < 8; ++i) {
          // Pieces in different order, so that neighbouring rows go to different banks.
          *reinterpret_cast<Words4*>(to + 256 * entry + 16 * ((i + entry) % 8)) =
              Words4{{levels, levels, levels, levels}};
        }
      } else {
        *reinterpret_cast<uint32_t*>(to + 4 * entry) = levels;
      }
    }
  }

  // Decode a page's block of a head: its keys into tile `buffer`, the scales of both sides to
  // `scales`; its values. Slots from `tokens` on get scale 0. All threads that decode.
  TQ_DEVICE void fill_page_keys(int buffer, float* scales, const PagedBlock& block) const {
    const DecodeArgs& call = args_.call;
    const std::byte* const keys = block.data + (call.has_mean ? 2 * kDim : 0);
    const std::byte* const key_scales =
        keys + cache::kBlockTokens * quant::packed_row_bytes(kDim, call.k_bits);
    const std::byte* const value_scales =
        block.data + call.key_part_bytes +
        cache::kBlockTokens * quant::packed_row_bytes(kDim, call.v_bits);
    // First, so that they come while codes are decoded.
    float taken[kThreadScales];
    TQ_UNROLL
    for (int k = 0; k < kThreadScales; ++k) {
      const int place = scale_place(k), slot = place % cache::kBlockTokens;
      const std::byte* const from = place < cache::kBlockTokens ? key_scales : value_scales;
      taken[k] = place < 2 * cache::kBlockTokens && slot < block.tokens
                     ? load_scale(from, slot, call.half_scales)
                     : 0.0f;
    }
    std::byte* const to = key_tile(buffer);
    switch (call.k_bits) {
      case 2:
        fill_rows<2>(to, keys, 0);
        break;
      case 3:
        fill_rows<3>(to, keys, 0);
        break;
      case 4:
        fill_rows<4>(to, keys, 0);
        break;
      case 5:
        fill_rows<5>(to, keys, 0);
        break;
      case 6:
        fill_rows<6>(to, keys, 0);
        break;
      default:
        fill_rows<8>(to, keys, 0);
    }
    put_scales(scales, taken);
  }
  TQ_DEVICE void fill_page_values(int buffer, const PagedBlock& block) const {
    std::byte* const to = value_tile(buffer);
    const std::byte* const values = block.data + args_.call.key_part_bytes;
    switch (args_.call.v_bits) {
      case 2:
        return fill_rows<2>(to, values, Traits::kValueTableOffset);
      case 3:
        return fill_rows<3>(to, values, Traits::kValueTableOffset);
      default:
        return fill_rows<4>(to, values, Traits::kValueTableOffset);
    }
  }

  // Likewise copy exact tokens, from the `first` of all of them on.
  TQ_DEVICE void fill_exact_keys(int buffer, float* scales, int64_t first) const {
    const int64_t of_keys = int64_t{args_.call.batch} * args_.call.num_kv_heads * args_.exact_slots;
    float taken[kThreadScales];
    TQ_UNROLL
    for (int k = 0; k < kThreadScales; ++k) {
      const int place = scale_place(k);
      const int64_t at = first + place % cache::kBlockTokens;
      taken[k] = place < 2 * cache::kBlockTokens
                     ? args_.exact_scales[place < cache::kBlockTokens ? at : of_keys + at]
                     : 0.0f;
    }
    copy_rows(args_.exact_keys + first * kDim, key_tile(buffer));
    put_scales(scales, taken);
  }
  TQ_DEVICE void fill_exact_values(int buffer, int64_t first) const {
    copy_rows(args_.exact_values + first * kDim, value_tile(buffer));
  }

  // Brings a page's block closer.
  TQ_DEVICE void prefetch_page(const PagedBlock& block) const {
    for (uint32_t i = 128 * static_cast<uint32_t>(fill_thread());
         i < args_.call.key_part_bytes + args_.call.value_part_bytes; i += 128 * kFillThreads) {
      ptx::prefetch(block.data + i);
    }
  }

  TQ_DEVICE std::byte* key_tile(int buffer) const {
    return shared_ + Traits::kTilesOffset + buffer * 2 * Traits::kSideBytes;
  }
  TQ_DEVICE std::byte* value_tile(int buffer) const {
    return key_tile(buffer) + Traits::kSideBytes;
  }
  // f32 keys [64], values [64], then u32 [kFillWarps].
  TQ_DEVICE float* scales(int buffer) const {
    return reinterpret_cast<float*>(shared_ + Traits::kScalesOffset +
                                    buffer * Traits::kScalesBytes);
  }
  // Bits of the largest finite value scale among a tile's.
  TQ_DEVICE static uint32_t largest_value_scale(const float* scales) {
    const auto* const of_warps =
        reinterpret_cast<const uint32_t*>(scales + 2 * cache::kBlockTokens);
    uint32_t largest = 0;
    TQ_UNROLL
    for (int w = 0; w < Traits::kFillWarps; ++w) {
      largest = of_warps[w] > largest ? of_warps[w] : largest;
    }
    return largest;
  }

 private:
  static constexpr int kPasses = cache::kBlockTokens / (8 * Traits::kFillWarps);

  static constexpr int kFillThreads = 32 * Traits::kFillWarps;
  // Scales of a block that a thread takes: number k of it is at this place of both sides'.
  static constexpr int kThreadScales =
      static_cast<int>(ceil_div(2 * cache::kBlockTokens, kFillThreads));
  TQ_DEVICE static int scale_place(int k) { return fill_thread() + k * kFillThreads; }

  TQ_DEVICE static int fill_warp() { return ptx::warp_index_here() - Traits::kFirstFillWarp; }
  TQ_DEVICE static int fill_thread() { return 32 * fill_warp() + ptx::lane_index_here(); }

  // A warp has eight rows, four lanes each; rows of one quarter of a warp are four apart, which
  // puts their pieces into different banks.
  TQ_DEVICE static int slot_of(int pass) {
    const int g = ptx::lane_index_here() >> 2;
    return (pass * Traits::kFillWarps + fill_warp()) * 8 + (g >> 1) + 4 * (g & 1);
  }

  TQ_DEVICE auto table(int offset) const {
    if constexpr (Traits::kLaneTable) {
      return LaneTable{shared_ + offset, static_cast<uint32_t>(4 * ptx::lane_index_here())};
    } else {
      return SharedTable{shared_ + offset};
    }
  }

  // Codes of two rows of a lane are on their way at once where registers allow.
  template <int kBits>
  TQ_DEVICE void fill_rows(std::byte* tile, const std::byte* codes, int table_offset) const {
    using Row = KeyRow<kDim, kBits>;
    constexpr int kAtOnce = kPasses % 2 == 0 && Row::kWords <= 8 ? 2 : 1;
    const auto levels = table(table_offset);
    const int t = ptx::lane_index_here() & 3;
    TQ_NO_UNROLL
    for (int pass = 0; pass < kPasses; pass += kAtOnce) {
      Row rows[kAtOnce];
      TQ_UNROLL
      for (int k = 0; k < kAtOnce; ++k) rows[k].load(codes, slot_of(pass + k), t);
      TQ_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        TQ_UNROLL
        for (int j = 0; j < Stored::kPieces; ++j) {
          uint32_t words[Stored::kPiecePairs];
          TQ_UNROLL
          for (int i = 0; i < Stored::kPiecePairs; ++i) {
            words[i] = key_levels(rows[k], j * Stored::kPiecePairs + i, levels);
          }
          std::byte* const at = tile + operand_at(slot_of(pass + k), j, t);
          if constexpr (Stored::kPiecePairs == 4) {
            *reinterpret_cast<Words4*>(at) = Words4{{words[0], words[1], words[2], words[3]}};
          } else {
            *reinterpret_cast<Words2*>(at) = Words2{{words[0], words[1]}};
          }
        }
      }
    }
  }

  TQ_DEVICE static void copy_rows(const uint16_t* rows, std::byte* tile) {
    const int t = ptx::lane_index_here() & 3;
    TQ_NO_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int slot = slot_of(pass);
      const auto* const from = reinterpret_cast<const std::byte*>(rows + int64_t{slot} * kDim);
      TQ_UNROLL
      for (int j = 0; j < Stored::kPieces; ++j) {
        const std::byte* const piece = from + Stored::piece(j, t);
        std::byte* const at = tile + operand_at(slot, j, t);
        if constexpr (Stored::kPiecePairs == 4) {
          *reinterpret_cast<Words4*>(at) = load_as<Words4>(piece);
        } else {
          *reinterpret_cast<Words2*>(at) = load_as<Words2>(piece);
        }
      }
    }
  }
  // Where piece j of lane t's of a row is in a tile.
  TQ_DEVICE static int operand_at(int slot, int j, int t) {
    return Traits::operand_at(cache::kBlockTokens, slot, Stored::piece(j, t));
  }

  TQ_DEVICE static void put_scales(float* scales, const float (&taken)[kThreadScales]) {
    uint32_t largest = 0;
    TQ_UNROLL
    for (int k = 0; k < kThreadScales; ++k) {
      const int place = scale_place(k);
      if (place < 2 * cache::kBlockTokens) scales[place] = taken[k];
      if (place < cache::kBlockTokens) continue;  // a key's
      const uint32_t bits = finite_magnitude(taken[k]);
      largest = bits > largest ? bits : largest;
    }
    largest = ptx::reduce_max(largest);
    if (ptx::lane_index_here() == 0) {
      reinterpret_cast<uint32_t*>(scales + 2 * cache::kBlockTokens)[fill_warp()] = largest;
    }
  }

  const ExtendArgs& args_;
  std::byte* shared_;
};

}  // namespace turboquant::cuda::detail
