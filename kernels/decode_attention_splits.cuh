// Decode attention, second kernel (decode_attention.cuh): partial attention over page splits and
// pieces of exact tokens.
//
// attend_splits runs one block on every multiprocessor. A block is one or two groups of (mostly)
// eight warps; a group takes pieces of work in a fixed order, warp w of it the pages w, w + 8, ...
// of a split. Each warp stages its own pages with the bulk copy engine, the key part of the next
// page while the value part of this one is used and the other way round, and keeps its own running
// maximum, sum and output; a group merges its warps' states once per split. Where short splits are
// many, warps take them alone, page by page.
#pragma once

#include "decode_attention_items.cuh"
#include "decode_attention_merge.cuh"
#include "decode_attention_pages.cuh"
#include "decode_attention_plain_exact.cuh"
#include "decode_attention_table.cuh"

namespace turboquant::cuda::detail {

template <class Traits>
class SplitWorker : WorkItems<Traits> {
 public:
  TQ_DEVICE SplitWorker(const DecodeArgs& args, std::byte* shared) : Base(args, shared) {}

  TQ_DEVICE void run() {
    ptx::touch_arguments(args_);
    ptx::expect_shared_base(shared_);

    // 1. How many page splits the rows have; barriers; the table's entries. What every warp reads
    // first of the slabs is on its way to the L1.
    if (warp() == 1 && args_.pages.num_slabs > 0) ptx::prefetch(args_.pages.slabs);
    TableShare<Traits> table;
    table.load(args_);
    if (warp() == 0) count_items();
    if (lane() == 0) {
      ptx::barrier_init(key_landed(), 1);
      ptx::barrier_init(value_landed(), 1);
      ptx::fence_barrier_init();
    }
    ptx::sync_block();

    // 2. The first page is on its way while the table is filled and the queries are rotated.
    // prepare_queries began when all before it was done: only its own results are waited for.
    this->template open_item<false>(0);
    begin_item(0);
    set_exact(first_exact_item(), 0);
    table.fill(shared_);
    ptx::sync_block();

    // 3. Page splits of the group. The next one is looked up before this one is begun.
    while (item(now()).count >= 0) {
      this->template open_item<false>(now() + 1);
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
    ptx::launch_dependents();
    // Whatever runs behind this kernel runs behind prepare_queries too.
    ptx::wait_dependencies();

    // 5. Page splits of this warp alone. Behind the rest: nobody waits for a warp then.
    if constexpr (Traits::kTakesWholeSplits) {
      if (launch_items().whole > 0) {
        // Its addresses are found anew: in registers, the old ones would push others out.
        SplitWorker whole(args_, shared_ + ptx::zero_here());
        whole.turns_ = turns_ & 1;  // items are counted anew
        whole.attend_whole_splits();
      }
    }
  }

 private:
  using Base = WorkItems<Traits>;
  using Base::args_;
  using Base::count_items;
  using Base::exact_items;
  using Base::fetch_pages;
  using Base::first_exact_item;
  using Base::group;
  using Base::item;
  using Base::lane;
  using Base::launch_items;
  using Base::member;
  using Base::num_groups;
  using Base::place_pages;
  using Base::shared_;
  using Base::warp;
  using Base::work;

  // Read anew in every function: registers that would live across the loops are dearer.
  TQ_DEVICE int now() const { return static_cast<int>(turns_ >> 1); }

  // ---- stages
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

  // ---- copies of page k of item `of`
  TQ_DEVICE void begin_item(int of) const {
    if (item(of).count <= 0) return;
    place_pages(of, 0);
    copy_keys(of, 0);
    copy_values(of, 0);
  }
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
    return args_.query_operands + int64_t{unit} * Traits::kUnitWords;
  }
  // This warp's share of the operands' lines, which the next split's first page would wait for; all
  // of them for a split of its own.
  template <bool kWhole>
  TQ_DEVICE void prefetch_operands(int unit) const {
    constexpr int kLineWords = 32, kLines = Traits::kRowTiles * Traits::kKeyPairs;
    static_assert(kLines <= kWarpLanes);
    const int line = kWhole ? lane() : member() + Traits::kGroupWarps * lane();
    if (line < kLines) ptx::prefetch(operands_of(unit) + line * kLineWords);
  }

  // ---- page splits
  // Item `now`: the key part of its first page is on its way, and so is the value part. On return
  // the same holds for the next item.
  TQ_DEVICE void attend_split() {
    PassState<Traits> state;
    TQ_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      state[r].clear();
      state[r].store_columns(work(), r);
    }
    PassQueries<Traits> queries;
    begin_queries<false>(queries);

    // 1. Page by page.
    TQ_NO_UNROLL
    for (int k = 0; k < item(now()).count; ++k) {
      attend_page<false>(k, queries, state);
      if (k + 1 < this->item(now()).count) copy_values(now(), k + 1);
    }
    if (item(now()).count == 0 && item(now() + 1).count > 0) {
      place_pages(now() + 1, 0);
      copy_keys(now() + 1, 0);
    }

    // 2. One state of the group's. combine_splits may start with the group's last one: let start
    // with this kernel, it delays the end of prepare_queries.
    if (item(now() + 1).count < 0 && exact_id() >= exact_items()) ptx::launch_dependents();
    const SplitItem& done = item(now());
    merge(done.tile, done.unit, done.slot, state);
    if (item(now() + 1).count > 0) copy_values(now() + 1, 0);
  }

  TQ_DEVICE void attend_whole_splits() {
    this->template open_item<true>(0);
    begin_item(0);
    while (item(now()).count > 0) {
      this->template open_item<true>(now() + 1);
      attend_whole_split();
      turns_ += 2;
    }
  }

  // As attend_split, for a split that is this warp's alone.
  TQ_DEVICE void attend_whole_split() {
    WholeSplit<typename Traits::Work, Traits::kSteps> split[Traits::kRowTiles];
    TQ_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) split[r].begin(work(), r);
    PassQueries<Traits> queries;
    begin_queries<true>(queries);
    TQ_NO_UNROLL
    for (int k = 0; k < item(now()).count; ++k) {
      PassState<Traits> state;
      TQ_UNROLL
      for (auto& of_tile : state) of_tile.clear();
      attend_page<true>(k, queries, state);
      if (k + 1 < this->item(now()).count) {
        copy_values(now(), k + 1);
      } else if (this->item(now() + 1).count > 0) {
        copy_values(now() + 1, 0);
      }
      TQ_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        split[r].add(work(), r, item(now()).first_entry + k, state[r]);
      }
    }
    const SplitItem& done = item(now());
    // Read here: in a register, it would push others out.
    const int slots = ptx::argument_here(args_.slots);
    TQ_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      float* const partial = args_.partials + DecodeArgs::partial_offset(done.unit + r, done.slot,
                                                                         slots, Traits::kDim);
      store_partial<Traits::kDim>(partial, args_.rows - (done.tile + r) * kTileRows,
                                  split[r].end(work(), r));
    }
  }

  template <bool kWhole>
  TQ_DEVICE void begin_queries(PassQueries<Traits>& queries) const {
    queries.begin_split(operands_of(item(now()).unit));
    if (item(now() + 1).count > 0) prefetch_operands<kWhole>(item(now() + 1).unit);
  }

  // Page k of item `now` joins the state; its value stage is free then, and the keys of the next
  // page are on their way. kLone: the state is clear, and this page's alone.
  template <bool kLone>
  TQ_DEVICE void attend_page(int k, PassQueries<Traits>& queries, PassState<Traits>& state) {
    constexpr int kRowTiles = Traits::kRowTiles;
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
      if (!kLone) state[r].load_columns(work(), r);
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
    if (kLone || ptx::any(changes || values.outgrow(state))) {
      TQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        float growth[2];
        state[r].raise_maxima(top[r], growth);
        values.raise_unit(!partial, seen[r], state[r], growth);
        if (kLone) continue;
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
    apply_factor(args_, factor, s);
    if (!partial) return ~0u;
    const int t = lane() & 3;
    const SplitItem& item = this->item(now);
    int begin[2] = {0, 0}, end[2] = {tokens, tokens};
    if (item.masked) {
      const int64_t e = item.first_entry + item.stride * k;
      const int first_token = args_.entry_begins[int64_t{item.b} * args_.page_columns + e];
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        begin[c] = clamp(work().begin[now & 1][r * kTileRows + 2 * t + c] - first_token, tokens);
        end[c] = clamp(work().end[now & 1][r * kTileRows + 2 * t + c] - first_token, tokens);
      }
    }
    uint32_t seen = ~0u;
    each_unseen_score(begin, end, [&](int n) {
      s[n / 4][n % 4] = -INFINITY;
      seen &= ~(1u << n);
    });
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
    const auto [unit, piece] = args_.by_exact_slots(exact_id());
    const auto [of_passes, pass] = args_.by_passes[Traits::kRowTiles - 1](unit);
    const auto [b, head] = args_.by_heads(of_passes);
    return {b, head, pass * Traits::kRowTiles + work().exact_tile, piece};
  }

  // For kExactTiles row tiles.
  TQ_DEVICE void attend_exact() {
    const auto [b, head, tile, piece] = exact_piece();
    const int count = static_cast<int>(
        exact_tokens(args_.plan.sink_tokens, load_row_state(args_.row_table, b)).count());
    const int begin = piece * kExactPieceTokens;
    if (begin >= count || tile * kTileRows >= args_.rows) return;
    WarpState<Traits::kSteps> state[Traits::kExactTiles];
    TQ_UNROLL
    for (auto& of_tile : state) of_tile.clear();
    attend_exact_piece<Traits>(args_, b, head, tile, begin, count, member(), key_stage(), state);
    TQ_UNROLL
    for (auto& of_tile : state) {  // outputs are in units of 1
      of_tile.exponent[0] = of_tile.exponent[1] = ptx::bits_of(1.0f);
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

  // Bit 0: parity of both barriers, each completes once a page. Above it: the item that is worked
  // on, counted from 0.
  uint32_t turns_ = 0;
};

}  // namespace turboquant::cuda::detail
