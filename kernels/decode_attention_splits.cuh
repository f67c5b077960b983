// Decode attention, second kernel (decode_attention.cuh): partial attention over page splits and
// pieces of exact tokens.
//
// attend_splits runs one block on every multiprocessor. A block is one or two groups of (mostly)
// eight warps; a group takes pieces of work in a fixed order, warp w of it the pages w, w + 8, ...
// of a split. Each warp stages its own pages with the bulk copy engine, the key part of the next
// page while the value part of this one is used and the other way round, and keeps its own running
// maximum, sum and output; a group merges its warps' states once per split.
#pragma once

#include "decode_attention_exact.cuh"
#include "decode_attention_merge.cuh"
#include "decode_attention_pages.cuh"
#include "decode_attention_table.cuh"

namespace turboquant::cuda::detail {

template <class Traits>
class SplitWorker {
 public:
  TQ_DEVICE SplitWorker(const DecodeArgs& args, std::byte* shared) : args_(args), shared_(shared) {}

  TQ_DEVICE void run() {
    ptx::launch_dependents();
    ptx::expect_shared_base(shared_);

    // 1. How many page splits the rows have; barriers; the table's entries. What every warp reads
    // first of the slabs is on its way to the L1.
    if (warp() == 1 && args_.pages.num_slabs > 0) ptx::prefetch(args_.pages.slabs);
    if (warp() == 0) count_items();
    TableShare<Traits> table;
    table.load(args_);
    if (lane() == 0) {
      ptx::barrier_init(key_landed(), 1);
      ptx::barrier_init(value_landed(), 1);
      ptx::fence_barrier_init();
    }
    ptx::sync_block();

    // 2. The first page is on its way while the table is filled and the queries are rotated.
    // prepare_queries began when all before it was done: only its own results are waited for.
    set_exact(first_exact_item(), 0);
    open_item(0);
    if (item(0).count > 0) {
      place_pages(0, 0);
      copy_keys(0, 0);
      copy_values(0, 0);
    }
    table.fill(shared_);
    ptx::sync_block();

    // 3. Page splits. The next one is looked up before this one is begun.
    while (item(now()).count >= 0) {
      open_item(now() + 1);
      if (item(now() + 1).count < 0) prefetch_exact();
      ptx::wait_dependencies();
      attend_split();
      turns_ += 2;
    }

    // 4. Exact tokens: groups without a split begin with them.
    while (exact_id() < exact_items()) {
      attend_exact();
      const int tile = work().exact_tile + Traits::kExactTiles;
      if (tile < Traits::kRowTiles) {
        set_exact(exact_id(), tile);
      } else {
        set_exact(exact_id() + num_groups(), 0);
      }
    }
    // Whatever runs behind this kernel runs behind prepare_queries too.
    ptx::wait_dependencies();
  }

 private:
  // Read anew in every function: registers that would live across the loops are dearer.
  TQ_DEVICE int now() const { return static_cast<int>(turns_ >> 1); }
  TQ_DEVICE static int lane() { return ptx::lane_index_here(); }
  TQ_DEVICE static int warp() { return ptx::warp_index(); }
  TQ_DEVICE static int group() { return warp() / Traits::kGroupWarps; }
  TQ_DEVICE static int member() { return warp() % Traits::kGroupWarps; }

  // ---- shared memory
  TQ_DEVICE std::byte* key_stage() const {
    return shared_ + Traits::kStagesOffset + warp() * Traits::kWarpStageBytes;
  }
  TQ_DEVICE std::byte* value_stage_of(int warp) const {
    return shared_ + Traits::kStagesOffset + warp * Traits::kWarpStageBytes +
           Traits::kKeyStageBytes;
  }
  TQ_DEVICE uint64_t* key_landed() const {
    return reinterpret_cast<uint64_t*>(shared_ + Traits::kBarriersOffset) + 2 * warp();
  }
  TQ_DEVICE uint64_t* value_landed() const { return key_landed() + 1; }
  TQ_DEVICE typename Traits::Work& work() const {
    return reinterpret_cast<typename Traits::Work*>(shared_ +
                                                    Traits::kWorkOffset)[ptx::warp_index_here()];
  }
  TQ_DEVICE RowPlan* plans() const {
    return reinterpret_cast<RowPlan*>(shared_ + Traits::kPlansOffset);
  }
  TQ_DEVICE SplitItem& item(int n) const {
    return work().item[static_cast<uint32_t>(n) % kHeldItems];
  }
  TQ_DEVICE int* items() const { return reinterpret_cast<int*>(shared_ + Traits::kItemsOffset); }

  // plans()[b]; items()[b]: page splits of the rows before b; items()[batch]: of all. One warp.
  TQ_DEVICE void count_items() {
    const int lane = this->lane();
    int before = 0;
    for (int start = 0; start < args_.batch; start += kWarpLanes) {
      const int b = start + lane;
      int count = 0;
      if (b < args_.batch) {
        const RowSplits splits = row_splits(args_.plan, load_row_state(args_.row_table, b));
        count = splits.num_splits * args_.num_kv_heads * args_.passes<Traits::kRowTiles>();
        plans()[b] = {splits.first_split * splits.split_pages, splits.first_entry,
                      splits.masked ? ~splits.end_entry : splits.end_entry, splits.split_pages};
      }
      int sum = count;
      TQ_UNROLL
      for (int delta = 1; delta < 32; delta *= 2) {
        const int other = ptx::shuffle_up(sum, delta);
        if (lane >= delta) sum += other;
      }
      if (b < args_.batch) items()[b] = before + sum - count;
      before += ptx::shuffle(sum, 31);
    }
    if (lane == 0) items()[args_.batch] = before;
  }

  // ---- pieces of work: all page splits, then all exact ones, dealt out to the groups in turn. A
  // lone row has few enough of both for a group each.
  TQ_DEVICE static int num_groups() { return ptx::grid_size() * Traits::kGroups; }
  TQ_DEVICE int group_index() const { return ptx::block_index() + ptx::grid_size() * group(); }
  // ceil(n / kGroupWarps)
  TQ_DEVICE static int groups_of_warps(int n) {
    return static_cast<int>((static_cast<uint32_t>(n) + Traits::kGroupWarps - 1) /
                            Traits::kGroupWarps);
  }
  TQ_DEVICE int exact_items() const {
    return args_.batch * args_.num_kv_heads * args_.passes<Traits::kRowTiles>() * args_.exact_slots;
  }
  // Exact pieces are numbered on from the page splits.
  TQ_DEVICE int first_exact_item() const {
    const int before = items()[args_.batch] - group_index();
    if (before <= 0) return -before;
    return (before + num_groups() - 1) / num_groups() * num_groups() - before;
  }

  // Items n ... n + kFoundItems - 1 of the group, a lane each: rows, then splits, then heads, then
  // passes (which read the same pages).
  TQ_DEVICE void find_items(int n) const {
    const int lane = this->lane();
    ptx::sync_warp();
    if (lane < kFoundItems) {
      SplitItem found{-1, 0, 0, 0, 0, 0, 0, 0};
      const int id = group_index() + (n + lane) * num_groups();
      if (id < items()[args_.batch]) {
        int low = 0, high = args_.batch;  // items()[low] <= id < items()[high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (items()[middle] <= id) {
            low = middle;
          } else {
            high = middle;
          }
        }
        const RowPlan plan = plans()[low];
        const auto of_row = static_cast<uint32_t>(id - items()[low]);
        const auto heads = static_cast<uint32_t>(args_.num_kv_heads);
        const auto passes = static_cast<uint32_t>(args_.passes<Traits::kRowTiles>());
        const uint32_t of_passes = of_row / passes;
        found.b = low;
        found.tile = static_cast<int>(of_row % passes) * Traits::kRowTiles;
        found.slot = static_cast<int>(of_passes / heads);
        found.head = static_cast<int>(of_passes % heads);
        found.unit = static_cast<int>(args_.unit(low, found.head, found.tile));
        found.masked = plan.end_entry < 0 ? 1 : 0;
        const int begin = plan.first_begin + found.slot * plan.split_pages;
        const int end_of_row = found.masked ? ~plan.end_entry : plan.end_entry;
        const int end =
            begin + plan.split_pages < end_of_row ? begin + plan.split_pages : end_of_row;
        int first = begin + member();
        if (first < plan.first_entry) {
          first += groups_of_warps(plan.first_entry - first) * Traits::kGroupWarps;
        }
        found.first_entry = first;
        found.count = first < end ? groups_of_warps(end - first) : 0;
      }
      item(n + lane) = found;
    }
    ptx::sync_warp();
  }

  // Item n is found, and its pages' entries are on their way.
  TQ_DEVICE void open_item(int n) const {
    if (n % kFoundItems == 0) find_items(n);
    const int lane = this->lane();
    const SplitItem& opened = item(n);
    if (opened.masked && lane < Traits::kRowTiles * kTileRows) {
      const attention::VisibleTokens visible = visible_of_row(
          args_, load_row_state(args_.row_table, opened.b), opened.tile * kTileRows + lane);
      work().begin[n & 1][lane] = static_cast<int>(visible.begin);
      work().end[n & 1][lane] = static_cast<int>(visible.end);
    }
    ptx::sync_warp();
    fetch_pages(n, 0);
  }

  // Entries of the page table for pages [first, first + kHeldPages) of this warp's part of
  // item `of` start on their way to where place_pages makes addresses of them.
  TQ_DEVICE void fetch_pages(int of, int first) const {
    const int lane = this->lane();
    const int k = first + lane;
    if (lane < kHeldPages && k < item(of).count) {
      const int64_t e = item(of).first_entry + int64_t{Traits::kGroupWarps} * k;
      const int32_t* const entry =
          args_.page_table +
          (int64_t{item(of).b} * args_.page_columns + e) * cache::tables::kPageColumns;
      ptx::copy_async_8(&work().block[of & 1][lane], entry);
    }
  }
  TQ_DEVICE void place_pages(int of, int first) const {
    const int lane = this->lane();
    ptx::wait_async_copies();
    if (lane < kHeldPages && first + lane < item(of).count) {
      const auto [page, tokens] =
          load_as<Words2>(reinterpret_cast<const std::byte*>(&work().block[of & 1][lane])).w;
      const std::byte* slab = args_.pages.only_slab;
      uint32_t of_slab = page;
      if (slab == nullptr) {  // divisions
        slab = args_.pages.slabs[page / args_.pages_per_slab];
        of_slab = page % args_.pages_per_slab;
      }
      work().block[of & 1][lane] =
          slab + of_slab * args_.pages.page_bytes + item(of).head * args_.pages.block_bytes;
      work().tokens[of & 1][lane] = static_cast<int>(tokens);
    }
    ptx::sync_warp();
  }

  // ---- copies of page k of item `of`
  TQ_DEVICE void copy_keys(int of, int k) const {
    if (lane() == 0) {
      ptx::barrier_expect(key_landed(), args_.key_part_bytes);
      ptx::bulk_copy(key_stage(), work().block[of & 1][k % kHeldPages], args_.key_part_bytes,
                     key_landed());
    }
  }
  TQ_DEVICE void copy_values(int of, int k) const {
    if (lane() == 0) {
      ptx::barrier_expect(value_landed(), args_.value_part_bytes);
      ptx::bulk_copy(value_stage_of(warp()),
                     work().block[of & 1][k % kHeldPages] + args_.key_part_bytes,
                     args_.value_part_bytes, value_landed());
    }
  }

  TQ_DEVICE const uint32_t* operands_of(int unit) const {
    return args_.query_operands + int64_t{unit} * 32 * Traits::kKeyPairs;
  }
  // This warp's share of the operands' lines, which the next split's first page would wait for.
  TQ_DEVICE void prefetch_operands(int unit) const {
    constexpr int kLineWords = 32, kLines = Traits::kRowTiles * Traits::kKeyPairs;
    const int line = member() + Traits::kGroupWarps * lane();
    if (line < kLines) ptx::prefetch(operands_of(unit) + line * kLineWords);
  }

  // ---- page splits
  // Item `now`: the key part of its first page is on its way, and so is the value part. On return
  // the same holds for the next item.
  TQ_DEVICE void attend_split() {
    constexpr int kRowTiles = Traits::kRowTiles;
    PassState<Traits> state;
    TQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      state[r].clear();
      state[r].store_columns(work(), r);
    }
    PassQueries<Traits> queries;
    queries.begin_split(operands_of(item(now()).unit));
    if (item(now() + 1).count > 0) prefetch_operands(item(now() + 1).unit);

    // 1. Page by page.
    TQ_NO_UNROLL
    for (int k = 0; k < item(now()).count; ++k) {
      ptx::barrier_wait(key_landed(), turns_ & 1);
      queries.begin_page(operands_of(item(now()).unit));
      PageScores<Traits> s;
      page_scores<Traits>(args_, shared_, key_stage(), queries, s);
      // What is needed next, on its way at once.
      const SplitItem& item = this->item(now());
      const int tokens = work().tokens[now() & 1][k % kHeldPages];
      const bool partial = item.masked || tokens < cache::kBlockTokens;
      const bool last = k + 1 == item.count;
      float factor[kRowTiles][2];
      TQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        load_factors(item.unit + r, factor[r]);
        state[r].load_columns(work(), r);
      }
      ptx::sync_warp();
      if (!last) {
        if ((k + 1) % kHeldPages == 0) {
          fetch_pages(now(), k + 1);
          place_pages(now(), k + 1);
        }
        copy_keys(now(), k + 1);
      } else if (this->item(now() + 1).count > 0) {
        place_pages(now() + 1, 0);
        copy_keys(now() + 1, 0);
      }

      uint32_t seen[kRowTiles];
      float top[kRowTiles][2];
      bool changes = partial;
      TQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        seen[r] = ~0u;
        if (partial || args_.softcap > 0.0f) {
          seen[r] = finish_scores(now(), k, r, tokens, partial, factor[r], s[r]);
        }
        state[r].largest_scores(s[r], factor[r], top[r]);
        changes = changes || state[r].is_passed_by(top[r]);
      }
      ptx::barrier_wait(value_landed(), turns_ & 1);
      turns_ ^= 1;
      const PageValues<Traits> values(args_, value_stage_of(warp()));
      if (ptx::any(changes || values.outgrow(state))) {
        TQ_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          float growth[2];
          state[r].raise_maxima(top[r], growth);
          values.raise_unit(!partial, seen[r], state[r], growth);
          state[r].store_columns(work(), r);
          if (k > 0) {  // before, the outputs are zeros
            TQ_UNROLL
            for (int c = 0; c < 2; ++c) state[r].scale_outputs(c, growth[c]);
          }
        }
      }
      TQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) state[r].weigh(s[r], factor[r]);
      values.attend(shared_, partial, seen, s, state);
      ptx::sync_warp();
      if (k + 1 < this->item(now()).count) copy_values(now(), k + 1);
    }
    if (item(now()).count == 0 && item(now() + 1).count > 0) {
      place_pages(now() + 1, 0);
      copy_keys(now() + 1, 0);
    }

    // 2. One state of the group's.
    TQ_UNROLL
    for (auto& of_tile : state) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        of_tile.scale_outputs(c, ptx::float_of(of_tile.exponent[c]));
      }
    }
    const SplitItem& done = item(now());
    merge(done.tile, done.unit, done.slot, state);
    if (item(now() + 1).count > 0) copy_values(now() + 1, 0);
  }

  // Of scores of this lane's columns.
  TQ_DEVICE void load_factors(int unit, float (&factor)[2]) const {
    uint32_t words[2];
    ptx::load_anew(args_.query_factors + int64_t{unit} * kTileRows + 2 * (lane() & 3), words);
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) factor[c] = ptx::float_of(words[c]);
  }

  // Scores times factor, which becomes 1, the soft cap, and -inf for slots without a token and
  // tokens that a query does not see. Returns which of the scores are seen: bit 4 i + n stands for
  // s[i][n].
  TQ_DEVICE uint32_t finish_scores(int now, int k, int r, int tokens, bool partial,
                                   float (&factor)[2], float (&s)[kTilesPerPage][4]) const {
    TQ_UNROLL
    for (int n = 0; n < 4 * kTilesPerPage; ++n) {
      float& score = s[n / 4][n % 4];
      score *= factor[n % 2];
      if (args_.softcap > 0.0f) score = capped_score(score, args_.softcap, args_.softcap_rate);
    }
    factor[0] = factor[1] = 1.0f;
    uint32_t seen = ~0u;
    if (!partial) return seen;
    const int g = lane() >> 2, t = lane() & 3;
    const SplitItem& item = this->item(now);
    int begin[2] = {0, 0}, end[2] = {tokens, tokens};
    if (item.masked) {
      const int64_t e = item.first_entry + int64_t{Traits::kGroupWarps} * k;
      const int first_token = args_.entry_begins[int64_t{item.b} * args_.page_columns + e];
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        begin[c] = clamp(work().begin[now & 1][r * kTileRows + 2 * t + c] - first_token, tokens);
        end[c] = clamp(work().end[now & 1][r * kTileRows + 2 * t + c] - first_token, tokens);
      }
    }
    TQ_UNROLL
    for (int i = 0; i < kTilesPerPage; ++i) {
      TQ_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int slot = i * kTileTokens + tile_slot(g) + n / 2 * 8;
        if (slot >= begin[n % 2] && slot < end[n % 2]) continue;
        s[i][n] = -INFINITY;
        seen &= ~(1u << (4 * i + n));
      }
    }
    return seen;
  }

  TQ_DEVICE static int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

  // ---- exact tokens
  // The group's piece. Read anew too.
  TQ_DEVICE int exact_id() const { return work().exact_id; }
  TQ_DEVICE void set_exact(int id, int tile) const {
    ptx::sync_warp();
    if (lane() == 0) {
      work().exact_id = id;
      work().exact_tile = tile;
    }
    ptx::sync_warp();
  }
  struct ExactPiece {
    int64_t b;
    int head, tile, piece;
  };
  TQ_DEVICE ExactPiece exact_piece() const {
    const int id = exact_id();
    const int unit = id / args_.exact_slots, passes = args_.passes<Traits::kRowTiles>();
    return {unit / passes / args_.num_kv_heads, unit / passes % args_.num_kv_heads,
            unit % passes * Traits::kRowTiles + work().exact_tile, id % args_.exact_slots};
  }

  // This warp's first tile of the group's first piece, before the group's last split.
  TQ_DEVICE void prefetch_exact() const {
    if (exact_id() >= exact_items()) return;
    const auto [b, head, tile, piece] = exact_piece();
    const cache::RowState row = load_row_state(args_.row_table, b);
    const int first = piece * kExactPieceTokens + member() * kTileTokens;
    const ExactTile tokens(args_, row, b, head, first, lane());
    tokens.prefetch<Traits::kDim>(args_, false,
                                  [](const std::byte* line) { ptx::prefetch_l2(line); });
  }

  // For kExactTiles row tiles.
  TQ_DEVICE void attend_exact() {
    const int lane = this->lane();
    const auto [b, head, tile, piece] = exact_piece();
    const cache::RowState row = load_row_state(args_.row_table, b);
    const int count = static_cast<int>(exact_tokens(args_.plan.sink_tokens, row).count());
    const int begin = piece * kExactPieceTokens;
    if (begin >= count || tile * kTileRows >= args_.rows) return;
    if (lane == 0) {
      work().exact_end = static_cast<int>(min_of(count, begin + kExactPieceTokens));
    }
    ptx::sync_warp();
    WarpState<Traits::kSteps> state[Traits::kExactTiles];
    TQ_UNROLL
    for (auto& of_tile : state) of_tile.clear();
    TQ_NO_UNROLL
    for (int first = begin + member() * kTileTokens; first < work().exact_end;
         first += Traits::kGroupWarps * kTileTokens) {
      if (args_.plain_exact) {
        attend_exact_tile<Traits::kDim, true>(args_, row, b, head, tile, first, lane, state);
      } else {
        attend_exact_tile<Traits::kDim, false>(args_, row, b, head, tile, first, lane, state);
      }
    }
    const ExactPiece done = exact_piece();
    merge(done.tile, args_.unit(done.b, done.head, done.tile), args_.page_slots + done.piece,
          state);
  }

  // ---- the group's states
  template <int kTiles>
  TQ_DEVICE void merge(int tile, int64_t unit, int slot,
                       WarpState<Traits::kSteps> (&state)[kTiles]) {
    merge_group<Traits>(value_stage_of(group() * Traits::kGroupWarps), group(), member(),
                        args_.rows - tile * kTileRows, args_.partial(unit, slot, Traits::kDim),
                        args_.partial_stride(Traits::kDim), state);
  }

  const DecodeArgs& args_;
  std::byte* const shared_;
  // Bit 0: parity of both barriers, each completes once a page. Above it: the item that is worked
  // on, counted from 0.
  uint32_t turns_ = 0;
};

}  // namespace turboquant::cuda::detail
