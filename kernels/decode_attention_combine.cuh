// Decode attention, third kernel (decode_attention.cuh): partial results to outputs.
#pragma once

#include "decode_attention_rotation.cuh"
#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

template <int kDim>
struct CombineTraits {
  static constexpr int kTeamThreads = 2 * kDim;  // one for each four numbers of a partial result
  // A Paley factor's sums take more registers than 1024 threads can have.
  static constexpr int kTeams = (math::hadamard_factor(kDim) == 1 ? 1024 : 512) / kTeamThreads;
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kWarps = kThreads / 32;
  static_assert(kTeamThreads % 32 == 0 && kTeams >= 2);
  // In this order: rows [8, kDim] of every team's part of the pages and of the exact tokens; maxima
  // and sums of both [2][2][8]; factors of the rotation [4 kDim]; weights of all partial results
  // [slots, 8].
  static constexpr int kPartBytes = kTileRows * kDim * 4;
  static constexpr int kStatsOffset = (kTeams + 1) * kPartBytes;
  static constexpr int kRotationOffset = kStatsOffset + 4 * kTileRows * 4;
  static constexpr int kWeightsOffset = kRotationOffset + 4 * kDim * 4;
  static constexpr int shared_bytes(int slots) { return kWeightsOffset + slots * kTileRows * 4; }
};

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

// A weight that stands for a partial result of no token: exactly neutral, whatever is stored.
inline constexpr float kNeutral = -1.0f;

// Weights 2^(max - largest max) of partial results [first, first + count) of a unit for its row r,
// to weights [slot, 8]; the largest maximum and the weighted sum. One warp; the order of the sum
// depends on count alone.
template <int kDim>
TQ_DEVICE void weigh_slots(const DecodeArgs& args, int64_t unit, int first, int count, int r,
                           float* weights, float& largest, float& total) {
  const int lane = ptx::lane_index();
  const float* const stats = args.partial(unit, first, kDim) + kTileRows * kDim + r;
  largest = kNoScore;
  total = 0.0f;
  for (int i = lane; i < count; i += kWarpLanes) {
    const float* const of_slot = stats + i * partial_floats(kDim);
    if (of_slot[kTileRows] != 0.0f) largest = fmaxf(largest, of_slot[0]);
  }
  TQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
  }
  for (int i = lane; i < count; i += kWarpLanes) {
    const float* const of_slot = stats + i * partial_floats(kDim);
    const float sum = of_slot[kTileRows];
    const float weight = sum == 0.0f ? kNeutral : exp2f(of_slot[0] - largest);
    weights[(first + i) * kTileRows + r] = weight;
    if (sum != 0.0f) total += sum * weight;
  }
  TQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) total += ptx::shuffle_xor(total, mask);
}

// Weighted sum of a unit's partial results [first, end) in ascending order: the four numbers of one
// thread of a team. The first kAhead are loaded before weights are known.
template <int kDim, int kAhead>
class SlotSum {
 public:
  TQ_DEVICE SlotSum(const DecodeArgs& args, int64_t unit, int first, int end, int thread)
      : from_(args.partial(unit, 0, kDim) + 4 * thread), first_(first), end_(end) {
    load(first_);
  }
  TQ_DEVICE void add_up(const float* weights, int t, float (&out)[4]) {
    TQ_NO_UNROLL
    for (int slot = first_; slot < end_; slot += kAhead) {
      if (slot != first_) load(slot);
      TQ_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        if (slot + k >= end_) break;
        TQ_UNROLL
        for (int n = 0; n < 4; ++n) {
          const float weight = weights[(slot + k) * kTileRows + 2 * t + n % 2];
          if (weight != kNeutral) out[n] = fmaf(weight, ptx::float_of(words_[k].w[n]), out[n]);
        }
      }
    }
  }

 private:
  TQ_DEVICE void load(int slot) {
    TQ_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (slot + k < end_) {
        words_[k] = load_as<Words4>(
            reinterpret_cast<const std::byte*>(from_ + (slot + k) * partial_floats(kDim)));
      }
    }
  }
  const float* from_;
  int first_, end_;
  Words4 words_[kAhead];
};

// Grid: one block for each (row, KV head, tile of 8 query rows). Teams of threads each add up a
// range of the page splits' results; one adds up the exact pieces' too.
template <int kDim>
TQ_DEVICE void combine_splits(const DecodeArgs& args, std::byte* shared) {
  using Traits = CombineTraits<kDim>;
  ptx::launch_dependents();
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int tile = ptx::block_index() % args.tiles;
  const int head = ptx::block_index() / args.tiles % args.num_kv_heads;
  const int64_t b = ptx::block_index() / args.tiles / args.num_kv_heads;
  const int64_t unit = args.unit(b, head, tile);
  float* const stats = reinterpret_cast<float*>(shared + Traits::kStatsOffset);
  float* const signs = reinterpret_cast<float*>(shared + Traits::kRotationOffset);
  float* const turns = signs + 3 * kDim;
  float* const weights = reinterpret_cast<float*>(shared + Traits::kWeightsOffset);

  // 1. What does not depend on the kernels before.
  const cache::RowState row = load_row_state(args.row_table, b);
  const int num_splits = row_splits(args.plan, row).num_splits;
  const int num_pieces = exact_pieces(exact_tokens(args.plan.sink_tokens, row));
  for (int i = ptx::thread_index(); i < 4 * kDim; i += Traits::kThreads) {
    signs[i] = i < 3 * kDim ? args.value_signs[int64_t{head} * 3 * kDim + i]
                            : args.value_turns[int64_t{head} * kDim + i - 3 * kDim];
  }
  ptx::wait_dependencies();

  // 2. Numbers on their way while weights are found.
  {
    const int team = ptx::thread_index() / Traits::kTeamThreads;
    const int thread = ptx::thread_index() % Traits::kTeamThreads;
    const int step = thread / 32, g = lane >> 2, t = lane & 3;
    const bool in_use = tile * kTileRows + 2 * t < args.rows;
    const int per_team = (num_splits + Traits::kTeams - 1) / Traits::kTeams;
    const int begin = static_cast<int>(min_of(num_splits, team * per_team));
    const int end = in_use ? static_cast<int>(min_of(num_splits, begin + per_team)) : begin;
    const bool has_exact = in_use && team == Traits::kTeams - 1;
    SlotSum<kDim, 4> pages(args, unit, begin, end, thread);
    SlotSum<kDim, 1> exact(args, unit, args.page_slots,
                           args.page_slots + (has_exact ? num_pieces : 0), thread);
    for (int task = warp; task < 2 * kTileRows; task += Traits::kWarps) {
      const int part = task / kTileRows, r = task % kTileRows;
      if (tile * kTileRows + r >= args.rows) continue;
      float largest, total;
      weigh_slots<kDim>(args, unit, part == 0 ? 0 : args.page_slots,
                        part == 0 ? num_splits : num_pieces, r, weights, largest, total);
      if (lane == 0) {
        stats[2 * part * kTileRows + r] = largest;
        stats[(2 * part + 1) * kTileRows + r] = total;
      }
    }
    ptx::sync_block();

    // 3. Sums, from accumulators to rows of coordinates. Columns of no query are not read.
    float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    pages.add_up(weights, t, out);
    float* const rows = reinterpret_cast<float*>(shared + team * Traits::kPartBytes);
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      rows[(2 * t + k % 2) * kDim + value_coordinate<kDim>(args.v_bits, step, g, k / 2)] = out[k];
    }
    if (team == Traits::kTeams - 1) {
      float* const exact_rows =
          reinterpret_cast<float*>(shared + Traits::kTeams * Traits::kPartBytes);
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) out[k] = 0.0f;
      exact.add_up(weights, t, out);
      TQ_UNROLL
      for (int k = 0; k < 4; ++k) {
        exact_rows[(2 * t + k % 2) * kDim +
                   ExactShare<kDim, 8, 4>::coordinate(2 * step + k / 2, g)] = out[k];
      }
    }
  }
  ptx::sync_block();

  // 4. Query by query: rotate back, merge, divide, write.
  for (int r = warp; r < kTileRows && tile * kTileRows + r < args.rows; r += Traits::kWarps) {
    const int flat = tile * kTileRows + r;
    const int j = flat / args.group, query_head = head * args.group + flat % args.group;
    float* const of_row = reinterpret_cast<float*>(shared) + r * kDim;
    const float* const exact =
        reinterpret_cast<const float*>(shared + Traits::kTeams * Traits::kPartBytes) + r * kDim;
    float paged[kRowShare<kDim>];
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const int i = k * kWarpLanes + lane;
      paged[k] = 0.0f;
      if (kDim % kWarpLanes != 0 && i >= kDim) continue;
      TQ_UNROLL
      for (int team = 0; team < Traits::kTeams; ++team) {
        paged[k] += of_row[team * kTileRows * kDim + i];
      }
    }
    if (num_splits > 0) {
      rotate_row<kDim, true>(paged, of_row, RotationFactors<kDim>(signs, turns, lane), lane);
    }
    const bool padding = attention::query_position(row, args.num_queries, j) < 0;
    float max[3], sum[3];
    TQ_UNROLL
    for (int part = 0; part < 2; ++part) {
      sum[part] = padding ? 0.0f : stats[(2 * part + 1) * kTileRows + r];
      max[part] = sum[part] == 0.0f ? kNoScore : stats[2 * part * kTileRows + r];
    }
    sum[2] = args.sink_logits != nullptr && !padding ? 1.0f : 0.0f;
    max[2] = sum[2] != 0.0f ? args.sink_logits[query_head] * kLog2E : kNoScore;
    const float largest = fmaxf(fmaxf(max[0], max[1]), max[2]);
    float weight[3], total = 0.0f;
    TQ_UNROLL
    for (int part = 0; part < 3; ++part) {
      weight[part] = sum[part] == 0.0f ? 0.0f : exp2f(max[part] - largest);
      total += weight[part] * sum[part];
    }
    std::byte* const out = const_cast<std::byte*>(args.out.row(b, query_head, j));
    const float inverse = total == 0.0f ? 0.0f : ptx::reciprocal_fast(total);
    TQ_UNROLL
    for (int k = 0; k < kRowShare<kDim>; ++k) {
      const int i = k * kWarpLanes + lane;
      if (kDim % kWarpLanes != 0 && i >= kDim) continue;
      float x = 0.0f;
      if (weight[0] != 0.0f) x += weight[0] * paged[k];
      if (weight[1] != 0.0f) x += weight[1] * exact[i];
      store_element(out, i * args.out.elem_stride, args.out_type, x * inverse);
    }
    if (lane == 0 && args.lse != nullptr) {
      args.lse[(b * args.num_kv_heads * args.group + query_head) * args.num_queries + j] =
          total == 0.0f ? -INFINITY : (largest + log2f(total)) * kLn2;
    }
  }
}

}  // namespace turboquant::cuda::detail
