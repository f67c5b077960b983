// Runs the kernels' code on the CPU: the functions of kernels/ptx.cuh for threads that are fibers.
// A unit defines TQ_SIMT_EMULATOR to this header's name before it includes a kernel header, and
// calls simt::launch.
//
// What it checks beside results: bulk copies fill their target with NaN when they are issued and
// land when their barrier is waited for, so a read too early or a copy over what is still in use
// shows; shared memory starts as NaN; a barrier that not all threads reach aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "turboquant/math/half.hpp"

#define TQ_DEVICE inline

namespace turboquant::simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "SIMT emulator: %s\n", what);
  std::abort();
}

// A counter that threads wait on: they go on when it has changed.
struct Gate {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Gate gate;
  std::array<std::array<uint32_t, 10>, 32> in;
  std::array<std::array<uint32_t, 4>, 32> out;
};

// Four warps whose tensor cores multiply beside them: products that were issued and not waited for.
struct Warpgroup {
  static constexpr int kThreads = 128;
  struct Product {
    std::array<float*, kThreads> d;  // [columns / 8][4] of each thread
    std::array<std::array<uint32_t, 4>, kThreads> a;
    const std::byte* a_shared;  // null: a is in registers
    const std::byte* b;
    int columns;
    bool b_transposed, accumulate;
  };
  Gate gate;
  Product next;
  std::vector<Product> issued;               // of no group yet
  std::vector<std::vector<Product>> groups;  // oldest first
  bool fenced = false;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
};

// An mbarrier: copies that are under way, and the phase; or (more than one arrival a phase)
// threads.
struct CopyBarrier {
  int arrivals = 1;
  Gate gate;
  uint32_t phase = 0;
  int64_t pending_bytes = 0;
  bool expected = false;
  std::vector<Copy> copies;
};

class Block {
 public:
  Block(int num_threads, int block_index, int grid_size, size_t shared_bytes)
      : index(block_index),
        grid(grid_size),
        shared_(shared_bytes / sizeof(Shared) + 1),
        threads_(num_threads),
        warps(num_threads / 32),
        warpgroups((num_threads + 127) / 128) {
    std::memset(shared_.data(), 0xFF, shared_.size() * sizeof(Shared));
  }

  std::byte* shared() { return reinterpret_cast<std::byte*>(shared_.data()); }

  void run(const std::function<void(std::byte*)>& kernel) {
    kernel_ = &kernel;
    current = this;
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() < threads_.size()) stacks.push_back(std::make_unique<char[]>(kStackBytes));
    size_t alive = threads_.size();
    for (size_t i = 0; i < threads_.size(); ++i) start(i, stacks[i].get());
    while (alive > 0) {
      bool progress = false;
      alive = 0;
      for (size_t i = 0; i < threads_.size(); ++i) {
        Thread& thread = threads_[i];
        if (thread.done) continue;
        ++alive;
        if (thread.gate->generation == thread.generation) continue;
        progress = true;
        resume(i);
      }
      if (alive > 0 && !progress) fail("deadlock: threads wait for a barrier nobody completes");
    }
    current = nullptr;
  }

  // Arrives; returns when `count` threads have. The last one runs `complete` first.
  template <class F>
  void arrive(Gate& gate, int count, F complete) {
    if (++gate.arrived == count) {
      gate.arrived = 0;
      complete();
      ++gate.generation;
      return;
    }
    wait(gate);
  }
  // Until the gate's next generation.
  void wait(Gate& gate) {
    Thread& thread = threads_[thread_index];
    thread.gate = &gate;
    thread.generation = gate.generation;
    if (_setjmp(thread.context) == 0) _longjmp(scheduler_, 1);
  }

  int index, grid;
  int thread_index = 0;
  static inline Block* current = nullptr;

 private:
  static constexpr size_t kStackBytes = 96 << 10;
  struct alignas(1024) Shared {
    unsigned char bytes[1024];
  };
  struct Thread {
    jmp_buf context;
    Gate* gate = nullptr;
    int64_t generation = 0;
    bool done = false;
  };

  // Both return when the thread waits or has ended. Their frames hold nothing that a jump could
  // clobber.
  void start(size_t i, char* stack) {
    thread_index = static_cast<int>(i);
    if (_setjmp(scheduler_) != 0) return;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::entry, 0);
    setcontext(&context);
  }
  void resume(size_t i) {
    thread_index = static_cast<int>(i);
    if (_setjmp(scheduler_) == 0) _longjmp(threads_[i].context, 1);
  }

  static void entry() {
    Block& block = *current;
    (*block.kernel_)(block.shared());
    block.threads_[block.thread_index].done = true;
    _longjmp(block.scheduler_, 1);
  }

  std::vector<Shared> shared_;
  std::vector<Thread> threads_;
  jmp_buf scheduler_;
  const std::function<void(std::byte*)>* kernel_ = nullptr;

 public:
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Gate block_gate;
  std::array<Gate, 16> named_gates;
  std::map<const void*, CopyBarrier> barriers;
  std::map<int, std::vector<Copy>> async_copies;  // of every thread
};

// Blocks one after the other; kernel(shared memory).
inline void launch(int grid, int threads, size_t shared_bytes,
                   const std::function<void(std::byte*)>& kernel) {
  for (int i = 0; i < grid; ++i) {
    Block block(threads, i, grid, shared_bytes);
    block.run(kernel);
  }
}

inline Warp& warp() { return Block::current->warps[Block::current->thread_index / 32]; }
inline int lane() { return Block::current->thread_index % 32; }

// Every lane gives numbers; the last one to come computes every lane's results.
template <size_t kIn, class F>
std::array<uint32_t, 4> collective(const std::array<uint32_t, kIn>& in, F compute) {
  Warp& w = warp();
  const int me = lane();
  std::copy(in.begin(), in.end(), w.in[me].begin());
  Block::current->arrive(w.gate, 32, [&] { compute(w); });
  return w.out[me];
}

inline uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float real(uint32_t x) { return std::bit_cast<float>(x); }

template <class Convert>
void mma(float (&d)[4], std::array<uint32_t, 6> operands, Convert convert) {
  const auto out = collective(
      std::array<uint32_t, 10>{operands[0], operands[1], operands[2], operands[3], operands[4],
                               operands[5], bits(d[0]), bits(d[1]), bits(d[2]), bits(d[3])},
      [&](Warp& w) {
        const auto half = [&](uint32_t word, int i) {
          return convert(static_cast<uint16_t>(word >> (16 * i)));
        };
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 2; ++i) {
            a[g][2 * t + i] = half(w.in[lane][0], i);
            a[g + 8][2 * t + i] = half(w.in[lane][1], i);
            a[g][2 * t + 8 + i] = half(w.in[lane][2], i);
            a[g + 8][2 * t + 8 + i] = half(w.in[lane][3], i);
            b[2 * t + i][g] = half(w.in[lane][4], i);
            b[2 * t + 8 + i][g] = half(w.in[lane][5], i);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int k = 0; k < 4; ++k) {
            const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
            float sum = real(w.in[lane][6 + k]);
            for (int i = 0; i < 16; ++i) sum += a[row][i] * b[i][column];
            w.out[lane][k] = bits(sum);
          }
        }
      });
  for (int k = 0; k < 4; ++k) d[k] = real(out[k]);
}

}  // namespace turboquant::simt

namespace turboquant::cuda::ptx {

inline int thread_index() { return simt::Block::current->thread_index; }
inline int warp_index() { return thread_index() / 32; }
inline int lane_index() { return thread_index() % 32; }
inline int lane_index_here() { return lane_index(); }
inline int warp_index_here() { return warp_index(); }
inline uint32_t zero_here() { return 0; }
inline int argument_here(int x) { return x; }
inline bool argument_here(bool x) { return x; }
inline int block_index() { return simt::Block::current->index; }
inline int grid_size() { return simt::Block::current->grid; }

inline void sync_warp() {
  simt::collective(std::array<uint32_t, 1>{0}, [](simt::Warp&) {});
}
template <class F>
uint32_t reduce_lanes(uint32_t x, F f) {
  return simt::collective(std::array<uint32_t, 1>{x}, [&](simt::Warp& w) {
    uint32_t all = w.in[0][0];
    for (int i = 1; i < 32; ++i) all = f(all, w.in[i][0]);
    for (int i = 0; i < 32; ++i) w.out[i][0] = all;
  })[0];
}
inline bool any(bool predicate) {
  return reduce_lanes(predicate, [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}
inline uint32_t reduce_max(uint32_t x) {
  return reduce_lanes(x, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t reduce_or(uint32_t x) {
  return reduce_lanes(x, [](uint32_t a, uint32_t b) { return a | b; });
}
inline float shuffle_xor(float x, int mask) {
  return simt::real(simt::collective(std::array<uint32_t, 1>{simt::bits(x)}, [&](simt::Warp& w) {
    for (int i = 0; i < 32; ++i) w.out[i][0] = w.in[i ^ mask][0];
  })[0]);
}
inline uint64_t shuffle(uint64_t x, int lane) {
  const auto out = simt::collective(
      std::array<uint32_t, 3>{static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32),
                              static_cast<uint32_t>(lane)},
      [](simt::Warp& w) {
        for (int i = 0; i < 32; ++i) {
          w.out[i][0] = w.in[w.in[i][2]][0];
          w.out[i][1] = w.in[w.in[i][2]][1];
        }
      });
  return uint64_t{out[1]} << 32 | out[0];
}
inline float shuffle(float x, int lane) {
  return simt::real(static_cast<uint32_t>(shuffle(uint64_t{simt::bits(x)}, lane)));
}
inline int shuffle(int x, int lane) {
  return static_cast<int>(shuffle(uint64_t{static_cast<uint32_t>(x)}, lane));
}
inline int shuffle_up(int x, int delta) {
  return static_cast<int>(
      simt::collective(std::array<uint32_t, 1>{static_cast<uint32_t>(x)}, [&](simt::Warp& w) {
        for (int i = 0; i < 32; ++i) w.out[i][0] = w.in[i >= delta ? i - delta : i][0];
      })[0]);
}
inline uint32_t move_transposed(uint32_t x) {
  return simt::collective(std::array<uint32_t, 1>{x}, [](simt::Warp& w) {
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      const auto element = [&](int r, int c) {
        return w.in[4 * r + c / 2][0] >> (16 * (c % 2)) & 0xFFFFu;
      };
      w.out[i][0] = element(column, row) | element(column + 1, row) << 16;
    }
  })[0];
}

inline void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  simt::mma(d, {a0, a1, a2, a3, b0, b1}, math::fp32_from_fp16);
}
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  simt::mma(d, {a0, a1, a2, a3, b0, b1}, math::fp32_from_bf16);
}

using SharedAddress = const std::byte*;
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<const std::byte*>(pointer);
}
template <bool kTransposed>
void load_matrices_of_warp(SharedAddress row, uint32_t (&m)[4]) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16 != 0) simt::fail("a row of a matrix does not start on 16 bytes");
  const auto out = simt::collective(
      std::array<uint32_t, 2>{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)},
      [](simt::Warp& w) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const auto element = [&](int r, int c) {
              const auto& in = w.in[8 * i + r];
              uint16_t bits;
              std::memcpy(&bits,
                          reinterpret_cast<const std::byte*>(uint64_t{in[1]} << 32 | in[0]) + 2 * c,
                          sizeof bits);
              return uint32_t{bits};
            };
            const int r = lane / 4, c = 2 * (lane % 4);
            w.out[lane][i] = kTransposed ? element(c, r) | element(c + 1, r) << 16
                                         : element(r, c) | element(r, c + 1) << 16;
          }
        }
      });
  for (int i = 0; i < 4; ++i) m[i] = out[i];
}
inline void load_matrices(SharedAddress row, uint32_t (&m)[4]) {
  load_matrices_of_warp<false>(row, m);
}
inline void load_matrices_transposed(SharedAddress row, uint32_t (&m)[4]) {
  load_matrices_of_warp<true>(row, m);
}

inline uint32_t bits_of(float x) { return simt::bits(x); }
inline float float_of(uint32_t x) { return simt::real(x); }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  }
  return result;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float f32_from_f16(uint32_t bits) {
  return math::fp32_from_fp16(static_cast<uint16_t>(bits));
}
inline uint32_t pack_f16(float low, float high) {
  return math::fp16_from_fp32(low) | uint32_t{math::fp16_from_fp32(high)} << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return math::bf16_from_fp32(low) | uint32_t{math::bf16_from_fp32(high)} << 16;
}

inline void prefetch(const void*) {}
template <class Args>
void touch_arguments(const Args&) {}
inline void copy_async(void* to, const void* from, uint32_t bytes) {
  std::memset(to, 0xFF, bytes);
  simt::Block& block = *simt::Block::current;
  block.async_copies[block.thread_index].push_back({to, from, bytes});
}
inline void copy_async_8(void* to, const void* from) { copy_async(to, from, 8); }
inline void copy_async_16(void* to, const void* from, bool exists) {
  static constexpr std::byte kZeros[16] = {};
  copy_async(to, exists ? from : kZeros, 16);
}
inline void wait_async_copies() {
  simt::Block& block = *simt::Block::current;
  auto& copies = block.async_copies[block.thread_index];
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}
template <int kOffset>
uint32_t load_shared_word(const std::byte* shared, uint32_t offset) {
  uint32_t word;
  std::memcpy(&word, shared + kOffset + offset, sizeof word);
  return word;
}
template <int kOffset>
void load_shared_words(const std::byte* shared, uint32_t offset, uint32_t (&words)[2]) {
  words[0] = load_shared_word<kOffset>(shared, offset);
  words[1] = load_shared_word<kOffset + 4>(shared, offset);
}
inline void load_anew(const void* from, uint32_t (&words)[2]) {
  std::memcpy(words, from, sizeof words);
}
inline void expect_shared_base(const std::byte*) {}

inline void sync_block() {
  simt::Block& block = *simt::Block::current;
  block.arrive(block.block_gate, static_cast<int>(block.warps.size()) * 32, [] {});
}
inline void sync_group(int id, int threads) {
  simt::Block& block = *simt::Block::current;
  block.arrive(block.named_gates[id], threads, [] {});
}
template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void take_registers() {}
inline void launch_dependents() {}
inline void wait_dependencies() {}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  simt::CopyBarrier& b = simt::Block::current->barriers[barrier];
  b = {};
  b.arrivals = arrivals;
}
inline void barrier_arrive(uint64_t* barrier) {
  simt::CopyBarrier& b = simt::Block::current->barriers.at(barrier);
  if (++b.gate.arrived < b.arrivals) return;
  b.gate.arrived = 0;
  ++b.gate.generation;
  ++b.phase;
}
inline void fence_barrier_init() {}
inline void fence_copy_engine() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  simt::CopyBarrier& b = simt::Block::current->barriers.at(barrier);
  if (b.expected) simt::fail("a barrier expects a second copy before the first has landed");
  b.expected = true;
  b.pending_bytes = bytes;
}
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 ||
      bytes % 16 != 0 || bytes == 0) {
    simt::fail("a bulk copy is not made of 16-byte pieces");
  }
  std::memset(to, 0xFF, bytes);
  simt::CopyBarrier& b = simt::Block::current->barriers.at(barrier);
  b.copies.push_back({to, from, bytes});
  b.pending_bytes -= bytes;
  if (b.pending_bytes < 0) simt::fail("a barrier expects fewer bytes than are copied");
  if (b.pending_bytes == 0) ++b.gate.generation;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  simt::CopyBarrier& b = simt::Block::current->barriers.at(barrier);
  while (b.phase % 2 == parity) {
    if (b.arrivals > 1 || !b.expected || b.pending_bytes > 0) {
      simt::Block::current->wait(b.gate);
      continue;
    }
    for (const auto& copy : b.copies) std::memcpy(copy.to, copy.from, copy.bytes);
    b.copies.clear();
    b.expected = false;
    ++b.phase;
  }
}

}  // namespace turboquant::cuda::ptx

#include "simt_warpgroup.hpp"
