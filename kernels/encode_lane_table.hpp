// A codebook's search cells and levels as encode_append looks them up. Host and device.
#pragma once

#include <cstdint>

#include "turboquant/portability.hpp"
#include "turboquant/quant/cell_search.hpp"

namespace turboquant::cuda::detail {

// In shared memory; or (kShuffled, both counts powers of two up to 32) across the lanes of a warp:
// a shuffle takes the index as it is and has no bank conflicts. On the host always in memory.
template <bool kShuffled>
class LaneTable {
 public:
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE LaneTable(const quant::SearchCell* cells, int num_cells,
                                            const float* levels, int num_levels)
      : cells_(cells), levels_(levels) {
#if defined(__CUDA_ARCH__)
    if constexpr (kShuffled) {
      const int lane = static_cast<int>(threadIdx.x);
      cell_ = cells[lane & (num_cells - 1)];
      level_ = levels[lane & (num_levels - 1)];
    }
#else
    (void)num_cells;
    (void)num_levels;
#endif
  }
  // Whole warps only.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE quant::SearchCell cell(uint32_t index) const {
#if defined(__CUDA_ARCH__)
    if constexpr (kShuffled) {
      return {__shfl_sync(0xFFFFFFFFu, cell_.boundary, static_cast<int>(index)),
              __shfl_sync(0xFFFFFFFFu, cell_.code, static_cast<int>(index))};
    }
#endif
    return cells_[index];
  }
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE float level(uint32_t code) const {
#if defined(__CUDA_ARCH__)
    if constexpr (kShuffled) return __shfl_sync(0xFFFFFFFFu, level_, static_cast<int>(code));
#endif
    return levels_[code];
  }

 private:
  const quant::SearchCell* cells_;
  const float* levels_;
#if defined(__CUDA_ARCH__)
  quant::SearchCell cell_;  // the lane's
  float level_;
#endif
};

}  // namespace turboquant::cuda::detail
