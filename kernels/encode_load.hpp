// The first steps of encode_append: rows of tokens from where they lie to registers, smoothed, with
// the first round's signs. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "encode_args.hpp"
#include "encode_plan.hpp"
#include "encode_thread.hpp"
#include "exact_math.hpp"
#include "row_rotation.hpp"
#include "turboquant/math/vector_codebook.hpp"
#include "turboquant/quant/cell_search.hpp"
#include "turboquant/quant/rotation.hpp"

namespace turboquant::cuda::detail {

using cache::ElementType;

template <int kDim, EncodeCodes kCodes>
class EncodeLoad : public EncodeThread<kDim, kCodes> {
  using Base = EncodeThread<kDim, kCodes>;

 protected:
  using Base::active;
  using Base::args_;
  using Base::chunk_row;
  using Base::exact_row;
  using Base::flags;
  using Base::kDivideRest;
  using Base::kElems;
  using Base::kModerate;
  using Base::kThreads;
  using Base::memory_;
  using Base::non_finite;
  using Base::part;
  using Base::part_table;
  using Base::place_;
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
  using Base::smooths;

  // The first job's rows, and tables; the next job's rows, if copying them is simple, while this
  // one is worked on; the rows of a job that are not under way. Copies may complete later, before
  // land() returns.
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void begin(Copies copies) {
    const JobArg job = job_arg(args_, place_.item);
    const RowArg row = row_arg(args_, job.row);
    fetch_rows(job, row, copies);
    fetch_tables();
    fetch_first_table(job.row);
    take_up(state(), job, row, true, false);
  }
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_next(Copies copies) {
    this->next_ = this->job_from(place_.item + args_.workers);
    if (this->last()) return;
    const JobArg job = job_arg(args_, this->next_);
    const RowArg row = row_arg(args_, job.row);
    const bool simple = kCodes != EncodeCodes::kVector && cache::element_bytes(args_.type) == 2 &&
                        job.tokens == kBlockTokens && job.first_token >= row.length &&
                        side().chunk.whole_vectors;
    if (simple) {
      const std::byte* const from = chunk_row(job, row, job.first_token);
      each_piece<kDim / 8, kThreads>(thread(), 0, kBlockTokens, [&](int i, int piece) {
        copies.copy16(memory_ + Plan::raw_offset(i, piece * 8, 2),
                      from + i * side().chunk.token_stride + piece * 16);
      });
    }
    take_up(state(this->slot_ ^ 1), job, row, simple, job.row != state().job.row);
  }
  TQ_HOST_DEVICE bool under_way() const { return state().under_way; }
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_late(Copies copies) {
    fetch_rows(state().job, state().row, copies);
  }
  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void land(Copies copies) {
    this->renew_thread();
    if (thread_ == 0) state().block = args_.pages.block(state().job.page, place_.head);
    if (smooths() && state().new_row) fetch_first_table(state().job.row);
    copies.wait();
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
    for (int n = place_.item + thread(); n < args_.num_jobs; n += kThreads) {
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
      const std::byte* const from = chunk_row(job, row, static_cast<int32_t>(token));
      std::byte* const to = exact_row(job, ring_index(args_.exact, read));
      for (int e = thread(); e < kDim; e += kThreads) {
        copy_element(from + e * side().chunk.elem_stride, to + e * side().exact.elem_stride, bytes);
      }
    }
  }

  // Elements to fp32 rows in registers, divided by the smoothing and multiplied by the first
  // round's signs.
  // Threads without a token do as the others, on what the tile holds: whole warps stay together.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load() {
    if (smooths() || centres()) {
      load_keys();
    } else {
      Magnitudes unused;
      load_elements<false>(unused);
      multiply(part_table(Plan::kFirst), x_);
    }
  }
  // Rows of fp32 keys, and of keys with zeros, tiny or huge elements, are divided in the tile, one
  // element at a time.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void divide_rest() {
    if (!active() || (flags()[thread_] & kDivideRest) == 0) return;
    store_row(region(thread()), x_);
    const float* const by = part_table(Plan::kFirst);
    float* const row = region(thread());
    TQ_NO_UNROLL
    for (int e = 0; e < kElems; ++e) row[e] = div_rn(row[e], by[e]);
    load_row(row, x_);
  }

 private:
  static constexpr uint32_t kLargestHalf = 0x7BFF;
  // Of a thread's 2-byte elements, as bits.
  struct Magnitudes {
    uint32_t largest = 0, least = 0xFFFF;
  };

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_keys() {
    Magnitudes magnitudes;
    load_elements<true>(magnitudes);
    // Keys are short enough for the short quotient, and the rotated row cannot overflow.
    const bool half = args_.type == ElementType::kFloat16;
    const bool moderate = args_.type != ElementType::kFloat32 &&
                          magnitudes.largest <= (half ? kLargestHalf : kShortQuotientMax);
    bool divide_rest = false;
    const float* const first = part_table(Plan::kFirst);
    if (!smooths()) {
      multiply(first, x_);
    } else if (whole_warp(moderate && (half || magnitudes.least >= kShortQuotientMin))) {
      divide_short(first, part_table(Plan::kReciprocal));
    } else {
      divide_rest = true;
    }
    flags()[thread_] = (moderate ? kModerate : 0) | (divide_rest ? kDivideRest : 0);
  }
  template <bool kMeasures>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_elements(Magnitudes& magnitudes) {
    switch (args_.type) {
      case ElementType::kBFloat16:
        load_halves<kMeasures>(
            [](uint32_t word, float* x) {
              x[0] = bits_float(word << 16);
              x[1] = bits_float(word & 0xFFFF0000u);
            },
            magnitudes);
        break;
      case ElementType::kFloat16:
        load_halves<kMeasures>(
            [](uint32_t word, float* x) {
              x[0] = half_to_float(static_cast<uint16_t>(word));
              x[1] = half_to_float(static_cast<uint16_t>(word >> 16));
            },
            magnitudes);
        break;
      default:  // all are loaded anew: nothing is kept from the job before
        load_floats();
    }
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void take_up(EncodeState& to, const JobArg& job,
                                               const RowArg& row, bool under_way, bool new_row) {
    if (thread_ == 0) {
      to = {.job = job,
            .row = row,
            .non_finite_tokens = 0,
            .encoded_end = 0,
            .under_way = under_way,
            .new_row = new_row,
            .block = nullptr};
    }
    if (thread_ < kBlockTokens) non_finite()[thread_] = 0;
  }

  template <class Copies>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_rows(const JobArg& job, const RowArg& row,
                                                  Copies copies) {
    const auto bytes = static_cast<int>(cache::element_bytes(args_.type));
    // Tokens [0, from_ring) of the job lie in the ring, the others in the chunk.
    const int from_ring =
        min_int(row.length > job.first_token ? row.length - job.first_token : 0, job.tokens);
    const auto ring = static_cast<int32_t>(args_.exact.ring_tokens());
    const int32_t first_ring = from_ring > 0 ? ring_index(args_.exact, job.first_token) : 0;
    // Where the job's first token would lie, were all of them in the chunk.
    const std::byte* const chunk = chunk_row(job, row, job.first_token);
    const auto source = [&](int i) -> const std::byte* {
      if (i >= from_ring) return chunk + i * side().chunk.token_stride;
      const int32_t at = first_ring + i;
      return exact_row(job, at < ring ? at : at - ring);
    };
    if ((from_ring == 0 || side().exact.whole_vectors) &&
        (from_ring == job.tokens || side().chunk.whole_vectors)) {
      const auto copy_rows = [&](auto element_bytes) {
        constexpr int kBytes = decltype(element_bytes)::value;
        const auto copy = [&](auto from_of) {
          each_piece<kDim * kBytes / 16, kThreads>(thread(), 0, job.tokens, [&](int i, int piece) {
            copies.copy16(memory_ + Plan::raw_offset(i, piece * 16 / kBytes, kBytes),
                          from_of(i) + piece * 16);
          });
        };
        if (from_ring == 0) {  // as in a prompt
          copy([&](int i) { return chunk + i * side().chunk.token_stride; });
        } else {
          copy(source);
        }
      };
      if (bytes == 2) {
        copy_rows(std::integral_constant<int, 2>{});
      } else {
        copy_rows(std::integral_constant<int, 4>{});
      }
      return;
    }
    for (int v = thread(); v < job.tokens * kDim; v += kThreads) {
      const int i = v / kDim, e = v % kDim;
      const int64_t stride = i < from_ring ? side().exact.elem_stride : side().chunk.elem_stride;
      copy_element(source(i) + e * stride, memory_ + Plan::raw_offset(i, e, bytes), bytes);
    }
  }

  TQ_HOST_DEVICE const float* signs() const {
    return side().tables.signs + int64_t{place_.head} * quant::SignHadamardRotation::kRounds * kDim;
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_tables() {
    const SideTables& tables = side().tables;
    const float* const turns = tables.turns + int64_t{place_.head} * kDim;
    for (int i = thread(); i < kDim; i += kThreads) {
      TQ_UNROLL
      for (int round = 0; round < 2; ++round) {
        table(Plan::kNormaliser + round * Plan::kTableBytes)[Shape::table_slot(round + 1, i)] =
            Base::signed_normaliser(round, i, signs()[(round + 1) * kDim + i]);
      }
      table(Plan::kTurns)[Shape::table_slot(quant::SignHadamardRotation::kTurnRound, i)] = turns[i];
    }
    if constexpr (kCodes == EncodeCodes::kVector) {
      auto* const codewords = reinterpret_cast<Codeword*>(memory_ + Plan::kCodewords);
      for (int i = thread(); i < math::VectorCodebook::kEntries; i += kThreads) {
        codewords[i] = tables.codewords[i];
      }
    } else {
      const int bits = side().bits;
      auto* const cells = reinterpret_cast<quant::SearchCell*>(memory_ + Plan::kCells);
      for (int i = thread(); i < quant::search_cells(bits); i += kThreads) {
        cells[i] = tables.cells[i];
      }
      // What the scale rule sums up.
      const bool squares = side().rule == quant::ScaleRule::kNormPreserving;
      for (int i = thread(); i < 1 << bits; i += kThreads) {
        const float level = tables.levels[i];
        table(Plan::levels_offset(bits))[i] = squares ? mul_rn(level, level) : level;
      }
      if (thread_ == 0) *table(Plan::kSearchScale) = tables.search_scale[0];
    }
  }
  // What elements are first multiplied or divided by, for a row of the batch.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fetch_first_table(int b) {
    const float* const smoothing =
        smooths() ? args_.smoothing + (int64_t{b} * args_.num_heads + place_.head) * kDim : nullptr;
    for (int i = thread(); i < kDim; i += kThreads) {
      const int slot = Shape::table_slot(0, i);
      float first = signs()[i];
      if (smoothing != nullptr) {
        first = mul_rn(first, smoothing[i]);
        table(Plan::kReciprocal)[slot] = div_rn(1.0f, first);
      }
      table(Plan::kFirst)[slot] = first;
    }
  }

  // Rows of 2-byte elements. `convert` makes two floats of a word.
  template <bool kMeasures, class Convert>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_halves(Convert convert, Magnitudes& magnitudes) {
    // A thread's elements come in pieces of 16 bytes, or (two threads that do not trade) of 8.
    constexpr bool kWhole = Shape::kThreads == 1 || Shape::kTrades;
    const std::byte* const raw = memory_ + (kWhole ? thread() : token()) * Plan::raw_pitch_bytes(2);
    uint32_t most = 0, fewest = 0xFFFFFFFFu;
    constexpr int kPieceWords = kWhole ? 4 : 2;
    struct alignas(4 * kPieceWords) Piece {
      uint32_t word[kPieceWords];
    };
    const auto* const pieces = reinterpret_cast<const Piece*>(raw);
    TQ_UNROLL
    for (int p = 0; p < kElems / (2 * kPieceWords); ++p) {
      hold_loads(p * kPieceWords * 2);
      const Piece piece = pieces[kWhole ? p : p * Shape::kThreads + part()];
      TQ_UNROLL
      for (int w = 0; w < kPieceWords; ++w) {
        convert(piece.word[w], x_ + (p * kPieceWords + w) * 2);
        if constexpr (kMeasures) {
          const uint32_t magnitude = piece.word[w] & 0x7FFF7FFFu;
          most = max_halves(most, magnitude);
          fewest = min_halves(fewest, magnitude);
        }
      }
    }
    magnitudes.largest = max_int(most & 0xFFFF, most >> 16);
    magnitudes.least = min_int(fewest & 0xFFFF, fewest >> 16);
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_floats() {
    constexpr bool kWhole = Shape::kThreads == 1 || Shape::kTrades;
    const std::byte* const raw = memory_ + (kWhole ? thread() : token()) * Plan::raw_pitch_bytes(4);
    const float* const from = reinterpret_cast<const float*>(raw) + (kWhole ? 0 : part() * 4);
    TQ_UNROLL
    for (int e = 0; e < kElems; e += 4) {
      const Four four = load_four(from + e * (kWhole ? 1 : Shape::kThreads));
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) x_[e + i] = four.at[i];
    }
  }

  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void divide_short(const float* by, const float* reciprocal) {
    TQ_UNROLL
    for (int e = 0; e < kElems; e += 4) {
      hold_loads(2 * e);
      const Four s = load_four(by + e);
      const Four r = load_four(reciprocal + e);
      TQ_UNROLL
      for (int i = 0; i < 4; ++i) x_[e + i] = short_quotient(x_[e + i], s.at[i], r.at[i]);
    }
  }
};

}  // namespace turboquant::cuda::detail
