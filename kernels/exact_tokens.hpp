// The other two kinds of thread block of encode_append: tokens that stay exact, and the fit of a
// row's smoothing. Host and device, as kernels/encode_block.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encode_args.hpp"
#include "exact_math.hpp"
#include "turboquant/cache/smoothing_rule.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// What a row's jobs encode: tokens [begin, end); begin >= end where there are none.
struct EncodedRange {
  int32_t begin, end;
};

TQ_HOST_DEVICE inline void scan_row_jobs(const EncodeArgs& args, int b, int thread, int threads,
                                         EncodedRange* range) {
  for (int n = thread; n < args.num_jobs; n += threads) {
    const JobArg job = job_arg(args, n);
    if (job.tokens <= 0 || job.row != b) continue;
    min_shared(&range->begin, job.first_token);
    max_shared(&range->end, job.first_token + job.tokens);
  }
}

// Copies new tokens of one row of the batch that stay exact to their slots: kKeepCopies pairs of
// (candidate, head and side). A candidate whose slot a job reads is left to that job's block.
inline constexpr int kKeepCopies = 16;

class KeepBlock {
 public:
  TQ_HOST_DEVICE static int blocks_per_row(const EncodeArgs& args) {
    return (copies_per_row(args) + kKeepCopies - 1) / kKeepCopies;
  }

  TQ_HOST_DEVICE KeepBlock(const EncodeArgs& args, EncodedRange* range, int index, int thread,
                           int threads)
      : args_(args),
        range_(range),
        b_(index / blocks_per_row(args)),
        first_copy_(index % blocks_per_row(args) * kKeepCopies),
        thread_(thread),
        threads_(threads) {}

  TQ_HOST_DEVICE void start() {
    if (thread_ == 0) *range_ = {INT32_MAX, 0};
  }
  TQ_HOST_DEVICE void scan() { scan_row_jobs(args_, b_, thread_, threads_, range_); }
  TQ_HOST_DEVICE void copy() {
    const RowArg row = row_arg(args_, b_);
    const int end = min_int(first_copy_ + kKeepCopies, copies_per_row(args_));
    const auto bytes = static_cast<int>(cache::element_bytes(args_.type));
    // Whole rows by a few threads each, so that several rows are under way at once.
    const int vectors = args_.dim * bytes / 16;
    const int copies = end - first_copy_;
    const bool whole = args_.sides[0].chunk.whole_vectors && args_.sides[0].exact.whole_vectors &&
                       args_.sides[1].chunk.whole_vectors && args_.sides[1].exact.whole_vectors;
    const int pieces = whole ? vectors : args_.dim;
    for (int v = thread_; v < copies * pieces; v += threads_) {
      const int copy = first_copy_ + v / pieces, piece = v % pieces;
      const int candidate = copy / (2 * args_.num_heads);
      const int head = copy / 2 % args_.num_heads;
      const EncodeSideArgs& side = args_.sides[copy % 2];
      const int64_t token = candidate_token(row, candidate);
      if (!keeps(row, candidate, token)) continue;
      const std::byte* const from =
          side.chunk.head(b_, head) +
          (args_.chunk_tokens - row.new_tokens + token - row.length) * side.chunk.token_stride;
      std::byte* const to = side.exact.head(b_, head) + slot(token) * side.exact.token_stride;
      if (whole) {
        reinterpret_cast<Vector*>(to)[piece] = reinterpret_cast<const Vector*>(from)[piece];
      } else {
        copy_element(from + piece * side.chunk.elem_stride, to + piece * side.exact.elem_stride,
                     bytes);
      }
    }
  }

 private:
  TQ_HOST_DEVICE static int copies_per_row(const EncodeArgs& args) {
    return (args.kept_sinks + args.kept_newest) * 2 * args.num_heads;
  }
  TQ_HOST_DEVICE static int min_int(int a, int b) { return a < b ? a : b; }

  // The sinks, then the newest tokens from the last one back.
  TQ_HOST_DEVICE int64_t candidate_token(const RowArg& row, int candidate) const {
    if (candidate < args_.kept_sinks) return int64_t{row.length} + candidate;
    return int64_t{row.length} + row.new_tokens - 1 - (candidate - args_.kept_sinks);
  }
  TQ_HOST_DEVICE bool keeps(const RowArg& row, int candidate, int64_t token) const {
    if (token < row.length || token >= int64_t{row.length} + row.new_tokens) return false;
    const bool sink = token < args_.exact.sink_tokens;
    if (sink != (candidate < args_.kept_sinks)) return false;
    if (sink) return true;
    if (token < range_->end) return false;
    // The last committed token that shares the slot: whether a job reads it in this launch.
    const int64_t ring = args_.exact.ring_tokens();
    const int64_t before = token - (token - row.length + ring) / ring * ring;
    return before < range_->begin || before >= range_->end;
  }
  TQ_HOST_DEVICE int64_t slot(int64_t token) const {
    if (token < args_.exact.sink_tokens) return token;
    return args_.exact.sink_tokens + ring_index(args_.exact, static_cast<int32_t>(token));
  }

  const EncodeArgs& args_;
  EncodedRange* range_;
  int b_, first_copy_, thread_, threads_;
};

template <class Each>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void keep_steps(Each each) {
  each([](auto& thread) { thread.start(); });
  each([](auto& thread) { thread.scan(); });
  each([](auto& thread) { thread.copy(); });
}

// Fits the smoothing of one row of the batch and one head, where a job asks for it. Blocks of keys
// wait for it, and its instructions come from far away, for it runs once: loops, hardly unrolled,
// and many threads.
class FitBlock {
 public:
  static constexpr int kThreads = 512;

  // Shared memory: the block's keys as fp32 [64][pitch], the channels' rms, and the state.
  TQ_HOST_DEVICE static int pitch(int dim) { return dim + 1; }
  TQ_HOST_DEVICE static int bytes(int dim) {
    return (cache::kBlockTokens * pitch(dim) + dim) * 4 + static_cast<int>(sizeof(State));
  }

  TQ_HOST_DEVICE FitBlock(const EncodeArgs& args, std::byte* memory, int index, int thread)
      : args_(args),
        memory_(memory),
        b_(index / args.num_heads),
        head_(index % args.num_heads),
        thread_(thread) {}

  TQ_HOST_DEVICE void start() {
    if (thread_ == 0) state() = {-1, {0, 0}, bits_float(0x7FC00000u)};
  }
  TQ_HOST_DEVICE void scan() {
    TQ_NO_UNROLL
    for (int n = thread_; n < args_.num_jobs; n += kThreads) {
      const JobArg job = job_arg(args_, n);
      if (job.tokens > 0 && job.row == b_ && job.fit_smoothing != 0) state().job = n;
    }
  }
  TQ_HOST_DEVICE bool fits() const { return state().job >= 0; }

  // Keys to fp32; tokens with NaN or inf are marked.
  TQ_HOST_DEVICE void load() {
    const EncodeSideArgs& keys = args_.sides[0];
    const bool whole = keys.exact.whole_vectors && keys.chunk.whole_vectors;
    if (args_.type == cache::ElementType::kFloat32) {
      whole ? load_pieces<4, 4>() : load_pieces<4, 1>();
    } else {
      whole ? load_pieces<2, 8>() : load_pieces<2, 1>();
    }
  }
  // A channel's rms after its mean is taken off. Tokens that are left out add zeros, which change
  // no sum.
  TQ_HOST_DEVICE void channel_rms() {
    const int step = pitch(args_.dim);
    const uint64_t left_out = state().left_out[0] | uint64_t{state().left_out[1]} << 32;
    int tokens = 0;
    TQ_NO_UNROLL
    for (int t = 0; t < cache::kBlockTokens; ++t) tokens += (left_out >> t & 1) == 0;
    const auto count = static_cast<float>(tokens);
    for (int c = thread_; c < args_.dim; c += kThreads) {
      const float* const column = tile() + c;
      float sum = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
      for (int t = 0; t < cache::kBlockTokens; ++t) {
        sum = add_rn(sum, (left_out >> t & 1) == 0 ? column[t * step] : 0.0f);
      }
      const float mean = div_rn(sum, count);
      float squares = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
      for (int t = 0; t < cache::kBlockTokens; ++t) {
        const float centred = (left_out >> t & 1) == 0 ? sub_rn(column[t * step], mean) : 0.0f;
        squares = add_rn(squares, mul_rn(centred, centred));
      }
      rms()[c] = sqrt_rn(div_rn(squares, count));
    }
  }
  // Ranks differ, so that at most one thread finds its channel to be the median.
  TQ_HOST_DEVICE void median_rms() {
    for (int c = thread_; c < args_.dim; c += kThreads) {
      if (cache::smoothing_rank(rms(), args_.dim, c) == args_.dim / 2) {
        state().median_rms = rms()[c];
      }
    }
  }
  TQ_HOST_DEVICE void store() {
    float* const to = args_.smoothing + (int64_t{b_} * args_.num_heads + head_) * args_.dim;
    for (int c = thread_; c < args_.dim; c += kThreads) {
      to[c] = cache::smoothing_of(rms()[c], state().median_rms);
    }
  }

 private:
  struct State {
    int32_t job;
    uint32_t left_out[2];  // a bit a token
    float median_rms;
  };

  // The block's keys, kPiece elements of kBytes bytes at a time.
  template <int kBytes, int kPiece>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE void load_pieces() {
    struct alignas(kBytes * kPiece) Piece {
      std::byte at[kBytes * kPiece];
    };
    const JobArg job = job_arg(args_, state().job);
    const RowArg row = row_arg(args_, b_);
    const EncodeSideArgs& keys = args_.sides[0];
    const int pieces = args_.dim / kPiece;
    TQ_NO_UNROLL
    for (int v = thread_; v < cache::kBlockTokens * pieces; v += kThreads) {
      const int i = v / pieces, c = v % pieces * kPiece;
      const int32_t t = job.first_token + i;
      const bool in_ring = t < row.length;
      const TensorArg& tensor = in_ring ? keys.exact : keys.chunk;
      const int64_t at = in_ring ? args_.exact.sink_tokens + ring_index(args_.exact, t)
                                 : args_.chunk_tokens - row.new_tokens + t - row.length;
      const Piece piece = *reinterpret_cast<const Piece*>(
          tensor.head(b_, head_) + at * tensor.token_stride + c * tensor.elem_stride);
      float* const to = tile() + i * pitch(args_.dim) + c;
      float sum = 0.0f;  // of zeros or NaN
      TQ_UNROLL
      for (int e = 0; e < kPiece; ++e) {
        to[e] = element<kBytes>(piece.at + e * kBytes);
        sum = add_rn(sum, sub_rn(to[e], to[e]));
      }
      if (sum != 0.0f || sum != sum) or_shared(&state().left_out[i / 32], 1u << i % 32);
    }
  }

  TQ_HOST_DEVICE float* tile() const { return reinterpret_cast<float*>(memory_); }
  TQ_HOST_DEVICE float* rms() const { return tile() + cache::kBlockTokens * pitch(args_.dim); }
  TQ_HOST_DEVICE State& state() const { return *reinterpret_cast<State*>(rms() + args_.dim); }
  template <int kBytes>
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float element(const std::byte* from) const {
    if constexpr (kBytes == 4) {
      return *reinterpret_cast<const float*>(from);
    } else {
      const uint16_t half = *reinterpret_cast<const uint16_t*>(from);
      return args_.type == cache::ElementType::kBFloat16 ? math::fp32_from_bf16(half)
                                                         : half_to_float(half);
    }
  }

  const EncodeArgs& args_;
  std::byte* memory_;
  int b_, head_, thread_;
};

template <class Block, class Each>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void fit_steps(const Block& block, Each each) {
  each([](auto& thread) { thread.start(); });
  each([](auto& thread) { thread.scan(); });
  if (!block.fits()) return;
  each([](auto& thread) { thread.load(); });
  each([](auto& thread) { thread.channel_rms(); });
  each([](auto& thread) { thread.median_rms(); });
  each([](auto& thread) { thread.store(); });
}

}  // namespace turboquant::cuda::detail
