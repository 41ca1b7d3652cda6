// What an H100 has beyond C++: asynchronous copies, barriers that count bytes, tensor cores, and the
// handshake between a kernel and its successor. One function an instruction, so that a kernel reads
// as plain C++; the tests run the same kernels on a CPU with these names defined otherwise.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace s1fast {

// A barrier in shared memory whose phase ends when all arrivals and all announced bytes are in.
using Barrier = uint64_t;

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- barriers -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes the barriers that this thread has set up known to the copy engine.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Announces bytes without arriving: the phase cannot end before somebody arrives.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of that parity (the first one is 0) has ended.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Among the first `threads` threads of the block, whole warps; the others do not take part.
template <int threads>
__device__ __forceinline__ void group_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}

// -- bulk copies: device to shared memory, past L1, without a register; in units of 16 bytes -----

__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier* told) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(told))
      : "memory");
}

// The same for what is read once: it is the first to leave L2.
__device__ __forceinline__ void copy_bulk_once(void* to, const void* from, uint32_t bytes,
                                               Barrier* told) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(told)), "l"(policy)
      : "memory");
}

// -- the handshake of programmatic dependent launch ----------------------------------------------

// Lets the successor start as soon as every block has come here and there is room for it.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the predecessor has ended and its writes are visible, to bulk copies too.
__device__ __forceinline__ void dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// -- arithmetic and memory ----------------------------------------------------------------------

// c[16, 8] += a[16, 16] b[16, 8] by a warp; lane 4 g + t holds
//   a: row g at 2t, 2t + 1; row g + 8 likewise; row g at 2t + 8, 2t + 9; row g + 8 likewise
//   b: column g at 2t, 2t + 1; at 2t + 8, 2t + 9
//   c: row g in columns 2t, 2t + 1; row g + 8 likewise
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Products of two pairs of bf16, rounded once.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }

// From L2, where other blocks write.
__device__ __forceinline__ float load_shared_by_blocks(const float* from) { return __ldcg(from); }

}  // namespace s1fast
