// A codebook's search cells and levels as encode_append looks them up. Host and device.
#pragma once

#include <cstdint>

#include "turboquant/portability.hpp"
#include "turboquant/quant/cell_search.hpp"

namespace turboquant::cuda::detail {

// In shared memory; or (kShuffled: up to kIndexedCellBits, 32 cells and levels) across the lanes of
// a warp: a shuffle takes the index as it is and has no bank conflicts, and the code before a cell
// is its index. On the host always in memory.
template <bool kShuffled>
class LaneTable {
 public:
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE LaneTable(const quant::SearchCell* cells, int num_cells,
                                            const float* levels, int num_levels)
      : cells_(cells), levels_(levels) {
#if defined(__CUDA_ARCH__)
    if constexpr (kShuffled) {
      const int lane = static_cast<int>(threadIdx.x % 32);
      boundary_ = cells[lane < num_cells ? lane : 0].boundary;
      level_ = levels[lane < num_levels ? lane : 0];
    }
#else
    (void)num_cells;
    (void)num_levels;
#endif
  }
  // The code of x, which is in that cell. Whole warps only.
  TQ_HOST_DEVICE TQ_ALWAYS_INLINE uint32_t code(uint32_t cell, float x) const {
    if constexpr (!kShuffled) return quant::search_code(cells_[cell], x);
#if defined(__CUDA_ARCH__)
    const float boundary = __shfl_sync(0xFFFFFFFFu, boundary_, static_cast<int>(cell));
#else
    const float boundary = cells_[cell].boundary;
#endif
    return quant::search_code({boundary, cell}, x);
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
  float boundary_, level_;  // the lane's
#endif
};

}  // namespace turboquant::cuda::detail
