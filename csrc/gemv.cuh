// out[M, N] = epilogue(norm(x)[M, K] @ weight[N, K]^T) for M = 1 ... 8: decoding, where the weights
// are all there is to read.
//
//   plain            out = x W^T (+ bias) (+ residual)
//   with a norm      x * rsqrt(mean(x^2) + eps) * norm in place of x
//   with SwiGLU      silu(gate) * up; W holds N gate rows, then N up rows
//
// Bytes: 2 N K once (4 N K with SwiGLU). Floor at 3.0 TB/s and Qwen2.5-32B: qkv 7168 x 5120 24 us,
// o 5120 x 5120 17 us, gate-up 2 x 27648 x 5120 189 us, down 5120 x 27648 94 us, head 152064 x 5120
// 519 us; an eighth each under tensor parallel 8. On an H200 (read roof 4.5 TB/s) at M 1: qkv 21 us, o
// 17, gate-up 137, down 72, head 364; at M 8 within a percent, o and down within 3.
//
// The product runs on tensor cores with the weights as the 16-row operand and the tokens as the 8
// columns, so M costs nothing, no weight passes through an arithmetic register, and a token's result
// has the same bits whatever M and the other tokens are. The bits depend on N, K and the number of
// blocks only.
//
// The work is a row of steps: ROWS rows of weights times COLUMNS columns, tile after tile. Every block
// takes an equal stretch of it, so all multiprocessors end together whatever N and K are. A tile that
// two or more blocks share is summed by the last of them to arrive, in the blocks' order: the same
// bits every time, and nobody waits.
//
// In a block WARPS warps stream: steps are dealt to them in turn, and each has asked memory for the
// next DEPTH of its own, beyond the tile's end too: for weights and, so that nobody ever waits for
// them, for the tokens and the norm. What a warp has asked for it waits for alone. One more warp
// finishes tiles.
//
// The weights do not depend on the kernel before and are asked for ahead of the wait for it. The next
// kernel may start as soon as this one has asked for its first bytes: its block comes to a
// multiprocessor when this kernel's has ended there (KERNELS 1; with 2, half as much in flight, both
// have room at once). So memory works while other blocks add up, end and hand over.
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

constexpr int WARPS = 8;      // that stream
constexpr int BLOCKS = 1;     // on a multiprocessor
constexpr int KERNELS = 1;    // of which a multiprocessor has blocks at a time; 2: the next one too
constexpr int FRAGMENTS = 2;  // of 16 rows in a tile: what is read of x serves all of them
constexpr int COLUMNS = 64;   // of a step: half a line of memory, or a whole one
constexpr int DEPTH = 4;      // steps that a warp has asked for and not used

constexpr int THREADS = 32 * (WARPS + 1);
constexpr int ROWS = 16 * FRAGMENTS;       // of weights in a tile
constexpr int PIECES = COLUMNS / 8;        // of 16 bytes in a row of a step
constexpr int ROUND = 32 / PIECES;         // rows that a warp copies at once
constexpr int SUMS = ROWS * MAX_TOKENS;    // of a tile, as [fragment][token][place]
constexpr int RECORD = SUMS + MAX_TOKENS;  // and the sum of squares of each token
static_assert(PIECES == 4 || PIECES == 8);

// What a warp has of a step. Rows and pieces lie as `position` says.
struct Slot {
  uint4 weights[ROWS * PIECES], x[MAX_TOKENS * PIECES], norm[PIECES];
};

// Where a row's piece lies: such that a piece of each of 8 rows, read at once, is in banks of its own.
constexpr __device__ __forceinline__ int position(int row, int piece) {
  return row * PIECES + (piece ^ row / (8 / PIECES) % PIECES);
}

struct Shared {
  Slot ring[WARPS][DEPTH];
  float sums[2][WARPS][RECORD];
  Barrier full[2], empty[2];
};

// Of a multiprocessor's memory, 256 KB of which at most 228 may be shared, what the blocks
// need, a KB beside each; the rest is L1, where x stays. Rounded down: the hardware's division rounds
// up again.
constexpr int SHARED_PERCENT = int(KERNELS * BLOCKS * (sizeof(Shared) + 1024) * 100 / 233472);
static_assert(SHARED_PERCENT < 100);

// How weights lie in memory, and come from a step to the tensor cores. Narrower ones bring their own;
// the rest of the kernel does not change.
struct Bf16Weight {
  static constexpr __host__ __device__ int64_t row_bytes(int64_t columns) { return 2 * columns; }
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const char* row) {
    load_matrices(a, row);
  }
};

// The division of the work: every block takes `share` steps, the first `over` blocks one more. What a
// block would have to divide for before it can ask for anything is divided here.
struct Plan {
  int steps_of_tile, grid, share, over;
  int tiles_apart, steps_apart;  // from one step of a warp to its next: WARPS, as tiles and a rest
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

inline Plan make_plan(int outputs, int width, bool swiglu, int processors) {
  const int tiles = (outputs + tile_outputs(swiglu) - 1) / tile_outputs(swiglu);
  Plan plan{};
  plan.steps_of_tile = (width + COLUMNS - 1) / COLUMNS;
  const int steps = tiles * plan.steps_of_tile, most = BLOCKS * processors;
  plan.grid = steps < most ? steps : most;
  plan.share = steps / plan.grid;
  plan.over = steps % plan.grid;
  plan.tiles_apart = WARPS / plan.steps_of_tile;
  plan.steps_apart = WARPS % plan.steps_of_tile;
  return plan;
}

// The workspace is `arrivals`, then `partial`, of which 16 bytes are read at once.
inline int64_t arrivals_bytes(int processors) { return (BLOCKS * processors + 3) / 4 * 16; }
inline int64_t workspace_bytes(int processors) {
  return arrivals_bytes(processors) + int64_t(BLOCKS) * processors * 2 * RECORD * sizeof(float);
}

__device__ __forceinline__ float bf16_to_float(uint16_t value) {
  return as_float(uint32_t(value) << 16);
}

__device__ __forceinline__ uint16_t float_to_bf16(float value) {  // to the nearest, ties to even
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays one
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ int first_step(const Plan& plan, int block) {
  return block * plan.share + (block < plan.over ? block : plan.over);
}

// The block that a step belongs to.
__device__ __forceinline__ int block_of(const Plan& plan, int step) {
  const int larger = plan.over * (plan.share + 1);
  if (step < larger) return step / (plan.share + 1);
  return plan.over + (step - larger) / plan.share;
}

__device__ __forceinline__ int live_tokens(const Gemv& g) {
  if (g.live == nullptr) return g.slots;
  const int live = *g.live;
  return live < 0 ? 0 : live < g.slots ? live : g.slots;
}

// The output that a place of a tile belongs to. With SwiGLU a gate's place is before its up's.
template <bool SWIGLU>
__device__ __forceinline__ int output_of(int tile, int place) {
  return tile * tile_outputs(SWIGLU) + (SWIGLU ? place / 2 : place);
}

// -- streaming ----------------------------------------------------------------------------------

// Where a warp stands among the steps that are dealt to it.
struct Walk {
  int tile, step;

  __device__ __forceinline__ Walk(const Plan& plan, int start)
      : tile(start / plan.steps_of_tile), step(start % plan.steps_of_tile) {}

  // True if that is another tile.
  __device__ __forceinline__ bool next(const Plan& plan) {
    const int before = tile;
    tile += plan.tiles_apart, step += plan.steps_apart;
    if (step >= plan.steps_of_tile) step -= plan.steps_of_tile, ++tile;
    return tile != before;
  }
};

// Asks for one step after another. A lane copies the same piece of every ROUND-th row. Of a fragment's
// 16 rows the first 8 are the even places, then come the odd ones.
template <bool NORM, bool SWIGLU, class Weight>
struct Asking {
  Walk at;
  int outputs;          // from the one of the lane's first place on
  const char* rows[2];  // where the weights of its first even and odd place begin
  const uint16_t *x, *norm;
  int apart;          // bytes from a row to the next
  int to[8 / ROUND];  // where the lane's piece goes, in bytes: of rows whose banks differ

  __device__ __forceinline__ Asking(const Gemv& g, int lane, int start) : at(g.plan, start) {
    const int row = lane / PIECES, piece = lane % PIECES;
    x = kept(g.x + row * g.x_stride + piece * 8);
    norm = kept(g.norm + piece * 8);
    apart = kept(int(Weight::row_bytes(g.weight_stride)));
    for (int i = 0; i < 8 / ROUND; ++i)
      to[i] = kept(int(sizeof(uint4)) * position(i * ROUND + row, piece));
    find_rows(g, lane);
  }

  __device__ __forceinline__ void find_rows(const Gemv& g, int lane) {
    const int first = output_of<SWIGLU>(at.tile, lane / PIECES * 2);
    outputs = g.outputs - first;
    rows[0] = static_cast<const char*>(g.weight) +
              Weight::row_bytes(first * g.weight_stride + lane % PIECES * 8);
    rows[1] = rows[0] + (SWIGLU ? g.outputs : 1) * int64_t(apart);
  }

  // A place in an array of pieces for `row` and those after it, one for each lane's.
  __device__ __forceinline__ void* place(uint4* pieces, int row) const {
    return reinterpret_cast<char*>(pieces + row / 8 * 8 * PIECES) + to[row % 8 / ROUND];
  }

  // The weights and the norm; a row that is not there is zeros.
  __device__ __forceinline__ void for_weights(const Gemv& g, int lane, Slot& slot) const {
    const int column = at.step * COLUMNS;
    const bool here = column + lane % PIECES * 8 < g.width;
    const int there = here ? outputs : 0;
#pragma unroll
    for (int row = 0; row < ROWS; row += ROUND) {
      const int odd = row % 16 / 8, even_place = row / 16 * 16 + row % 8 * 2;
      const int further = SWIGLU ? even_place / 2 : even_place;
      copy_once(place(slot.weights, row),
                rows[odd] + Weight::row_bytes(column) + further * int64_t(apart),
                further + (SWIGLU ? 0 : odd) < there);
    }
    if (NORM && lane < PIECES) copy_kept(place(slot.norm, 0), norm + column, here);
  }

  // The tokens; those that are not live are zeros.
  __device__ __forceinline__ void for_tokens(const Gemv& g, int step, int lane, int live,
                                             Slot& slot) const {
    const int column = step * COLUMNS;
    const int there = column + lane % PIECES * 8 < g.width ? live - lane / PIECES : 0;
#pragma unroll
    for (int row = 0; row < MAX_TOKENS; row += ROUND)
      copy_kept(place(slot.x, row), x + column + row * g.x_stride, row < there);
  }

  __device__ __forceinline__ void next(const Gemv& g, int lane) {
    if (at.next(g.plan)) find_rows(g, lane);
  }
};

// A warp's sums of a tile as they grow, in the layout of `mma`.
struct Running {
  float product[FRAGMENTS][4] = {}, squares[4] = {};
};

// Where the rows are that a lane points at, in bytes of a slot: row lane % 8 of matrix lane / 8, and
// piece 0 ... 3. Four pieces further is 64 bytes away, up or down.
struct Pointing {
  int weights[2], x, norm;

  __device__ __forceinline__ explicit Pointing(int lane) {
    const int row = lane % 8, matrix = lane / 8, piece_bytes = int(sizeof(uint4));
    x = kept(int(offsetof(Slot, x)) + piece_bytes * position(row, matrix));
    norm = kept(int(offsetof(Slot, norm)) + piece_bytes * matrix);
    for (int i = 0; i < 2; ++i)
      weights[i] = kept(piece_bytes * position(matrix % 2 * 8 + row, 2 * i + matrix / 2));
  }
};

// 32 columns of a step as the tensor cores take them: of each of four pieces the lane's pair.
template <bool NORM, class Weight>
struct Taken {
  uint32_t weights[2][FRAGMENTS][4], x[4], norm[4];

  __device__ __forceinline__ Taken(const Slot& slot, const Pointing& at, int part) {
    const char* base = reinterpret_cast<const char*>(&slot);
    load_matrices(x, base + (at.x ^ 64 * part));
    if (NORM) load_matrices(norm, base + at.norm + 64 * part);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
        Weight::fragment(weights[i][f], base + (at.weights[i] ^ 64 * part) + 256 * PIECES * f);
  }

  __device__ __forceinline__ void multiply(Running& sums) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t low = x[2 * i], high = x[2 * i + 1];
      if (NORM) {
        mma(sums.squares, low, 0, high, 0, low, high);
        low = multiply_pairs(low, norm[2 * i]);
        high = multiply_pairs(high, norm[2 * i + 1]);
      }
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) {
        const uint32_t(&a)[4] = weights[i][f];
        mma(sums.product[f], a[0], a[1], a[2], a[3], low, high);
      }
    }
  }
};

// A warp's sums as a record, in which four places of a token lie side by side.
template <bool NORM>
__device__ __forceinline__ void put(const Running& sums, float* record, int lane) {
  const int group = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int i = 0; i < 4 * FRAGMENTS; ++i) {
    const int f = i / 4, token = 2 * quarter + i % 2, place = 2 * group + i % 4 / 2;
    record[(f * MAX_TOKENS + token) * 16 + place] = sums.product[f][i % 4];
  }
  if (NORM && group / 2 == quarter)
    record[SUMS + group] = group % 2 ? sums.squares[1] : sums.squares[0];
}

// A streaming warp: every WARPS-th step of the block's.
template <bool NORM, bool SWIGLU, class Weight>
__device__ __forceinline__ void stream(const Gemv& g, Shared& shared, int warp, int lane, int begin,
                                       int end) {
  Slot* ring = kept(&shared.ring[warp][0]);
  const Plan& plan = g.plan;
  Asking<NORM, SWIGLU, Weight> asking(g, lane, begin + warp);
  const int steps = (end - begin - warp + WARPS - 1) / WARPS;
#pragma unroll 1
  for (int i = 0; i < DEPTH; ++i) {
    if (i < steps) {
      asking.for_weights(g, lane, ring[i]);
      asking.next(g, lane);
    }
    end_of_group();  // one for each step, though it be empty
  }
  __syncthreads();  // the barriers are there, and all warps have asked
  dependency_wait();
  const int live = live_tokens(g);
  Walk used(plan, begin + warp), first = used;
#pragma unroll 1
  for (int i = 0; i < DEPTH; ++i, first.next(plan)) {
    if (i < steps) asking.for_tokens(g, first.step, lane, live, ring[i]);
    end_of_group();
  }

  const Pointing pointing(lane);
  Running sums;
  int tile = begin / plan.steps_of_tile, turn = 0;
  uint32_t parity = 1;    // at first both sets of sums are empty
  auto hand_over = [&] {  // two sets in turn: one is read while the other is written
    barrier_wait(&shared.empty[turn], parity);
    put<NORM>(sums, shared.sums[turn][warp], lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.full[turn]);
    sums = Running{};
    ++tile;
    turn ^= 1;
    parity ^= turn == 0;
  };
  for (int left = steps, slot = 0; left > 0; --left) {
    while (tile < used.tile) hand_over();
    wait_for_groups<DEPTH - 1>();
    __syncwarp();  // all lanes' copies are there
#pragma unroll
    for (int part = 0; part < COLUMNS / 32; ++part) {
      const Taken<NORM, Weight> taken(ring[slot], pointing, part);
      if (part == COLUMNS / 32 - 1) {
        __syncwarp();  // all is taken: the place is free
        if (left > DEPTH) {
          asking.for_tokens(g, asking.at.step, lane, live, ring[slot]);
          asking.for_weights(g, lane, ring[slot]);
          asking.next(g, lane);
        }
        end_of_group();
      }
      taken.multiply(sums);
    }
    if (++slot == DEPTH) slot = 0;
    used.next(plan);
  }
  while (tile <= (end - 1) / plan.steps_of_tile) hand_over();
}

// -- finishing ----------------------------------------------------------------------------------

// What a lane has of a tile: four places of token lane / 4 in each fragment.
struct Total {
  float4 sums[FRAGMENTS];
  float squares;
};

template <bool NORM, class Load>
__device__ __forceinline__ void add(Total& total, const float* record, int lane, Load load) {
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
    const float4 part = load(reinterpret_cast<const float4*>(record) + 32 * f + lane);
    total.sums[f].x += part.x, total.sums[f].y += part.y;
    total.sums[f].z += part.z, total.sums[f].w += part.w;
  }
  if (NORM) total.squares += load(record + SUMS + lane / 4);
}

template <bool NORM>
__device__ __forceinline__ void put(const Total& total, float* record, int lane) {
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) reinterpret_cast<float4*>(record)[32 * f + lane] = total.sums[f];
  if (NORM && lane % 4 == 0) record[SUMS + lane / 4] = total.squares;
}

template <bool NORM, bool SWIGLU>
__device__ __forceinline__ void write(const Gemv& g, const Total& total, int tile, int live,
                                      int lane) {
  const int token = lane / 4;
  if (token >= live) return;
  const float scale = NORM ? inverse_root(total.squares / g.width + g.eps) : 1.0f;
  auto put_one = [&](int place, float y) {
    const int output = output_of<SWIGLU>(tile, place);
    if (output >= g.outputs) return;
    if (g.bias != nullptr) y += bf16_to_float(g.bias[output]);
    if (g.residual != nullptr) y += bf16_to_float(g.residual[token * g.residual_stride + output]);
    g.out[token * g.out_stride + output] = float_to_bf16(y);
  };
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
    const float4 sums = total.sums[f];
    const float y[4] = {scale * sums.x, scale * sums.y, scale * sums.z, scale * sums.w};
    const int place = 16 * f + lane % 4 * 4;
    for (int i = 0; i < 4; i += SWIGLU ? 2 : 1)
      put_one(place + i, SWIGLU ? y[i] / (1.0f + exponential(-y[i])) * y[i + 1] : y[i]);
  }
}

// True for the last block of a tile to arrive, which then has the sums of all in `total`.
template <bool NORM>
__device__ __forceinline__ bool last_of_tile(const Gemv& g, Total& total, int tile, int lane) {
  const int first_of_tile = tile * g.plan.steps_of_tile;
  const int first = block_of(g.plan, first_of_tile);
  const int last = block_of(g.plan, first_of_tile + g.plan.steps_of_tile - 1);
  if (first == last) return true;

  // A block shares at most two tiles: that in which its stretch begins, and that in which it ends,
  // of which it is the first block.
  auto record = [&](int block) { return g.partial + int64_t(2 * block + (block == first)) * RECORD; };
  put<NORM>(total, record(blockIdx.x), lane);
  __syncwarp();
  const int before = broadcast(lane == 0 ? arrive(&g.arrivals[first]) : 0);
  __syncwarp();
  if (before < last - first) return false;
  if (lane == 0) g.arrivals[first] = 0;  // for the next launch
  total = Total{};
  for (int block = first; block <= last; ++block)
    add<NORM>(total, record(block), lane, [](auto* from) { return load_shared_by_blocks(from); });
  return true;
}

// The finishing warp: adds the streaming warps' sums of each tile, in their order.
template <bool NORM, bool SWIGLU>
__device__ __forceinline__ void finish(const Gemv& g, Shared& shared, int lane, int begin, int end) {
  const int live = live_tokens(g);
  const int last_tile = (end - 1) / g.plan.steps_of_tile;
  int turn = 0;
  uint32_t parity = 0;
  for (int tile = begin / g.plan.steps_of_tile; tile <= last_tile; ++tile) {
    barrier_wait(&shared.full[turn], parity);
    Total total{};
#pragma unroll 4
    for (int warp = 0; warp < WARPS; ++warp)
      add<NORM>(total, shared.sums[turn][warp], lane, [](auto* from) { return *from; });
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[turn]);
    turn ^= 1;
    parity ^= turn == 0;
    if (last_of_tile<NORM>(g, total, tile, lane)) write<NORM, SWIGLU>(g, total, tile, live, lane);
  }
}

template <bool NORM, bool SWIGLU, class Weight = Bf16Weight>
__global__ void __launch_bounds__(THREADS, KERNELS * BLOCKS) gemv_kernel(const __grid_constant__ Gemv g) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = first_step(g.plan, blockIdx.x), end = first_step(g.plan, blockIdx.x + 1);
  if (warp < WARPS) return stream<NORM, SWIGLU, Weight>(g, shared, warp, lane, begin, end);
  if (lane < 2) {
    barrier_init(&shared.full[lane], WARPS);
    barrier_init(&shared.empty[lane], 1);
  }
  __syncthreads();
  launch_dependents();
  dependency_wait();
  finish<NORM, SWIGLU>(g, shared, lane, begin, end);
}

}  // namespace s1fast
