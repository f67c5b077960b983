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

using cache::ElementType;

template <int kDim>
class EncodeBlock {
  using Shape = RowShape<kDim>;
  using Plan = EncodePlan<kDim>;
  static constexpr int kElems = Shape::kElems;
  static constexpr int kPitch = Shape::kPitch;
  static constexpr int kThreads = Plan::kThreads;

 public:
  // Block `index` of num_jobs * H * 2; `memory` is shared by its threads.
  TQ_HOST_DEVICE EncodeBlock(const EncodeArgs& args, std::byte* memory, int index, int thread)
      : args_(args),
        memory_(memory),
        index_(static_cast<unsigned>(index)),
        thread_(static_cast<unsigned>(thread)) {}

  TQ_HOST_DEVICE bool empty() const { return job_arg(args_, job_index()).tokens <= 0; }
  TQ_HOST_DEVICE bool smooths() const { return side_index() == 0 && args_.smoothing != nullptr; }
  TQ_HOST_DEVICE bool finds_pairs() const { return args_.vector; }
  TQ_HOST_DEVICE bool centres() const { return side_index() == 0 && args_.center_keys; }

  // Copies to shared memory; `copy16(to, from)` may complete later, before the next step.
  template <class Copy16>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch(Copy16 copy16) {
    const JobArg job = job_arg(args_, job_index());
    const RowArg row = row_arg(args_, job.row);
    const int head = static_cast<int>(index_ / 2) % args_.num_heads;
    fetch_rows(job, row, head, copy16);
    fetch_tables(job, head);
    if (thread_ == 0) {
      state() = {.job = job,
                 .row = row,
                 .head = head,
                 .search_scale = args_.vector ? 0.0f : side().tables.search_scale[0],
                 .non_finite_tokens = 0,
                 .encoded_end = 0};
    }
    if (thread_ < kBlockTokens) non_finite()[thread_] = 0;
  }

  // Whether new tokens may take slots that this block has read.
  TQ_HOST_DEVICE bool overwrites() const {
    const EncodeState& s = state();
    return s.job.first_token < s.row.length &&
           int64_t{s.job.first_token} + args_.exact.ring_tokens() <
               int64_t{s.row.length} + s.row.new_tokens;
  }
  // How far the row is encoded.
  TQ_HOST_DEVICE void scan_jobs() {
    for (int n = job_index() + thread(); n < args_.num_jobs; n += kThreads) {
      const JobArg job = job_arg(args_, n);
      if (job.tokens > 0 && job.row == state().job.row) {
        max_shared(&state().encoded_end, job.first_token + job.tokens);
      }
    }
  }
  // The new tokens that stay exact in slots that fetch() has read.
  TQ_HOST_DEVICE void overwrite() {
    const JobArg job = state().job;
    const RowArg row = state().row;
    const int64_t ring = args_.exact.ring_tokens();
    const int64_t bytes = cache::element_bytes(args_.type);
    for (int32_t read = job.first_token; read < job.first_token + job.tokens && read < row.length;
         ++read) {
      // The one token from encoded_end on, within a ring's length, that shares the slot.
      const int64_t rounds = (state().encoded_end - read + ring - 1) / ring;
      const int64_t token = read + rounds * ring;
      if (token < row.length || token >= int64_t{row.length} + row.new_tokens) continue;
      const std::byte* const from = chunk_row(job, row, state().head, static_cast<int32_t>(token));
      std::byte* const to = exact_row(job, state().head, ring_index(args_.exact, read));
      for (int e = thread(); e < kDim; e += kThreads) {
        copy_element(from + e * side().chunk.elem_stride, to + e * side().exact.elem_stride, bytes);
      }
    }
  }

  // Elements to fp32 rows in registers, divided by the smoothing and multiplied by the first
  // round's signs.
  // Threads without a token do as the others, on what the tile holds: whole warps stay together.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load() {
    uint32_t largest = 0, least = 0xFFFF;  // of the magnitudes, as bits
    switch (args_.type) {
      case ElementType::kBFloat16:
        load_halves(
            [](uint32_t word, float* x) {
              x[0] = bits_float(word << 16);
              x[1] = bits_float(word & 0xFFFF0000u);
            },
            largest, least);
        break;
      case ElementType::kFloat16:
        load_halves(
            [](uint32_t word, float* x) {
              x[0] = half_to_float(static_cast<uint16_t>(word));
              x[1] = half_to_float(static_cast<uint16_t>(word >> 16));
            },
            largest, least);
        break;
      case ElementType::kFloat32:
        load_floats();
        break;
    }
    // Keys are short enough for the short quotient, and the rotated row cannot overflow.
    const bool half = args_.type == ElementType::kFloat16;
    const bool moderate =
        args_.type != ElementType::kFloat32 && largest <= (half ? kLargestHalf : kShortQuotientMax);
    bool divide_rest = false;
    const float* const first = part_table(Plan::kFirst);
    if (!smooths()) {
      multiply(first, x_);
    } else if (whole_warp(moderate && (half || least >= kShortQuotientMin))) {
      divide_short(first, part_table(Plan::kReciprocal));
    } else {
      divide_rest = true;
    }
    flags()[thread_] = (moderate ? kModerate : 0) | (divide_rest ? kDivideRest : 0);
  }
  // Rows of fp32 keys, and of keys with zeros, tiny or huge elements, are divided in the tile, one
  // element at a time.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void divide_rest() {
    if (!active() || (flags()[thread_] & kDivideRest) == 0) return;
    put_row();
    const float* const by = part_table(Plan::kFirst);
    float* const row = region(thread());
    TQ_NO_UNROLL
    for (int e = 0; e < kElems; ++e) row[e] = div_rn(row[e], by[e]);
    load_row(row, x_);
  }

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
  static constexpr uint32_t kLargestHalf = 0x7BFF;
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

  TQ_HOST_DEVICE int thread() const { return static_cast<int>(thread_); }
  TQ_HOST_DEVICE int token() const { return static_cast<int>(thread_ / Shape::kThreads); }
  TQ_HOST_DEVICE int part() const { return static_cast<int>(thread_ % Shape::kThreads); }
  TQ_HOST_DEVICE int side_index() const { return static_cast<int>(index_ % 2); }
  TQ_HOST_DEVICE int job_index() const { return static_cast<int>(index_ / 2) / args_.num_heads; }
  TQ_HOST_DEVICE bool active() const { return token() < state().job.tokens; }
  TQ_HOST_DEVICE const EncodeSideArgs& side() const { return args_.sides[side_index()]; }
  TQ_HOST_DEVICE float* table(int offset) const {
    return reinterpret_cast<float*>(memory_ + offset);
  }
  TQ_HOST_DEVICE const float* part_table(int offset) const {
    return table(offset) + part() * kPitch;
  }
  TQ_HOST_DEVICE float* region(int thread) const { return table(0) + thread * kPitch; }
  TQ_HOST_DEVICE EncodeState& state() const {
    return *reinterpret_cast<EncodeState*>(memory_ + Plan::kState);
  }
  TQ_HOST_DEVICE uint8_t* non_finite() const {
    return reinterpret_cast<uint8_t*>(memory_ + Plan::kNonFinite);
  }
  // Of a thread's elements as they came: short_quotient and the rotation take them; or divide_rest
  // must divide them.
  static constexpr uint8_t kModerate = 1, kDivideRest = 2;
  TQ_HOST_DEVICE uint8_t* flags() const {
    return reinterpret_cast<uint8_t*>(memory_ + Plan::kFlags);
  }
  TQ_HOST_DEVICE std::byte* stored_block() const {
    return args_.pages.block(state().job.page, state().head);
  }
  TQ_HOST_DEVICE std::byte* chunk_row(const JobArg& job, const RowArg& row, int head,
                                      int32_t token) const {
    const int32_t at = args_.chunk_tokens - row.new_tokens + token - row.length;
    return side().chunk.head(job.row, head) + at * side().chunk.token_stride;
  }
  TQ_HOST_DEVICE std::byte* exact_row(const JobArg& job, int head, int32_t ring) const {
    return side().exact.head(job.row, head) +
           (args_.exact.sink_tokens + ring) * side().exact.token_stride;
  }

  template <class Copy16>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_rows(const JobArg& job, const RowArg& row, int head,
                                                  Copy16 copy16) {
    const auto bytes = static_cast<int>(cache::element_bytes(args_.type));
    // Tokens [0, from_ring) of the job lie in the ring, the others in the chunk.
    const int from_ring =
        min_int(row.length > job.first_token ? row.length - job.first_token : 0, job.tokens);
    const auto ring = static_cast<int32_t>(args_.exact.ring_tokens());
    const int32_t first_ring = from_ring > 0 ? ring_index(args_.exact, job.first_token) : 0;
    const int pitch = Plan::raw_pitch_bytes(bytes);
    // Where the job's first token would lie, were all of them in the chunk.
    const std::byte* const chunk = chunk_row(job, row, head, job.first_token);
    const auto source = [&](int i) -> const std::byte* {
      if (i >= from_ring) return chunk + i * side().chunk.token_stride;
      const int32_t at = first_ring + i;
      return exact_row(job, head, at < ring ? at : at - ring);
    };
    if ((from_ring == 0 || side().exact.whole_vectors) &&
        (from_ring == job.tokens || side().chunk.whole_vectors)) {
      // Pieces of 16 bytes, neighbouring threads' side by side.
      const auto copy_rows = [&](int vectors) {
        int i = thread() / vectors, piece = thread() % vectors;
        TQ_NO_UNROLL
        while (i < job.tokens) {
          copy16(memory_ + i * pitch + piece * 16, source(i) + piece * 16);
          i += kThreads / vectors;
          piece += kThreads % vectors;
          if (piece >= vectors) {
            piece -= vectors;
            ++i;
          }
        }
      };
      if (bytes == 2) {
        copy_rows(kDim / 8);
      } else {
        copy_rows(kDim / 4);
      }
      return;
    }
    for (int v = thread(); v < job.tokens * kDim; v += kThreads) {
      const int i = v / kDim, e = v % kDim;
      const int64_t stride = i < from_ring ? side().exact.elem_stride : side().chunk.elem_stride;
      copy_element(source(i) + e * stride, memory_ + i * pitch + e * bytes, bytes);
    }
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_tables(const JobArg& job, int head) {
    const SideTables& tables = side().tables;
    const float* const signs = tables.signs + int64_t{head} * 3 * kDim;
    const float* const turns = tables.turns + int64_t{head} * kDim;
    const float* const smoothing =
        smooths() ? args_.smoothing + (int64_t{job.row} * args_.num_heads + head) * kDim : nullptr;
    for (int i = thread(); i < kDim; i += kThreads) {
      const int slot = Shape::table_slot(i);
      float first = signs[i];
      if (smoothing != nullptr) {
        first = mul_rn(first, smoothing[i]);
        table(Plan::kReciprocal)[slot] = div_rn(1.0f, first);
      }
      table(Plan::kFirst)[slot] = first;
      table(Plan::kNormaliser)[slot] = mul_rn(signs[kDim + i], kNormaliser<kDim>);
      table(Plan::kNormaliser + Plan::kTableBytes)[slot] =
          mul_rn(signs[2 * kDim + i], kNormaliser<kDim>);
      table(Plan::kTurns)[slot] = turns[i];
    }
    if (finds_pairs()) {
      auto* const codewords = reinterpret_cast<Codeword*>(memory_ + Plan::kCodewords);
      for (int i = thread(); i < math::VectorCodebook::kEntries; i += kThreads) {
        codewords[i] = tables.codewords[i];
      }
      return;
    }
    const int bits = side().bits;
    auto* const cells = reinterpret_cast<quant::SearchCell*>(memory_ + Plan::kCells);
    for (int i = thread(); i < quant::search_cells(bits); i += kThreads) cells[i] = tables.cells[i];
    for (int i = thread(); i < 1 << bits; i += kThreads) {
      table(Plan::levels_offset(bits))[i] = tables.levels[i];
    }
  }

  // Rows of 2-byte elements. `convert` makes two floats of a word.
  template <class Convert>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_halves(Convert convert, uint32_t& largest,
                                                   uint32_t& least) {
    const std::byte* const raw = memory_ + token() * Plan::raw_pitch_bytes(2);
    uint32_t most = 0, fewest = 0xFFFFFFFFu;
    // A thread's elements come in pieces of 16 bytes, or (two threads a row) of 8.
    constexpr int kPieceWords = Shape::kThreads == 1 ? 4 : 2;
    struct alignas(4 * kPieceWords) Piece {
      uint32_t word[kPieceWords];
    };
    const auto* const pieces = reinterpret_cast<const Piece*>(raw);
    TQ_UNROLL
    for (int p = 0; p < kElems / (2 * kPieceWords); ++p) {
      hold_loads(p * kPieceWords * 2);
      const Piece piece = pieces[p * Shape::kThreads + part()];
      TQ_UNROLL
      for (int w = 0; w < kPieceWords; ++w) {
        convert(piece.word[w], x_ + (p * kPieceWords + w) * 2);
        const uint32_t magnitude = piece.word[w] & 0x7FFF7FFFu;
        most = max_halves(most, magnitude);
        fewest = min_halves(fewest, magnitude);
      }
    }
    largest = max_int(most & 0xFFFF, most >> 16);
    least = min_int(fewest & 0xFFFF, fewest >> 16);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_floats() {
    const std::byte* const raw = memory_ + token() * Plan::raw_pitch_bytes(4);
    const auto* const from = reinterpret_cast<const float*>(raw) + part() * 4;
    TQ_UNROLL
    for (int e = 0; e < kElems; e += 4) {
      const Four four = load_four(from + e * Shape::kThreads);
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) x_[e + i] = four.at[i];
    }
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void divide_short(const float* by, const float* reciprocal) {
    TQ_UNROLL
    for (int e = 0; e < kElems; e += 4) {
      hold_loads(e);
      const Four s = load_four(by + e);
      const Four r = load_four(reciprocal + e);
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) x_[e + i] = short_quotient(x_[e + i], s.at[i], r.at[i]);
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
  // Whether it holds for every thread of the warp; on the host a thread is a warp.
  TQ_HOST_DEVICE static bool whole_warp(bool holds) {
#if defined(__CUDA_ARCH__)
    return __all_sync(0xFFFFFFFFu, holds) != 0;
#else
    return holds;
#endif
  }

  template <class Int>
  TQ_HOST_DEVICE static Int min_int(Int a, Int b) {
    return a < b ? a : b;
  }
  template <class Int>
  TQ_HOST_DEVICE static Int max_int(Int a, Int b) {
    return a > b ? a : b;
  }
  // Of the two unsigned halves of a word.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __vmaxu2(a, b);
#else
    return max_int(a & 0xFFFF, b & 0xFFFF) | max_int(a >> 16, b >> 16) << 16;
#endif
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE static uint32_t min_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __vminu2(a, b);
#else
    return min_int(a & 0xFFFF, b & 0xFFFF) | min_int(a >> 16, b >> 16) << 16;
#endif
  }

  // Few: between them and a row of 128 floats there must be room for the work. Those that a step
  // leaves to a later one have no value before it.
  const EncodeArgs& args_;
  std::byte* memory_;
  unsigned index_, thread_;  // unsigned: halves and remainders are shifts and masks
  float x_[kElems];
  float squares_, unit_, rescale_, factor_;
};

// A block's steps in order. each(f) runs f(thread) for every thread of the block and waits for all.
// `block` is any of them: what it is asked is the same for all.
template <int kDim, class Block, class Each, class Fetch>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void encode_steps(const Block& block, Each each, Fetch fetch) {
  each(fetch);
  if (block.overwrites()) {
    each([](auto& thread) { thread.scan_jobs(); });
    each([](auto& thread) { thread.overwrite(); });
  }
  constexpr bool kCross = RowShape<kDim>::kThreads == 2;
  each([](auto& thread) { thread.load(); });
  if (block.smooths()) each([](auto& thread) { thread.divide_rest(); });
  // Unrolled: a loop would move every coordinate back to its register at the end of a round.
  if constexpr (kCross) {
    TQ_UNROLL
    for (int round = 0; round < quant::SignHadamardRotation::kRounds; ++round) {
      each([=](auto& thread) {
        thread.rotate_begin(round);
        thread.put_row();
      });
      each([=](auto& thread) {
        thread.cross_rows();
        thread.rotate_end();
      });
    }
    each([](auto& thread) { thread.normalise(); });
  } else {
    each([](auto& thread) {
      TQ_UNROLL
      for (int round = 0; round < quant::SignHadamardRotation::kRounds; ++round) {
        thread.rotate_begin(round);
        thread.rotate_end();
      }
      thread.normalise();
    });
  }
  if (block.centres()) {
    each([](auto& thread) { thread.find_non_finite(); });
    each([](auto& thread) { thread.put_finite_row(); });
    each([](auto& thread) { thread.find_mean(); });
  }
  each([](auto& thread) { thread.centre(); });
  each([](auto& thread) { thread.find_squares(); });
  if (block.finds_pairs()) {
    each([](auto& thread) { thread.rescale(); });
    each([](auto& thread) { thread.find_pairs(); });
    each([](auto& thread) { thread.sum_pairs(); });
  } else {
    each([](auto& thread) { thread.quantise(); });
  }
  each([](auto& thread) {
    thread.store_scale();
    thread.store_codes();
  });
}

}  // namespace turboquant::cuda::detail
