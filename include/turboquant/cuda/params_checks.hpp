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

inline void check_tables(const cache::LayerSpec& spec, const CodecTables& tables) {
  const bool vector = spec.codebook == quant::CodebookKind::kVector;
  for (const SideTables* side : {&tables.keys, &tables.values}) {
    check_pointer("tables", side->signs, true);
    check_pointer("tables", side->turns, true);
    check_pointer("tables", side->decode, true);
    check_pointer("tables", side->levels, !vector);
    check_pointer("tables", side->cells, !vector);
    check_pointer("tables", side->search_scale, !vector);
    check_pointer("tables", side->codewords, vector);
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
