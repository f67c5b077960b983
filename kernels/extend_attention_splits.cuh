// Extend attention, second kernel (extend_attention.cuh): partial attention of one tile of query
// rows over one split of its blocks.
#pragma once

#include "extend_attention_rows.cuh"
#include "extend_attention_tiles.cuh"

namespace turboquant::cuda::detail {

template <class Traits>
class ExtendWorker {
  static constexpr int kDim = Traits::kDim;

 public:
  TQ_DEVICE ExtendWorker(const ExtendArgs& args, std::byte* shared)
      : args_(args), shared_(shared), filler_(args, shared) {}

  TQ_DEVICE void run() {
    const DecodeArgs& call = args_.call;
    item_ = extend_item(args_, ptx::block_index());
    row_ = load_row_state(call.row_table, item_.b);
    first_row_ = item_.tile * Traits::kTileRows;
    const int rows = static_cast<int>(min_of(Traits::kTileRows, call.rows - first_row_));
    range_ = extend_range(call.plan, row_, first_row_ / call.group,
                          (first_row_ + rows - 1) / call.group);
    const ExtendSplit split = extend_split(range_.blocks(), args_.splits, item_.split);
    begin_ = split.begin;
    end_ = split.end;

    // 1. What stays: levels, queries, where the first blocks are.
    filler_.fill_table();
    load_queries(rows);
    for (int i = ptx::thread_index(); i < kDim / 2; i += Traits::kThreads) {
      pairs()[i] = static_cast<uint8_t>(stored_pair<kDim>(call.k_bits, i));
    }
    if (ptx::warp_index() == 0) find_blocks(begin_, kPagedBlocks);
    ptx::sync_block();

    // 2. Block by block. With two buffers half of the warps decode the next block first and the
    // other half last, so that the tensor cores and the rest both have something to do.
    const int warp_row = ptx::warp_index() * Traits::kWarpRows;
    const int count = static_cast<int>(min_of(Traits::kWarpRows, rows - warp_row));
    const int64_t query = args_.unit(item_.b, item_.head) * call.rows + first_row_ + warp_row;
    QueryRows<Traits> state(
        ptx::shared_address(shared_ + Traits::kQueriesOffset) + warp_row * Traits::kPitch,
        args_.query_factors + query, count, call.softcap);
    constexpr bool kAhead = Traits::kBuffers == 2;
    if (kAhead && begin_ < end_) fill(begin_);
    TQ_NO_UNROLL
    for (int i = begin_; i < end_; ++i) {
      if (!kAhead) fill(i);
      ptx::sync_block();
      if ((i - begin_) % kMeanBlocks == 0) begin_group(i, state, count);
      if (kAhead) {
        const int fill_turn = ptx::warp_index() % 2;
        TQ_NO_UNROLL
        for (int turn = 0; turn < 2; ++turn) {
          if (turn == fill_turn) {
            if (i + 1 < end_) fill(i + 1);
          } else if (count > 0) {
            attend(i, warp_row, state);
          }
        }
      } else {
        if (count > 0) attend(i, warp_row, state);
        ptx::sync_block();
      }
    }

    // 3. The partial result.
    const int64_t at = query * args_.splits + item_.split;
    state.store(args_.partials + at * kDim, int64_t{args_.splits} * kDim, args_.stats + at * 2,
                int64_t{args_.splits} * 2, count);
  }

 private:
  TQ_DEVICE std::byte* queries() const { return shared_ + Traits::kQueriesOffset; }
  TQ_DEVICE float* means(int warp_row) const {
    return reinterpret_cast<float*>(shared_ + Traits::kMeansOffset) + warp_row * kMeanBlocks;
  }
  TQ_DEVICE uint8_t* pairs() const {
    return reinterpret_cast<uint8_t*>(shared_ + Traits::kPairsOffset);
  }
  TQ_DEVICE PagedBlock& paged_block(int i) const {
    return reinterpret_cast<PagedBlock*>(
        shared_ + Traits::kBlocksOffset)[static_cast<unsigned>(i - begin_) % kPagedBlocks];
  }
  TQ_DEVICE int buffer_of(int i) const { return (i - begin_) % Traits::kBuffers; }
  TQ_DEVICE bool is_paged(int i) const { return i < range_.entries; }

  // Operand rows of the tile; rows that do not exist are zeros.
  TQ_DEVICE void load_queries(int rows) const {
    constexpr int kPieces = kDim * 2 / 16;
    const auto* const from = reinterpret_cast<const std::byte*>(
        args_.queries + (args_.unit(item_.b, item_.head) * args_.call.rows + first_row_) * kDim);
    for (int i = ptx::thread_index(); i < Traits::kTileRows * kPieces; i += Traits::kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      *reinterpret_cast<Words4*>(queries() + row * Traits::kPitch + 16 * piece) =
          row < rows ? load_as<Words4>(from + 16 * int64_t{i}) : Words4{};
    }
  }

  // Paged blocks [first, first + count) of the split, by one warp.
  TQ_DEVICE void find_blocks(int first, int count) const {
    const DecodeArgs& call = args_.call;
    const int i = first + ptx::lane_index();
    if (ptx::lane_index() >= count || i >= end_ || !is_paged(i)) return;
    const int64_t e = item_.b * call.page_columns + range_.first_entry + i;
    const int32_t* const entry = call.page_table + e * cache::tables::kPageColumns;
    paged_block(i) = {call.pages.block(entry[0], item_.head), call.entry_begins[e], entry[1]};
  }

  // Every eight blocks: q'.m of these eight, and where the eight after the next are.
  TQ_DEVICE void begin_group(int i, const QueryRows<Traits>& state, int count) const {
    if (i > begin_ && ptx::warp_index() == 0) find_blocks(i + kMeanBlocks, kMeanBlocks);
    if (!args_.call.has_mean || count <= 0 || !is_paged(i)) return;
    const auto mean = [&](int g, int pair) -> uint32_t {
      if (i + g >= end_ || !is_paged(i + g)) return 0;
      return load_as<uint32_t>(paged_block(i + g).data + 4 * pairs()[pair]);
    };
    ptx::sync_warp();
    state.multiply_means(mean, means(ptx::warp_index() * Traits::kWarpRows));
    ptx::sync_warp();
  }

  TQ_DEVICE void fill(int i) const {
    if (is_paged(i)) {
      if (i + 1 < end_ && is_paged(i + 1)) filler_.prefetch_page(paged_block(i + 1));
      filler_.fill_page(buffer_of(i), paged_block(i));
    } else {
      filler_.fill_exact(buffer_of(i), args_.unit(item_.b, item_.head), exact_index(i));
    }
  }
  TQ_DEVICE int exact_index(int i) const { return range_.first_exact + i - range_.entries; }

  TQ_DEVICE TileTokens tokens_of(int i) const {
    TileTokens tokens{};
    if (is_paged(i)) {
      const PagedBlock& block = paged_block(i);
      tokens = {block.tokens, cache::kBlockTokens, block.first, 0, false};
    } else {
      const ExactTokens exact = exact_tokens(args_.call.plan.sink_tokens, row_);
      const int first = exact_index(i) * cache::kBlockTokens;
      const int sinks = static_cast<int>(exact.sinks);
      tokens = {static_cast<int>(min_of(cache::kBlockTokens, exact.count() - first)), sinks - first,
                first, first - sinks + static_cast<int>(row_.exact_begin), false};
    }
    tokens.whole = tokens.count == cache::kBlockTokens &&
                   tokens.position(0) >= range_.every_begin &&
                   tokens.position(cache::kBlockTokens - 1) < range_.every_end;
    return tokens;
  }

  TQ_DEVICE void attend(int i, int warp_row, QueryRows<Traits>& state) const {
    const int buffer = buffer_of(i);
    const Tile tile{ptx::shared_address(filler_.key_tile(buffer)),
                    ptx::shared_address(filler_.value_tile(buffer)),
                    filler_.scales(buffer),
                    filler_.largest_value_scale(buffer),
                    args_.call.has_mean && is_paged(i)
                        ? means(warp_row) + (i - begin_) % kMeanBlocks
                        : nullptr,
                    tokens_of(i)};
    state.attend(tile, [&](int row) {
      return visible_of_row(args_.call, row_, first_row_ + warp_row + row);
    });
  }

  const ExtendArgs& args_;
  std::byte* shared_;
  TileFiller<Traits> filler_;
  ExtendItem item_;
  cache::RowState row_;
  int first_row_;
  ExtendRange range_;
  int begin_, end_;
};

}  // namespace turboquant::cuda::detail
