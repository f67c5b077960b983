#include "turboquant/quant/simd_level.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <string>

#include "cpu/attention_kernels.hpp"
#include "cpu/encode_kernels.hpp"
#include "turboquant/error.hpp"

namespace turboquant::quant {
namespace {

constexpr const char* kVariable = "TURBOQUANT_SIMD";

#if defined(__x86_64__)
// Half-precision conversions. Asked of the processor itself: older clang releases do not know
// the name "f16c" in __builtin_cpu_supports. That the system saves the wide registers is what the
// check for AVX2 beside it says.
bool has_f16c() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<SimdLevel> detect_levels() {
  std::vector<SimdLevel> levels = {SimdLevel::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    levels.push_back(SimdLevel::kAvx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    levels.push_back(SimdLevel::kAvx512);
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("bmi2")) {
      levels.push_back(SimdLevel::kAvx512Vnni);
    }
  }
#elif defined(__aarch64__)
  levels.push_back(SimdLevel::kNeon);  // part of the base architecture
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
    case SimdLevel::kAvx512Vnni:
      return "avx512vnni";
    case SimdLevel::kNeon:
      return "neon";
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

}  // namespace turboquant::quant

namespace turboquant {
namespace {

using quant::SimdLevel;

struct LevelKernels {
  SimdLevel level;
  const quant::detail::EncodeKernels& encode;
  const attention::detail::AttentionKernels& attention;
};

const LevelKernels& kernels_of_active_level() {
  namespace enc = quant::detail;
  namespace att = attention::detail;
  static constexpr LevelKernels kLevels[] = {
    {SimdLevel::kPortable, enc::kPortableEncodeKernels, att::kPortableAttentionKernels},
#if defined(__x86_64__)
    {SimdLevel::kAvx2, enc::kAvx2EncodeKernels, att::kAvx2AttentionKernels},
    {SimdLevel::kAvx512, enc::kAvx512EncodeKernels, att::kAvx512AttentionKernels},
    {SimdLevel::kAvx512Vnni, enc::kAvx512EncodeKernels, att::kAvx512VnniAttentionKernels},
#elif defined(__aarch64__)
    {SimdLevel::kNeon, enc::kNeonEncodeKernels, att::kNeonAttentionKernels},
#endif
  };
  const SimdLevel active = quant::active_simd_level();
  return *std::find_if(std::begin(kLevels), std::end(kLevels),
                       [=](const LevelKernels& kernels) { return kernels.level == active; });
}

}  // namespace

const quant::detail::EncodeKernels& quant::detail::active_encode_kernels() {
  return kernels_of_active_level().encode;
}

const attention::detail::AttentionKernels& attention::detail::active_attention_kernels() {
  return kernels_of_active_level().attention;
}

}  // namespace turboquant
