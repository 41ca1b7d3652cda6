// Runs a kernel of csrc/ on a CPU: a fiber for each thread of a block, block after block.
//
// Defines the names of csrc/hopper.cuh and of CUDA that the kernels use. What it is strict about:
//   - shared memory starts as NaN; device memory is the caller's (run under sanitizers);
//   - copies are late (done when their thread has waited for them and then meets its warp) or early
//     (done at once), so that reading too soon and overwriting too soon both show; addresses must
//     divide by 16;
//   - what a kernel before this one writes is NaN until a block has waited for it;
//   - warps fall asleep for a while, so that one may be far behind another;
//   - a barrier that not all reach, or a copy that nobody waits for, ends the program with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct float4 {
  float x, y, z, w;
};

namespace fibers {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr int WARP = 32;

struct Index {
  int x;
};

struct Copy {  // of 16 bytes, or zeros
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;  // kept from block to block
  bool done = false;
  uint32_t fragment[6];  // what this lane brings to a product of its warp
  int word;              // what it brings to an exchange
  const void* rows[2];   // where it points, at even and at odd loads
  int loads = 0;
  std::vector<Copy> copies;              // asked for, their group not ended
  std::deque<std::vector<Copy>> groups;  // ended, and not waited for
  std::vector<Copy> awaited;             // done when the warp meets next
};

struct Meeting {  // of `size` threads, again and again
  int arrived = 0, rounds = 0;
};

inline std::vector<Fiber> threads;

struct Block {
  std::vector<Meeting> warps;
  Meeting everyone;
  std::vector<char> shared;
  bool waited = false;  // for the kernel before
};

inline Block* block;
inline int current;
inline Index thread_index, block_index, grid_size;
inline ucontext_t scheduler;
inline bool moved;  // somebody got on since the scheduler last looked
inline bool early_copies;
inline std::function<void()> kernel, before_dependency, on_dependency;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %d, thread %d: %s\n", block_index.x, current, what);
  std::exit(3);
}

inline void yield() { swapcontext(&threads[current].context, &scheduler); }

template <class Condition>
void wait_until(Condition holds) {
  while (!holds()) yield();
  moved = true;
}

inline void meet(Meeting& meeting, int size) {
  const int round = meeting.rounds;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.rounds;
    moved = true;
  } else {
    wait_until([&] { return meeting.rounds != round; });
  }
}

inline void meet_warp() { meet(block->warps[current / WARP], WARP); }

inline void entry() {
  kernel();
  threads[current].done = moved = true;
}

// A barrier's 64 bits.
struct State {
  int32_t missing;
  uint16_t arrivals, phase;
};
static_assert(sizeof(State) == 8);

inline void perform(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

inline void run_block(int index, int num_threads, size_t shared_bytes, std::mt19937& random) {
  Block here;
  block = &here;
  block_index.x = index;
  threads.resize(num_threads);
  here.warps.resize(num_threads / WARP);
  here.shared.assign(shared_bytes + 128, char(0xff));  // NaN, whatever it is read as
  if (before_dependency) before_dependency();
  for (Fiber& fiber : threads) {
    fiber.done = false;
    fiber.loads = 0;
    fiber.stack.resize(STACK_BYTES);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<int> order(num_threads);
  for (int i = 0; i < num_threads; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int> asleep(here.warps.size(), 0);  // for so many rounds
  moved = true;
  for (int left = num_threads; left > 0;) {
    for (int& rounds : asleep)  // all are woken before it is said that nobody can go on
      rounds = !moved ? 0 : rounds ? rounds - 1 : random() % 16 ? 0 : int(random() % 64);
    const bool all_awake = std::count(asleep.begin(), asleep.end(), 0) == int(asleep.size());
    moved = false;
    for (int i : order) {
      if (threads[i].done || asleep[i / WARP]) continue;
      current = thread_index.x = i;
      swapcontext(&scheduler, &threads[i].context);
      left -= threads[i].done;
    }
    if (!moved && all_awake) fail("nobody can go on: a barrier that some do not reach");
  }
  for (Fiber& fiber : threads) {
    for (const std::vector<Copy>& group : fiber.groups)
      if (!group.empty()) fail("the block ended with copies under way");
    if (!fiber.awaited.empty()) fail("the block ended with copies that its warp has not met over");
    if (!fiber.copies.empty()) fail("the block ended with copies that belong to no group");
    fiber.groups.clear();
  }
}

// Blocks run in an order drawn from the seed.
inline void launch(int grid, int num_threads, size_t shared_bytes, uint32_t seed,
                   std::function<void()> body) {
  std::mt19937 random(seed);
  std::vector<int> order(grid);
  for (int i = 0; i < grid; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  kernel = std::move(body);
  grid_size.x = grid;
  for (int index : order) run_block(index, num_threads, shared_bytes, random);
}

}  // namespace fibers

#define threadIdx fibers::thread_index
#define blockIdx fibers::block_index
#define gridDim fibers::grid_size

inline void __syncthreads() {
  fibers::meet(fibers::block->everyone, int(fibers::threads.size()));
}
inline void __syncwarp() {
  std::vector<fibers::Copy>& awaited = fibers::threads[fibers::current].awaited;
  for (const fibers::Copy& copy : awaited) fibers::perform(copy);
  awaited.clear();
  fibers::meet_warp();
}

namespace s1fast {

using Barrier = uint64_t;

inline char* dynamic_shared() {
  char* start = fibers::block->shared.data();
  return start + (128 - reinterpret_cast<uintptr_t>(start) % 128) % 128;
}

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  const fibers::State state{int32_t(arrivals), uint16_t(arrivals), 0};
  std::memcpy(barrier, &state, sizeof state);
}
inline void barrier_arrive(Barrier* barrier) {
  fibers::State state;
  std::memcpy(&state, barrier, sizeof state);
  if (--state.missing == 0) {
    state.missing = state.arrivals;
    state.phase ^= 1;
    fibers::moved = true;
  }
  std::memcpy(barrier, &state, sizeof state);
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  fibers::wait_until([&] {
    fibers::State state;
    std::memcpy(&state, barrier, sizeof state);
    return state.phase != parity;
  });
}

inline void copy_once(void* to, const void* from, bool here) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16)
    fibers::fail("a copy whose ends do not divide by 16");
  const fibers::Copy copy{to, here ? from : nullptr};
  if (fibers::early_copies)
    fibers::perform(copy);
  else
    fibers::threads[fibers::current].copies.push_back(copy);
}
inline void copy_kept(void* to, const void* from, bool here) { copy_once(to, from, here); }
inline void end_of_group() {
  fibers::Fiber& fiber = fibers::threads[fibers::current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int most>
void wait_for_groups() {
  std::deque<std::vector<fibers::Copy>>& groups = fibers::threads[fibers::current].groups;
  std::vector<fibers::Copy>& awaited = fibers::threads[fibers::current].awaited;
  for (; groups.size() > most; groups.pop_front())
    awaited.insert(awaited.end(), groups.front().begin(), groups.front().end());
}

inline void launch_dependents() {}
inline void dependency_wait() {
  if (!fibers::block->waited && fibers::on_dependency) fibers::on_dependency();
  fibers::block->waited = true;
}

template <class T>
T kept(T value) {
  return value;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float half_of_pair(uint32_t pair, int index) {
  return as_float(index ? pair & 0xffff0000u : pair << 16);
}
inline float exponential(float x) { return std::exp(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline int arrive(int* counter) { return (*counter)++; }
template <class T>
T load_shared_by_blocks(const T* from) {
  return *from;
}
inline int broadcast(int value) {
  fibers::threads[fibers::current].word = value;
  fibers::meet_warp();
  const int first = fibers::threads[fibers::current / fibers::WARP * fibers::WARP].word;
  fibers::meet_warp();
  return first;
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 2; ++i) {  // the product of two bf16 is exact in fp32: one rounding
    const uint32_t bits = as_bits(half_of_pair(a, i) * half_of_pair(b, i));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? bits >> 16 | 0x40 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    product |= rounded << 16 * i;
  }
  return product;
}

// Nobody waits for the others to have read: a lane may be one load, or a copy, ahead of them.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if (uintptr_t(row) % 16) fibers::fail("a matrix's row that does not begin at a multiple of 16");
  const int turn = fibers::threads[fibers::current].loads++ % 2;
  fibers::threads[fibers::current].rows[turn] = row;
  fibers::meet_warp();
  const int first = fibers::current / fibers::WARP * fibers::WARP;
  const int group = fibers::current % fibers::WARP / 4, quarter = fibers::current % 4;
  for (int i = 0; i < 4; ++i) {
    const void* from = fibers::threads[first + 8 * i + group].rows[turn];
    std::memcpy(&to[i], static_cast<const char*>(from) + 4 * quarter, 4);
  }
}

// The layout of fragments is that of hopper.cuh's comment.
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(fibers::threads[fibers::current].fragment, mine, sizeof mine);
  fibers::meet_warp();
  const int first = fibers::current / fibers::WARP * fibers::WARP;
  const int group = fibers::current % fibers::WARP / 4, quarter = fibers::current % 4;
  const fibers::Fiber* lanes = fibers::threads.data() + first;
  for (int i = 0; i < 4; ++i) {
    const int row = group, lower = i / 2, column = 2 * quarter + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2, upper = k / 8;
      sum += half_of_pair(lanes[4 * row + lane].fragment[2 * upper + lower], k % 2) *
             half_of_pair(lanes[4 * column + lane].fragment[4 + upper], k % 2);
    }
    c[i] += sum;
  }
  fibers::meet_warp();
}

}  // namespace s1fast
