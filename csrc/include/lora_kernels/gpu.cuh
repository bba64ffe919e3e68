// The few things a kernel asks of the machine: PTX under nvcc, fibers on a CPU under a host compiler (tests/csrc/emu.h).
#pragma once
#include <cstdint>

namespace gpu {
struct alignas(16) Chunk {
  uint32_t w[4];
};
struct alignas(8) Pair {
  uint32_t w[2];
};
}  // namespace gpu

#if !defined(__CUDACC__)
#include "emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LORA_DEVICE __device__ __forceinline__
#define LORA_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define LORA_PARAM const __grid_constant__
#define LORA_UNROLL _Pragma("unroll")
#define LORA_UNROLL_4 _Pragma("unroll 4")
#define LORA_UNROLL_1 _Pragma("unroll 1")

namespace gpu {

LORA_DEVICE int thread() { return threadIdx.x; }
LORA_DEVICE int block() { return blockIdx.x; }
LORA_DEVICE int blocks() { return gridDim.x; }
LORA_DEVICE char* shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
LORA_DEVICE uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

template <int THREADS>
LORA_DEVICE void sync_block(int barrier) {  // the first THREADS threads
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
LORA_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }
LORA_DEVICE void sync_warp() { __syncwarp(); }

// Global memory. `published`: written by another block of this launch, and acquired; past L1, which may hold older bytes.
LORA_DEVICE Chunk load(const void* p) {
  Chunk c;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(c.w[0]), "=r"(c.w[1]), "=r"(c.w[2]), "=r"(c.w[3]) : "l"(p));
  return c;
}
LORA_DEVICE Chunk load_cached(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
LORA_DEVICE Chunk load_published(const void* p) {
  Chunk c;
  asm volatile("ld.global.cg.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(c.w[0]), "=r"(c.w[1]), "=r"(c.w[2]), "=r"(c.w[3]) : "l"(p) : "memory");
  return c;
}
LORA_DEVICE Pair load_pair_published(const void* p) {
  Pair c;
  asm volatile("ld.global.cg.v2.b32 {%0,%1}, [%2];" : "=r"(c.w[0]), "=r"(c.w[1]) : "l"(p) : "memory");
  return c;
}
LORA_DEVICE void publish(void* p, Chunk c) { *static_cast<uint4*>(p) = make_uint4(c.w[0], c.w[1], c.w[2], c.w[3]); }
LORA_DEVICE void publish(void* p, Pair c) { *static_cast<uint2*>(p) = make_uint2(c.w[0], c.w[1]); }
LORA_DEVICE void store(void* p, Chunk c) { *static_cast<uint4*>(p) = make_uint4(c.w[0], c.w[1], c.w[2], c.w[3]); }
LORA_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Counters. The barrier before an add makes the whole block's (warp's) writes part of what it releases.
LORA_DEVICE int add_acq_rel(int32_t* p, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
LORA_DEVICE int load_acquire(const int32_t* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
LORA_DEVICE void reset(int32_t* p) { asm volatile("st.relaxed.gpu.global.s32 [%0], 0;" ::"l"(p) : "memory"); }
LORA_DEVICE void pause() { __nanosleep(64); }

// Shared memory.
LORA_DEVICE Chunk load_shared(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// Copies of 16 bytes, every thread its own (sm_80). W passes through L2 once, and gives way there to what is read again.
LORA_DEVICE uint64_t streaming_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
LORA_DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}
LORA_DEVICE void copy16_streaming(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "l"(policy)
               : "memory");
}
LORA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
LORA_DEVICE void wait_copies_but() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }
LORA_DEVICE void wait_copies(int groups_left) {  // uniform: one of seven immediates
  switch (groups_left) {
    case 0: return wait_copies_but<0>();
    case 1: return wait_copies_but<1>();
    case 2: return wait_copies_but<2>();
    case 3: return wait_copies_but<3>();
    case 4: return wait_copies_but<4>();
    case 5: return wait_copies_but<5>();
    default: return wait_copies_but<6>();
  }
}

// Bulk copies and their barriers: what is compiled for sm_90 and later has them, and then no other ring.
#if __CUDA_ARCH__ >= 900
template <bool BULK> constexpr bool RUNS = BULK;
#else
template <bool BULK> constexpr bool RUNS = !BULK;
#endif
LORA_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}
LORA_DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LORA_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
LORA_DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
LORA_DEVICE void barrier_wait(uint64_t* barrier, int parity) {  // until the phase of this parity is over
  uint32_t over;
  do {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over) : "r"(address(barrier)), "r"(parity) : "memory");
  } while (!over);
}
LORA_DEVICE void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}
LORA_DEVICE void bulk_copy_streaming(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)), "l"(policy) : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), fragments as PTX lays out mma.m16n8k16.
#define LORA_MMA(TYPE)                                                                                          \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "     \
               "{%8,%9}, {%0,%1,%2,%3};"                                                                        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

struct Bfloat16 {
  static LORA_DEVICE float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  static LORA_DEVICE uint16_t narrow(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static LORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { LORA_MMA("bf16"); }
};
struct Half {
  static LORA_DEVICE float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static LORA_DEVICE uint16_t narrow(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static LORA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { LORA_MMA("f16"); }
};
LORA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
LORA_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

}  // namespace gpu
#endif
