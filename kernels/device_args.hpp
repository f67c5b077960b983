// What the kernels' params have in common: tensors, ring slots, atomics that the host has too.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "turboquant/cache/layout.hpp"
#include "turboquant/cache/tensor_view.hpp"
#include "turboquant/portability.hpp"

namespace turboquant::cuda::detail {

// A dense tensor [B, H, T, D] with strides in bytes.
struct TensorArg {
  std::byte* data;  // sources are only read
  int64_t row_stride, head_stride, token_stride, elem_stride;
  bool whole_vectors;  // rows are contiguous and start on 16 bytes

  TQ_HOST_DEVICE std::byte* head(int64_t b, int64_t h) const {
    return data + b * row_stride + h * head_stride;
  }
};

inline TensorArg tensor_arg(const void* data, cache::ElementType type,
                            const std::array<int64_t, 4>& strides, int64_t dim) {
  const int64_t bytes = cache::element_bytes(type);
  TensorArg arg{.data = static_cast<std::byte*>(const_cast<void*>(data)),
                .row_stride = strides[0] * bytes,
                .head_stride = strides[1] * bytes,
                .token_stride = strides[2] * bytes,
                .elem_stride = strides[3] * bytes,
                .whole_vectors = false};
  arg.whole_vectors =
      strides[3] == 1 &&
      (reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(arg.row_stride) |
       static_cast<uint64_t>(arg.head_stride) | static_cast<uint64_t>(arg.token_stride) |
       static_cast<uint64_t>(dim * bytes)) %
              16 ==
          0;
  return arg;
}

// Ring index of token t >= sink_tokens (ExactLayout::slot less the sinks) in 32 bits.
TQ_HOST_DEVICE inline int32_t ring_index(const cache::ExactLayout& exact, int32_t t) {
  return static_cast<int32_t>(static_cast<uint32_t>(t - static_cast<int32_t>(exact.sink_tokens)) %
                              static_cast<uint32_t>(exact.ring_tokens()));
}

TQ_HOST_DEVICE inline void add_counter(int64_t* counter, int64_t count) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
#else
  *counter += count;
#endif
}
TQ_HOST_DEVICE inline void add_shared(int32_t* counter, int32_t count) {
#if defined(__CUDA_ARCH__)
  atomicAdd(counter, count);
#else
  *counter += count;
#endif
}
TQ_HOST_DEVICE inline void max_shared(int32_t* largest, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(largest, value);
#else
  *largest = value > *largest ? value : *largest;
#endif
}
TQ_HOST_DEVICE inline void or_shared(uint32_t* mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  atomicOr(mask, bits);
#else
  *mask |= bits;
#endif
}
TQ_HOST_DEVICE inline void min_shared(int32_t* least, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicMin(least, value);
#else
  *least = value < *least ? value : *least;
#endif
}

// A number that all lanes of a warp have; the compiler learns that.
TQ_HOST_DEVICE inline int32_t uniform(int32_t x) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(0xFFFFFFFFu, x, 0);
#else
  return x;
#endif
}

// 16 bytes.
struct alignas(16) Vector {
  uint32_t word[4];
};

// What a thread block of encode_append or dequantize works on: a job, or an entry of a row's page
// table, a KV head, keys (0) or values (1).
struct BlockPlace {
  int item, head, side;
};

// f(row, piece) for kPieces pieces of each of rows [first, end), shared out among kThreads threads:
// neighbours have neighbouring pieces.
template <int kPieces, int kThreads, class F>
TQ_HOST_DEVICE TQ_ALWAYS_INLINE void each_piece(int thread, int first, int end, F f) {
  int row = first + thread / kPieces, piece = thread % kPieces;
  if constexpr (kThreads % kPieces == 0) {
    for (; row < end; row += kThreads / kPieces) f(row, piece);
  } else {
    TQ_NO_UNROLL
    while (row < end) {
      f(row, piece);
      row += kThreads / kPieces;
      piece += kThreads % kPieces;
      if (piece >= kPieces) {
        piece -= kPieces;
        ++row;
      }
    }
  }
}

// One element between two addresses of one element size.
TQ_HOST_DEVICE inline void copy_element(const std::byte* from, std::byte* to, int64_t bytes) {
  if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  } else {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  }
}

}  // namespace turboquant::cuda::detail
