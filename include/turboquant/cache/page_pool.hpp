// Storage of one layer's pages: slabs that are never moved, so growth copies nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "turboquant/cache/layout.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cache {

// The pages of a layer wherever they live; trivially copyable, owns nothing.
// Page p is the (p % pages_per_slab)-th page of slab p / pages_per_slab.
struct PagePoolView {
  std::byte* const* slabs = nullptr;  // [num_slabs], each pages_per_slab * page_bytes
  int64_t num_slabs = 0;
  int64_t pages_per_slab = 1;
  int64_t page_bytes = 0;
  int64_t block_bytes = 0;
  // The slab where there is but one, or null: a kernel finds it among its arguments, and nobody has
  // to bring an array of addresses to the device.
  std::byte* only_slab = nullptr;

  TQ_HOST_DEVICE std::byte* slab(int64_t slab_index) const {
    return only_slab != nullptr ? only_slab : slabs[slab_index];
  }
  TQ_HOST_DEVICE int64_t num_pages() const { return num_slabs * pages_per_slab; }
  TQ_HOST_DEVICE std::byte* page(int64_t page) const {
    return slab(page / pages_per_slab) + (page % pages_per_slab) * page_bytes;
  }
  TQ_HOST_DEVICE std::byte* block(int64_t page_index, int head) const {
    return page(page_index) + head * block_bytes;
  }
};

// Owns slabs in host memory. Slabs start on 64 bytes and are uninitialised.
class PagePool {
 public:
  // page_bytes must be whole blocks: BlockLayout::page_bytes(num_kv_heads).
  PagePool(int64_t page_bytes, int64_t block_bytes, int64_t pages_per_slab)
      : page_bytes_(page_bytes), block_bytes_(block_bytes), pages_per_slab_(pages_per_slab) {
    if (block_bytes <= 0 || page_bytes <= 0 || page_bytes % block_bytes != 0) {
      turboquant::detail::throw_invalid(
          "page_bytes", "a positive multiple of block_bytes",
          std::to_string(page_bytes) + " with blocks of " + std::to_string(block_bytes));
    }
    if (pages_per_slab <= 0 || pages_per_slab > std::numeric_limits<int64_t>::max() / page_bytes) {
      turboquant::detail::throw_invalid("pages_per_slab",
                                        "1 or more, with a slab's bytes in 64 bits",
                                        std::to_string(pages_per_slab));
    }
  }

  // Makes pages [0, num_pages) exist. Either succeeds or leaves the pool as it was (memory that
  // was added before a failure is given back).
  void reserve(int64_t num_pages) {
    const int64_t wanted_slabs = (num_pages + pages_per_slab_ - 1) / pages_per_slab_;
    if (wanted_slabs <= num_slabs()) return;
    const size_t slabs_before = slabs_.size();
    addresses_.reserve(wanted_slabs);
    try {
      slabs_.reserve(wanted_slabs);
      while (num_slabs() < wanted_slabs) slabs_.push_back(allocate_slab());
    } catch (...) {
      slabs_.resize(slabs_before);
      throw;
    }
    for (size_t i = slabs_before; i < slabs_.size(); ++i) addresses_.push_back(slabs_[i].get());
  }

  // Gives back every slab that holds none of the pages [0, num_pages).
  void shrink(int64_t num_pages) noexcept {
    const int64_t kept_slabs = (num_pages + pages_per_slab_ - 1) / pages_per_slab_;
    if (kept_slabs >= num_slabs()) return;
    slabs_.resize(kept_slabs);
    addresses_.resize(kept_slabs);
  }

  void copy_page(int64_t from_page, int64_t to_page) noexcept {
    const PagePoolView pages = view();
    std::memcpy(pages.page(to_page), pages.page(from_page), page_bytes_);
  }

  // Valid until the next reserve or shrink; page addresses stay valid until their slab is given
  // back.
  PagePoolView view() const noexcept {
    return {.slabs = addresses_.data(),
            .num_slabs = num_slabs(),
            .pages_per_slab = pages_per_slab_,
            .page_bytes = page_bytes_,
            .block_bytes = block_bytes_};
  }

  int64_t num_slabs() const noexcept { return static_cast<int64_t>(slabs_.size()); }
  int64_t num_pages() const noexcept { return num_slabs() * pages_per_slab_; }
  int64_t page_bytes() const noexcept { return page_bytes_; }
  int64_t allocated_bytes() const noexcept { return num_pages() * page_bytes_; }

 private:
  static constexpr std::align_val_t kSlabAlignment{64};
  struct SlabDelete {
    void operator()(std::byte* slab) const { ::operator delete(slab, kSlabAlignment); }
  };
  using Slab = std::unique_ptr<std::byte, SlabDelete>;

  Slab allocate_slab() const {
    return Slab(static_cast<std::byte*>(
        ::operator new(static_cast<size_t>(pages_per_slab_ * page_bytes_), kSlabAlignment)));
  }

  int64_t page_bytes_;
  int64_t block_bytes_;
  int64_t pages_per_slab_;
  std::vector<Slab> slabs_;
  std::vector<std::byte*> addresses_;
};

}  // namespace turboquant::cache
