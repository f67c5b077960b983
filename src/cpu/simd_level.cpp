#include "turboquant/quant/simd_level.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/encode_kernels.hpp"
#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

constexpr const char* kVariable = "TURBOQUANT_SIMD";

std::vector<SimdLevel> detect_levels() {
  std::vector<SimdLevel> levels = {SimdLevel::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) levels.push_back(SimdLevel::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    levels.push_back(SimdLevel::kAvx512);
  }
#endif
  return levels;
}

std::string available_names() {
  std::string names;
  for (const SimdLevel level : available_simd_levels()) {
    if (!names.empty()) names += ", ";
    names += simd_level_name(level);
  }
  return names;
}

SimdLevel initial_level() {
  const auto& levels = available_simd_levels();
  const char* const wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return levels.back();
  for (const SimdLevel level : levels) {
    if (simd_level_name(level) == wanted) return level;
  }
  turboquant::detail::throw_invalid(kVariable, "one of " + available_names() + " on this machine",
                                    std::string(wanted));
}

std::atomic<SimdLevel>& current_level() {
  static std::atomic<SimdLevel> level{initial_level()};
  return level;
}

}  // namespace

std::string_view simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPortable:
      return "portable";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
  }
  return "unknown";
}

const std::vector<SimdLevel>& available_simd_levels() {
  static const std::vector<SimdLevel> levels = detect_levels();
  return levels;
}

SimdLevel active_simd_level() { return current_level().load(std::memory_order_relaxed); }

void set_simd_level(SimdLevel level) {
  const auto& levels = available_simd_levels();
  if (std::find(levels.begin(), levels.end(), level) == levels.end()) {
    turboquant::detail::throw_invalid("level", "one of " + available_names() + " on this machine",
                                      std::string(simd_level_name(level)));
  }
  current_level().store(level, std::memory_order_relaxed);
}

namespace detail {

const EncodeKernels& active_encode_kernels() {
  switch (active_simd_level()) {
#if defined(__x86_64__)
    case SimdLevel::kAvx512:
      return kAvx512EncodeKernels;
    case SimdLevel::kAvx2:
      return kAvx2EncodeKernels;
#endif
    default:
      return kPortableEncodeKernels;
  }
}

}  // namespace detail
}  // namespace turboquant::quant
