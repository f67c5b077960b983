// Decode attention over packed codes: three kernels that the stream runs one after the other, each
// starting while the one before ends (programmatic dependent launch).
//
//   prepare_queries  q' = R (q * s) of every query row as fp16 operands; positions of page table
//                    entries for rows whose pages are not seen whole
//   attend_splits    partial attention: page splits and pieces of exact tokens
//   combine_splits   merges a row's partial results in ascending order, rotates the pages' part
//                    back, merges the exact part and the sink logit, writes out and lse
//
// Inputs, shapes and what a query sees: include/turboquant/cuda/decode_attention.hpp. Scores are
// q.k = q'.m + scale (q'.c), docs/cache_format.md ("What the numbers mean"), in units of log2;
// values are scale (V c), rotated back once per query.
//
// attend_splits runs one block on every multiprocessor. A block is one or two groups of (mostly)
// eight warps; a group takes pieces of work in a fixed order, warp w of it the pages w, w + 8, ...
// of a split. Each warp stages its own pages with the bulk copy engine, the key part of the next
// page while the value part of this one is used and the other way round, and keeps its own running
// maximum, sum and output; a group merges its warps' states once per split.
#pragma once

#include "decode_attention_exact.cuh"
#include "decode_attention_pages.cuh"
#include "decode_attention_rotation.cuh"

namespace turboquant::cuda::detail {

// ---------------------------------------------------------------- prepare_queries

inline constexpr int kPrepareThreads = 32 * kTileRows;

// Largest magnitude's exponent as a power of two 2^-e that brings the row into [1, 2); 1 for rows
// of zeros and rows with NaN or infinity, which stay what they are.
TQ_DEVICE float normalising_factor(float magnitude) {
  const uint32_t exponent = ptx::bits_of(magnitude) & 0x7F800000u;
  if (exponent == 0 || exponent == 0x7F800000u) return 1.0f;
  return ptx::float_of((254u << 23) - (exponent < (253u << 23) ? exponent : 253u << 23));
}

// 1 / x for a power of two in [2^-126, 2^126].
TQ_DEVICE float inverse_power(float x) { return ptx::float_of((254u << 23) - ptx::bits_of(x)); }

// Over a warp.
template <int kCount>
TQ_DEVICE float row_magnitude(const float (&y)[kCount]) {
  float largest = 0.0f;
  TQ_UNROLL
  for (int k = 0; k < kCount; ++k) {
    const float magnitude = fabsf(y[k]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  TQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = ptx::shuffle_xor(largest, mask);
    largest = other > largest || other != other ? other : largest;
  }
  return largest;
}

TQ_DEVICE float load_element(const std::byte* row, int64_t index, cache::ElementType type) {
  switch (type) {
    case cache::ElementType::kFloat16:
      return ptx::f32_from_f16(load_as<uint16_t>(row + 2 * index));
    case cache::ElementType::kBFloat16:
      return ptx::float_of(uint32_t{load_as<uint16_t>(row + 2 * index)} << 16);
    default:
      return load_as<float>(row + 4 * index);
  }
}

// The pair of coordinates that operand register u of lane t holds.
template <int kDim>
TQ_DEVICE int key_pair(int k_bits, int u, int t) {
  switch (k_bits) {
    case 2:
      return key_pair_of<kDim, 2>(u, t);
    case 3:
      return key_pair_of<kDim, 3>(u, t);
    case 4:
      return key_pair_of<kDim, 4>(u, t);
    case 8:
      return key_pair_of<kDim, 8>(u, t);
    default:
      return key_pair_of<kDim, 6>(u, t);  // 5 too
  }
}

// Positions of the first tokens of a row's entries: an exclusive prefix sum by the whole block.
// shared: kPrepareThreads integers.
TQ_DEVICE void write_entry_begins(const DecodeArgs& args, int64_t b, const cache::RowState& row,
                                  int* shared) {
  const int thread = ptx::thread_index();
  const int32_t* const entries =
      args.page_table + b * args.page_columns * cache::tables::kPageColumns;
  int32_t* const begins = args.entry_begins + b * args.page_columns;
  int position = static_cast<int>(min_of(row.length, args.plan.sink_tokens));
  for (int64_t start = 0; start < row.num_entries; start += kPrepareThreads) {
    const int64_t e = start + thread;
    const int tokens = e < row.num_entries ? entries[cache::tables::kPageColumns * e + 1] : 0;
    int sum = tokens;
    TQ_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = ptx::shuffle_up(sum, delta);
      if (thread % 32 >= delta) sum += other;
    }
    if (thread % 32 == 31) shared[thread / 32] = sum;
    ptx::sync_block();
    int before = 0, total = 0;
    for (int w = 0; w < kPrepareThreads / 32; ++w) {
      if (w < thread / 32) before += shared[w];
      total += shared[w];
    }
    if (e < row.num_entries) begins[e] = position + before + sum - tokens;
    position += total;
    ptx::sync_block();
  }
}

// Grid: one block for each (row, KV head, tile of 8 query rows); a warp for each query row.
template <int kDim>
TQ_DEVICE void prepare_queries(const DecodeArgs& args, std::byte* shared) {
  // In this order: attend_splits reads what the kernels before this one wrote as soon as it runs.
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const int warp = ptx::warp_index(), lane = ptx::lane_index();
  const int tile = ptx::block_index() % args.tiles;
  const int head = ptx::block_index() / args.tiles % args.num_kv_heads;
  const int64_t b = ptx::block_index() / args.tiles / args.num_kv_heads;
  const int64_t unit = args.unit(b, head, tile);

  // 1. q * s, brought into [1, 2) by powers of two before and after the rotation: nothing on the
  // way overflows for any finite query, and fp16 keeps 2^-11 of the row's largest coordinate (what
  // is below 2^-14 of it loses bits, but not more than 2^-25 of the largest). Every load is issued
  // before the first result is used.
  constexpr int kShare = kRowShare<kDim>;
  float* const x = reinterpret_cast<float*>(shared) + warp * kDim;
  const int r = tile * kTileRows + warp;
  const std::byte* const query = query_row(args, b, head, r);
  const cache::RowState row = load_row_state(args.row_table, b);
  float factor = 0.0f;
  float y[kShare];
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) y[k] = 0.0f;
  if (query != nullptr) {
    const RotationFactors<kDim> rotation(args.key_signs + int64_t{head} * 3 * kDim,
                                         args.key_turns + int64_t{head} * kDim, lane);
    float smoothing[kShare];
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const int i = k * kWarpLanes + lane;
      const bool exists = kDim % kWarpLanes == 0 || i < kDim;
      smoothing[k] = exists && args.smooth_keys
                         ? args.smoothing[(b * args.num_kv_heads + head) * kDim + i]
                         : 1.0f;
      if (exists) y[k] = load_element(query, i * args.query.elem_stride, args.type);
    }
    const float before = normalising_factor(row_magnitude(y));
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) y[k] = y[k] * before * smoothing[k];
    rotate_row<kDim, false>(y, x, rotation, lane);
    const float after = normalising_factor(row_magnitude(y));
    TQ_UNROLL
    for (int k = 0; k < kShare; ++k) y[k] *= after;
    factor = args.scaling * (args.softcap > 0.0f ? 1.0f : kLog2E) * inverse_power(before) *
             inverse_power(after);
  }
  ptx::sync_warp();
  TQ_UNROLL
  for (int k = 0; k < kShare; ++k) {
    const int i = k * kWarpLanes + lane;
    if (kDim % kWarpLanes == 0 || i < kDim) x[i] = y[k];
  }
  ptx::sync_warp();
  if (lane == 0) args.query_factors[unit * kTileRows + warp] = factor;

  // 2. Operand B: row `warp` is column g = warp, held by lanes 4 g + t.
  uint32_t* const operands = args.query_operands + unit * 32 * (kDim / 8);
  for (int i = lane; i < kDim / 2; i += kWarpLanes) {
    const int t = i % 4, u = i / 4;
    const int pair = key_pair<kDim>(args.k_bits, u, t);
    operands[query_operand(u, 4 * warp + t)] = ptx::pack_f16(x[2 * pair], x[2 * pair + 1]);
  }

  // 3. Where entries start, if masks need it.
  if (head == 0 && tile == 0 && row_splits(args.plan, row).masked) {
    ptx::sync_block();  // x is shared memory too
    write_entry_begins(args, b, row, reinterpret_cast<int*>(shared));
  }
}

// ---------------------------------------------------------------- attend_splits

template <class Traits>
class SplitWorker {
 public:
  TQ_DEVICE SplitWorker(const DecodeArgs& args, std::byte* shared) : args_(args), shared_(shared) {}

  TQ_DEVICE void run() {
    ptx::launch_dependents();
    TableShare table_share;
    load_table(table_share);

    // 1. Barriers; how many page splits the rows have.
    if (lane() == 0) {
      ptx::barrier_init(key_landed(), 1);
      ptx::barrier_init(value_landed(), 1);
      ptx::fence_barrier_init();
    }
    if (warp() == 0) count_items();
    ptx::sync_block();

    // 2. The first page is on its way while the table is filled and the queries are rotated. A
    // group that has exact tokens to attend first needs the value stages for its states.
    // prepare_queries began when all before it was done: only its own results are waited for.
    const bool begins_with_exact = group_index() < exact_items();
    find_item(0, first_page_item());
    if (work().item[0].count > 0) {
      copy_keys(0, 0);
      if (!begins_with_exact) copy_values(0, 0);
    }
    fill_table(table_share);

    // 3. Exact tokens.
    if (begins_with_exact) {
      set_exact_id(group_index());
      while (exact_id() < exact_items()) {
        attend_exact();
        set_exact_id(exact_id() + num_groups());
      }
      if (work().item[0].count > 0) copy_values(0, 0);
    }
    ptx::sync_block();
    ptx::wait_dependencies();

    // 4. Page splits. The next one is looked up before this one is begun.
    while (work().item[now()].id >= 0) {
      find_item(1 - now(), work().item[now()].id + num_groups());
      attend_split();
      turns_ ^= 2;
    }
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
  TQ_DEVICE WarpWork& work() const {
    return reinterpret_cast<WarpWork*>(shared_ + Traits::kWorkOffset)[ptx::warp_index_here()];
  }
  TQ_DEVICE int* items() const { return reinterpret_cast<int*>(shared_ + Traits::kItemsOffset); }
  TQ_DEVICE LaneTable table(int side) const { return {shared_ + side * Traits::kValueTableOffset}; }

  // items()[b]: page splits of the rows before b; items()[batch]: of all. One warp.
  TQ_DEVICE void count_items() {
    const int lane = this->lane();
    int before = 0;
    for (int start = 0; start < args_.batch; start += kWarpLanes) {
      const int b = start + lane;
      int count = 0;
      if (b < args_.batch) {
        count = row_splits(args_.plan, load_row_state(args_.row_table, b)).num_splits *
                args_.num_kv_heads * args_.tiles;
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

  // Level pairs of every byte, for every lane: 16 bytes (four lanes) at a time. A thread's entries
  // are loaded all at once, before anything else of the kernel.
  static constexpr int kTablePieces = Traits::kTableBytes / 16;
  struct TableShare {
    uint32_t levels[kTablePieces / Traits::kThreads];
  };
  static_assert(kTablePieces % Traits::kThreads == 0);
  TQ_DEVICE void load_table(TableShare& share) const {
    constexpr int kPiecesPerSide = Traits::kValueTableOffset / 16;
    TQ_UNROLL
    for (int i = 0; i < kTablePieces / Traits::kThreads; ++i) {
      const int n = i * Traits::kThreads + ptx::thread_index();
      const int entry = n / (2 * kPiecesPerSide), side = n / kPiecesPerSide % 2;
      share.levels[i] = side == 0 ? table_entry<Traits::kKeyBits>(args_.key_levels, entry)
                                  : table_entry<Traits::kValueBits>(args_.value_levels, entry);
    }
  }
  TQ_DEVICE void fill_table(const TableShare& share) const {
    TQ_UNROLL
    for (int i = 0; i < kTablePieces / Traits::kThreads; ++i) {
      const int n = i * Traits::kThreads + ptx::thread_index();
      const uint32_t levels = share.levels[i];
      *reinterpret_cast<Words4*>(shared_ + 16 * n) = Words4{{levels, levels, levels, levels}};
    }
  }
  template <int kBits>
  TQ_DEVICE static uint32_t table_entry(const float* levels, int entry) {
    if constexpr (index_kind(kBits) == IndexKind::kByte) {
      return ptx::pack_f16(levels[2 * entry], levels[2 * entry + 1]);
    } else if constexpr (index_kind(kBits) == IndexKind::kNibble) {
      // Entries below 16 have no codes in their upper half.
      return ptx::pack_f16(levels[4 * (entry % 16)], levels[4 * (entry % 16) + 1]);
    } else {
      return entry < 1 << kBits ? ptx::pack_f16(levels[entry], levels[entry]) : 0;
    }
  }

  // ---- pieces of work: all exact ones, then all page splits, dealt out to the groups in turn
  TQ_DEVICE static int num_groups() { return ptx::grid_size() * Traits::kGroups; }
  TQ_DEVICE int group_index() const { return ptx::block_index() + ptx::grid_size() * group(); }
  // ceil(n / kGroupWarps)
  TQ_DEVICE static int groups_of_warps(int n) {
    return static_cast<int>((static_cast<uint32_t>(n) + Traits::kGroupWarps - 1) /
                            Traits::kGroupWarps);
  }
  TQ_DEVICE int exact_items() const {
    return args_.batch * args_.num_kv_heads * args_.tiles * args_.exact_slots;
  }
  TQ_DEVICE int first_page_item() const {
    const int before = exact_items() - group_index();
    if (before <= 0) return -before;
    return (before + num_groups() - 1) / num_groups() * num_groups() - before;
  }

  // Page split `id` becomes work().item[to]: rows, then heads, then splits, then tiles (which read
  // the same pages).
  TQ_DEVICE void find_item(int to, int id) const {
    const int lane = this->lane();
    SplitItem item{-1, 0, 0, 0, 0, 0, 0, false};
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
      const RowSplits splits = row_splits(args_.plan, load_row_state(args_.row_table, low));
      const int of_row = id - items()[low];
      item.id = id;
      item.b = low;
      item.tile = of_row % args_.tiles;
      item.slot = of_row / args_.tiles % splits.num_splits;
      item.head = of_row / args_.tiles / splits.num_splits;
      item.masked = splits.masked;
      const int begin = (splits.first_split + item.slot) * splits.split_pages;
      const int end = begin + splits.split_pages < splits.end_entry ? begin + splits.split_pages
                                                                    : splits.end_entry;
      int first = begin + member();
      if (first < splits.first_entry) {
        first += groups_of_warps(splits.first_entry - first) * Traits::kGroupWarps;
      }
      item.first_entry = first;
      item.count = first < end ? groups_of_warps(end - first) : 0;
    }
    ptx::sync_warp();
    if (lane == 0) work().item[to] = item;
    if (item.masked && lane < kTileRows) {
      const attention::VisibleTokens visible = visible_of_row(
          args_, load_row_state(args_.row_table, item.b), item.tile * kTileRows + lane);
      work().begin[to][lane] = static_cast<int>(visible.begin);
      work().end[to][lane] = static_cast<int>(visible.end);
    }
    ptx::sync_warp();
    hold_pages(to, 0);
  }

  // Pages [first, first + kHeldPages) of this warp's part of work().item[of].
  TQ_DEVICE void hold_pages(int of, int first) const {
    const int lane = this->lane();
    const SplitItem& item = work().item[of];
    const int k = first + lane;
    if (lane < kHeldPages && k < item.count) {
      const int64_t e = item.first_entry + int64_t{Traits::kGroupWarps} * k;
      const int32_t* const entry = args_.page_table + (int64_t{item.b} * args_.page_columns + e) *
                                                          cache::tables::kPageColumns;
      const auto [page, tokens] = load_as<Words2>(reinterpret_cast<const std::byte*>(entry)).w;
      // Pages are int32: so is a slab's number, and a slab of more pages is the only one.
      const auto per_slab = static_cast<uint32_t>(min_of(args_.pages.pages_per_slab, INT32_MAX));
      work().block[of][lane] = args_.pages.slabs[page / per_slab] +
                               page % per_slab * args_.pages.page_bytes +
                               item.head * args_.pages.block_bytes;
      work().tokens[of][lane] = static_cast<int>(tokens);
    }
    ptx::sync_warp();
  }

  // ---- copies of page k of work().item[of]
  TQ_DEVICE void copy_keys(int of, int k) const {
    if (lane() == 0) {
      ptx::barrier_expect(key_landed(), args_.key_part_bytes);
      ptx::bulk_copy(key_stage(), work().block[of][k % kHeldPages], args_.key_part_bytes,
                     key_landed());
    }
  }
  TQ_DEVICE void copy_values(int of, int k) const {
    if (lane() == 0) {
      ptx::barrier_expect(value_landed(), args_.value_part_bytes);
      ptx::bulk_copy(value_stage_of(warp()),
                     work().block[of][k % kHeldPages] + args_.key_part_bytes,
                     args_.value_part_bytes, value_landed());
    }
  }

  // ---- page splits
  // Item `now`: the key part of its first page is on its way, and so is the value part. On return
  // the same holds for the other item.
  TQ_DEVICE void attend_split() {
    const int now = this->now();
    const SplitItem& item = work().item[now];
    const SplitItem& next = work().item[1 - now];
    WarpState<Traits::kSteps> state;
    state.clear();

    // 1. Page by page.
    TQ_NO_UNROLL
    for (int k = 0; k < item.count; ++k) {
      const int tokens = work().tokens[now][k % kHeldPages];
      const bool last = k + 1 == item.count;
      const bool partial = item.masked || tokens < cache::kBlockTokens;
      float s[kTilesPerPage][4];
      ptx::barrier_wait(key_landed(), turns_ & 1);
      page_scores<Traits>(args_, key_stage(), table(0), args_.unit(item.b, item.head, item.tile),
                          s);
      ptx::sync_warp();
      if (!last && (k + 1) % kHeldPages == 0) hold_pages(now, k + 1);
      if (!last) {
        copy_keys(now, k + 1);
      } else if (next.count > 0) {
        copy_keys(1 - now, 0);
      }
      const uint32_t seen = finish_scores(now, k, tokens, partial, s);
      state.weigh(s);
      ptx::barrier_wait(value_landed(), turns_ & 1);
      turns_ ^= 1;
      page_outputs<Traits>(args_, value_stage_of(warp()), table(1), partial, seen, s, state);
      ptx::sync_warp();
      if (!last) copy_values(now, k + 1);
    }
    if (item.count == 0 && next.count > 0) copy_keys(1 - now, 0);

    // 2. One state of the group's.
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      state.scale_outputs(c, ptx::float_of(state.exponent[c]));
    }
    merge_group(item.tile,
                args_.partial(args_.unit(item.b, item.head, item.tile), item.slot, Traits::kDim),
                state);
    if (next.count > 0) copy_values(1 - now, 0);
  }

  // Soft cap, and -inf for slots without a token and tokens that a query does not see. Returns
  // which of the scores are seen: bit 4 i + n stands for s[i][n].
  TQ_DEVICE uint32_t finish_scores(int now, int k, int tokens, bool partial,
                                   float (&s)[kTilesPerPage][4]) const {
    if (args_.softcap > 0.0f) {
      TQ_UNROLL
      for (int i = 0; i < kTilesPerPage; ++i) {
        TQ_UNROLL
        for (int n = 0; n < 4; ++n) s[i][n] = capped_score(s[i][n], args_.softcap);
      }
    }
    uint32_t seen = 0xFFFFu;
    if (!partial) return seen;
    const int g = lane() >> 2, t = lane() & 3;
    const SplitItem& item = work().item[now];
    int begin[2] = {0, 0}, end[2] = {tokens, tokens};
    if (item.masked) {
      const int64_t e = item.first_entry + int64_t{Traits::kGroupWarps} * k;
      const int first_token = args_.entry_begins[int64_t{item.b} * args_.page_columns + e];
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        begin[c] = clamp(work().begin[now][2 * t + c] - first_token, tokens);
        end[c] = clamp(work().end[now][2 * t + c] - first_token, tokens);
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
  // The group's piece, before page splits need the second item. Read anew too.
  TQ_DEVICE int exact_id() const { return work().item[1].id; }
  TQ_DEVICE void set_exact_id(int id) const {
    ptx::sync_warp();
    if (lane() == 0) work().item[1].id = id;
    ptx::sync_warp();
  }
  struct ExactPiece {
    int64_t b;
    int head, tile, piece;
  };
  TQ_DEVICE ExactPiece exact_piece() const {
    const int id = exact_id();
    const int unit = id / args_.exact_slots;
    return {unit / args_.tiles / args_.num_kv_heads, unit / args_.tiles % args_.num_kv_heads,
            unit % args_.tiles, id % args_.exact_slots};
  }

  TQ_DEVICE void attend_exact() {
    const int lane = this->lane();
    const auto [b, head, tile, piece] = exact_piece();
    const cache::RowState row = load_row_state(args_.row_table, b);
    const int count = static_cast<int>(exact_tokens(args_.plan.sink_tokens, row).count());
    const int begin = piece * kExactPieceTokens;
    if (begin >= count) return;
    const int end = static_cast<int>(min_of(count, begin + kExactPieceTokens));
    WarpState<Traits::kSteps> state;
    state.clear();
    TQ_NO_UNROLL
    for (int first = begin + member() * kTileTokens; first < end;
         first += Traits::kGroupWarps * kTileTokens) {
      if (args_.plain_exact) {
        attend_exact_tile<Traits::kDim, true>(args_, row, b, head, tile, first, lane, state);
      } else {
        attend_exact_tile<Traits::kDim, false>(args_, row, b, head, tile, first, lane, state);
      }
    }
    const ExactPiece done = exact_piece();
    merge_group(done.tile,
                args_.partial(args_.unit(done.b, done.head, done.tile),
                              args_.page_slots + done.piece, Traits::kDim),
                state);
  }

  // ---- the group's state
  // Merges the warps' states in the order of the warps into `partial`, through the value stages.
  TQ_DEVICE void merge_group(int tile, float* partial, WarpState<Traits::kSteps>& state) {
    const int lane = this->lane();
    constexpr int kStatsOffset = kTileRows * Traits::kDim * 4;  // max [8], sum [8]
    const int g = lane >> 2, t = lane & 3;

    // 1. Publish.
    std::byte* const own = value_stage_of(warp());
    TQ_UNROLL
    for (int i = 0; i < Traits::kSteps; ++i) store_four(own, i, state.out[i]);
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      TQ_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        state.sum[c] += ptx::shuffle_xor(state.sum[c], mask);
      }
    }
    if (g == 0) {
      float* const stats = reinterpret_cast<float*>(own + kStatsOffset);
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        stats[2 * t + c] = state.max[c];
        stats[kTileRows + 2 * t + c] = state.sum[c];
      }
    }
    ptx::sync_group(1 + group(), Traits::kGroupWarps * kWarpLanes);

    // 2. Merge: every warp its m-tiles.
    float max[2] = {kNoScore, kNoScore}, weight[Traits::kGroupWarps][2], sum[2] = {0.0f, 0.0f};
    const auto stats_of = [&](int w) {
      return reinterpret_cast<const float*>(value_stage_of(group() * Traits::kGroupWarps + w) +
                                            kStatsOffset);
    };
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      TQ_UNROLL
      for (int w = 0; w < Traits::kGroupWarps; ++w) max[c] = fmaxf(max[c], stats_of(w)[2 * t + c]);
      TQ_UNROLL
      for (int w = 0; w < Traits::kGroupWarps; ++w) {
        weight[w][c] = ptx::exp2_fast(stats_of(w)[2 * t + c] - max[c]);
        sum[c] = fmaf(weight[w][c], stats_of(w)[kTileRows + 2 * t + c], sum[c]);
      }
    }
    const bool in_use = tile * kTileRows + 2 * t < args_.rows;
    TQ_UNROLL
    for (int i = 0; i < Traits::kSteps; i += Traits::kGroupWarps) {
      const int step = i + member();
      if (Traits::kSteps % Traits::kGroupWarps != 0 && step >= Traits::kSteps) break;
      float out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      TQ_UNROLL
      for (int w = 0; w < Traits::kGroupWarps; ++w) {
        const Words4 words = load_as<Words4>(value_stage_of(group() * Traits::kGroupWarps + w) +
                                             (step * kWarpLanes + lane) * 16);
        TQ_UNROLL
        for (int k = 0; k < 4; ++k) {
          out[k] = fmaf(weight[w][k % 2], ptx::float_of(words.w[k]), out[k]);
        }
      }
      if (in_use) store_four(reinterpret_cast<std::byte*>(partial), step, out);
    }
    if (member() == 0 && g == 0) {
      TQ_UNROLL
      for (int c = 0; c < 2; ++c) {
        partial[kTileRows * Traits::kDim + 2 * t + c] = max[c] - kWeightBias;
        partial[kTileRows * Traits::kDim + kTileRows + 2 * t + c] = sum[c];
      }
    }

    // 3. The stages may be overwritten.
    ptx::sync_group(1 + group(), Traits::kGroupWarps * kWarpLanes);
    ptx::fence_copy_engine();
    ptx::sync_warp();
  }
  TQ_DEVICE void store_four(std::byte* to, int step, const float (&x)[4]) const {
    Words4 words;
    TQ_UNROLL
    for (int k = 0; k < 4; ++k) words.w[k] = ptx::bits_of(x[k]);
    *reinterpret_cast<Words4*>(to + (step * kWarpLanes + lane()) * 16) = words;
  }

  const DecodeArgs& args_;
  std::byte* const shared_;
  // One register for two turns. Bit 0: parity of both barriers, each completes once a page. Bit 1:
  // the item that is worked on.
  uint32_t turns_ = 0;
};

// ---------------------------------------------------------------- combine_splits

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
