// Checks that the host makes before a kernel is launched.
#pragma once

#include <cstdint>
#include <string>

#include "turboquant/cache/layer_spec.hpp"
#include "turboquant/cuda/codec_tables.hpp"
#include "turboquant/error.hpp"

namespace turboquant::cuda {

// Longest rows that encode_append and dequantize hold in registers.
inline constexpr int kMaxHeadDim = 256;

// All throw InvalidArgument.

inline void check_kernel_spec(const cache::LayerSpec& spec) {
  spec.validate();
  if (spec.codebook != quant::CodebookKind::kScalar) {
    turboquant::detail::throw_invalid("codebook", "scalar on CUDA devices", "vector");
  }
  if (spec.head_dim > kMaxHeadDim) {
    turboquant::detail::throw_invalid("head_dim", "at most 256 on CUDA devices",
                                      std::to_string(spec.head_dim));
  }
}

inline void check_pointer(const char* argument, const void* pointer, bool needed) {
  if (needed && pointer == nullptr) {
    turboquant::detail::throw_invalid(argument, "device memory", "null");
  }
}

inline void check_tables(const CodecTables& tables) {
  for (const SideTables* side : {&tables.keys, &tables.values}) {
    for (const void* part :
         {static_cast<const void*>(side->signs), static_cast<const void*>(side->turns),
          static_cast<const void*>(side->levels), static_cast<const void*>(side->decode),
          static_cast<const void*>(side->cells), static_cast<const void*>(side->search_scale)}) {
      check_pointer("tables", part, true);
    }
  }
}

// 0 <= count, and the sum of two such count * each is a 32-bit index.
inline void check_count(const char* argument, int64_t count, int64_t each) {
  const int64_t largest = INT32_MAX / 2 / each;
  if (count < 0 || count > largest) {
    turboquant::detail::throw_invalid(argument, "0 to " + std::to_string(largest),
                                      std::to_string(count));
  }
}

}  // namespace turboquant::cuda
