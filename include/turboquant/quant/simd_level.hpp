// Which instruction set the compiled encode kernels use. Every level stores the same bits: one
// source is compiled per level, with a fixed order of additions and without FMA contraction.
#pragma once

#include <string_view>
#include <vector>

namespace turboquant::quant {

enum class SimdLevel { kPortable, kAvx2, kAvx512 };

std::string_view simd_level_name(SimdLevel level);  // "portable", "avx2", "avx512"

// The levels this build holds and this CPU can run, slowest first; always contains kPortable.
const std::vector<SimdLevel>& available_simd_levels();

// The level in use: the fastest available one, or the one that the environment variable
// TURBOQUANT_SIMD names. Throws InvalidArgument where it names an unknown or unavailable level.
SimdLevel active_simd_level();

// Changes the level for the whole process (for tests and benchmarks). Throws InvalidArgument where
// the level is not available.
void set_simd_level(SimdLevel level);

}  // namespace turboquant::quant
