// One wrapper per instruction that CUDA C++ has no name for, or that decides a kernel's speed.
// Tests define TQ_SIMT_EMULATOR to the header of an emulator with the same functions and run the
// kernels' code on the CPU (tests/kernels/simt_emulator.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/portability.hpp"

#if defined(TQ_SIMT_EMULATOR)
#include TQ_SIMT_EMULATOR
#else

#define TQ_DEVICE __device__ __forceinline__

namespace turboquant::cuda::ptx {

TQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TQ_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
TQ_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
// The same, read anew where it is called: what is computed from it is not kept in registers across
// a loop.
TQ_DEVICE int lane_index_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
TQ_DEVICE int warp_index_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread >> 5;
}
// A zero that the compiler does not know to be one, so that what is computed with it is not what
// was computed before.
TQ_DEVICE uint32_t zero_here() {
  uint32_t zero;
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  return zero;
}
// A kernel's argument, read where it is called for the same reason.
TQ_DEVICE int argument_here(int x) {
  int y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
TQ_DEVICE bool argument_here(bool x) { return argument_here(static_cast<int>(x)) != 0; }
// Brings a kernel's arguments to the constant caches, where they are not when it starts: a line by
// every warp, instead of one after the other where each is first used.
template <class Args>
TQ_DEVICE void touch_arguments(const Args& args) {
  constexpr int kLineBytes = 64, kLines = (sizeof(Args) + kLineBytes - 1) / kLineBytes;
  const auto* const words = reinterpret_cast<const uint32_t*>(&args);
  for (int i = warp_index(); i < kLines; i += static_cast<int>(blockDim.x >> 5)) {
    asm volatile("" ::"r"(words[i * (kLineBytes / 4)]));
  }
}
TQ_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
// Read anew, as lane_index_here.
TQ_DEVICE int grid_size() {
  int size;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(size));
  return size;
}

// ---- warp
TQ_DEVICE void sync_warp() { __syncwarp(); }
TQ_DEVICE bool any(bool predicate) { return __any_sync(0xFFFFFFFFu, predicate); }
TQ_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
TQ_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
TQ_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
TQ_DEVICE uint64_t shuffle(uint64_t x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
// A number that all lanes have; where it is computed from, the compiler learns that.
TQ_DEVICE uint32_t uniform(uint32_t x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
TQ_DEVICE int shuffle_up(int x, int delta) { return __shfl_up_sync(0xFFFFFFFFu, x, delta); }
TQ_DEVICE uint32_t reduce_max(uint32_t x) { return __reduce_max_sync(0xFFFFFFFFu, x); }
TQ_DEVICE uint32_t reduce_or(uint32_t x) { return __reduce_or_sync(0xFFFFFFFFu, x); }

// Transposes an 8x8 matrix of 16-bit elements: lane 4 r + c holds elements (r, 2c) and (r, 2c + 1).
TQ_DEVICE uint32_t move_transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- tensor cores: d [16, 8] += a [16, 16] b [16, 8]. Lane 4 g + t holds
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)   pairs of columns
//   b: (2t.., g), (2t + 8.., g)                                     pairs of rows
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
TQ_DEVICE void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TQ_DEVICE void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- arithmetic
TQ_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
TQ_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
// Byte i of the result is byte (selector >> 4 i & 7) of {a, b}, a lowest.
TQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// Bits [shift, shift + 32) of {high, low}; shift < 32.
TQ_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}
// 2^x within 2 ulp, exact for whole numbers (PTX does not promise that; an H200 has it for all of
// them); 2^-inf = 0; results below the least normal number become 0.
TQ_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TQ_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The fp16 number in the low half.
TQ_DEVICE float f32_from_f16(uint32_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(static_cast<unsigned short>(bits)));
  return y;
}
// Two numbers rounded to nearest even, `low` in the low half.
TQ_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
TQ_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// ---- memory
// Starts a line of global memory on its way to the L1.
TQ_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }

// Eight bytes of global memory to shared memory without a register; this thread's have landed after
// wait_async_copies.
TQ_DEVICE void copy_async_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
// Sixteen bytes, past the L1; zeros, if they do not exist.
TQ_DEVICE void copy_async_16(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
TQ_DEVICE void wait_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two words of global memory, read where it is called: not kept in registers from an earlier call.
TQ_DEVICE void load_anew(const void* from, uint32_t (&words)[2]) {
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
}
// Dynamic shared memory of a kernel without static shared memory starts here: behind the 1 KB that
// the system keeps for itself on 9.0.
inline constexpr uint32_t kSharedBase = 1024;
TQ_DEVICE void expect_shared_base(const std::byte* shared) {
  if (__cvta_generic_to_shared(shared) != kSharedBase) __trap();
}
// The word at byte kOffset + offset of it. A base that the compiler knows is part of the
// instruction. shared: its start (of no use on a device).
template <int kOffset>
TQ_DEVICE uint32_t load_shared_word(const std::byte*, uint32_t offset) {
  uint32_t word;
  asm("ld.shared.b32 %0, [%1+%2];" : "=r"(word) : "r"(offset), "n"(kSharedBase + kOffset));
  return word;
}

// Two words likewise, on 8 bytes.
template <int kOffset>
TQ_DEVICE void load_shared_words(const std::byte*, uint32_t offset, uint32_t (&words)[2]) {
  asm("ld.shared.v2.b32 {%0, %1}, [%2+%3];"
      : "=r"(words[0]), "=r"(words[1])
      : "r"(offset), "n"(kSharedBase + kOffset));
}

// ---- synchronisation
TQ_DEVICE void sync_block() { __syncthreads(); }
// The `threads` threads that name barrier `id` (1 to 15).
TQ_DEVICE void sync_group(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Registers of this warp's threads from here on: fewer, or more once other warps have released
// them. All warps of a warpgroup together; 9.0 only.
template <int kRegisters>
TQ_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TQ_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Lets the next kernel of the stream start when every block has called it or ended; what it may
// read is up to wait_dependencies there.
TQ_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before has ended and its writes are visible.
TQ_DEVICE void wait_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- shared memory
using SharedAddress = uint32_t;
TQ_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// Four 8x8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i, 16
// bytes on 16 bytes. m[i] of lane 4 r + c is elements (r, 2c) and (r, 2c + 1) of matrix i.
TQ_DEVICE void load_matrices(SharedAddress row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
// The same of the transposed matrices.
TQ_DEVICE void load_matrices_transposed(SharedAddress row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// ---- tensor cores of a warpgroup: four warps, the first one's number a multiple of four. Their
// instructions run beside the threads; those of compute capability 9.0 only.

// Where 16-bit elements lie in shared memory: rows of 64 of them, 128 bytes apart, from a multiple
// of 1024 bytes on; 16-byte piece p of row r is at place p ^ r % 8.
using SharedMatrix = uint64_t;
TQ_DEVICE SharedMatrix shared_matrix(SharedAddress start) {
  constexpr uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
  return kSwizzle128 << 62 | kEightRows << 32 | kEightRows << 16 | (start >> 4 & 0x3FFFu);
}
// The part of a matrix that starts at any eighth row and, unswizzled, at any 32 bytes of it.
TQ_DEVICE SharedMatrix matrix_part(SharedMatrix matrix, int bytes) {
  return matrix + static_cast<uint32_t>(bytes) / 16;
}
// Nothing that is computed from these numbers moves across.
TQ_DEVICE void keep_order(float& x) { asm volatile("" : "+f"(x)::"memory"); }
TQ_DEVICE void keep_order(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, size_t kCount>
TQ_DEVICE void keep_order(T (&x)[kCount]) {
  TQ_UNROLL
  for (size_t i = 0; i < kCount; ++i) keep_order(x[i]);
}
// Orders the warpgroup's accesses to registers before later instructions' own.
TQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// What was issued since the last call is a group.
TQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups, the newest, are under way.
template <int kPending = 0>
TQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
#define TQ_TILE(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TQ_WORDS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define TQ_WORDS_16 TQ_WORDS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TQ_WORDS_32 TQ_WORDS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// d [64, 64] = a [64, 16] b [64, 16]^T (+ d). Each warp has 16 rows of d, as mma_f16 lays them out.
TQ_DEVICE void wgmma_f16(float (&d)[8][4], SharedMatrix a, SharedMatrix b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TQ_WORDS_32
      "}, %32, %33, accumulate, 1, 1, 0, 0;\n"
      "}\n"
      : TQ_TILE(0), TQ_TILE(1), TQ_TILE(2), TQ_TILE(3), TQ_TILE(4), TQ_TILE(5), TQ_TILE(6),
        TQ_TILE(7)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
// d [64, kColumns] += a [64, 16] b [16, kColumns], kColumns <= 64: a as mma_f16 has it, 16 rows a
// warp; rows of shared memory are b's rows.
template <int kColumns>
TQ_DEVICE void wgmma_f16_transposed(float (*d)[4], const uint32_t (&a)[4], SharedMatrix b) {
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64);
  if constexpr (kColumns == 16) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {" TQ_WORDS_8
                 "}, {%8,%9,%10,%11}, %12, 1, 1, 1, 1;"
                 : TQ_TILE(0), TQ_TILE(1)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kColumns == 32) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" TQ_WORDS_16
                 "}, {%16,%17,%18,%19}, %20, 1, 1, 1, 1;"
                 : TQ_TILE(0), TQ_TILE(1), TQ_TILE(2), TQ_TILE(3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" TQ_WORDS_32
                 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : TQ_TILE(0), TQ_TILE(1), TQ_TILE(2), TQ_TILE(3), TQ_TILE(4), TQ_TILE(5),
                   TQ_TILE(6), TQ_TILE(7)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}
#undef TQ_WORDS_32
#undef TQ_WORDS_16
#undef TQ_WORDS_8
#undef TQ_TILE

// ---- the bulk copy engine
TQ_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the copy engine.
TQ_DEVICE void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine.
TQ_DEVICE void fence_copy_engine() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// What this thread has read and written is done before the phase ends.
TQ_DEVICE void barrier_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// Arrives at the barrier and makes its phase wait for `bytes` more.
TQ_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
TQ_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Global to shared memory; addresses and size are multiples of 16; completes on the barrier.
TQ_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

}  // namespace turboquant::cuda::ptx

#endif
