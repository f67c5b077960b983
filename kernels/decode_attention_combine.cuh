// Decode attention, third kernel (decode_attention.cuh): partial results to outputs.
#pragma once

#include "decode_attention_rotation.cuh"
#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// A row's partial results are summed in kCombineTeams chains, result s in chain s % kCombineTeams,
// and the chains in ascending order: by that many warps, or by one that has them all. The order
// depends on the number of results alone.
inline constexpr int kCombineTeams = 4;
inline constexpr int kCombineThreads = 32 * kCombineTeams;

TQ_HOST_DEVICE constexpr int64_t query_rows(const DecodeArgs& args) {
  return int64_t{args.batch} * args.num_kv_heads * args.rows;
}

// Blocks and shared memory of combine_splits: of every warp a row of the pages' sum, one of the
// exact tokens' and the weights of all results; where results have parts, also the parts' weights,
// and, of the block, the results' maxima and sums.
TQ_HOST_DEVICE constexpr int64_t combine_blocks(const DecodeArgs& args, int row_warps) {
  return ceil_div(query_rows(args), kCombineTeams / row_warps);
}
TQ_HOST_DEVICE constexpr int combine_warp_floats(const DecodeArgs& args, int head_dim) {
  const int results = args.page_results ? args.slots / kShortSplitPages : 0;
  return (2 * head_dim + results + args.slots + 3) / 4 * 4;
}
TQ_HOST_DEVICE constexpr int combine_bytes(const DecodeArgs& args, int head_dim) {
  const int merged = args.page_results ? args.slots / kShortSplitPages * 2 : 0;
  return (kCombineTeams * combine_warp_floats(args, head_dim) + merged) * 4;
}

// Blocks that wait for attend_splits gather on the multiprocessors that it leaves first, as many as
// fit, while the others stand idle; with as little room as blocks, they would wait for the last
// one. Shared memory of a block that leaves twice as much room as blocks need on a device of 9.0.
TQ_HOST_DEVICE constexpr int combine_spread_bytes(int64_t blocks, int multiprocessors) {
  constexpr int64_t kOfSystem = 1024, kUnit = 128;
  const int64_t of_each = ceil_div(2 * blocks, multiprocessors);
  const int64_t bytes = (kMaxSharedBytes + kOfSystem) / of_each - kOfSystem;
  return static_cast<int>(max_of(0, bytes) / kUnit * kUnit);
}

// The coordinate that row g (odd: g + 8) of m-tile v of the second product holds.
template <int kDim>
TQ_DEVICE int value_coordinate(int v_bits, int v, int g, int odd) {
  switch (v_bits) {
    case 2:
      return 2 * value_pair_of<kDim, 2>(v, g) + odd;
    case 3:
      return 2 * value_pair_of<kDim, 3>(v, g) + odd;
    default:
      return 2 * value_pair_of<kDim, 4>(v, g) + odd;
  }
}

TQ_DEVICE void store_element(std::byte* row, int64_t index, cache::ElementType type, float x) {
  switch (type) {
    case cache::ElementType::kFloat16:
      *reinterpret_cast<uint16_t*>(row + 2 * index) =
          static_cast<uint16_t>(ptx::pack_f16(x, 0.0f) & 0xFFFFu);
      return;
    case cache::ElementType::kBFloat16:
      *reinterpret_cast<uint16_t*>(row + 2 * index) =
          static_cast<uint16_t>(ptx::pack_bf16(x, 0.0f) & 0xFFFFu);
      return;
    default:
      *reinterpret_cast<float*>(row + 4 * index) = x;
  }
}

// The partial results of one query row: page splits, then exact pieces, numbered on. kParts: of
// each: itself, or (attend_pages) a part for each page of a split and each warp of a piece, merged
// as merge_group does.
template <int kDim, int kParts>
class RowPartials {
 public:
  static constexpr int kShare = (kDim / 4 + kWarpLanes - 1) / kWarpLanes;  // 16 bytes each
  // Running maximum and sum; a sum of 0: of no token.
  struct Stats {
    float max, sum;
  };
  struct Share {
    Words4 words[kParts][kShare];
  };

  TQ_DEVICE RowPartials(const DecodeArgs& args, int64_t unit, int column, const RowSplits& splits,
                        const ExactTokens& exact, bool padding)
      : from_(args.partial(unit, 0, kDim)),
        column_(column),
        splits_(padding ? 0 : splits.num_splits),
        count_(padding ? 0 : splits.num_splits + exact_pieces(exact)),
        pieces_behind_(args.page_slots - splits_ * kParts),
        pages_(splits.end_entry),
        tiles_(static_cast<int>(ceil_div(exact.count(), kTileTokens))) {}

  TQ_DEVICE int count() const { return count_; }
  TQ_DEVICE int splits() const { return splits_; }
  TQ_DEVICE bool of_pages(int s) const { return s < splits_; }
  // Of part n of them all. Pages are seen from the first on; warp w of a piece has its 16 tokens w
  // and w + kParts.
  TQ_DEVICE bool exists(int n) const {
    if (kParts == 1) return n < count_;
    const int of_exact = n - splits_ * kParts;
    if (of_exact < 0) return n < pages_;
    return n < count_ * kParts && of_exact / kParts * kParts + of_exact < tiles_;
  }
  TQ_DEVICE Stats stats(int n) const {
    if (!exists(n)) return {kNoScore, 0.0f};
    const float* const at = part(n) + kTileRows * kDim + column_;
    return {at[0], at[kTileRows]};
  }
  // Numbers 4 (32 k + lane) ... of the row as it is stored. Parts that do not exist are of no use.
  TQ_DEVICE void load(int s, int lane, Share& share) const {
    if (s >= count_) return;
    const float* const from = part(s * kParts) + column_ * kDim;
    TQ_UNROLL
    for (int i = 0; i < kParts; ++i) {
      TQ_UNROLL
      for (int k = 0; k < kShare; ++k) {
        const int piece = k * kWarpLanes + lane;
        if (kDim / 4 % kWarpLanes == 0 || piece < kDim / 4) {
          share.words[i][k] = load_as<Words4>(
              reinterpret_cast<const std::byte*>(from + i * partial_floats(kDim) + 4 * piece));
        }
      }
    }
  }

 private:
  TQ_DEVICE const float* part(int n) const {
    const int slot = n < splits_ * kParts ? n : n + pieces_behind_;
    return from_ + static_cast<uint32_t>(slot) * static_cast<uint32_t>(partial_floats(kDim));
  }
  const float* from_;
  int column_, splits_, count_, pieces_behind_;
  int pages_, tiles_;
};

// A weight that stands for a partial result of no token: exactly neutral, whatever is stored.
inline constexpr float kNeutral = -1.0f;

// Weighted sums of a chain of partial results, of pages (rotated basis) and of exact tokens (the
// model's): a lane's share of either.
template <int kDim, int kParts>
struct ChainSum {
  using Share = typename RowPartials<kDim, kParts>::Share;
  static constexpr int kNumbers = 4 * RowPartials<kDim, kParts>::kShare;
  float paged[kNumbers] = {};
  float exact[kNumbers] = {};

  // of_parts: where a result has several, their weights in it.
  TQ_DEVICE void add(const Share& share, const float* of_parts, float weight, bool of_pages) {
    float factors[kParts];
    if constexpr (kParts > 1) {
      TQ_UNROLL
      for (int i = 0; i < kParts; i += 4) {
        const Words4 words = load_as<Words4>(reinterpret_cast<const std::byte*>(of_parts + i));
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) factors[i + k] = ptx::float_of(words.w[k]);
      }
    }
    TQ_UNROLL
    for (int n = 0; n < kNumbers; ++n) {
      float x = ptx::float_of(share.words[0][n / 4].w[n % 4]);
      if constexpr (kParts > 1) {
        x = factors[0] * x;  // the first part always exists
        TQ_UNROLL
        for (int i = 1; i < kParts; ++i) {
          const float y = ptx::float_of(share.words[i][n / 4].w[n % 4]);
          if (factors[i] != kNeutral) x = fmaf(factors[i], y, x);
        }
      }
      if (of_pages) {
        paged[n] = fmaf(weight, x, paged[n]);
      } else {
        exact[n] = fmaf(weight, x, exact[n]);
      }
    }
  }
};

// Grid: kRowWarps (1 or kCombineTeams) warps for each query row of each KV head and row. kParts: of
// RowPartials.
template <int kDim, int kRowWarps, int kParts = 1>
TQ_DEVICE void combine_splits(const DecodeArgs& args, std::byte* shared) {
  constexpr int kChains = kCombineTeams / kRowWarps;  // of a warp
  // Results that are loaded at once: of a lone row of 8 KV heads all, 32 splits and a piece, or 64
  // pages and a piece.
  constexpr int kAhead = kParts > 1 ? 3 : kRowWarps == 1 ? 4 : 9;
  constexpr int kHeld = kParts > 1 ? 1 : 2;  // of a lane's statistics
  static_assert(kParts == 1 || kRowWarps == kCombineTeams);
  static_assert(kAhead % kChains == 0);
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int query = ptx::block_index() * kChains + warp / kRowWarps;
  const auto [unit, flat] = args.by_rows(query);  // of (row, KV head)
  const auto [row_of_batch, head] = args.by_heads(unit);
  const int64_t b = row_of_batch;
  if (b >= args.batch) return;
  const auto [j, of_group] = args.by_group(flat);
  const int query_head = head * args.group + of_group;

  // 1. What does not depend on the kernels before.
  const cache::RowState row = load_row_state(args.row_table, b);
  const RotationFactors<kDim> factors(args.value_signs + int64_t{head} * 3 * kDim,
                                      args.value_turns + int64_t{head} * kDim, lane);
  const bool padding = attention::query_position(row, args.num_queries, j) < 0;
  const bool has_sink = args.sink_logits != nullptr && !padding;
  const float sink = has_sink ? args.sink_logits[query_head] * kLog2E : kNoScore;
  using Partials = RowPartials<kDim, kParts>;
  const Partials partials(args, args.unit(b, head, flat / kTileRows), flat % kTileRows,
                          row_splits(args.plan, row), exact_tokens(args.plan.sink_tokens, row),
                          padding);
  constexpr int kShare = 4 * Partials::kShare;
  int pages_at[kShare], exact_at[kShare];  // coordinates of a lane's numbers
  TQ_UNROLL
  for (int n = 0; n < kShare; ++n) {
    const int pair = 2 * (n / 4 * kWarpLanes + lane) + n % 4 / 2, odd = n % 2;
    pages_at[n] = value_coordinate<kDim>(args.v_bits, pair / 8, pair % 8, odd);
    exact_at[n] = ExactShare<kDim, 8, 4>::coordinate(2 * (pair / 8) + odd, pair % 8);
  }
  ptx::wait_dependencies();
  ptx::launch_dependents();

  // 2. The largest maximum; the first results are on their way meanwhile.
  const int first = warp % kRowWarps;
  // A lane has statistics of all results in turn, or of the parts of its warp's own results: in
  // each round of kRound results.
  constexpr int kRound = kParts == 1 ? kWarpLanes : kWarpLanes / kParts * kRowWarps;
  const auto result_of_lane = [&](int k) {
    return kParts == 1 ? k * kWarpLanes + lane
                       : (k * kWarpLanes + lane) / kParts * kRowWarps + first;
  };
  const auto part_of_lane = [&](int k) { return result_of_lane(k) * kParts + lane % kParts; };
  typename Partials::Stats held[kHeld];
  TQ_UNROLL
  for (int k = 0; k < kHeld; ++k) held[k] = partials.stats(part_of_lane(k));
  typename Partials::Share shares[kAhead];
  const auto load_shares = [&](int s) {
    TQ_UNROLL
    for (int k = 0; k < kAhead; ++k) partials.load(s + k * kRowWarps, lane, shares[k]);
  };
  load_shares(first);
  float* const rows = reinterpret_cast<float*>(shared) + warp * combine_warp_floats(args, kDim);
  float* const part_weights = rows + 2 * kDim;
  float* const weights = kParts == 1 ? part_weights : part_weights + args.slots;
  auto* const merged = reinterpret_cast<typename Partials::Stats*>(
      reinterpret_cast<float*>(shared) + kCombineTeams * combine_warp_floats(args, kDim));
  const auto each_of_lane = [&](auto use) {
    TQ_UNROLL
    for (int k = 0; k < kHeld; ++k) use(part_of_lane(k), held[k]);
    TQ_NO_UNROLL
    for (int k = kHeld; k * kRound < partials.count(); ++k) {
      use(part_of_lane(k), partials.stats(part_of_lane(k)));
    }
  };
  const auto each_result = [&](auto use) {
    if constexpr (kParts == 1) {
      each_of_lane(use);
    } else {
      TQ_NO_UNROLL
      for (int s = lane; s < partials.count(); s += kWarpLanes) use(s, merged[s]);
    }
  };
  if constexpr (kParts > 1) {
    each_of_lane([&](int n, const auto& stats) {
      float max = stats.max;
      TQ_UNROLL
      for (int mask = 1; mask < kParts; mask *= 2) max = fmaxf(max, ptx::shuffle_xor(max, mask));
      const float weight = ptx::exp2_fast(stats.max - max);
      float sum = weight * stats.sum;
      TQ_UNROLL
      for (int mask = 1; mask < kParts; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
      if (n >= partials.count() * kParts) return;
      part_weights[n] = partials.exists(n) ? weight : kNeutral;
      if (n % kParts == 0) merged[n / kParts] = {max, sum};
    });
    ptx::sync_block();
  }
  float largest = sink;
  each_result([&](int, const auto& stats) {
    if (stats.sum != 0.0f) largest = fmaxf(largest, stats.max);
  });
  TQ_UNROLL
  for (int mask = 1; mask < kWarpLanes; mask *= 2) {
    largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
  }

  // 3. Weights, and the sums of this warp's chains.
  float total = 0.0f;
  each_result([&](int s, const auto& stats) {
    if (s >= partials.count()) return;
    const float weight = stats.sum == 0.0f ? kNeutral : exp2f(stats.max - largest);
    if (stats.sum != 0.0f) total = fmaf(stats.sum, weight, total);
    weights[s] = weight;
  });
  ptx::sync_warp();
  ChainSum<kDim, kParts> sums[kChains];
  TQ_NO_UNROLL
  for (int s = first; s < partials.count(); s += kAhead * kRowWarps) {
    if (s != first) load_shares(s);
    TQ_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int of = s + k * kRowWarps;
      if (of >= partials.count()) break;
      const float weight = weights[of];
      if (weight == kNeutral) continue;
      sums[k % kChains].add(shares[k], part_weights + of * kParts, weight, partials.of_pages(of));
    }
  }
  TQ_UNROLL
  for (int mask = 1; mask < kWarpLanes; mask *= 2) total += ptx::shuffle_xor(total, mask);
  if (has_sink) total += exp2f(sink - largest);

  // 4. From the order they are stored in to coordinates; chain to chain.
  TQ_UNROLL
  for (int n = 0; n < kShare; ++n) {
    if (kDim / 4 % kWarpLanes != 0 && n / 4 * kWarpLanes + lane >= kDim / 4) continue;
    TQ_UNROLL
    for (int c = 1; c < kChains; ++c) {
      sums[0].paged[n] += sums[c].paged[n];
      sums[0].exact[n] += sums[c].exact[n];
    }
    rows[pages_at[n]] = sums[0].paged[n];
    rows[kDim + exact_at[n]] = sums[0].exact[n];
  }
  if constexpr (kRowWarps == 1) {
    ptx::sync_warp();
  } else {
    ptx::sync_block();
    if (warp != 0) return;
  }
  float paged[kRowShare<kDim>], exact[kRowShare<kDim>];
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    paged[k] = exact[k] = 0.0f;
    if (kDim % kWarpLanes != 0 && i >= kDim) continue;
    paged[k] = rows[i];
    exact[k] = rows[kDim + i];
    TQ_UNROLL
    for (int c = 1; c < kRowWarps; ++c) {
      const float* const of_team = rows + c * combine_warp_floats(args, kDim);
      paged[k] += of_team[i];
      exact[k] += of_team[kDim + i];
    }
  }

  // 5. Rotate back, divide, write.
  if (partials.splits() > 0) rotate_row<kDim, true>(paged, rows, factors, lane);
  std::byte* const out = const_cast<std::byte*>(args.out.row(b, query_head, j));
  const float inverse = total == 0.0f ? 0.0f : ptx::reciprocal_fast(total);
  TQ_UNROLL
  for (int k = 0; k < kRowShare<kDim>; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes != 0 && i >= kDim) continue;
    store_element(out, i * args.out.elem_stride, args.out_type, (paged[k] + exact[k]) * inverse);
  }
  if (lane == 0 && args.lse != nullptr) {
    args.lse[(b * args.num_kv_heads * args.group + query_head) * args.num_queries + j] =
        total == 0.0f ? -INFINITY : (largest + log2f(total)) * kLn2;
  }
}

}  // namespace turboquant::cuda::detail
