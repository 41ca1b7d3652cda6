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
// The work is a row of steps: ROWS rows of weights times 32 columns, tile after tile. Every block
// takes an equal stretch of it, so all multiprocessors end together whatever N and K are. A tile that
// two or more blocks share is summed by the last of them to arrive, in the blocks' order: the same
// bits every time, and nobody waits.
//
// In a block WARPS warps stream: steps are dealt to them in turn, and each has asked memory for the
// next DEPTH of its own, beyond the tile's end too. Every thread copies 16 bytes at a time to a place
// in shared memory of its own, from where it alone takes them: nobody waits for another. One more warp
// finishes tiles.
//
// The weights do not depend on the kernel before and are asked for ahead of the wait for it. The next
// kernel may start when this one asks for its last bytes, and a multiprocessor has room for blocks of
// both: so memory works while this kernel adds up, ends and hands over.
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
constexpr int STEP = 32;  // columns: 16 bytes a thread and row

constexpr int WARPS = 8;      // that stream
constexpr int BLOCKS = 1;     // on a multiprocessor, beside as many of the next kernel
constexpr int FRAGMENTS = 2;  // of 16 rows in a tile: what is read of x serves all of them
constexpr int DEPTH = 4;      // steps that a warp has asked for and not used
constexpr int AHEAD = 4;      // further steps of a warp, brought to L2 before the kernel ahead ends
constexpr int LEAVE = 2;      // steps of a warp not yet asked for when the next kernel may start

constexpr int THREADS = 32 * (WARPS + 1);
constexpr int ROWS = 16 * FRAGMENTS;       // of weights in a tile
constexpr int SUMS = ROWS * MAX_TOKENS;    // of a tile, as [fragment][token][place]
constexpr int RECORD = SUMS + MAX_TOKENS;  // and the sum of squares of each token

// What a warp has of a step, a column of 16-byte pieces for each thread.
using Slot = uint4[2 * FRAGMENTS][32];

struct Shared {
  Slot ring[WARPS][DEPTH];  // 64 KB, in flight
  float sums[2][WARPS][RECORD];
  Barrier full[2], empty[2];
};

// Of a multiprocessor's memory, 256 KB of which at most 228 may be shared, what two kernels' blocks
// need, a KB beside each; the rest is L1, where x stays. Rounded down: the hardware's division rounds
// up again.
constexpr int SHARED_PERCENT = int(2 * BLOCKS * (sizeof(Shared) + 1024) * 100 / 233472);
static_assert(SHARED_PERCENT < 100);

// How weights lie in memory and become bf16. Narrower ones bring their own; the rest of the kernel
// does not change.
struct Bf16Weight {
  static constexpr __host__ __device__ int64_t row_bytes(int64_t columns) { return 2 * columns; }
  static __device__ __forceinline__ uint4 bf16(uint4 piece) { return piece; }
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
  plan.steps_of_tile = (width + STEP - 1) / STEP;
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

// Where a place's weights begin. A row that is not there is the last one again: nobody looks at its
// sums.
template <bool SWIGLU, class Weight>
__device__ __forceinline__ const char* weight_row(const Gemv& g, int tile, int place) {
  const int output = output_of<SWIGLU>(tile, place), last = g.outputs - 1;
  const int64_t row = (output < last ? output : last) + (SWIGLU && place % 2 ? g.outputs : 0);
  return static_cast<const char*>(g.weight) + Weight::row_bytes(row * g.weight_stride);
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

// Asks for one step after another. Lane 4 g + q has, of each fragment, columns 8 q ... 8 q + 7 of the
// rows at places 2 g and 2 g + 1.
template <bool SWIGLU, class Weight>
struct Asking {
  Walk at;
  int left;  // steps
  const char* rows[2 * FRAGMENTS];

  __device__ __forceinline__ Asking(const Gemv& g, int warp, int lane, int begin, int end)
      : at(g.plan, begin + warp), left((end - begin - warp + WARPS - 1) / WARPS) {
    find_rows(g, lane);
  }

  __device__ __forceinline__ void find_rows(const Gemv& g, int lane) {
#pragma unroll
    for (int i = 0; i < 2 * FRAGMENTS; ++i)
      rows[i] = weight_row<SWIGLU, Weight>(g, at.tile, i / 2 * 16 + lane / 4 * 2 + i % 2) +
                Weight::row_bytes(lane % 4 * 8);
  }

  __device__ __forceinline__ void next(const Gemv& g, int lane, Slot& slot) {
    if (left > 0) {
      const int column = at.step * STEP;
      const bool here = column + lane % 4 * 8 < g.width;
#pragma unroll
      for (int i = 0; i < 2 * FRAGMENTS; ++i)
        copy_once(&slot[i][lane], rows[i] + Weight::row_bytes(column), here);
      if (at.next(g.plan)) find_rows(g, lane);
      if (--left <= LEAVE) launch_dependents();
    }
    end_of_group();  // one for each step, though it be empty
  }
};

// A warp's sums of a tile as they grow, in the layout of `mma`.
struct Running {
  float product[FRAGMENTS][4] = {}, squares[4] = {};
};

// Eight columns of a token, and of the norm.
struct Tokens {
  uint4 x, scale;
};

template <bool NORM>
__device__ __forceinline__ Tokens load_tokens(const Gemv& g, const Walk& at, int lane, int live) {
  const int token = lane / 4, column = at.step * STEP + lane % 4 * 8;
  Tokens loaded{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (column >= g.width) return loaded;
  if (token < live) loaded.x = load(g.x + token * g.x_stride + column);
  if (NORM) loaded.scale = load_constant(g.norm + column);
  return loaded;
}

// x as the product takes it.
template <bool NORM>
__device__ __forceinline__ uint4 prepare(const Tokens& tokens, Running& sums) {
  const uint4 x = tokens.x, scale = tokens.scale;
  if (!NORM) return x;
  mma(sums.squares, x.x, 0, x.y, 0, x.x, x.y);
  mma(sums.squares, x.z, 0, x.w, 0, x.z, x.w);
  return make_uint4(multiply_pairs(x.x, scale.x), multiply_pairs(x.y, scale.y),
                    multiply_pairs(x.z, scale.z), multiply_pairs(x.w, scale.w));
}

// The order of columns is free as long as both operands have the same one.
template <class Weight>
__device__ __forceinline__ void multiply(const Slot& slot, int lane, const uint4& x, Running& sums) {
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
    const uint4 even = Weight::bf16(slot[2 * f][lane]), odd = Weight::bf16(slot[2 * f + 1][lane]);
    mma(sums.product[f], even.x, odd.x, even.y, odd.y, x.x, x.y);
    mma(sums.product[f], even.z, odd.z, even.w, odd.w, x.z, x.w);
  }
}

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
  Slot* ring = shared.ring[warp];
  Asking<SWIGLU, Weight> asking(g, warp, lane, begin, end);
  for (int i = 0; i < DEPTH; ++i) asking.next(g, lane, ring[i]);
  __syncthreads();  // the barriers are there
  dependency_wait();
  const int live = live_tokens(g);

  Running sums;
  int tile = begin / g.plan.steps_of_tile, turn = 0;
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
  Walk used(g.plan, begin + warp);
  Tokens tokens = load_tokens<NORM>(g, used, lane, live);
  for (int at = begin + warp, slot = 0; at < end; at += WARPS) {
    while (tile < used.tile) hand_over();
    const uint4 x = prepare<NORM>(tokens, sums);
    used.next(g.plan);
    tokens = load_tokens<NORM>(g, used, lane, live);  // the next step's, on the way meanwhile
    wait_for_groups<DEPTH - 1>();
    multiply<Weight>(ring[slot], lane, x, sums);
    asking.next(g, lane, ring[slot]);
    if (++slot == DEPTH) slot = 0;
  }
  while (tile <= (end - 1) / g.plan.steps_of_tile) hand_over();
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
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp)
      add<NORM>(total, shared.sums[turn][warp], lane, [](auto* from) { return *from; });
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[turn]);
    turn ^= 1;
    parity ^= turn == 0;
    if (last_of_tile<NORM>(g, total, tile, lane)) write<NORM, SWIGLU>(g, total, tile, live, lane);
  }
}

// Brings to L2 what the block's warps will ask for when they have used what they asked for first.
template <bool SWIGLU, class Weight>
__device__ __forceinline__ void bring(const Gemv& g, int lane, int begin, int end) {
  int at = begin + WARPS * DEPTH;
  const int stop = at + WARPS * AHEAD < end ? at + WARPS * AHEAD : end;
  for (int count; at < stop; at += count) {
    const int tile = at / g.plan.steps_of_tile, step = at % g.plan.steps_of_tile;
    const int rest = g.plan.steps_of_tile - step;
    count = stop - at < rest ? stop - at : rest;
    const int column = step * STEP, left = g.width - column;
    const int columns = count * STEP < left ? count * STEP : left;
    if (lane < ROWS && output_of<SWIGLU>(tile, lane) < g.outputs)
      prefetch(weight_row<SWIGLU, Weight>(g, tile, lane) + Weight::row_bytes(column),
               uint32_t(Weight::row_bytes(columns)));
  }
}

template <bool NORM, bool SWIGLU, class Weight = Bf16Weight>
__global__ void __launch_bounds__(THREADS, 2 * BLOCKS) gemv_kernel(const __grid_constant__ Gemv g) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = first_step(g.plan, blockIdx.x), end = first_step(g.plan, blockIdx.x + 1);
  if (warp < WARPS) return stream<NORM, SWIGLU, Weight>(g, shared, warp, lane, begin, end);
  if (lane < 2) {
    barrier_init(&shared.full[lane], WARPS);
    barrier_init(&shared.empty[lane], 1);
  }
  __syncthreads();
  bring<SWIGLU, Weight>(g, lane, begin, end);
  dependency_wait();
  finish<NORM, SWIGLU>(g, shared, lane, begin, end);
}

}  // namespace s1fast
