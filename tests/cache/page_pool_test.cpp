#include "turboquant/cache/page_pool.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cache/table_checks.hpp"

namespace turboquant::cache {
namespace {

constexpr int64_t kBlockBytes = 272;
constexpr int kHeads = 3;
constexpr int64_t kPageBytes = kHeads * kBlockBytes;

TEST(PagePool, GrowsBySlabsThatNeverMove) {
  PagePool pool(kPageBytes, kBlockBytes, 4);
  EXPECT_EQ(pool.allocated_bytes(), 0);
  std::vector<std::byte*> addresses;
  for (int64_t pages = 1; pages <= 50; ++pages) {
    pool.reserve(pages);
    EXPECT_EQ(pool.num_pages(), (pages + 3) / 4 * 4);
    EXPECT_EQ(pool.allocated_bytes(), pool.num_pages() * kPageBytes);
    addresses.push_back(pool.view().page(pages - 1));
    std::memset(addresses.back(), static_cast<int>(pages), kPageBytes);
  }
  for (int64_t page = 0; page < 50; ++page) {
    EXPECT_EQ(pool.view().page(page), addresses[page]);
    for (int64_t i = 0; i < kPageBytes; ++i) {
      ASSERT_EQ(static_cast<int>(addresses[page][i]), page + 1);
    }
    for (int head = 0; head < kHeads; ++head) {
      EXPECT_EQ(pool.view().block(page, head), addresses[page] + head * kBlockBytes);
    }
  }
  EXPECT_EQ(reinterpret_cast<uintptr_t>(addresses[0]) % 64, 0u);
}

TEST(PagePool, ShrinkKeepsTheSlabsInUse) {
  PagePool pool(kPageBytes, kBlockBytes, 4);
  pool.reserve(17);
  std::memset(pool.view().page(8), 7, kPageBytes);
  pool.shrink(9);
  EXPECT_EQ(pool.num_pages(), 12);
  EXPECT_EQ(static_cast<int>(pool.view().page(8)[0]), 7);
  pool.shrink(40);
  EXPECT_EQ(pool.num_pages(), 12);
  pool.shrink(0);
  EXPECT_EQ(pool.allocated_bytes(), 0);
}

TEST(PagePool, CopiesAPage) {
  PagePool pool(kPageBytes, kBlockBytes, 2);
  pool.reserve(5);
  for (int page = 0; page < 5; ++page) std::memset(pool.view().page(page), page, kPageBytes);
  pool.copy_page(1, 4);
  EXPECT_EQ(std::memcmp(pool.view().page(1), pool.view().page(4), kPageBytes), 0);
  EXPECT_EQ(static_cast<int>(pool.view().page(3)[kPageBytes - 1]), 3);
}

TEST(PagePoolView, AnOnlySlabNeedsNoArray) {
  PagePool pool(kPageBytes, kBlockBytes, 5);
  pool.reserve(5);
  PagePoolView view = pool.view();
  ASSERT_EQ(view.num_slabs, 1);
  view.only_slab = view.slabs[0];
  view.slabs = nullptr;
  for (int64_t page = 0; page < 5; ++page) {
    EXPECT_EQ(view.page(page), pool.view().page(page));
    EXPECT_EQ(view.block(page, kHeads - 1), pool.view().block(page, kHeads - 1));
  }
}

TEST(PagePoolView, IsCheckedForItsSlabs) {
  const LayerSpec spec{.head_dim = 64, .num_kv_heads = 2};
  PagePool pool(spec.block_layout().page_bytes(2), spec.block_layout().block_bytes(), 4);
  pool.reserve(8);
  PagePoolView view = pool.view();
  check_pages(spec, view);
  view.only_slab = view.slabs[0];
  EXPECT_THROW(check_pages(spec, view), InvalidArgument);  // there are two
  view.num_slabs = 1;
  view.slabs = nullptr;
  check_pages(spec, view);
  view.only_slab = nullptr;
  EXPECT_THROW(check_pages(spec, view), InvalidArgument);
}

TEST(PagePool, RefusesSizesThatCannotBe) {
  EXPECT_THROW(PagePool(0, kBlockBytes, 1), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes + 1, kBlockBytes, 1), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes, kBlockBytes, 0), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes, kBlockBytes, INT64_MAX / 100), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
