// Preloaded into a Python process: makes one allocation of operator new fail, of those that code in
// given address ranges asks for (the package's two libraries), in any thread.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr int kMaxRanges = 16;
constexpr int64_t kNone = -1;
uintptr_t range_begin[kMaxRanges], range_end[kMaxRanges];
int num_ranges = 0;
std::atomic<int64_t> left = kNone;  // allocations before the one that fails

void* allocate(size_t size, size_t alignment, const void* caller) {
  if (left.load() >= 0) {
    const auto address = reinterpret_cast<uintptr_t>(caller);
    for (int i = 0; i < num_ranges; ++i) {
      if (address >= range_begin[i] && address < range_end[i] && left.fetch_sub(1) == 0) {
        throw std::bad_alloc();
      }
    }
  }
  size = (size + alignment - 1) / alignment * alignment;
  if (void* memory = std::aligned_alloc(alignment, size > 0 ? size : alignment)) return memory;
  throw std::bad_alloc();
}

}  // namespace

extern "C" {

// Allocations of code in [begin, end) can be made to fail. 0 where there are too many ranges.
int watch_range(uintptr_t begin, uintptr_t end) {
  if (num_ranges == kMaxRanges) return 0;
  range_begin[num_ranges] = begin;
  range_end[num_ranges] = end;
  ++num_ranges;
  return 1;
}

void fail_allocation(int64_t number) { left = number; }

void watch_nothing() { num_ranges = 0; }

// Ends it; whether an allocation has failed.
int has_failed() { return left.exchange(kNone) < 0; }

}  // extern "C"

#define CALLER __builtin_return_address(0)
void* operator new(size_t size) { return allocate(size, alignof(std::max_align_t), CALLER); }
void* operator new[](size_t size) { return allocate(size, alignof(std::max_align_t), CALLER); }
void* operator new(size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<size_t>(alignment), CALLER);
}
void* operator new[](size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<size_t>(alignment), CALLER);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
