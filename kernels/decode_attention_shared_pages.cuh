// Decode attention of a call with few pages (decode_attention.cuh): four warps share a page.
//
// With a page for each warp, a lone short row leaves most of a device idle, and its time is one
// warp's way through a page. attend_pages has a team of four warps for each page: a warp takes 16
// of the page's tokens in the first product and a fourth of the coordinates in the second. No group
// merges: a page's state is a partial result, and combine_splits merges the pages of a split as a
// group would (RowPartials). A block's pages are of one row and KV head, whose queries it rotates
// itself while they are on their way: one kernel less. The bits are those of attend_splits.
#pragma once

#include "decode_attention_merge.cuh"
#include "decode_attention_pages.cuh"
#include "decode_attention_plain_exact.cuh"
#include "decode_attention_prepare.cuh"
#include "decode_attention_table.cuh"

namespace turboquant::cuda::detail {

inline constexpr int kTeamWarps = kTilesPerPage;

// A block's query operands, in its shared memory (as PassQueries).
class BlockQueries {
 public:
  TQ_DEVICE explicit BlockQueries(const uint32_t* operands) : operands_(operands) {}
  TQ_DEVICE Words2 step(int, int step) const {
    return load_as<Words2>(reinterpret_cast<const std::byte*>(
        operands_ + (step * kWarpLanes + ptx::lane_index()) * 2));
  }

 private:
  const uint32_t* operands_;
};

template <class Traits>
class PageTeams {
  static_assert(Traits::kSharesPages && Traits::kRowTiles == 1);
  static_assert(Traits::kGroupWarps == kShortSplitPages);
  static constexpr int kTeams = Traits::kWarps / kTeamWarps;
  static_assert(kTeams * (kTeamWarps - 1) >= kTileRows && kTeams == kMostTeams);
  // m-tiles of the second product that a warp has; at 96 coordinates (80) the last warp has none
  // (the last two have one).
  static constexpr int kTeamSteps = (Traits::kSteps + kTeamWarps - 1) / kTeamWarps;
  using State = WarpState<kTeamSteps>[1];

 public:
  TQ_DEVICE PageTeams(const SharedPagesArgs& args, std::byte* shared)
      : args_(args.call),
        blocks_(args.blocks),
        by_unit_blocks_(args.by_unit_blocks),
        shared_(shared) {}

  TQ_DEVICE void run() {
    ptx::touch_arguments(args_);
    ptx::expect_shared_base(shared_);
    if (member() == 0 && lane() == 0) {
      ptx::barrier_init(key_landed(), 1);
      ptx::barrier_init(value_landed(), 1);
      if (warp() == 0) ptx::barrier_init(table_filled(), kWarpLanes * kFillWarps);
      ptx::fence_barrier_init();
    }
    ptx::sync_block();
    ptx::wait_dependencies();
    if (ptx::block_index() < blocks_.exact) {
      attend_exact();
    } else {
      attend_pages();
    }
  }

 private:
  // Read anew in every function: registers that would live long are dearer.
  TQ_DEVICE static int lane() { return ptx::lane_index_here(); }
  TQ_DEVICE static int warp() { return ptx::warp_index_here(); }
  TQ_DEVICE static int team() { return warp() / kTeamWarps; }
  TQ_DEVICE static int member() { return warp() % kTeamWarps; }
  TQ_DEVICE static void sync_team() { ptx::sync_group(1 + team(), kTeamWarps * kWarpLanes); }

  // ---- shared memory: that of attend_splits. Of the stages of a team's four warps it has the
  // first for its page and the second for what its warps exchange; queries lie where items do
  // there.
  TQ_DEVICE std::byte* stage(int n) const {
    return shared_ + Traits::kStagesOffset + (team() * kTeamWarps + n) * Traits::kWarpStageBytes;
  }
  TQ_DEVICE std::byte* key_stage() const { return stage(0); }
  TQ_DEVICE std::byte* value_stage() const { return stage(0) + Traits::kKeyStageBytes; }
  TQ_DEVICE uint64_t* barriers() const {
    return reinterpret_cast<uint64_t*>(shared_ + Traits::kBarriersOffset);
  }
  TQ_DEVICE uint64_t* key_landed() const { return barriers() + 2 * team(); }
  TQ_DEVICE uint64_t* value_landed() const { return key_landed() + 1; }
  TQ_DEVICE uint64_t* table_filled() const { return barriers() + 2 * kTeams; }
  struct Exchange {
    Words2 tops[kTilesPerPage][kWarpLanes];     // a tile's largest scores, by lane
    Words4 weights[kTilesPerPage][kWarpLanes];  // and its weights' operands and sums
    int tokens;                                 // of the page; 0: the team has none
  };
  static_assert(sizeof(Exchange) <= Traits::kWarpStageBytes);
  TQ_DEVICE Exchange& exchange() const { return *reinterpret_cast<Exchange*>(stage(1)); }
  struct Queries {
    uint32_t operands[Traits::kUnitWords];
    float factors[kTileRows];
    float rotated[kTileRows][Traits::kDim];  // scratch
  };
  static_assert(sizeof(Queries) <= Traits::kWarps * sizeof(typename Traits::Work));
  TQ_DEVICE Queries& queries() const {
    return *reinterpret_cast<Queries*>(shared_ + Traits::kWorkOffset);
  }

  // ---- pages
  // Place of the team's page.
  struct Page {
    int64_t b;
    int unit, head, entry;
  };
  TQ_DEVICE Page page() const {
    const auto [unit, n] = by_unit_blocks_(ptx::block_index() - blocks_.exact);
    const auto [b, head] = args_.by_heads(unit);
    return {b, unit, head, n * blocks_.teams + team()};
  }
  // The page on its way, if there is one. A team's first warp.
  TQ_DEVICE void copy_page(const Page& page) const {
    int tokens = 0;
    if (page.entry < args_.page_columns) {
      const int64_t place = page.b * args_.page_columns + page.entry;
      const Words2 found = load_as<Words2>(reinterpret_cast<const std::byte*>(
          args_.page_table + place * cache::tables::kPageColumns));
      if (page.entry < load_row_state(args_.row_table, page.b).num_entries) {
        tokens = static_cast<int>(found.w[1]);
        if (lane() == 0) copy_block(args_.block(found.w[0], page.head));
      }
    }
    if (lane() == 0) exchange().tokens = tokens;
  }
  TQ_DEVICE void copy_block(const std::byte* block) const {
    ptx::barrier_expect(key_landed(), args_.key_part_bytes);
    ptx::bulk_copy(key_stage(), block, args_.key_part_bytes, key_landed());
    ptx::barrier_expect(value_landed(), args_.value_part_bytes);
    ptx::bulk_copy(value_stage(), block + args_.key_part_bytes, args_.value_part_bytes,
                   value_landed());
  }

  // Eight warps fill the table, each team's first one among them. Others have a query row each to
  // rotate: those of the last team if it has no page, or one or two of every team, on all of the
  // multiprocessor's schedulers. Numbers of the part and the row; too high where there is none.
  static constexpr int kFillWarps = 8;
  TQ_DEVICE bool spares_team() const { return blocks_.teams < kTeams; }
  TQ_DEVICE int role() const { return (member() - 1 - team() + kTeams) % (kTeamWarps - 1); }
  TQ_DEVICE int table_part() const {
    if (spares_team()) return team() < kTeams - 1 ? member() * (kTeams - 1) + team() : kFillWarps;
    return member() == 0 ? 2 * team() : role() == 2 ? 2 * team() + 1 : kFillWarps;
  }
  TQ_DEVICE int rotated_row() const {
    if (spares_team()) return team() == kTeams - 1 ? member() : kTileRows;
    return member() == 0 ? kTileRows : team() + role() * kTeams;
  }

  TQ_DEVICE void attend_pages() {
    if (table_part() < kFillWarps) {
      TableShare<Traits, kWarpLanes * kFillWarps> table;
      const int thread = table_part() * kWarpLanes + lane();
      table.load(args_, thread);
      if (member() == 0) copy_page(page());
      table.fill(shared_, thread);
      ptx::barrier_arrive(table_filled());
    }
    if (rotated_row() < kTileRows) {
      const Page page = this->page();
      prepare_row<Traits::kDim>(args_, Traits::kKeyBits, page.b, page.head, rotated_row(),
                                queries().rotated[rotated_row()], queries().operands,
                                queries().factors);
    }
    ptx::barrier_wait(table_filled(), 0);
    attend_page(team() < blocks_.teams ? exchange().tokens : 0);
  }

  // The only query sees all of a page. Whole block: the queries are waited for.
  TQ_DEVICE void attend_page(int tokens) const {
    const int g = lane() >> 2, t = lane() & 3, tile = member();
    const bool partial = tokens < cache::kBlockTokens;
    uint32_t seen = ~0u;  // of the page
    if (partial) {
      each_unseen_score({0, 0}, {tokens, tokens}, [&](int n) { seen &= ~(1u << n); });
    }
    const std::byte* const codes = key_stage() + (args_.has_mean ? 2 * Traits::kDim : 0);
    const PageValues<Traits> values(args_, value_stage());
    State state;
    state[0].clear();

    // 1. Keys and values are decoded while the queries are rotated.
    uint32_t of_keys[Traits::kSteps][4], of_values[kTilesPerPage][kTeamSteps][4];
    if (tokens > 0) {
      ptx::barrier_wait(key_landed(), 0);
      const auto table = lane_table<Traits, 0>(shared_, lane());
      KeyOperandsOf<Traits> keys;
      keys.load(codes, tile * kTileTokens + tile_slot(g), t);
      TQ_UNROLL
      for (int step = 0; step < Traits::kSteps; ++step) keys.take(step, table, of_keys[step]);
      ptx::barrier_wait(value_landed(), 0);
      decode_values<0>(values, of_values);
      float growth[2] = {1.0f, 1.0f};
      values.raise_unit(!partial, seen, state[0], growth);
    }
    ptx::sync_block();
    ptx::launch_dependents();
    if (tokens == 0) return;

    // 2. Scores of this warp's tokens.
    const BlockQueries operands(queries().operands);
    float s[1][1][4] = {}, mean[1][2] = {}, factor[2];
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) factor[c] = queries().factors[2 * t + c];
    TQ_UNROLL
    for (int step = 0; step < Traits::kSteps; ++step) {
      const Words2 q = operands.step(0, step);
      const uint32_t(&a)[4] = of_keys[step];
      ptx::mma_f16(s[0][0], a[0], a[1], a[2], a[3], q.w[0], q.w[1]);
    }
    if (args_.has_mean) page_mean<Traits>(key_stage(), operands, mean);
    const std::byte* const scales = codes + cache::kBlockTokens * Traits::Key::kRowBytes;
    const int first = tile * kTileTokens + tile_slot(g);
    if (args_.half_scales) {
      scale_scores<true>(scales, first, mean, s);
    } else {
      scale_scores<false>(scales, first, mean, s);
    }
    if (partial || args_.softcap > 0.0f) apply_factor(args_, factor, s[0]);
    const uint32_t seen_of_tile[1] = {seen >> 4 * tile};
    TQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      if ((seen_of_tile[0] >> n & 1u) == 0) s[0][0][n] = -INFINITY;
    }

    // 3. The page's maxima; weights.
    float top[2];
    state[0].largest_scores(s[0], factor, top);
    exchange().tops[tile][lane()] = Words2{{ptx::bits_of(top[0]), ptx::bits_of(top[1])}};
    sync_team();
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      const Words2 other = exchange().tops[i][lane()];
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) top[c] = fmaxf(top[c], ptx::float_of(other.w[c]));
    }
    float growth[2];
    state[0].raise_maxima(top, growth);
    state[0].weigh(s[0], factor);
    values.scale_weights(tile, state, s);
    uint32_t own[1][1][2];
    values.weight_operands(partial, seen_of_tile, s, own);
    exchange().weights[tile][lane()] = Words4{
        {own[0][0][0], own[0][0][1], ptx::bits_of(state[0].sum[0]), ptx::bits_of(state[0].sum[1])}};
    sync_team();

    // 4. This warp's coordinates of all tokens.
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      const Words4 p = exchange().weights[i][lane()];
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float sum = ptx::float_of(p.w[2 + c]);
        state[0].sum[c] = i == 0 ? sum : state[0].sum[c] + sum;
      }
      TQ_UNROLL
      for (int v = 0; v < kTeamSteps; ++v) {
        const uint32_t(&a)[4] = of_values[i][v];
        ptx::mma_f16(state[0].out[v], a[0], a[1], a[2], a[3], p.w[0], p.w[1]);
      }
    }
    // Found anew: in registers, it would push operands out.
    const Page page = this->page();
    float* const result = args_.partial(page.unit, page.entry, Traits::kDim);
    TQ_UNROLL
    for (int v = 0; v < kTeamSteps; ++v) {
      const int step = tile * kTeamSteps + v;
      if (Traits::kSteps % kTeamWarps != 0 && step >= Traits::kSteps) break;
      float out[4];
      TQ_UNROLL
      for (int n = 0; n < 4; ++n) {
        out[n] = state[0].out[v][n] * ptx::float_of(state[0].exponent[n % 2]);
      }
      store_outputs<Traits::kDim>(result, args_.rows, step, out);
    }
    if (tile != 0) return;
    state[0].reduce_sums();
    store_stats<Traits::kDim>(result, state[0]);
  }

  // Operands A of the m-tiles of member kMember (or a later one), those that do not exist zeros.
  template <int kMember>
  TQ_DEVICE void decode_values(const PageValues<Traits>& values,
                               uint32_t (&a)[kTilesPerPage][kTeamSteps][4]) const {
    if constexpr (kMember < kTeamWarps - 1) {
      if (member() != kMember) return decode_values<kMember + 1>(values, a);
    }
    constexpr int kFirst = kMember * kTeamSteps;
    const auto table = lane_table<Traits, Traits::kValueTableOffset>(shared_, lane());
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      const auto operands = values.operands(i, lane());
      TQ_UNROLL
      for (int v = 0; v < kTeamSteps; ++v) {
        if (kFirst + v < Traits::kSteps) {
          operands.take(kFirst + v, table, a[i][v]);
        } else {
          TQ_UNROLL
          for (int k = 0; k < 4; ++k) a[i][v][k] = 0;
        }
      }
    }
  }

  // ---- exact tokens: the warps of attend_splits' groups, each with a result of its own
  TQ_DEVICE void attend_exact() const {
    ptx::launch_dependents();
    const int blocks = blocks_.exact;
    const int pieces = args_.batch * args_.num_kv_heads * args_.exact_slots;
    constexpr int kGroupWarps = Traits::kGroupWarps;
    const int group = warp() / kGroupWarps, of_group = warp() % kGroupWarps;
    for (int id = ptx::block_index() + blocks * group; id < pieces;
         id += blocks * Traits::kGroups) {
      const auto [unit, piece] = args_.by_exact_slots(id);
      const auto [b, head] = args_.by_heads(unit);
      const auto count = static_cast<int>(
          exact_tokens(args_.plan.sink_tokens, load_row_state(args_.row_table, b)).count());
      const int begin = piece * kExactPieceTokens;
      if (begin + of_group * kTileTokens >= count) continue;
      WarpState<Traits::kSteps> state[1];
      state[0].clear();
      attend_exact_piece<Traits>(args_, b, head, 0, begin, count, of_group, stage(member()), state);
      state[0].reduce_sums();
      const int slot = args_.page_slots + piece * kShortSplitPages + of_group;
      store_partial<Traits::kDim>(args_.partial(unit, slot, Traits::kDim), args_.rows, state[0]);
    }
  }

  const DecodeArgs& args_;
  const PageBlocks& blocks_;
  const Divider& by_unit_blocks_;
  std::byte* const shared_;
};

}  // namespace turboquant::cuda::detail
