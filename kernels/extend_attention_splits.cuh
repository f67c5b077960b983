// Extend attention, second kernel (extend_attention.cuh): partial attention of one tile of query
// rows over one split of its blocks.
#pragma once

#include "extend_attention_rows.cuh"
#include "extend_attention_tiles.cuh"

namespace turboquant::cuda::detail {

template <class Traits>
class ExtendWorker {
  static constexpr int kDim = Traits::kDim;
  static constexpr int kSchedulers = 4;  // of a multiprocessor; warp w is scheduler w % 4's

 public:
  TQ_DEVICE ExtendWorker(const ExtendArgs& args, std::byte* shared)
      : args_(args), shared_(shared), filler_(args, shared) {}

  TQ_DEVICE void run() {
    // 1. What stays: levels, the work, queries, where the first blocks are.
    if (ptx::thread_index() == 0) work() = make_work();
    if constexpr (Traits::kWarpgroups) {
      if (ptx::thread_index() == 0) {
        for (int stage = 0; stage < Traits::kStages; ++stage) {
          ptx::barrier_init(full(stage), 32 * Traits::kFillWarps);
          ptx::barrier_init(empty(stage), 32 * Traits::kWarps);
        }
      }
    }
    filler_.fill_table();
    for (int i = ptx::thread_index(); i < kDim / 2; i += Traits::kThreads) {
      pairs()[i] = static_cast<uint8_t>(stored_pair<kDim>(args_.call.k_bits, i));
    }
    ptx::sync_block();
    load_queries();
    for (int i = ptx::thread_index(); i < Traits::kTileRows; i += Traits::kThreads) {
      const attention::VisibleTokens seen =
          visible_of_row(args_.call, work().row, work().first_row + i);
      const int64_t query = args_.unit(work().item.b, work().item.head) * args_.call.rows;
      tile_rows()[i] = {static_cast<int>(seen.begin), static_cast<int>(seen.end),
                        i < work().rows ? args_.query_factors[query + work().first_row + i] : 0.0f,
                        kNoScore, kLeastUnit};
    }
    if (ptx::warp_index() == 0) find_blocks(begin(), kPagedBlocks);
    if constexpr (Traits::kWarpgroups) ptx::fence_copy_engine();  // wgmma reads the queries
    ptx::sync_block();

    // 2. Block by block.
    if constexpr (Traits::kWarpgroups) {
      if (ptx::warp_index() >= Traits::kFirstFillWarp) {
        ptx::release_registers<Traits::kFillRegisters>();
        decode_ahead();
      } else {
        ptx::take_registers<Traits::kAttendRegisters>();
        attend_decoded();
      }
    } else {
      decode_and_attend();
    }
  }

 private:
  // Warps that only decode are ahead of the others by kBuffers blocks, or by half a block: with one
  // buffer the next keys come as soon as scores are done, the next values as soon as outputs are.
  TQ_DEVICE void decode_ahead() const {
    TQ_NO_UNROLL
    for (int i = begin(); i < end(); ++i) {
      const int done = i - begin();
      if (done >= Traits::kBuffers) wait_until_empty(key_stage(i), i);
      if (done % kMeanBlocks == kMeanBlocks / 2 && done > kMeanBlocks &&
          ptx::warp_index() == Traits::kFirstFillWarp) {
        // Behind the barrier: nobody reads the group before this one any more.
        find_blocks(i + kMeanBlocks / 2, kMeanBlocks);
      }
      fill_keys(i);
      if constexpr (Traits::kBuffers == 1) {
        announce_full(key_stage(i));
        if (done >= 1) wait_until_empty(value_stage(i), i);
      }
      fill_values(i);
      announce_full(value_stage(i));
    }
  }
  TQ_DEVICE void attend_decoded() const {
    QueryRows<Traits> sets[Traits::kRowSets];
    TQ_NO_UNROLL
    for (int i = begin(); i < end(); ++i) {
      wait_until_full(key_stage(i), i);
      if ((i - begin()) % kMeanBlocks == 0) multiply_means(i);
      attend(i, sets);
      ptx::barrier_arrive(empty(value_stage(i)));
    }
    store(sets);
  }

  // Every warp decodes and attends. With two buffers one of a scheduler's two warps decodes the
  // next block first and the other one last, so that its tensor core and the rest both have
  // something to do.
  TQ_DEVICE void decode_and_attend() const {
    QueryRows<Traits> sets[Traits::kRowSets];
    constexpr bool kAhead = Traits::kBuffers == 2;
    if (kAhead && begin() < end()) fill(begin());
    TQ_NO_UNROLL
    for (int i = begin(); i < end(); ++i) {
      if (!kAhead) fill(i);
      ptx::sync_block();
      if ((i - begin()) % kMeanBlocks == 0) {
        if (i > begin() && ptx::warp_index() == 0) find_blocks(i + kMeanBlocks, kMeanBlocks);
        multiply_means(i);
      }
      if (kAhead) {
        TQ_NO_UNROLL
        for (int turn = 0; turn < 2; ++turn) {
          if (turn == ptx::warp_index_here() / kSchedulers % 2) {
            if (i + 1 < end()) fill(i + 1);
          } else {
            attend(i, sets);
          }
        }
      } else {
        attend(i, sets);
        ptx::sync_block();
      }
    }
    store(sets);
  }

  // 3. The partial result.
  TQ_DEVICE void store(QueryRows<Traits> (&sets)[Traits::kRowSets]) const {
    TQ_UNROLL
    for (int k = 0; k < Traits::kRowSets; ++k) {
      const int64_t at = (first_query() + warp_row(k)) * args_.splits + work().item.split;
      sets[k].store(tile_rows() + warp_row(k), args_.partials + at * kDim,
                    int64_t{args_.splits} * kDim, args_.stats + at * 2, int64_t{args_.splits} * 2,
                    work().rows - warp_row(k));
    }
  }

  // Between the warps that decode and those that attend: a stage is full, is empty again. All
  // threads arrive for themselves: the phases are clear to racecheck then, which neither knows
  // bar.arrive nor what a warp has written before one of its lanes arrives.
  TQ_DEVICE uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(shared_ + Traits::kBarriersOffset) + stage;
  }
  TQ_DEVICE uint64_t* empty(int stage) const { return full(stage) + Traits::kStages; }
  TQ_DEVICE int key_stage(int i) const { return Traits::kBuffers == 1 ? 0 : buffer_of(i); }
  TQ_DEVICE int value_stage(int i) const { return Traits::kBuffers == 1 ? 1 : buffer_of(i); }
  // How often the stages of block i were filled before.
  TQ_DEVICE uint32_t turn_of(int i) const {
    return static_cast<uint32_t>(i - begin()) / Traits::kBuffers;
  }
  TQ_DEVICE void wait_until_full(int stage, int i) const {
    ptx::barrier_wait(full(stage), turn_of(i) & 1);
  }
  TQ_DEVICE void wait_until_empty(int stage, int i) const {
    ptx::barrier_wait(empty(stage), (turn_of(i) - 1) & 1);
  }
  TQ_DEVICE void announce_full(int stage) const {
    ptx::fence_copy_engine();  // wgmma reads what was written
    ptx::barrier_arrive(full(stage));
  }

  // Read anew where they are used: registers that live across the loop are dearer.
  TQ_DEVICE ExtendWork& work() const {
    return *reinterpret_cast<ExtendWork*>(shared_ + Traits::kWorkOffset);
  }
  TQ_DEVICE int begin() const { return work().split.begin; }
  TQ_DEVICE int end() const { return work().split.end; }
  // First row of set k of the warps that multiply together, and of this warp.
  TQ_DEVICE static int group_row(int k) {
    constexpr int kGroups = Traits::kWarps / Traits::kGroupWarps;
    return (kGroups * k + ptx::warp_index_here() / Traits::kGroupWarps) * Traits::kGroupRows;
  }
  TQ_DEVICE static int warp_row(int k) {
    return group_row(k) + ptx::warp_index_here() % Traits::kGroupWarps * Traits::kWarpRows;
  }
  // Under mma.sync a warp without rows may leave out its part.
  TQ_DEVICE bool has_rows() const { return Traits::kWarpgroups || warp_row(0) < work().rows; }
  // Number of the tile's first row among all query rows.
  TQ_DEVICE int64_t first_query() const {
    return args_.unit(work().item.b, work().item.head) * args_.call.rows + work().first_row;
  }
  TQ_DEVICE ExtendWork make_work() const {
    const DecodeArgs& call = args_.call;
    ExtendWork work{};
    work.item = extend_item(args_, ptx::block_index());
    work.row = load_row_state(call.row_table, work.item.b);
    work.first_row = work.item.tile * Traits::kTileRows;
    work.rows = static_cast<int>(min_of(Traits::kTileRows, call.rows - work.first_row));
    work.range = extend_range(call.plan, work.row, work.first_row / call.group,
                              (work.first_row + work.rows - 1) / call.group);
    work.split = extend_split(work.range.blocks(), args_.splits, work.item.split);
    return work;
  }

  TQ_DEVICE std::byte* queries() const { return shared_ + Traits::kQueriesOffset; }
  TQ_DEVICE ptx::SharedAddress operands(int k) const {
    return ptx::shared_address(queries()) + Traits::operand_at(Traits::kTileRows, group_row(k), 0);
  }
  TQ_DEVICE float* means(int k) const {
    return reinterpret_cast<float*>(shared_ + Traits::kMeansOffset) + warp_row(k) * kMeanBlocks;
  }
  TQ_DEVICE TileRow* tile_rows() const {
    return reinterpret_cast<TileRow*>(shared_ + Traits::kRowsOffset);
  }
  TQ_DEVICE uint8_t* pairs() const {
    return reinterpret_cast<uint8_t*>(shared_ + Traits::kPairsOffset);
  }
  TQ_DEVICE PagedBlock& paged_block(int i) const {
    return reinterpret_cast<PagedBlock*>(
        shared_ + Traits::kBlocksOffset)[static_cast<unsigned>(i - begin()) % kPagedBlocks];
  }
  TQ_DEVICE int buffer_of(int i) const {
    return static_cast<int>(static_cast<unsigned>(i - begin()) % Traits::kBuffers);
  }
  TQ_DEVICE float* scales_of(int i) const {
    return filler_.scales(
        static_cast<int>(static_cast<unsigned>(i - begin()) % Traits::kScaleBuffers));
  }
  TQ_DEVICE bool is_paged(int i) const { return i < work().range.entries; }

  // Operand rows of the tile; rows that do not exist are zeros.
  TQ_DEVICE void load_queries() const {
    constexpr int kPieces = kDim * 2 / 16;
    const auto* const from = reinterpret_cast<const std::byte*>(
        args_.queries +
        (args_.unit(work().item.b, work().item.head) * args_.call.rows + work().first_row) * kDim);
    for (int i = ptx::thread_index(); i < Traits::kTileRows * kPieces; i += Traits::kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      *reinterpret_cast<Words4*>(queries() +
                                 Traits::operand_at(Traits::kTileRows, row, 16 * piece)) =
          row < work().rows ? load_as<Words4>(from + 16 * int64_t{i}) : Words4{};
    }
  }

  // Paged blocks [first, first + count) of the split, by one warp.
  TQ_DEVICE void find_blocks(int first, int count) const {
    const DecodeArgs& call = args_.call;
    const int i = first + ptx::lane_index();
    if (ptx::lane_index() >= count || i >= end() || !is_paged(i)) return;
    const int64_t e = work().item.b * call.page_columns + work().range.first_entry + i;
    const int32_t* const entry = call.page_table + e * cache::tables::kPageColumns;
    paged_block(i) = {call.pages.block(entry[0], work().item.head), call.entry_begins[e], entry[1]};
  }

  // Every eight blocks: q'.m of these eight. Meanwhile it is found where those after the next are.
  TQ_DEVICE void multiply_means(int i) const {
    if (!args_.call.has_mean || !has_rows() || !is_paged(i)) return;
    // Columns without a block are of no use: they may hold this one's again.
    const int lane = ptx::lane_index_here(), t = lane & 3;
    const int other = i + (lane >> 2);
    const std::byte* const mean = paged_block(other < end() && is_paged(other) ? other : i).data;
    typename QueryRows<Traits>::Means means_of_lane;
    TQ_UNROLL
    for (int k = 0; k < kDim / 8; ++k) {
      means_of_lane[k / 2][k % 2] = load_as<uint32_t>(mean + 4 * pairs()[4 * k + t]);
    }
    ptx::sync_warp();
    TQ_UNROLL
    for (int k = 0; k < Traits::kRowSets; ++k) {
      QueryRows<Traits>::multiply_means(operands(k), means_of_lane, means(k));
    }
    ptx::sync_warp();
  }

  TQ_DEVICE void fill_keys(int i) const {
    if (is_paged(i)) {
      if (i + 1 < end() && is_paged(i + 1)) filler_.prefetch_page(paged_block(i + 1));
      filler_.fill_page_keys(buffer_of(i), scales_of(i), paged_block(i));
    } else {
      filler_.fill_exact_keys(buffer_of(i), scales_of(i), first_exact_row(i));
    }
  }
  TQ_DEVICE void fill_values(int i) const {
    if (is_paged(i)) {
      filler_.fill_page_values(buffer_of(i), paged_block(i));
    } else {
      filler_.fill_exact_values(buffer_of(i), first_exact_row(i));
    }
  }
  TQ_DEVICE void fill(int i) const {
    fill_keys(i);
    fill_values(i);
  }
  TQ_DEVICE int64_t first_exact_row(int i) const {
    return args_.unit(work().item.b, work().item.head) * args_.exact_slots +
           int64_t{exact_index(i)} * cache::kBlockTokens;
  }
  TQ_DEVICE int exact_index(int i) const {
    return work().range.first_exact + i - work().range.entries;
  }

  TQ_DEVICE TileTokens tokens_of(int i) const {
    TileTokens tokens{};
    if (is_paged(i)) {
      const PagedBlock& block = paged_block(i);
      tokens = {block.tokens, cache::kBlockTokens, block.first, 0};
    } else {
      const ExactTokens exact = exact_tokens(args_.call.plan.sink_tokens, work().row);
      const int first = exact_index(i) * cache::kBlockTokens;
      const int sinks = static_cast<int>(exact.sinks);
      tokens = {static_cast<int>(min_of(cache::kBlockTokens, exact.count() - first)), sinks - first,
                first, first - sinks + static_cast<int>(work().row.exact_begin)};
    }
    return tokens;
  }
  TQ_DEVICE bool is_whole(int i) const {
    const TileTokens tokens = tokens_of(i);
    return tokens.count == cache::kBlockTokens && tokens.position(0) >= work().range.every_begin &&
           tokens.position(cache::kBlockTokens - 1) < work().range.every_end;
  }

  // The tile as set k of this warp's rows sees it.
  TQ_DEVICE Tile tile_of(int i, int k, bool plain, float unit) const {
    const int buffer = buffer_of(i);
    return {operands(k),
            tile_rows() + warp_row(k),
            args_.call.softcap_scale,
            args_.call.softcap_rate,
            ptx::shared_address(filler_.key_tile(buffer)),
            ptx::shared_address(filler_.value_tile(buffer)),
            scales_of(i),
            args_.call.has_mean && is_paged(i) ? means(k) + (i - begin()) % kMeanBlocks : nullptr,
            plain,
            unit};
  }

  TQ_DEVICE void attend(int i, QueryRows<Traits> (&sets)[Traits::kRowSets]) const {
    if (!has_rows()) return;
    const bool plain = args_.call.softcap == 0.0f && is_whole(i);
    const float unit = unit_of(filler_.largest_value_scale(scales_of(i)));
    const auto tokens = [&] { return tokens_of(i); };
    const auto tile = [&](int k) { return tile_of(i, k, plain, unit); };
    if constexpr (Traits::kWarpgroups) {
      // While one set's scores become weights, the tensor cores multiply the other one's.
      constexpr int kSets = Traits::kRowSets;
      typename QueryRows<Traits>::Scores s[kSets];
      typename QueryRows<Traits>::Weights p[kSets];
      TQ_UNROLL
      for (int k = 0; k < kSets; ++k) sets[k].start_scores(tile(k), s[k]);
      TQ_UNROLL
      for (int k = 0; k < kSets; ++k) {
        sets[k].template settle<kSets - 1>(s[k]);
        if constexpr (Traits::kBuffers == 1) {
          static_assert(kSets == 1);
          ptx::barrier_arrive(empty(key_stage(i)));
        }
        sets[k].weigh(tile(k), 0, tokens, s[k], p[k]);
        if constexpr (Traits::kBuffers == 1) wait_until_full(value_stage(i), i);
        sets[k].start_outputs(tile(k), p[k]);
      }
      TQ_UNROLL
      for (int k = 0; k < kSets; ++k) sets[k].settle_outputs();
    } else {
      sets[0].attend(tile(0), tokens);
    }
  }

  const ExtendArgs& args_;
  std::byte* shared_;
  TileFiller<Traits> filler_;
};

}  // namespace turboquant::cuda::detail
