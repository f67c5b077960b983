#include "turboquant/quant/simd_level.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

constexpr SimdLevel kAll[] = {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512,
                              SimdLevel::kAvx512Vnni, SimdLevel::kNeon};

TEST(SimdLevel, PortableIsAlwaysThere) {
  const auto& levels = available_simd_levels();
  ASSERT_FALSE(levels.empty());
  EXPECT_EQ(levels.front(), SimdLevel::kPortable);
}

TEST(SimdLevel, SetChangesTheActiveOneOrThrows) {
  const SimdLevel before = active_simd_level();
  const auto& levels = available_simd_levels();
  for (const SimdLevel level : kAll) {
    if (std::find(levels.begin(), levels.end(), level) != levels.end()) {
      set_simd_level(level);
      EXPECT_EQ(active_simd_level(), level);
    } else {
      EXPECT_THROW(set_simd_level(level), InvalidArgument);
    }
  }
  set_simd_level(before);
}

// The variable is read once, so each case needs a process of its own.
void report_level_under(const char* value) {
  setenv("TURBOQUANT_SIMD", value, 1);
  int exit_code = 0;
  try {
    exit_code = 10 + static_cast<int>(active_simd_level());
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    const bool clear = message.find("TURBOQUANT_SIMD: expected one of portable") == 0 &&
                       message.find(std::string("got ") + value) != std::string::npos;
    exit_code = clear ? 1 : 2;
  }
  std::_Exit(exit_code);
}

TEST(SimdLevelDeathTest, EnvironmentForcesALevel) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(report_level_under("portable"), ::testing::ExitedWithCode(10), "");
  EXPECT_EXIT(
      report_level_under(std::string(simd_level_name(available_simd_levels().back())).c_str()),
      ::testing::ExitedWithCode(10 + static_cast<int>(available_simd_levels().back())), "");
  EXPECT_EXIT(report_level_under("sse9"), ::testing::ExitedWithCode(1), "");
}

}  // namespace
}  // namespace turboquant::quant
