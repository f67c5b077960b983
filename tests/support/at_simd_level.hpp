// A test that runs at every SIMD level of this machine.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "turboquant/quant/simd_level.hpp"

namespace turboquant::testing_support {

class AtSimdLevel : public ::testing::TestWithParam<quant::SimdLevel> {
 protected:
  void SetUp() override { quant::set_simd_level(GetParam()); }
  void TearDown() override { quant::set_simd_level(before_); }

 private:
  quant::SimdLevel before_ = quant::active_simd_level();
};

// The name of a test's parameter.
inline std::string simd_level_of(const ::testing::TestParamInfo<quant::SimdLevel>& level) {
  return std::string(quant::simd_level_name(level.param));
}

}  // namespace turboquant::testing_support
