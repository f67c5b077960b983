// The emulator's wgmma (simt_emulator.hpp): products of a warpgroup that run until they are waited
// for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simt_emulator.hpp"
#include "turboquant/math/half.hpp"

namespace turboquant::simt {

// Element (row, column) of a matrix as ptx::shared_matrix describes it.
inline float shared_element(const std::byte* start, int row, int column) {
  const auto flat = reinterpret_cast<uintptr_t>(start) + row * 128 + column * 2;
  uint16_t half;
  std::memcpy(&half, reinterpret_cast<const void*>(flat ^ (flat >> 3 & 0x70)), sizeof half);
  return math::fp32_from_fp16(half);
}

inline void multiply(const Warpgroup::Product& p) {
  float a[64][16], b[16][64];
  for (int thread = 0; thread < Warpgroup::kThreads; ++thread) {
    const int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int k = 0; k < 8; ++k) {
      const int row = g + k / 2 % 2 * 8, column = 2 * t + k / 4 * 8 + k % 2;
      a[row][column] =
          p.a_shared != nullptr
              ? shared_element(p.a_shared, row, column)
              : math::fp32_from_fp16(static_cast<uint16_t>(p.a[thread][k / 2] >> (16 * (k % 2))));
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < p.columns; ++n) {
      b[k][n] = p.b_transposed ? shared_element(p.b, k, n) : shared_element(p.b, n, k);
    }
  }
  for (int thread = 0; thread < Warpgroup::kThreads; ++thread) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = p.accumulate ? p.d[thread][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      p.d[thread][i] = sum;
    }
  }
}

inline Warpgroup& warpgroup() {
  return Block::current->warpgroups[Block::current->thread_index / Warpgroup::kThreads];
}
template <class F>
void in_warpgroup(F last) {
  Warpgroup& w = warpgroup();
  Block::current->arrive(w.gate, Warpgroup::kThreads, [&] { last(w); });
}

// Results come when they are waited for: numbers read before are NaN or old ones, operands written
// over before give wrong ones.
inline void issue(float* d, const uint32_t* a, const std::byte* a_shared, const std::byte* b,
                  int columns, bool b_transposed, bool accumulate) {
  const int me = Block::current->thread_index % Warpgroup::kThreads;
  Warpgroup& w = warpgroup();
  w.next.d[me] = d;
  for (int i = 0; i < 4; ++i) w.next.a[me][i] = a != nullptr ? a[i] : 0;
  if (!accumulate) std::fill_n(d, columns / 2, NAN);
  for (const std::byte* start : {a_shared, b}) {
    // Rows of a matrix start on 1024 bytes, its part at 32 bytes of a row.
    if (reinterpret_cast<uintptr_t>(start) % 32 != 0) fail("a matrix does not start on 32 bytes");
  }
  in_warpgroup([&](Warpgroup& group) {
    if (!group.fenced) fail("a wgmma without a fence before it");
    group.next.a_shared = a_shared;
    group.next.b = b;
    group.next.columns = columns;
    group.next.b_transposed = b_transposed;
    group.next.accumulate = accumulate;
    group.issued.push_back(group.next);
  });
}

}  // namespace turboquant::simt

namespace turboquant::cuda::ptx {

inline SharedAddress uniform(SharedAddress x) { return x; }
using SharedMatrix = const std::byte*;
inline SharedMatrix shared_matrix(SharedAddress start) { return start; }
inline SharedMatrix matrix_part(SharedMatrix matrix, int bytes) { return matrix + bytes; }
template <class T>
void keep_order(T&) {}
inline void wgmma_fence() {
  simt::in_warpgroup([](simt::Warpgroup& w) { w.fenced = true; });
}
inline void wgmma_commit() {
  simt::in_warpgroup([](simt::Warpgroup& w) {
    w.groups.push_back(std::move(w.issued));
    w.issued.clear();
    w.fenced = false;
  });
}
template <int kPending = 0>
void wgmma_wait() {
  simt::in_warpgroup([](simt::Warpgroup& w) {
    while (w.groups.size() > kPending) {
      for (const auto& product : w.groups.front()) simt::multiply(product);
      w.groups.erase(w.groups.begin());
    }
  });
}
inline void wgmma_f16(float (&d)[8][4], SharedMatrix a, SharedMatrix b, bool accumulate) {
  simt::issue(d[0], nullptr, a, b, 64, false, accumulate);
}
template <int kColumns>
void wgmma_f16_transposed(float (*d)[4], const uint32_t (&a)[4], SharedMatrix b) {
  simt::issue(d[0], a, nullptr, b, kColumns, true, true);
}

}  // namespace turboquant::cuda::ptx
