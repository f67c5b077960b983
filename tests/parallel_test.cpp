#include "turboquant/parallel.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

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

}  // namespace
}  // namespace turboquant
