// What attend_splits works on: how page splits and pieces of exact tokens are dealt out, and where
// a split's pages lie.
#pragma once

#include "decode_attention_exact.cuh"
#include "decode_attention_traits.cuh"

namespace turboquant::cuda::detail {

// A warp's view of them, in its block's shared memory.
template <class Traits>
class WorkItems {
 protected:
  TQ_DEVICE WorkItems(const DecodeArgs& args, std::byte* shared) : args_(args), shared_(shared) {}

  // Read anew in every function: registers that would live across the loops are dearer.
  TQ_DEVICE static int lane() { return ptx::lane_index_here(); }
  TQ_DEVICE static int warp() { return ptx::warp_index(); }
  TQ_DEVICE static int group() { return warp() / Traits::kGroupWarps; }
  TQ_DEVICE static int member() { return warp() % Traits::kGroupWarps; }

  // ---- shared memory
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
  TQ_DEVICE typename Traits::Items& launch_items() const {
    return *reinterpret_cast<typename Traits::Items*>(shared_ + Traits::kItemsOffset);
  }

  // Plans and items. One warp.
  TQ_DEVICE void count_items() {
    const int lane = this->lane();
    constexpr int kKinds = Traits::Items::kKinds;
    typename Traits::Items& items = launch_items();
    int before[kKinds] = {};
    for (int start = 0; start < args_.batch; start += kWarpLanes) {
      const int b = start + lane;
      int count[kKinds] = {};
      if (b < args_.batch) {
        const RowSplits splits = row_splits(args_.plan, load_row_state(args_.row_table, b));
        const int kind = Traits::kTakesWholeSplits && splits.split_pages != kShortSplitPages;
        TQ_UNROLL
        for (int k = 0; k < kKinds; ++k) {
          if (k == kind) {
            count[k] = splits.num_splits * args_.num_kv_heads * args_.passes<Traits::kRowTiles>();
          }
        }
        plans()[b] = {splits.first_split * splits.split_pages, splits.first_entry,
                      splits.masked ? ~splits.end_entry : splits.end_entry, splits.split_pages};
      }
      if (args_.batch == 1) {
        TQ_UNROLL
        for (int k = 0; k < kKinds; ++k) {
          items.before[k][0] = 0;
          before[k] = count[k];  // lane 0's
        }
        break;
      }
      int sum[kKinds];
      TQ_UNROLL
      for (int k = 0; k < kKinds; ++k) sum[k] = count[k];
      TQ_UNROLL
      for (int delta = 1; delta < 32; delta *= 2) {
        TQ_UNROLL
        for (int k = 0; k < kKinds; ++k) {
          const int other = ptx::shuffle_up(sum[k], delta);
          if (lane >= delta) sum[k] += other;
        }
      }
      TQ_UNROLL
      for (int k = 0; k < kKinds; ++k) {
        if (b < args_.batch) items.before[k][b] = before[k] + sum[k] - count[k];
        before[k] += ptx::shuffle(sum[k], 31);
      }
    }
    if (lane != 0) return;
    items.all = 0;
    TQ_UNROLL
    for (int k = 0; k < kKinds; ++k) {
      items.before[k][args_.batch] = before[k];
      items.all += before[k];
    }
    items.whole = Traits::kTakesWholeSplits ? whole_splits(before[0], num_warps()) : 0;
  }

  // ---- pieces of work: page splits, then all exact ones, dealt out to the groups in turn, but for
  // the splits that warps take, dealt out to the warps. A lone row has few enough of both for a
  // group each.
  TQ_DEVICE static int num_warps() { return ptx::grid_size() * Traits::kWarps; }
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
    const int before = launch_items().all - launch_items().whole - group_index();
    if (before <= 0) return -before;
    return (before + num_groups() - 1) / num_groups() * num_groups() - before;
  }

  // Items n ... n + kFoundItems - 1 of the group (kWhole: of this warp), a lane each: rows, then
  // splits, then heads, then passes (which read the same pages).
  template <bool kWhole>
  TQ_DEVICE void find_items(int n) const {
    const int lane = this->lane();
    ptx::sync_warp();
    if (lane < kFoundItems) {
      SplitItem found{-1, 0, 0, 0, 0, 0, 0, 0, kWhole ? 1 : Traits::kGroupWarps};
      const typename Traits::Items& items = launch_items();
      int id = kWhole ? ptx::block_index() + ptx::grid_size() * warp() + (n + lane) * num_warps()
                      : items.whole + group_index() + (n + lane) * num_groups();
      if (id < (kWhole ? items.whole : items.all)) {
        const int* before = items.before[0];
        if (!kWhole && Traits::kTakesWholeSplits && id >= before[args_.batch]) {
          id -= before[args_.batch];
          before = items.before[Traits::Items::kKinds - 1];
        }
        int low = 0, high = args_.batch;  // before[low] <= id < before[high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (before[middle] <= id) {
            low = middle;
          } else {
            high = middle;
          }
        }
        const RowPlan plan = plans()[low];
        const auto [of_passes, pass] = args_.by_passes[Traits::kRowTiles - 1](id - before[low]);
        const auto [slot, head] = args_.by_heads(of_passes);
        found.b = low;
        found.tile = pass * Traits::kRowTiles;
        found.slot = slot;
        found.head = head;
        found.unit = static_cast<int>(args_.unit(low, found.head, found.tile));
        found.masked = plan.end_entry < 0 ? 1 : 0;
        const int begin = plan.first_begin + found.slot * plan.split_pages;
        const int end_of_row = found.masked ? ~plan.end_entry : plan.end_entry;
        const int end =
            begin + plan.split_pages < end_of_row ? begin + plan.split_pages : end_of_row;
        if constexpr (kWhole) {
          const int first = begin < plan.first_entry ? plan.first_entry : begin;
          found.first_entry = first;
          found.count = end - first;
        } else {
          int first = begin + member();
          if (first < plan.first_entry) {
            first += groups_of_warps(plan.first_entry - first) * Traits::kGroupWarps;
          }
          found.first_entry = first;
          found.count = first < end ? groups_of_warps(end - first) : 0;
        }
      }
      item(n + lane) = found;
    }
    ptx::sync_warp();
  }

  // Item n is found, and its pages' entries are on their way.
  template <bool kWhole>
  TQ_DEVICE void open_item(int n) const {
    if (n % kFoundItems == 0) find_items<kWhole>(n);
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
      const int64_t e = item(of).first_entry + item(of).stride * k;
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
      work().block[of & 1][lane] = args_.block(page, item(of).head);
      work().tokens[of & 1][lane] = static_cast<int>(tokens);
    }
    ptx::sync_warp();
  }

  const DecodeArgs& args_;
  std::byte* const shared_;
};

}  // namespace turboquant::cuda::detail
