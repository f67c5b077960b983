// Device memory for benchmarks, filled as a cache is (random codes, sound scales and means), and
// the time of a graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "turboquant/cache/layout.hpp"
#include "turboquant/math/half.hpp"

namespace turboquant::bench {

inline void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

static __global__ void fill_random(uint32_t* words, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ static_cast<uint32_t>(i >> 32) ^ seed;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    words[i] = x ^ x >> 16;
  }
}

// Elements of the size of normal numbers, as bf16: random sign and mantissa, exponent of 2^-1.
static __global__ void fill_bf16(uint16_t* elems, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2246822519u + seed;
    x ^= x >> 15;
    x *= 0x2C1B3C6Du;
    x ^= x >> 12;
    elems[i] = static_cast<uint16_t>((x & 0x80FFu) | 0x3F00u);
  }
}

// Sound numbers for the scales and means of every block; codes stay random.
static __global__ void fix_blocks(std::byte* blocks, int64_t count, cache::BlockLayout layout) {
  const int64_t block_index = blockIdx.x;
  if (block_index >= count) return;
  std::byte* const block = blocks + block_index * layout.block_bytes();
  for (int t = threadIdx.x; t < cache::kBlockTokens; t += blockDim.x) {
    const float scale = 0.08f + 0.001f * static_cast<float>(t % 16);
    if (layout.scale_bytes == 4) {
      *reinterpret_cast<float*>(block + layout.k_scale(t)) = scale;
      *reinterpret_cast<float*>(block + layout.v_scale(t)) = scale;
    } else {
      const uint16_t half = math::fp16_from_fp32(scale);
      *reinterpret_cast<uint16_t*>(block + layout.k_scale(t)) = half;
      *reinterpret_cast<uint16_t*>(block + layout.v_scale(t)) = half;
    }
  }
  for (int i = threadIdx.x; layout.has_mean && i < layout.head_dim; i += blockDim.x) {
    reinterpret_cast<uint16_t*>(block + layout.k_mean_offset())[i] =
        math::fp16_from_fp32(0.01f * static_cast<float>(i % 7 - 3));
  }
}

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

template <class T>
T* upload(const std::vector<T>& host) {
  T* const device = allocate<T>(static_cast<int64_t>(host.size()));
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return device;
}

// Median milliseconds of a replay of what enqueue() puts into the stream.
template <class Enqueue>
double time_graph(cudaStream_t stream, int replays, Enqueue enqueue) {
  constexpr int kWarmUps = 3;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  enqueue();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < replays + kWarmUps; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    check(cudaGraphLaunch(exec, stream), "replay");
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "replay");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= kWarmUps) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace turboquant::bench
