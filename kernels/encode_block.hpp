// The work of one thread block of encode_append: 64 tokens of one KV head, keys or values, become
// codes and scales. Host and device: tests/kernels run the same steps on the host, thread by
// thread, and compare every byte with the CPU encoder.
//
// One thread (two for D > 80) holds a token's row in registers through rotation and centring, so
// that a butterfly is one instruction and the row's sums need no exchange. Shared memory holds the
// tile of rows: as it came, then (keys) as rotated rows for the mean, then centred rows for the
// quantiser, which packs each row's codes over the part of the row it has read.
//
//   fetch      tables, and the tile of raw elements                     global -> shared
//   load       elements to fp32, divided by smoothing, times signs      shared -> registers
//   rotate     three rounds (kernels/row_rotation.hpp)                  registers
//   mean       keys with means: rows to the tile, 64 rows summed in order per channel
//   centre     y = z - mean, <y,y> in 16 lanes; y to the tile
//   quantise   codes by cell search, <y,c>, <c,c>, scale; codes to the tile
//              (vector codebooks: indices by kernels/encode_pairs.hpp, in shared memory; the sums)
//   store      packed rows, coalesced                                    shared -> global
//
// Numerics: cache/encode_append.hpp, quant/quantize_rows.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encode_args.hpp"
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

template <int kDim>
class EncodeBlock : public EncodeLoad<kDim> {
  using Base = EncodeLoad<kDim>;
  using Base::active;
  using Base::args_;
  using Base::flags;
  using Base::kElems;
  using Base::kModerate;
  using Base::kPitch;
  using Base::kThreads;
  using Base::memory_;
  using Base::non_finite;
  using Base::part;
  using Base::part_table;
  using Base::region;
  using Base::side;
  using Base::state;
  using Base::stored_block;
  using Base::table;
  using Base::thread;
  using Base::thread_;
  using Base::token;
  using Base::x_;
  using typename Base::Plan;
  using typename Base::Shape;

 public:
  using Base::Base;
  using Base::centres;
  using Base::finds_pairs;

  // A round up to the stage that crosses, and from there.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_begin(int round) {
    if (round > 0) {
      multiply(part_table(Plan::kNormaliser + (round - 1) * Plan::kTableBytes), x_);
    }
    if (round == quant::SignHadamardRotation::kTurnRound) {
      turn_pairs(part_table(Plan::kTurns), x_);
    }
    hadamard_begin<kDim>(x_);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void put_row() { store_row(region(thread()), x_); }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void cross_rows() { cross(region(thread() ^ 1), part(), x_); }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rotate_end() { hadamard_end<kDim, false>(x_); }
  // The last round's normaliser.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void normalise() {
    TQ_UNROLL
    for (int e = 0; e < kElems; ++e) x_[e] = mul_rn(x_[e], kNormaliser<kDim>);
  }

  // Marks tokens with NaN or inf after rotation.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_non_finite() {
    if (!active() || (flags()[thread_] & kModerate) != 0) return;
    float sum = 0.0f;  // of zeros or NaN
    TQ_UNROLL
    for (int e = 0; e < kElems; ++e) sum = add_rn(sum, sub_rn(x_[e], x_[e]));
    if (sum != 0.0f || sum != sum) non_finite()[token()] = 1;
  }
  // Rows for the mean. Those that are left out add zeros, which change no sum (none is -0).
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void put_finite_row() {
    if (!active()) return;
    if (non_finite()[token()] == 0) {
      put_row();
      return;
    }
    if (part() == 0) add_shared(&state().non_finite_tokens, 1);
    float* const to = region(thread());
    TQ_NO_UNROLL
    for (int e = 0; e < kElems; ++e) to[e] = 0.0f;
  }
  // The block's mean: two channels a thread.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_mean() {
    const int count = state().job.tokens - state().non_finite_tokens;
    int64_t saturated = 0;
    TQ_NO_UNROLL
    for (int channel = 2 * thread(); channel < kDim; channel += 2 * kThreads) {
      const float* column = region(Shape::part_of(channel)) + Shape::elem_of(channel);
      float sums[2] = {0.0f, 0.0f};
#if defined(__CUDA_ARCH__)
#pragma unroll 16
#endif
      for (int t = 0; t < kBlockTokens; ++t) {  // whole blocks only have a mean
        sums[0] = add_rn(sums[0], column[t * kRowPitch]);
        sums[1] = add_rn(sums[1], column[t * kRowPitch + 1]);
      }
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const float mean = count > 0 ? div_rn(sums[i], static_cast<float>(count)) : 0.0f;
        const uint16_t bits = cache::saturated_fp16(mean, saturated);
        word |= uint32_t{bits} << (16 * i);
        table(Plan::kMean)[Shape::table_slot(channel + i)] = math::fp32_from_fp16(bits);
      }
      reinterpret_cast<uint32_t*>(stored_block())[channel / 2] = word;
    }
    if (saturated > 0) add_counter(args_.counters, saturated);
  }

  // y = z - mean to the tile, and this thread's share of <y,y>. The tile takes rows as the
  // quantiser reads them: a thread's lanes of every sum of 16 are whole groups of eight
  // coordinates.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void centre() {
    if (centres()) {
      centre_row<true>();
    } else {
      centre_row<false>();
    }
  }
  // <y,y>, and how rows whose squares are out of range are scaled. Only reads the tile.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_squares() {
    if (!active()) return;
    if constexpr (Shape::kThreads == 2) {
      const Four low = load_four(region(thread() - part()) + kElems);
      const Four high = load_four(region(thread() - part() + 1) + kElems);
      float lanes[4];
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) lanes[i] = add_rn(low.at[i], high.at[i]);
      fold<4, 1>(lanes);
      squares_ = lanes[0];
    }
    unit_ = 1.0f;
    rescale_ = 1.0f;
    if (!(squares_ >= quant::kMinSquares && squares_ <= quant::kMaxSquares)) rescue();
    factor_ = squares_ > 0.0f ? div_rn(args_.sqrt_dim, sqrt_rn(squares_)) : 0.0f;
  }

  // Rows whose squares are out of range are scaled in the tile.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void rescale() {
    if (!active() || rescale_ == 1.0f) return;
    float* const to = region(thread());
    TQ_NO_UNROLL
    for (int e = 0; e < kElems; ++e) to[e] = mul_rn(to[e], rescale_);
  }

  // Codes over the start of the thread's part of the tile, and its share of the sums.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void quantise() {
    if (!active()) return;
    if (!(squares_ > 0.0f)) {  // zero, or NaN: codes 0
      float* const to = region(thread());
      TQ_NO_UNROLL
      for (int e = 0; e < kElems; ++e) to[e] = 0.0f;
      return;
    }
    rescale();
    with_bits(side().bits, [&](auto bits) {
      sum_groups([&](int group, float* dots, float* squares) {
        quantise_group<decltype(bits)::kValue>(group, dots, squares);
      });
    });
  }

  // Vector codebooks: this thread's share of the row's indices; then its share of the sums.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void find_pairs() {
    if (!active()) return;
    if (squares_ > 0.0f) {
      pair_search().find(side().bits);
    } else {
      pair_search().clear();
    }
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void sum_pairs() {
    if (!active() || !(squares_ > 0.0f)) return;
    sum_groups([&](int group, float* dots, float* squares) {
      float y[8], level[8];
      load_row(region(thread()) + 8 * group, y);
      pair_search().levels(group * Shape::kThreads + part(), level);
      add_sums(y, level, dots, squares);
    });
  }

  // The scale, by the row's first thread.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_scale() {
    if (!active() || part() != 0) return;
    float scale;
    if (squares_ > 0.0f) {
      quant::RowSums sums = {squares_, 0.0f, 0.0f};
      if constexpr (Shape::kThreads == 2) {
        sums.row_dot_level = add_up_parts(kDotOffset);
        sums.level_squares = add_up_parts(kLevelOffset);
      } else {
        sums.row_dot_level = region(thread())[kDotOffset];
        sums.level_squares = region(thread())[kLevelOffset];
      }
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
        stored_block() + side().scales_offset + (state().job.page_offset + token()) * scale_bytes,
        saturated);
    if (saturated > 0) add_counter(args_.counters, saturated);
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_codes() {
    std::byte* const to = stored_block() + side().codes_offset;
    if (finds_pairs()) {
      store_indices(to);
      return;
    }
    with_bits(side().bits, [&](auto bits) { store_rows<decltype(bits)::kValue>(to); });
  }

 private:
  static constexpr int kRowPitch = kPitch * Shape::kThreads;  // floats between tokens in the tile
  static constexpr int kSquareLanes = quant::kSumLanes / Shape::kThreads;
  static constexpr float kMaxFloat = 3.402823466e+38f;
  // Where a thread leaves its sums, or (two threads a row) its eight lanes of each: in floats of
  // its part of the tile, behind the codes.
  static constexpr int kSumFloats = Shape::kThreads == 1 ? 1 : 8;
  static constexpr int kDotOffset = kElems - 2 * kSumFloats;
  static constexpr int kLevelOffset = kElems - kSumFloats;
  static_assert(kDotOffset * 4 >= kElems);  // codes take a byte an element at most

  template <int kBits>
  struct Bits {
    static constexpr int kValue = kBits;
  };
  template <class F>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static void with_bits(int bits, F f) {
    switch (bits) {
      case 1:
        return f(Bits<1>{});
      case 2:
        return f(Bits<2>{});
      case 3:
        return f(Bits<3>{});
      case 4:
        return f(Bits<4>{});
      case 5:
        return f(Bits<5>{});
      case 6:
        return f(Bits<6>{});
      case 7:
        return f(Bits<7>{});
      default:
        return f(Bits<8>{});
    }
  }

  template <bool kMean>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void centre_row() {
    const float* const mean = part_table(Plan::kMean);
    // Lanes of the sum that this thread holds: all 16, or those whose bit 2 is its part.
    float lanes[kSquareLanes] = {};
    TQ_UNROLL
    for (int e = 0; e < kElems; e += 4) {
      if constexpr (kMean) {
        hold_loads(e);
        const Four four = load_four(mean + e);
        TQ_UNROLL
        for (int i = 0; i < 4; ++i) x_[e + i] = sub_rn(x_[e + i], four.at[i]);
      }
      TQ_UNROLL
      for (int i = e; i < e + 4; ++i) {
        lanes[i % kSquareLanes] = add_rn(lanes[i % kSquareLanes], mul_rn(x_[i], x_[i]));
      }
      const int group = e / 4;
      store_four(Shape::kThreads == 1
                     ? region(thread()) + e
                     : region(thread() - part() + group % 2) + group / 2 * 8 + part() * 4,
                 x_ + e);
    }
    fold<kSquareLanes, Shape::kThreads == 1 ? 1 : 4>(lanes);
    if constexpr (Shape::kThreads == 1) {
      squares_ = lanes[0];
    } else {
      store_four(region(thread()) + kElems, lanes);
    }
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

  // Coordinate i of the row in the tile after centre().
  TQ_HOST_DEVICE float grouped(int i) const {
    if constexpr (Shape::kThreads == 1) return region(thread())[i];
    return region(thread() - part() + i / 8 % 2)[i / 16 * 8 + i % 8];
  }
  TQ_HOST_DEVICE void rescue() {
    const bool tiny = squares_ < quant::kMinSquares;
    unit_ = tiny ? quant::kTinyUnit : quant::kHugeUnit;
    rescale_ = tiny ? 1 / quant::kTinyUnit : 1 / quant::kHugeUnit;
    float lanes[quant::kSumLanes] = {};
    TQ_NO_UNROLL
    for (int start = 0; start < kDim; start += quant::kSumLanes) {
      TQ_UNROLL
      for (int l = 0; l < quant::kSumLanes; ++l) {
        if (start + l < kDim) {
          const float y = mul_rn(grouped(start + l), rescale_);
          lanes[l] = add_rn(lanes[l], mul_rn(y, y));
        }
      }
    }
    fold<quant::kSumLanes, 1>(lanes);
    squares_ = lanes[0];
    if (!(squares_ <= kMaxFloat)) squares_ = bits_float(0x7FC00000u);
  }

  // Lanes of a sum that this thread holds while it quantises: all, or the eight of its groups.
  static constexpr int kGroupLanes = quant::kSumLanes / Shape::kThreads;

  // The row's sums, to which group(g, dots, squares) adds those of group g of this thread's.
  template <class Group>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void sum_groups(Group add_group) {
    constexpr int kGroups = kElems / 8;
    constexpr int kGroupsAtOnce = kGroupLanes / 8;
    float dots[kGroupLanes] = {}, squares[kGroupLanes] = {};
    int group = 0;
    TQ_NO_UNROLL
    for (; group + kGroupsAtOnce <= kGroups; group += kGroupsAtOnce) {
      TQ_UNROLL
      for (int g = 0; g < kGroupsAtOnce; ++g) add_group(group + g, dots + 8 * g, squares + 8 * g);
    }
    if constexpr (kGroups % kGroupsAtOnce != 0) add_group(group, dots, squares);
    if constexpr (Shape::kThreads == 1) {
      fold<kGroupLanes, 1>(dots);
      fold<kGroupLanes, 1>(squares);
      region(thread())[kDotOffset] = dots[0];
      region(thread())[kLevelOffset] = squares[0];
    } else {
      store_row(region(thread()) + kDotOffset, dots);
      store_row(region(thread()) + kLevelOffset, squares);
    }
  }

  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void quantise_group(int group, float* dots, float* squares) {
    const float search_scale = state().search_scale;
    const auto* const cells = reinterpret_cast<const quant::SearchCell*>(memory_ + Plan::kCells);
    const float* const levels = table(Plan::levels_offset(kBits));
    const float* const from = region(thread()) + 8 * group;
    float y[8];
    load_row(from, y);
    uint32_t codes[8];
    TQ_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float x = mul_rn(y[i], factor_);
      codes[i] = quant::search_code(
          cells[quant::search_cell(x, search_scale, quant::search_cells(kBits))], x);
    }
    float level[8];
    TQ_UNROLL
    for (int i = 0; i < 8; ++i) level[i] = levels[codes[i]];
    add_sums(y, level, dots, squares);
    pack_group<kBits>(codes,
                      reinterpret_cast<std::byte*>(region(thread())) + group * kGroupBytes<kBits>);
  }

  // The sums that the rule reads.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void add_sums(const float (&y)[8], const float (&level)[8],
                                                float* dots, float* squares) const {
    const quant::ScaleRule rule = side().rule;
    if (rule == quant::ScaleRule::kUnbiased || rule == quant::ScaleRule::kLeastSquares) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) dots[i] = add_rn(dots[i], mul_rn(y[i], level[i]));
    }
    if (rule == quant::ScaleRule::kNormPreserving || rule == quant::ScaleRule::kLeastSquares) {
      TQ_UNROLL
      for (int i = 0; i < 8; ++i) squares[i] = add_rn(squares[i], mul_rn(level[i], level[i]));
    }
  }

  // The sum whose eight lanes each the row's two threads left at `offset`.
  TQ_HOST_DEVICE float add_up_parts(int offset) const {
    float low[8], high[8];
    load_row(region(thread()) + offset, low);
    load_row(region(thread() + 1) + offset, high);
    TQ_UNROLL
    for (int l = 0; l < 8; ++l) low[l] = add_rn(low[l], high[l]);
    fold<8, 1>(low);
    return low[0];
  }

  // The packed rows of all tokens, in units of the largest power of two that pieces of a row are
  // aligned to.
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void store_rows(std::byte* codes) const {
    constexpr int kRowBytes = static_cast<int>(quant::packed_row_bytes(kDim, kBits));
    // Contiguous in the tile: a row's bytes, or, with two threads a row, a group's. At 3 bits units
    // do not straddle segments either.
    constexpr int kPiece = Shape::kThreads == 2 ? kGroupBytes<kBits> : kRowBytes;
    constexpr int kAligned = kBits == 3 ? kPiece | kDim / 8 : kPiece;
    constexpr int kUnit = lowest_bit(kAligned | kRowBytes | 16);
    constexpr int kUnits = kRowBytes / kUnit;
    std::byte* const to = codes + state().job.page_offset * kRowBytes;
    for (int v = thread(); v < state().job.tokens * kUnits; v += kThreads) {
      const int token = v / kUnits, at = v % kUnits * kUnit;
      if constexpr (kBits == 3) {
        constexpr int kSegment = kDim / 8;
        const int segment = at / kSegment;
        const auto* const own = tile_bytes<kBits>(token, at);
        const auto* const last = tile_bytes<kBits>(token, 3 * kSegment + at % kSegment);
        store_planes<kUnit>(own, last, segment, to + v * kUnit);
      } else {
        copy_unit<kUnit>(tile_bytes<kBits>(token, at), to + v * kUnit);
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
  template <int kBits>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE const std::byte* tile_bytes(int token, int at) const {
    if constexpr (Shape::kThreads == 1) {
      return reinterpret_cast<const std::byte*>(region(token)) + at;
    } else {
      const int group = at / kGroupBytes<kBits>;
      return reinterpret_cast<const std::byte*>(region(2 * token + group % 2)) +
             group / 2 * kGroupBytes<kBits> + at % kGroupBytes<kBits>;
    }
  }

  // Those that a step leaves to a later one have no value before it.
  float squares_, unit_, rescale_, factor_;
};

}  // namespace turboquant::cuda::detail
