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

// Blocks and shared memory of combine_splits: of every warp a row of the pages' sum, one of the
// exact tokens' and the weights of all results.
TQ_HOST_DEVICE constexpr int64_t combine_blocks(const DecodeArgs& args, int row_warps) {
  return ceil_div(int64_t{args.batch} * args.num_kv_heads * args.rows, kCombineTeams / row_warps);
}
TQ_HOST_DEVICE constexpr int combine_warp_floats(const DecodeArgs& args, int head_dim) {
  return 2 * head_dim + args.page_slots + args.exact_slots;
}
TQ_HOST_DEVICE constexpr int combine_bytes(const DecodeArgs& args, int head_dim) {
  return kCombineTeams * combine_warp_floats(args, head_dim) * 4;
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

// The partial results of one query row: page splits, then exact pieces, numbered on.
template <int kDim>
class RowPartials {
 public:
  static constexpr int kShare = (kDim / 4 + kWarpLanes - 1) / kWarpLanes;  // 16 bytes each
  // Running maximum and sum; a sum of 0: of no token.
  struct Stats {
    float max, sum;
  };
  struct Share {
    Words4 words[kShare];
  };

  TQ_DEVICE RowPartials(const DecodeArgs& args, int64_t unit, int column, int splits, int pieces)
      : from_(args.partial(unit, 0, kDim)),
        column_(column),
        splits_(splits),
        count_(splits + pieces),
        pieces_behind_(args.page_slots - splits) {}

  TQ_DEVICE int count() const { return count_; }
  TQ_DEVICE bool of_pages(int s) const { return s < splits_; }
  TQ_DEVICE Stats stats(int s) const {
    if (s >= count_) return {kNoScore, 0.0f};
    const float* const at = partial(s) + kTileRows * kDim + column_;
    return {at[0], at[kTileRows]};
  }
  // Numbers 4 (32 k + lane) ... of the row as it is stored.
  TQ_DEVICE void load(int s, int lane, Share& share) const {
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const int piece = k * kWarpLanes + lane;
      if (s < count_ && (kDim / 4 % kWarpLanes == 0 || piece < kDim / 4)) {
        share.words[k] = load_as<Words4>(
            reinterpret_cast<const std::byte*>(partial(s) + column_ * kDim + 4 * piece));
      }
    }
  }

 private:
  TQ_DEVICE const float* partial(int s) const {
    const int slot = of_pages(s) ? s : s + pieces_behind_;
    return from_ + static_cast<uint32_t>(slot) * static_cast<uint32_t>(partial_floats(kDim));
  }
  const float* from_;
  int column_, splits_, count_, pieces_behind_;
};

// Weighted sums of a chain of partial results, of pages (rotated basis) and of exact tokens (the
// model's): a lane's share of either.
template <int kDim>
struct ChainSum {
  float paged[4 * RowPartials<kDim>::kShare] = {};
  float exact[4 * RowPartials<kDim>::kShare] = {};

  TQ_DEVICE void add(const typename RowPartials<kDim>::Share& share, float weight, bool of_pages) {
    TQ_UNROLL
    for (int n = 0; n < 4 * RowPartials<kDim>::kShare; ++n) {
      const float x = ptx::float_of(share.words[n / 4].w[n % 4]);
      if (of_pages) {
        paged[n] = fmaf(weight, x, paged[n]);
      } else {
        exact[n] = fmaf(weight, x, exact[n]);
      }
    }
  }
};

// A weight that stands for a partial result of no token: exactly neutral, whatever is stored.
inline constexpr float kNeutral = -1.0f;

// Grid: kRowWarps (1 or kCombineTeams) warps for each query row of each KV head and row.
template <int kDim, int kRowWarps>
TQ_DEVICE void combine_splits(const DecodeArgs& args, std::byte* shared) {
  constexpr int kChains = kCombineTeams / kRowWarps;  // of a warp
  // Results that are loaded at once: of a lone row of 8 KV heads all, 32 splits and a piece.
  constexpr int kAhead = kRowWarps == 1 ? 4 : 9;
  constexpr int kHeld = 2;  // of a lane's statistics
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
  const int num_splits = padding ? 0 : row_splits(args.plan, row).num_splits;
  const int num_pieces = padding ? 0 : exact_pieces(exact_tokens(args.plan.sink_tokens, row));
  const RowPartials<kDim> partials(args, args.unit(b, head, flat / kTileRows), flat % kTileRows,
                                   num_splits, num_pieces);
  constexpr int kShare = 4 * RowPartials<kDim>::kShare;
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
  typename RowPartials<kDim>::Stats held[kHeld];
  TQ_UNROLL
  for (int k = 0; k < kHeld; ++k) held[k] = partials.stats(k * kWarpLanes + lane);
  typename RowPartials<kDim>::Share shares[kAhead];
  const auto load_shares = [&](int s) {
    TQ_UNROLL
    for (int k = 0; k < kAhead; ++k) partials.load(s + k * kRowWarps, lane, shares[k]);
  };
  load_shares(first);
  float largest = sink;
  const auto each_of_lane = [&](auto use) {
    TQ_UNROLL
    for (int k = 0; k < kHeld; ++k) use(k * kWarpLanes + lane, held[k]);
    TQ_NO_UNROLL
    for (int s = kHeld * kWarpLanes + lane; s < partials.count(); s += kWarpLanes) {
      use(s, partials.stats(s));
    }
  };
  each_of_lane([&](int, const auto& stats) {
    if (stats.sum != 0.0f) largest = fmaxf(largest, stats.max);
  });
  TQ_UNROLL
  for (int mask = 1; mask < kWarpLanes; mask *= 2) {
    largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
  }

  // 3. Weights, and the sums of this warp's chains.
  float* const rows = reinterpret_cast<float*>(shared) + warp * combine_warp_floats(args, kDim);
  float* const weights = rows + 2 * kDim;
  float total = 0.0f;
  each_of_lane([&](int s, const auto& stats) {
    if (s >= partials.count()) return;
    const float weight = stats.sum == 0.0f ? kNeutral : exp2f(stats.max - largest);
    if (stats.sum != 0.0f) total = fmaf(stats.sum, weight, total);
    weights[s] = weight;
  });
  ptx::sync_warp();
  ChainSum<kDim> sums[kChains];
  TQ_NO_UNROLL
  for (int s = first; s < partials.count(); s += kAhead * kRowWarps) {
    if (s != first) load_shares(s);
    TQ_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int of = s + k * kRowWarps;
      if (of >= partials.count()) break;
      const float weight = weights[of];
      if (weight != kNeutral) sums[k % kChains].add(shares[k], weight, partials.of_pages(of));
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
  if (num_splits > 0) rotate_row<kDim, true>(paged, rows, factors, lane);
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
