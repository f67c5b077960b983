#include "failing_allocations.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

constexpr int64_t kNoLimit = -1;
std::atomic<int64_t> allocations_left = kNoLimit;

// Operators below are not inlined: g++ would take free() in an inlined delete for a mismatch.
void count_allocation() {
  int64_t left = allocations_left;
  while (left > 0 && !allocations_left.compare_exchange_weak(left, left - 1)) {
  }
  if (left == 0) throw std::bad_alloc();
}

}  // namespace

[[gnu::noinline]] void* operator new(size_t size) {
  count_allocation();
  if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t size, std::align_val_t alignment) {
  count_allocation();
  const auto align = static_cast<size_t>(alignment);
  if (void* memory = std::aligned_alloc(align, (size + align - 1) / align * align)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace turboquant::testing_support {

void fail_after(int64_t allocations) { allocations_left = allocations; }
void stop_failing() { allocations_left = kNoLimit; }

namespace {

TEST(FailingAllocations, FailWhereAsked) {
  fail_after(1);
  bool first_succeeded = false, second_failed = false;
  void* memory = nullptr;
  try {  // direct calls: a new expression may be optimised away
    memory = ::operator new(10);
    first_succeeded = true;
    ::operator delete(::operator new(10));
  } catch (const std::bad_alloc&) {
    second_failed = true;
  }
  stop_failing();
  EXPECT_TRUE(first_succeeded);
  EXPECT_TRUE(second_failed);
  ::operator delete(memory);
}

}  // namespace
}  // namespace turboquant::testing_support
