// The work of one thread block of encode_append: 64 tokens of one KV head, keys or values, become
// codes and scales, job after job. Host and device: tests/kernels run the same steps on the host,
// thread by thread, and compare every byte with the CPU encoder.
//
// One to four threads hold a token's row in registers from its elements to its codes, so that a
// butterfly is one instruction and most of a row's sums need no exchange. Threads of a row exchange
// numbers by shuffles (kernels/row_rotation.hpp). Shared memory holds the tile of rows: as it came,
// then (keys) as rotated rows for the mean, then packed codes. Up to 4 bits the codebook's tables
// lie across the lanes of a warp: a shuffle is a look-up without an address and without bank
// conflicts.
//
//   begin      tables, and the first tile of raw elements               global -> shared
//   load       elements to fp32, divided by smoothing, times signs      shared -> registers
//   rotate     three rounds (kernels/row_rotation.hpp)                  registers
//   mean       keys with means: rows to the tile, 64 rows summed in order per channel
//   fetch_next the next job's raw elements are on their way             global -> shared
//   centre     y = z - mean, <y,y> in 16 lanes
//   quantise   codes by cell search, <y,c>, <c,c>; packed codes to the tile
//              (vector codebooks: y to the tile, indices by kernels/encode_pairs.hpp; the sums)
//   store      scale; packed rows, coalesced                             shared -> global
//
// Numerics: cache/encode_append.hpp, quant/quantize_rows.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "encode_args.hpp"
#include "encode_lane_table.hpp"
#include "encode_load.hpp"
#include "encode_pack.hpp"
#include "encode_pairs.hpp"
#include "encode_plan.hpp"
#include "exact_math.hpp"
#include "row_rotation.hpp"
#include "turboquant/cache/stored_scale.hpp"
#include "turboquant/math/half.hpp"
#include "turboquant/quant/cell_search.hpp"
#include "turboquant/quant/quantize_rows.hpp"
#include "turboquant/quant/rotation.hpp"
#include "turboquant/quant/scale_rule.hpp"

namespace turboquant::cuda::detail {

template <int kDim, EncodeCodes kCodes>
class EncodeBlock : public EncodeLoad<kDim, kCodes> {
  using Base = EncodeLoad<kDim, kCodes>;
  using Base::active;
  using Base::args_;
  using Base::flags;
  using Base::kElems;
  using Base::kModerate;
  using Base::kPitch;
  using Base::kThreads;
  using Base::memory_;
  using Base::non_finite;
  using Base::offer;
  using Base::part;
  using Base::part_table;
  using Base::partner;
  using Base::region;
  using Base::side;
  using Base::state;
  using Base::table;
  using Base::thread;
  using Base::thread_;
  using Base::token;
  using Base::whole_warp;
  using Base::x_;
  using typename Base::Plan;
  using typename Base::Shape;

 public:
  using Base::Base;
  using Base::centres;
  using Base::finds_pairs;

  // A round up to the stage that crosses, and from there.
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_begin() {
    if constexpr (kRound > 0) {
      multiply(part_table(Plan::kNormaliser + (kRound - 1) * Plan::kTableBytes), x_);
    }
    if constexpr (kRound == quant::SignHadamardRotation::kTurnRound) {
      turn_pairs(part_table(Plan::kTurns), x_);
    }
    Base::template transform_begin<kRound>();
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void offer_row() { offer(x_); }
  template <int kRound, int kNth>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_cross() {
    Base::template transform_cross<kRound, kNth>();
  }
  template <int kRound>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_end() {
    Base::template transform_end<kRound, false>();
    if constexpr (kRound == kEnd - 1) Base::template normalise<kRound>();
  }

  // Marks tokens with NaN or inf after rotation.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_non_finite() {
    if (active() && (flags()[thread_] & kModerate) == 0) [[unlikely]] {
      float sum = 0.0f;  // of zeros or NaN
      TQ_UNROLL
      for (int e = 0; e < kElems; ++e) sum = add_rn(sum, sub_rn(x_[e], x_[e]));
      if (sum != 0.0f || sum != sum) non_finite()[token()] = 1;
    }
  }
  // Rows for the mean. Those that are left out add zeros, which change no sum (none is -0).
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void put_finite_row() {
    if (!active()) return;
    if (non_finite()[token()] == 0) {
      store_row(region(thread()), x_);
      return;
    }
    if (part() == 0) add_shared(&state().non_finite_tokens, 1);
    float* const to = region(thread());
    TQ_NO_UNROLL
    for (int e = 0; e < kElems; ++e) to[e] = 0.0f;
  }
  // The block's mean.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_mean() {
    const int count = state().job.tokens - state().non_finite_tokens;
    int64_t saturated = 0;
    TQ_NO_UNROLL
    for (int slot = thread(); slot < kDim; slot += kThreads) {
      const int held_by = slot / kElems, e = slot % kElems;
      const float* const column = region(held_by) + e;
      float sum = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 16
#endif
      for (int t = 0; t < kBlockTokens; ++t) {  // whole blocks only have a mean
        sum = add_rn(sum, column[t * kRowPitch]);
      }
      const float mean = count > 0 ? div_rn(sum, static_cast<float>(count)) : 0.0f;
      const uint16_t bits = cache::saturated_fp16(mean, saturated);
      table(Plan::kMean)[held_by * kPitch + e] = math::fp32_from_fp16(bits);
      reinterpret_cast<uint16_t*>(state().block)[Shape::coordinate(kEnd, held_by, e)] = bits;
    }
    if (saturated > 0) add_counter(args_.counters, saturated);
  }

  // y = z - mean, and this thread's share of <y,y>.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void centre() {
    if (centres()) {
      apply_table(part_table(Plan::kMean), x_, [](float z, float mean) { return sub_rn(z, mean); });
    }
    share_squares(kSumPlace);
  }
  // <y,y>. Rows whose squares are out of range are scaled, and squared again: rescue() has those.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_squares() {
    squares_ = sum_shares(sums_, kSumPlace);
    const bool in_range = squares_ >= quant::kMinSquares && squares_ <= quant::kMaxSquares;
    const bool tiny = squares_ < quant::kMinSquares;
    unit_ = in_range ? 1.0f : tiny ? quant::kTinyUnit : quant::kHugeUnit;
    rescues_ = !whole_warp(in_range);
    if (rescues_) [[unlikely]] {
      const float scale = in_range ? 1.0f : tiny ? 1 / quant::kTinyUnit : 1 / quant::kHugeUnit;
      TQ_UNROLL
      for (int e = 0; e < kElems; ++e) x_[e] = mul_rn(x_[e], scale);
      share_squares(kLevelPlace);
    }
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rescue() {
    if (rescues_) [[unlikely]] {
      squares_ = sum_shares(sums_, kLevelPlace);
      if (!(squares_ <= kMaxFloat)) squares_ = bits_float(0x7FC00000u);
    }
    factor_ = squares_ > 0.0f ? div_rn(args_.sqrt_dim, sqrt_rn(squares_)) : 0.0f;
  }

  // Codes, and this thread's share of the sums. All threads of a warp: codes of rows without a
  // token or a direction come to nothing.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void quantise() {
    const auto squares = [this] { return sums_squares(); };
    if constexpr (kCodes != EncodeCodes::kNarrow) {
      side().bits > kShuffledBits ? quantise_row<false>(squares) : quantise_row<true>(squares);
    } else if (squares()) {
      quantise_row<true>([] { return std::true_type{}; });
    } else {
      quantise_row<true>([] { return std::false_type{}; });
    }
  }

  // Vector codebooks: rows for the search; this thread's share of the row's indices; then its
  // share of the sums.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void put_row() { store_row(region(thread()), x_); }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_pairs() {
    if (!active()) return;
    if (squares_ > 0.0f) {
      pair_search().find(side().bits);
    } else {
      pair_search().clear();
    }
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void sum_pairs() {
    load_row(region(thread()), x_);  // the search needs the registers
    const auto levels_of = [this](int group, float(&level)[8]) {
      TQ_UNROLL
      for (int e = 0; e < 8; e += 4) {
        pair_search().levels(Shape::coordinate(kEnd, part(), 8 * group + e) / 2, level + e);
      }
    };
    clear(sums_);
    if (active()) {
      TQ_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float level[8];
        levels_of(group, level);
        if (sums_squares()) {
          TQ_UNROLL
          for (float& x : level) x = mul_rn(x, x);
        }
        add_to_sums(group, level, sums_squares());
      }
    }
    sum_least_squares(levels_of);
    share(sums_, kSumPlace);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_sums() {
    sum_ = sum_shares(sums_, kSumPlace);
    sum_of_level_squares_ = sum_;
    if (side().rule == quant::ScaleRule::kLeastSquares) [[unlikely]] {
      sum_of_level_squares_ = sum_shares(level_squares_, kLevelPlace);
    }
  }
  // A row's threads have a group's quads in pairs: each takes every other group of them.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void join_quads() {
    if constexpr (Shape::kThreads > 1) {
      const bool odd = part() % 2 != 0;
      TQ_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        auto& quads = codes_[group];
        const float sent = bits_float(odd ? quads[0] : quads[1]);
        const int place = kCodesPlace + 2 * group + (odd ? 1 : 0);  // the partner's
        const uint32_t got = float_bits(partner(1, sent, place));
        quads[0] = odd ? got : quads[0];
        quads[1] = odd ? quads[1] : got;
      }
    }
  }
  // Codes to the tile.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void pack() {
    with_bits<kCodes == EncodeCodes::kNarrow>(side().bits, [&](auto constant) {
      constexpr int kBits = decltype(constant)::value;
      const int first = Shape::coordinate(kEnd, part(), Shape::kThreads == 1 ? 0 : part() % 2 * 4);
      pack_groups<kBits, Shape::kThreads>(
          codes_, tile_row<kBits>(token()) + first / 8 * kGroupBytes<kBits>);
    });
  }

  // The scale, by the row's first thread.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_scale() {
    if (!active() || part() != 0) return;
    float scale;
    if (squares_ > 0.0f) {
      const quant::RowSums sums = {squares_, sum_, sum_of_level_squares_};
      scale = mul_rn(quant::scale_from_sums(side().rule, sums, args_.sqrt_dim), unit_);
      scale = kMaxFloat < scale ? kMaxFloat : scale;
    } else if (squares_ == 0.0f) {
      scale = 0.0f;
    } else {
      scale = bits_float(0x7FC00000u);
      add_counter(args_.counters + 1, 1);
    }
    const int scale_bytes = args_.half_scales ? 2 : 4;
    int64_t saturated = 0;
    cache::store_scale(
        args_.half_scales ? cache::ScaleType::kFloat16 : cache::ScaleType::kFloat32, scale,
        state().block + side().scales_offset + (state().job.page_offset + token()) * scale_bytes,
        saturated);
    if (saturated > 0) add_counter(args_.counters, saturated);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_codes() {
    std::byte* const to = state().block + side().codes_offset;
    if constexpr (kCodes == EncodeCodes::kVector) {
      store_indices(to);
    } else {
      with_bits<kCodes == EncodeCodes::kNarrow>(
          side().bits, [&](auto bits) { store_rows<decltype(bits)::value>(to); });
    }
  }

 private:
  static constexpr int kRowPitch = kPitch * Shape::kThreads;  // floats between tokens in the tile
  static constexpr int kEnd = quant::SignHadamardRotation::kRounds;  // the layout after them
  static constexpr int kGroups = kElems / 8;
  // Up to as many bits the search's cells and the levels fit a warp's lanes.
  static constexpr int kShuffledBits = 4;
  static_assert(kShuffledBits <= quant::kIndexedCellBits && (1 << kShuffledBits) <= 32);
  // Lanes of a sum of 16 that this thread holds: all, or those of its quads.
  static constexpr int kSumLanes = quant::kSumLanes / Shape::kThreads;
  static constexpr int kSharedLanes = Shape::kThreads == 1 ? 1 : 4;
  static constexpr float kMaxFloat = 3.402823466e+38f;
  // Where a thread offers its lanes of sums, and its codes.
  static constexpr int kSumPlace = 0, kLevelPlace = kSumLanes, kCodesPlace = 2 * kSumLanes;

  template <int kCount>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static void clear(float (&numbers)[kCount]) {
    TQ_UNROLL
    for (int i = 0; i < kCount; ++i) numbers[i] = 0.0f;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void share_squares(int place) {
    clear(sums_);
    TQ_UNROLL
    for (int e = 0; e < kElems; ++e) {
      sums_[e % kSumLanes] = add_rn(sums_[e % kSumLanes], mul_rn(x_[e], x_[e]));
    }
    share(sums_, place);
  }
  // Lanes of a sum up to those that other threads have, too; and from there.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void share(float (&lanes)[kSumLanes], int place) const {
    fold<kSumLanes, kSharedLanes>(lanes);
    offer(lanes, place);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float sum_shares(float (&lanes)[kSumLanes], int place) const {
    if constexpr (Shape::kThreads > 1) {
      TQ_UNROLL
      for (int l = 0; l < kSharedLanes; ++l) lanes[l] = Base::sum_of_parts(lanes[l], place + l);
    }
    fold<kSharedLanes, 1>(lanes);
    return lanes[0];
  }
  // Adds lane l + kCount / 2 to lane l until kLeft lanes are left.
  template <int kCount, int kLeft>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static void fold(float* lanes) {
    if constexpr (kCount > kLeft) {
      TQ_UNROLL
      for (int l = 0; l < kCount / 2; ++l) lanes[l] = add_rn(lanes[l], lanes[l + kCount / 2]);
      fold<kCount / 2, kLeft>(lanes);
    }
  }

  // squares(): sums_squares().
  template <bool kShuffled, class Squares>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void quantise_row(Squares squares) {
    const int bits = side().bits;
    const int cell_count = quant::search_cells(bits);
    const float search_scale = *Base::table(Plan::kSearchScale);
    const auto* const cells = reinterpret_cast<const quant::SearchCell*>(memory_ + Plan::kCells);
    const float* const levels = table(Plan::levels_offset(bits));
    const LaneTable<kShuffled> table(cells, cell_count, levels, 1 << bits);
    const uint32_t kept = active() && squares_ > 0.0f ? 0xFFFFFFFFu : 0;
    const int code_bits = bits == 3 ? 4 : bits;  // in a quad
    const uint32_t next_code = 1u << code_bits;
    clear(sums_);
    TQ_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if constexpr (!kShuffled || (Shape::kThreads > 1 && !Shape::kTrades)) hold_loads(8 * group);
      uint32_t code[8];
      float level[8];
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float x = mul_rn(x_[8 * group + i], factor_);
        code[i] = table.code(quant::search_cell(x, search_scale, cell_count), x);
        level[i] = table.level(code[i]);
      }
      add_to_sums(group, level, squares());
      codes_[group][0] = codes_[group][1] = 0;
      TQ_UNROLL
      for (int i = 3; i >= 0; --i) {
        codes_[group][0] = codes_[group][0] * next_code + code[i];
        codes_[group][1] = codes_[group][1] * next_code + code[i + 4];
      }
      TQ_UNROLL
      for (uint32_t& quad : codes_[group]) quad &= kept;
    }
    sum_least_squares([&](int group, float(&level)[8]) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        level[i] = table.level(codes_[group][i / 4] >> (i % 4 * code_bits) & (next_code - 1));
      }
    });
    share(sums_, kSumPlace);
    if constexpr (Shape::kThreads > 1) {
      float quads[2 * kGroups];
      TQ_UNROLL
      for (int q = 0; q < 2 * kGroups; ++q) quads[q] = bits_float(codes_[q / 2][q % 2]);
      offer(quads, kCodesPlace);
    }
  }

  // What a scale rule reads: <y,c>, or (norm preserving) <c,c>, in sums_; least squares both, the
  // second once the row is not needed any more.
  TQ_HOST_DEVICE bool sums_squares() const {
    return side().rule == quant::ScaleRule::kNormPreserving;
  }
  // Adds the group's levels times the row, or (norm preserving) their squares.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void add_to_sums(int group, const float (&level)[8],
                                                   bool squares) {
    const auto lane = [group](int i) { return (8 * group + i) % kSumLanes; };
    if (squares) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) sums_[lane(i)] = add_rn(sums_[lane(i)], level[i]);
    } else {  // the norm rule reads neither
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) {
        sums_[lane(i)] = add_rn(sums_[lane(i)], mul_rn(x_[8 * group + i], level[i]));
      }
    }
  }
  template <class Levels>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void sum_least_squares(Levels levels_of) {
    clear(level_squares_);
    if (side().rule == quant::ScaleRule::kLeastSquares) [[unlikely]] {
      TQ_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float level[8];
        levels_of(group, level);
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          float& sum = level_squares_[(8 * group + i) % kSumLanes];
          sum = add_rn(sum, mul_rn(level[i], level[i]));
        }
      }
      share(level_squares_, kLevelPlace);
    }
  }

  // The packed rows of all tokens, in units of the largest power of two that pieces of a row are
  // aligned to.
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_rows(std::byte* codes) const {
    constexpr int kRowBytes = static_cast<int>(quant::packed_row_bytes(kDim, kBits));
    // At 3 bits units do not straddle segments.
    constexpr int kUnit = lowest_bit((kBits == 3 ? kDim / 8 : kRowBytes) | 16);
    constexpr int kUnits = kRowBytes / kUnit;
    std::byte* const to = codes + state().job.page_offset * kRowBytes;
    for (int v = thread(); v < state().job.tokens * kUnits; v += kThreads) {
      const int token = v / kUnits, at = v % kUnits * kUnit;
      if constexpr (kBits == 3) {
        constexpr int kSegment = kDim / 8;
        const int segment = at / kSegment;
        const std::byte* const last = tile_row<kBits>(token) + 3 * kSegment + at % kSegment;
        store_planes<kUnit>(tile_row<kBits>(token) + at, last, segment, to + v * kUnit);
      } else {
        copy_unit<kUnit>(tile_row<kBits>(token) + at, to + v * kUnit);
      }
    }
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE PairSearch<kDim> pair_search() const {
    return {.codewords = reinterpret_cast<const Codeword*>(memory_ + Plan::kCodewords),
            .tile = region(thread() - part()),
            .factor = factor_,
            .part = part(),
            .indices = indices(token())};
  }
  TQ_HOST_DEVICE uint8_t* indices(int token) const {
    return reinterpret_cast<uint8_t*>(memory_ + Plan::kIndices) + token * Plan::kIndexPitch;
  }
  // The packed rows of all tokens are indices: all of a row's, or its first ones, or every other
  // one (quant/packing.hpp).
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_indices(std::byte* codes) const {
    const int bits = side().bits;
    const int row_bytes = kDim / 8 * bits, each = bits == 2 ? 2 : 1;
    auto* const to = reinterpret_cast<uint8_t*>(codes + state().job.page_offset * row_bytes);
    for (int v = thread(); v < state().job.tokens * row_bytes; v += kThreads) {
      to[v] = indices(v / row_bytes)[v % row_bytes * each];
    }
  }
  // Where a token's packed groups wait for store_rows().
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE std::byte* tile_row(int token) const {
    return memory_ + Plan::kPacked + token * group_row_pitch<kBits>(kDim);
  }

  // Those that a step leaves to a later one have no value before it.
  float squares_, unit_, factor_, sum_, sum_of_level_squares_;
  bool rescues_;
  uint32_t codes_[kGroups][2];  // of quads of coordinates; later of the halves of groups
  float sums_[kSumLanes], level_squares_[kSumLanes];
};

}  // namespace turboquant::cuda::detail
