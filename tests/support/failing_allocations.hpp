// Makes allocations fail, to test what a call leaves behind.
#pragma once

#include <cstdint>

namespace turboquant::testing_support {

// The next `allocations` calls of operator new, in any thread, succeed, all later ones throw
// std::bad_alloc, until stop_failing().
void fail_after(int64_t allocations);
void stop_failing();

}  // namespace turboquant::testing_support
