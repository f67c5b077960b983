#include "turboquant/parallel.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "support/failing_allocations.hpp"

namespace turboquant {
namespace {

TEST(Parallel, CoversEveryIndexOnce) {
  for (const int num_threads : {1, 2, 7}) {
    for (const int64_t count : {0, 1, 5, 1000}) {
      std::vector<int> visits(count, 0);
      threads(num_threads)(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      EXPECT_EQ(std::accumulate(visits.begin(), visits.end(), int64_t{0}), count);
      EXPECT_TRUE(std::all_of(visits.begin(), visits.end(), [](int v) { return v == 1; }));
    }
  }
}

TEST(Parallel, RethrowsTheBodysException) {
  EXPECT_THROW(threads(3)(9,
                          [](int64_t begin, int64_t) {
                            if (begin > 0) throw std::runtime_error("body");
                          }),
               std::runtime_error);
}

// Threads that were started before memory ran out end before the call does.
TEST(Parallel, ThrowsWhereNoThreadCanBeStarted) {
  const ParallelFor three = threads(3);
  int64_t failures = 0;
  for (bool done = false; !done; ++failures) {
    std::vector<int> visits(9, 0);
    const ParallelBody body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++visits[i];
    };
    testing_support::fail_after(failures);
    try {
      three(9, body);
      done = true;
    } catch (const std::bad_alloc&) {
    }
    testing_support::stop_failing();
    EXPECT_TRUE(std::all_of(visits.begin(), visits.end(), [&](int v) { return v <= 1; }));
    if (done) {
      EXPECT_EQ(std::accumulate(visits.begin(), visits.end(), 0), 9);
    }
  }
  EXPECT_GT(failures, 2);
}

}  // namespace
}  // namespace turboquant
