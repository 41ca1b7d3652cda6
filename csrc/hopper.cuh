// What an H100 has beyond C++: asynchronous copies, barriers to arrive at without waiting, tensor
// cores, and the handshake between a kernel and its successor. One function an instruction, so that a
// kernel reads as plain C++; the tests run the same kernels on a CPU with these names defined
// otherwise.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace s1fast {

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- barriers -----------------------------------------------------------------------------------

// In shared memory; a phase ends when all arrivals are in.
using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
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

// -- reading memory, 16 bytes a thread -----------------------------------------------------------

// A copy to shared memory, past L1 and registers, of what is read once; zeros if it is not there.
__device__ __forceinline__ void copy_once(void* to, const void* from, bool here) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(here ? 16 : 0)
               : "memory");
}

// The same through L1, where it stays.
__device__ __forceinline__ void copy_kept(void* to, const void* from, bool here) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(here ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void end_of_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until this thread's groups are there, except the `most` youngest.
template <int most>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(most) : "memory");
}

// -- the handshake of programmatic dependent launch ----------------------------------------------

// Lets the successor start as soon as a thread of every block has come here (or the block has ended)
// and there is room for it.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the predecessor has ended and its writes are visible.
__device__ __forceinline__ void dependency_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// -- arithmetic, and memory that blocks share ----------------------------------------------------

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

// Four matrices of 8 rows x 16 bytes in shared memory; lane 8 m + r points at row r of matrix m. Lane
// 4 g + t gets of each the pair at 2t, 2t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// A value that the compiler shall keep, where it would rather compute it again and again.
template <class T>
__device__ __forceinline__ T kept(T value) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else
    asm volatile("" : "+r"(value));
  return value;
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

// The counter before one was added. What a block wrote before (the warp, if it has met) is visible
// to those that arrive after it.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The first lane's value, to all of its warp.
__device__ __forceinline__ int broadcast(int value) { return __shfl_sync(~0u, value, 0); }

// From L2, where other blocks write.
template <class T>
__device__ __forceinline__ T load_shared_by_blocks(const T* from) {
  return __ldcg(from);
}

}  // namespace s1fast
