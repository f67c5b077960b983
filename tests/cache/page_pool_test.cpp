#include "turboquant/cache/page_pool.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

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

TEST(PagePool, RefusesSizesThatCannotBe) {
  EXPECT_THROW(PagePool(0, kBlockBytes, 1), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes + 1, kBlockBytes, 1), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes, kBlockBytes, 0), InvalidArgument);
  EXPECT_THROW(PagePool(kPageBytes, kBlockBytes, INT64_MAX / 100), InvalidArgument);
}

}  // namespace
}  // namespace turboquant::cache
