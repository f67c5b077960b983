#include "turboquant/attention/split_plan.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace turboquant::attention {
namespace {

TEST(SplitPlan, CoversEveryQueryAndSplitOnce) {
  // Rows with 0, 1, 8, 9 and 100 entries.
  const std::vector<int32_t> rows = {0,   0, 0,   1, 64,  1, 64,   1,   512,  8,
                                     512, 1, 576, 9, 576, 1, 6400, 100, 6400, 1};
  for (const int64_t queries : {1, 63, 64, 65, 200}) {
    for (const int64_t budget : {1, 5, 40, 100000}) {
      const SplitPlan plan = SplitPlan::make(rows, 5, 3, queries, budget);
      int64_t expected_row = 0, expected_head = 0, expected_first = 0;
      int64_t wave_start = 0;
      size_t wave = 0;
      int64_t partials = 0;
      for (size_t i = 0; i < plan.tiles.size(); ++i) {
        const QueryTile& tile = plan.tiles[i];
        ASSERT_EQ(tile.row, expected_row);
        ASSERT_EQ(tile.kv_head, expected_head);
        ASSERT_EQ(tile.first_query, expected_first);
        ASSERT_EQ(tile.num_queries, std::min<int64_t>(kQueryTileRows, queries - expected_first));
        ASSERT_EQ(tile.splits, num_splits(rows[tile.row * 4 + 1]));
        ASSERT_EQ(tile.first_partial, partials);
        partials += tile.splits + 1;
        ASSERT_TRUE(partials <= budget || static_cast<int64_t>(i) == wave_start);
        if (static_cast<int64_t>(i) + 1 == plan.wave_ends[wave]) {
          wave_start = plan.wave_ends[wave++];
          partials = 0;
        }
        expected_first += tile.num_queries;
        if (expected_first == queries) {
          expected_first = 0;
          if (++expected_head == 3) {
            expected_head = 0;
            ++expected_row;
          }
        }
      }
      EXPECT_EQ(expected_row, 5);
      EXPECT_EQ(wave, plan.wave_ends.size());
    }
  }
}

TEST(SplitPlan, VisibleTokens) {
  const auto visible = [](int64_t position, int64_t window) {
    const VisibleTokens tokens = visible_tokens(position, window);
    return std::pair{tokens.begin, tokens.end};
  };
  EXPECT_EQ(visible(-1, 0), (std::pair<int64_t, int64_t>{0, 0}));
  EXPECT_EQ(visible(-5, 3), (std::pair<int64_t, int64_t>{0, 0}));
  EXPECT_EQ(visible(0, 0), (std::pair<int64_t, int64_t>{0, 1}));
  EXPECT_EQ(visible(9, 0), (std::pair<int64_t, int64_t>{0, 10}));
  EXPECT_EQ(visible(9, 10), (std::pair<int64_t, int64_t>{0, 10}));
  EXPECT_EQ(visible(9, 4), (std::pair<int64_t, int64_t>{6, 10}));  // t > position - window
  EXPECT_EQ(visible(9, 1), (std::pair<int64_t, int64_t>{9, 10}));
}

}  // namespace
}  // namespace turboquant::attention
