// out[M, N] = epilogue(norm(x)[M, K] @ weight[N, K]^T) for M = 1 ... 8: decoding, where the weights
// are all there is to read.
//
//   plain            out = x W^T (+ bias) (+ residual)
//   with a norm      x * rsqrt(mean(x^2) + eps) * norm in place of x
//   with SwiGLU      silu(gate) * up; W holds N gate rows, then N up rows
//
// Bytes: 2 N K once (4 N K with SwiGLU). Floor at 3.0 TB/s and Qwen2.5-32B: qkv 7168 x 5120 24 us,
// o 5120 x 5120 17 us, gate-up 2 x 27648 x 5120 189 us, down 5120 x 27648 94 us, head 152064 x 5120
// 519 us; an eighth each under tensor parallel 8. Measured on an H100: not yet.
//
// The product runs on tensor cores with the weights as the 16-row operand and the tokens as the 8
// columns, so M costs nothing, no weight passes through an arithmetic register, and a token's result
// has the same bits whatever M and the other tokens are. The bits depend on N, K and the number of
// blocks only.
//
// The work is a row of units: 16 rows of weights times `chunk` columns, tile after tile. Every block
// takes an equal stretch of it, so all 132 multiprocessors end together whatever N and K are. A tile
// that two or more blocks share is summed by the last of them to arrive, in the blocks' order: the
// same bits every time, and nobody waits.
//
// In a block one warp copies units into a ring in shared memory, and WARPS warps take them out. What
// does not depend on the kernel before (weights, norm) is asked for ahead of the wait for it; x
// follows. The ring is less than half of a multiprocessor's memory, so the next kernel's fits beside
// it and fills while this one ends.
//
// A norm needs no pass of its own: the sum of squares grows beside the product (the diagonal of
// x x^T, on tensor cores too), travels with a shared tile's partial sums, and scales the result.
#pragma once

#ifdef __CUDACC__
#include "hopper.cuh"
#else
#include "fibers.h"  // the same names on a CPU: tests/
#endif

namespace s1fast {

constexpr int MAX_TOKENS = 8;
constexpr int ROWS = 16;  // of weights in a tile
constexpr int WARPS = 4;  // that compute; one more copies
constexpr int CONSUMERS = 32 * WARPS;
constexpr int THREADS = CONSUMERS + 32;
constexpr int LONGEST_CHUNK = 512;  // columns: 1 KB a row and copy
constexpr int SHORTEST_CHUNK = 128;
constexpr int STEP = 32;  // columns a warp takes at once, 16 bytes a thread and row
constexpr int MAX_STAGES = 16;
constexpr int SUMS = ROWS * MAX_TOKENS;  // of a tile, as [token][row]
constexpr int RECORD = SUMS + MAX_TOKENS;  // and the sum of squares of each token
// A multiprocessor has 228 KB, 1 KB of it reserved for each block; two blocks fit.
constexpr int SHARED_LIMIT = 233472 / 2 - 1024;

// What stays when the ring turns; the ring lies behind it.
struct Shared {
  float sums[2][WARPS][RECORD];
  Barrier full[MAX_STAGES], empty[MAX_STAGES];
  int last_to_arrive;
};
constexpr int RING_OFFSET = (sizeof(Shared) + 127) / 128 * 128;

// How weights lie in memory and become bf16. Narrower ones bring their own `row_bytes` and `load`
// and need no more room than bf16; the rest of the kernel does not change.
struct Bf16Weight {
  static constexpr __host__ __device__ int64_t row_bytes(int64_t columns) { return 2 * columns; }
  // Columns [column, column + 8) of a row in shared memory.
  static __device__ __forceinline__ uint4 load(const char* row, int column) {
    return *reinterpret_cast<const uint4*>(row + 2 * column);
  }
};

// The division of the work. `grid` blocks share `units` evenly.
struct Plan {
  int chunk, chunks;  // columns of a unit; units of a tile
  int units, grid;
  int pitch, stages, shared_bytes;  // bytes of a row in the ring; units in the ring; of a block
};

struct Gemv {
  const void* weight;
  const uint16_t *x, *norm, *bias, *residual;  // bf16; the last three may be null
  uint16_t* out;                               // [token][N]; rows from `live` on are not written
  const int* live;                             // tokens that are there, at most slots; null: slots
  float* partial;                              // RECORD floats, two for each block
  int* arrivals;                               // one for each block; 0 before and after
  int64_t weight_stride, x_stride, residual_stride, out_stride;  // elements between rows
  float eps;
  int slots, outputs, width;  // M, N, K
  Plan plan;
};

constexpr __host__ __device__ int tile_outputs(bool swiglu) { return swiglu ? ROWS / 2 : ROWS; }

// Half a line beyond a whole number of lines of 128 bytes: the pieces of two rows that eight threads
// read at once, 64 bytes each, then lie in different banks.
constexpr int pitch_of(int chunk) { return 2 * chunk | 64; }

constexpr __host__ __device__ int stage_bytes(int slots, bool norm, int pitch) {
  return (ROWS + norm + slots) * pitch;
}

// Longer chunks make better copies; shorter ones divide more evenly. The longest that keep all blocks
// busy 95 % of the time, or else those that come nearest.
inline Plan make_plan(int outputs, int width, int slots, bool norm, bool swiglu, int processors) {
  const int64_t tiles = (outputs + tile_outputs(swiglu) - 1) / tile_outputs(swiglu);
  Plan best{};
  double best_share = 0;
  for (int chunks = (width + LONGEST_CHUNK - 1) / LONGEST_CHUNK;; ++chunks) {
    const int chunk = ((width + chunks - 1) / chunks + STEP - 1) / STEP * STEP;
    if (best_share >= 0.95 || (best_share > 0 && chunk < SHORTEST_CHUNK)) break;
    const int used = (width + chunk - 1) / chunk;
    const int64_t units = tiles * used;
    const int64_t longest = (units + processors - 1) / processors;
    const double share = double(tiles) * width / (double(longest) * processors * chunk);
    if (share > best_share) {
      best_share = share;
      best.chunk = chunk, best.chunks = used, best.units = int(units);
    }
  }
  best.grid = best.units < processors ? best.units : processors;
  best.pitch = pitch_of(best.chunk);
  const int stage = stage_bytes(slots, norm, best.pitch);
  const int stages = (SHARED_LIMIT - RING_OFFSET) / stage;
  best.stages = stages < MAX_STAGES ? stages : MAX_STAGES;
  best.shared_bytes = RING_OFFSET + best.stages * stage;
  return best;
}

// Bytes for `partial` and `arrivals` of as many blocks.
inline int64_t workspace_bytes(int processors) {
  return int64_t(processors) * (2 * RECORD * sizeof(float) + sizeof(int));
}

__device__ __forceinline__ float bf16_to_float(uint16_t value) {
  return as_float(uint32_t(value) << 16);
}

__device__ __forceinline__ uint16_t float_to_bf16(float value) {  // to the nearest, ties to even
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays one
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// First unit of a block: the first blocks have one more, until none is left over.
__device__ __forceinline__ int first_unit(const Plan& plan, int block) {
  const int share = plan.units / plan.grid, over = plan.units % plan.grid;
  return block * share + (block < over ? block : over);
}

// The block that a unit belongs to.
__device__ __forceinline__ int block_of(const Plan& plan, int unit) {
  const int share = plan.units / plan.grid, over = plan.units % plan.grid;
  const int larger = over * (share + 1);
  return unit < larger ? unit / (share + 1) : over + (unit - larger) / share;
}

__device__ __forceinline__ int live_tokens(const Gemv& g) {
  if (g.live == nullptr) return g.slots;
  const int live = *g.live;
  return live < 0 ? 0 : live < g.slots ? live : g.slots;
}

// Where a walk along the units stands, and in which stage of the ring that unit lies.
struct Cursor {
  int unit, tile, chunk, stage;
  uint32_t parity;  // of the stage's barriers in this turn of the ring

  __device__ __forceinline__ Cursor(const Plan& plan, int start)
      : unit(start), tile(start / plan.chunks), chunk(start % plan.chunks), stage(0), parity(0) {}

  __device__ __forceinline__ void next(const Plan& plan) {
    ++unit;
    if (++chunk == plan.chunks) chunk = 0, ++tile;
    if (++stage == plan.stages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int columns_of(const Gemv& g, const Cursor& at) {
  const int left = g.width - at.chunk * g.plan.chunk;
  return left < g.plan.chunk ? left : g.plan.chunk;
}

// The copying warp: lanes 0 ... 15 own a row of weights, lane 16 the norm, those after it a token.
template <bool NORM, bool SWIGLU, class Weight>
__device__ __forceinline__ void produce(const Gemv& g, Shared& shared, char* ring, int lane,
                                        int begin, int end) {
  constexpr int OUTPUTS = tile_outputs(SWIGLU);
  const int pitch = g.plan.pitch, stride = stage_bytes(g.slots, NORM, pitch);
  const int token = lane - ROWS - NORM;
  int live = 0;

  auto constants = [&](const Cursor& at) {
    const int columns = columns_of(g, at);
    const int64_t first_column = int64_t(at.chunk) * g.plan.chunk;
    const int output = at.tile * OUTPUTS + lane % OUTPUTS;
    const int left = g.outputs - at.tile * OUTPUTS;
    const int outputs = left < OUTPUTS ? left : OUTPUTS;
    const uint32_t bytes = uint32_t(Weight::row_bytes(columns));
    char* to = ring + at.stage * stride + lane * pitch;
    if (lane == 0)
      barrier_expect(&shared.full[at.stage], bytes * outputs * (SWIGLU ? 2 : 1) + NORM * 2 * columns);
    if (lane < ROWS && output < g.outputs) {
      const int64_t row = int64_t(output) + (SWIGLU && lane >= OUTPUTS ? g.outputs : 0);
      const char* from = static_cast<const char*>(g.weight) +
                         Weight::row_bytes(row * g.weight_stride + first_column);
      copy_bulk_once(to, from, bytes, &shared.full[at.stage]);
    }
    if (NORM && lane == ROWS)
      copy_bulk(to, g.norm + first_column, 2 * columns, &shared.full[at.stage]);
  };
  auto tokens = [&](const Cursor& at) {  // ends the announcements of a stage
    const int columns = columns_of(g, at);
    if (lane == 0) barrier_arrive_expect(&shared.full[at.stage], live * 2 * columns);
    if (token >= 0 && token < live)
      copy_bulk(ring + at.stage * stride + lane * pitch,
                g.x + token * g.x_stride + int64_t(at.chunk) * g.plan.chunk, 2 * columns,
                &shared.full[at.stage]);
  };

  const int ahead = end - begin < g.plan.stages ? end : begin + g.plan.stages;
  Cursor first(g.plan, begin);
  for (; first.unit < ahead; first.next(g.plan)) constants(first);
  launch_dependents();
  dependency_wait();
  live = live_tokens(g);
  for (Cursor at(g.plan, begin); at.unit < ahead; at.next(g.plan)) tokens(at);
  for (Cursor at = first; at.unit < end; at.next(g.plan)) {
    barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
    constants(at);
    tokens(at);
  }
}

// One output from the sums of its tile, wherever these lie: value(i) of a RECORD.
template <bool NORM, bool SWIGLU, class Value>
__device__ __forceinline__ void write_output(const Gemv& g, int tile, int live, int thread,
                                             Value value) {
  constexpr int OUTPUTS = tile_outputs(SWIGLU);
  const int token = thread / OUTPUTS, row = thread % OUTPUTS;
  const int output = tile * OUTPUTS + row;
  if (token >= live || output >= g.outputs) return;
  const float scale = NORM ? inverse_root(value(SUMS + token) / g.width + g.eps) : 1.0f;
  float y = scale * value(token * ROWS + row);
  if (SWIGLU) y = y / (1.0f + exponential(-y)) * (scale * value(token * ROWS + row + OUTPUTS));
  if (g.bias != nullptr) y += bf16_to_float(g.bias[output]);
  if (g.residual != nullptr) y += bf16_to_float(g.residual[token * g.residual_stride + output]);
  g.out[token * g.out_stride + output] = float_to_bf16(y);
}

// Adds the warps' sums of a tile, or of this block's part of it, and hands them on.
template <bool NORM, bool SWIGLU>
__device__ __forceinline__ void finish_tile(const Gemv& g, Shared& shared, const float (*sums)[RECORD],
                                            int tile, int live, int thread) {
  group_sync<CONSUMERS>();
  auto in_block = [&](int i) {
    float total = sums[0][i];
    for (int warp = 1; warp < WARPS; ++warp) total += sums[warp][i];
    return total;
  };
  const int first_of_tile = tile * g.plan.chunks;
  const int first = block_of(g.plan, first_of_tile);
  const int last = block_of(g.plan, first_of_tile + g.plan.chunks - 1);
  if (first == last) return write_output<NORM, SWIGLU>(g, tile, live, thread, in_block);

  // A block shares at most two tiles: that in which its stretch begins, and that in which it ends,
  // of which it is the first block.
  auto record = [&](int block) { return g.partial + int64_t(2 * block + (block == first)) * RECORD; };
  float* mine = record(blockIdx.x);
  for (int i = thread; i < (NORM ? RECORD : SUMS); i += CONSUMERS) mine[i] = in_block(i);
  __threadfence();
  group_sync<CONSUMERS>();
  if (thread == 0) shared.last_to_arrive = atomicAdd(&g.arrivals[first], 1) == last - first;
  group_sync<CONSUMERS>();
  if (!shared.last_to_arrive) return;
  __threadfence();
  if (thread == 0) g.arrivals[first] = 0;  // for the next launch
  write_output<NORM, SWIGLU>(g, tile, live, thread, [&](int i) {
    float total = load_shared_by_blocks(record(first) + i);
    for (int block = first + 1; block <= last; ++block)
      total += load_shared_by_blocks(record(block) + i);
    return total;
  });
}

// A computing warp: every WARPS-th step of each chunk.
template <bool NORM, bool SWIGLU, class Weight>
__device__ __forceinline__ void consume(const Gemv& g, Shared& shared, const char* ring, int thread,
                                        int begin, int end) {
  launch_dependents();
  dependency_wait();
  const int live = live_tokens(g);
  const int warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, quarter = lane % 4;  // of the rows; of a step's columns
  const int pitch = g.plan.pitch, stride = stage_bytes(g.slots, NORM, pitch);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  float product[4] = {}, squares[4] = {};
  int turn = 0;
  for (Cursor at(g.plan, begin); at.unit < end; at.next(g.plan)) {
    barrier_wait(&shared.full[at.stage], at.parity);
    const char* stage = ring + at.stage * stride;
    const int columns = columns_of(g, at);
#pragma unroll 2
    for (int step = warp * STEP; step < columns; step += WARPS * STEP) {
      const int column = step + 8 * quarter;
      // Beyond the last column lies what a longer unit left, which may be NaN: not read.
      const bool here = column < columns;
      const uint4 upper = here ? Weight::load(stage + group * pitch, column) : zero;
      const uint4 lower = here ? Weight::load(stage + (group + 8) * pitch, column) : zero;
      const char* row = stage + (ROWS + NORM + group) * pitch;
      uint4 x = here && group < live ? Bf16Weight::load(row, column) : zero;
      if (NORM) {
        mma(squares, x.x, 0, x.y, 0, x.x, x.y);
        mma(squares, x.z, 0, x.w, 0, x.z, x.w);
        const uint4 scale = here ? Bf16Weight::load(stage + ROWS * pitch, column) : zero;
        x = make_uint4(multiply_pairs(x.x, scale.x), multiply_pairs(x.y, scale.y),
                       multiply_pairs(x.z, scale.z), multiply_pairs(x.w, scale.w));
      }
      // The order of columns is free as long as both operands have the same one.
      mma(product, upper.x, lower.x, upper.y, lower.y, x.x, x.y);
      mma(product, upper.z, lower.z, upper.w, lower.w, x.z, x.w);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[at.stage]);

    if (at.chunk + 1 < g.plan.chunks && at.unit + 1 < end) continue;
    // Two sets of sums in turn: one may still be read while the other is written.
    float* sums = shared.sums[turn][warp];
    for (int i = 0; i < 4; ++i)
      sums[(2 * quarter + i % 2) * ROWS + group + i / 2 * 8] = product[i];
    if (NORM && group / 2 == quarter) sums[SUMS + group] = group % 2 ? squares[1] : squares[0];
    finish_tile<NORM, SWIGLU>(g, shared, shared.sums[turn], at.tile, live, thread);
    for (int i = 0; i < 4; ++i) product[i] = squares[i] = 0;
    turn ^= 1;
  }
}

template <bool NORM, bool SWIGLU, class Weight = Bf16Weight>
__global__ void __launch_bounds__(THREADS) gemv_kernel(const __grid_constant__ Gemv g) {
  char* memory = dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  char* ring = memory + RING_OFFSET;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < g.plan.stages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], WARPS);
    }
    barriers_ready();
  }
  __syncthreads();
  const int begin = first_unit(g.plan, blockIdx.x), end = first_unit(g.plan, blockIdx.x + 1);
  if (thread < CONSUMERS)
    consume<NORM, SWIGLU, Weight>(g, shared, ring, thread, begin, end);
  else
    produce<NORM, SWIGLU, Weight>(g, shared, ring, thread - CONSUMERS, begin, end);
}

}  // namespace s1fast
