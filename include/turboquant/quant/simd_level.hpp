// Which instruction set the compiled kernels use. Encoders store the same bits at every level: one
// source is compiled per level, with a fixed order of additions and without FMA contraction. Decode
// attention only reads, and differs in rounding between levels: by some 1e-6 of the output, and by
// up to 4e-4 with kAvx512Vnni, whose products of pages are of 16-bit integers.
#pragma once

#include <string_view>
#include <vector>

namespace turboquant::quant {

// kAvx2 needs FMA and F16C too; kAvx512 means F, BW, DQ and VL; kAvx512Vnni VNNI, VBMI and BMI2 in
// addition.
enum class SimdLevel { kPortable, kAvx2, kAvx512, kAvx512Vnni, kNeon };

// "portable", "avx2", "avx512", "avx512vnni", "neon"
std::string_view simd_level_name(SimdLevel level);

// The levels this build holds and this CPU can run, slowest first; always contains kPortable.
const std::vector<SimdLevel>& available_simd_levels();

// The level in use: the fastest available one, or the one that the environment variable
// TURBOQUANT_SIMD names. Throws InvalidArgument where it names an unknown or unavailable level.
SimdLevel active_simd_level();

// Changes the level for the whole process (for tests and benchmarks). Throws InvalidArgument where
// the level is not available.
void set_simd_level(SimdLevel level);

}  // namespace turboquant::quant
