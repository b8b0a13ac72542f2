// A module's product with what LoRA adds, on Hopper (sm_90a): y is summed in f32, and written once.
//
// A block makes tiles of 128 rows and 256 columns of y. One warp brings 64 columns of both operands at a time by bulk copies while two
// warpgroups multiply them (wgmma), each of them 64 rows. Two blocks whose tiles lie one below the other are a pair, and each of them
// brings half of the second operand for both. The pairs draw their tiles, in an order in which those that run side by side make a square
// of tiles, so that the L2 cache holds what they share.
#include "common.cuh"
#include "hopper.cuh"
#include "rope.cuh"

static const int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4, THREADS = 384;

__device__ u32 linear_ticket;

// The shared memory of a block: stages, each with a tile of both operands, and the number of the tile that the pair makes.
struct Block {
    typedef Tile<DEPTH, ROWS> A;
    typedef Tile<DEPTH, COLUMNS> B;
    static const int STAGE_BYTES = A::BYTES + B::BYTES, BOX_BYTES = A::BOX_ROWS * DEPTH * 2, BARRIERS = STAGES * STAGE_BYTES;
    static_assert(BARRIERS + 16 * STAGES + 32 + ALIGNMENT <= MAX_SHARED_BYTES, "");
    u32 shared, rank;

    __device__ __forceinline__ u32 a(u32 stage) const { return shared + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 b(u32 stage) const { return a(stage) + A::BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return shared + BARRIERS + 16 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8; }
    __device__ __forceinline__ u32 tile_full() const { return full(STAGES); }
    // These are used in the first block of the pair, which draws for both.
    __device__ __forceinline__ u32 tile_empty() const { return empty(STAGES); }
    __device__ __forceinline__ u32 tile() const { return full(STAGES + 1); }

    __device__ __forceinline__ Block() {
        shared = aligned_shared();
        rank = pair_rank();
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full(i), 1);
                // The eight warps of both blocks that multiply.
                barrier_init(empty(i), 8 * PAIR);
            }
            barrier_init(tile_full(), 1);
            // Those warps, and the one of the second block that brings tiles.
            barrier_init(tile_empty(), 8 * PAIR + 1);
            barriers_begin();
        }
        pair_wait();
    }

    // Tells both blocks that this warp has read a stage.
    __device__ __forceinline__ void release(u32 stage) const {
        if (threadIdx.x % 32 < PAIR) barrier_arrive_there(shared_of(empty(stage), threadIdx.x % 32));
    }

    // The thread that brings tiles: draws the next one in the first block, and returns it in both; −1 when there is none.
    __device__ __forceinline__ int draw_tile(u32 parity, u32 total) const {
        if (rank == 0) {
            int drawn = draw(&linear_ticket, total, gridDim.x / PAIR);
            barrier_wait(tile_empty(), parity ^ 1);
            for (u32 of = 0; of < PAIR; of++) send_word(shared_of(tile(), of), drawn, shared_of(tile_full(), of));
        }
        barrier_arrive_expecting(tile_full(), 4);
        barrier_wait(tile_full(), parity);
        int drawn = *(const volatile int *)shared_pointer(tile());
        if (rank > 0) barrier_arrive_there(shared_of(tile_empty(), 0));
        return drawn;
    }

    // A warp that multiplies: waits for the next tile and returns it.
    __device__ __forceinline__ int next_tile(u32 parity) const {
        barrier_wait(tile_full(), parity);
        int drawn = uniform(*(const volatile int *)shared_pointer(tile()));
        if (threadIdx.x % 32 == 0) barrier_arrive_there(shared_of(tile_empty(), 0));
        return drawn;
    }
};

// The tiles of y, of which a pair takes two at a time.
struct Tiles {
    // Tiles of a pair that are below each other before the next columns come.
    static const int GROUP = 8;
    int tiles_m, tiles_n;
    __device__ __forceinline__ Tiles(int m, int n)
        : tiles_m((m + PAIR * ROWS - 1) / (PAIR * ROWS)), tiles_n((n + COLUMNS - 1) / COLUMNS) {}
    __device__ __forceinline__ int count() const { return tiles_m * tiles_n; }
    // The first row and column of a tile of this block.
    __device__ __forceinline__ void place(int tile, u32 rank, int &row, int &column) const {
        int first = tile / (GROUP * tiles_n) * GROUP, height = min(GROUP, tiles_m - first), in_group = tile % (GROUP * tiles_n);
        row = ((first + in_group % height) * PAIR + rank) * ROWS;
        column = in_group / height * COLUMNS;
    }
};

// A [m, k] and B [n, k], the operands of A · Bᵀ.
struct Operands {
    const TensorMap *a, *b;
    int k;
};

// One thread brings the operands of a tile, stage by stage; what lies outside of them becomes zeros.
__device__ __forceinline__ void bring(const Block &block, Ring<STAGES> &stage, const Operands &operands, int row, int column) {
    const int BOXES_A = ROWS / Block::A::BOX_ROWS, BOXES_B = COLUMNS / Block::A::BOX_ROWS / PAIR;
    for (int k = 0; k < operands.k; k += DEPTH, stage.next()) {
        barrier_wait(block.empty(stage.index), stage.parity ^ 1);
        u32 full = block.full(stage.index);
        barrier_arrive_expecting(full, Block::STAGE_BYTES);
        for (int box = 0; box < BOXES_A; box++)
            copy_box(block.a(stage.index) + box * Block::BOX_BYTES, *operands.a, k, row + box * Block::A::BOX_ROWS, full);
        for (int i = 0; i < BOXES_B; i++) {
            int box = block.rank * BOXES_B + i;
            copy_box_to_pair(block.b(stage.index) + box * Block::BOX_BYTES, *operands.b, k, column + box * Block::A::BOX_ROWS, full);
        }
    }
}

// acc [64, COLUMNS] = (accumulate ? acc : 0) + A · Bᵀ for a warpgroup's rows; 16 · STEPS of a stage's columns are not zeros. A stage is
// released when the products of the next one have begun.
template <int STEPS>
__device__ __forceinline__ void multiply(float (&acc)[COLUMNS / 2], const Block &block, Ring<STAGES> &stage, int warpgroup, int depth,
                                         bool accumulate) {
    u32 before = 0;
    for (int k = 0; k < depth; k += DEPTH, stage.next()) {
        barrier_wait(block.full(stage.index), stage.parity);
        products_begin();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u64 a = Block::A::by_columns(block.a(stage.index), 64 * warpgroup, step), b = Block::B::by_columns(block.b(stage.index), 0, step);
            Product<COLUMNS>::run(acc, a, b, accumulate || k + step > 0);
        }
        products_commit();
        if (k > 0) {
            products_wait<1>();
            block.release(before);
        }
        before = stage.index;
    }
    products_wait<0>();
    pin(acc);
    block.release(before);
}

// Four lanes have four pairs of neighbouring columns each, of four runs of eight columns; each lane gets one whole run.
__device__ __forceinline__ uint4 gather_run(u32 v0, u32 v1, u32 v2, u32 v3) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    u32 r0 = __shfl_xor_sync(0xffffffffu, odd ? v0 : v1, 1), r1 = __shfl_xor_sync(0xffffffffu, odd ? v2 : v3, 1);
    u32 a0 = odd ? r0 : v0, a1 = odd ? v1 : r0, b0 = odd ? r1 : v2, b1 = odd ? v3 : r1;
    u32 s0 = __shfl_xor_sync(0xffffffffu, high ? a0 : b0, 2), s1 = __shfl_xor_sync(0xffffffffu, high ? a1 : b1, 2);
    return high ? uint4{s0, s1, b0, b1} : uint4{a0, a1, s0, s1};
}

// The last step on y [m, n], whose values are rounded before it. Where there are angles [m, head_dim / 2], heads turn by them as in
// rope.cu; where there is a residual [m, n], it is added.
struct Finish {
    const float *cos, *sin;
    int head_dim;
    const Act *residual;
};

// Turns the heads of D features in a row of a tile, which has whole heads: a thread's pairs of neighbouring features, of every run of eight.
template <int D> __device__ __forceinline__ void turn(u32 (&pairs)[COLUMNS / 8], const Finish &finish, int row) {
    // Runs between two features that turn together.
    const int APART = D / 16;
    u64 at = (u64)row * (D / 2) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int run = 0; run < APART; run++) {
        float2 c = *(const float2 *)(finish.cos + at + 8 * run), s = *(const float2 *)(finish.sin + at + 8 * run);
#pragma unroll
        for (int i = run; i < COLUMNS / 8; i += 2 * APART) {
            float a0 = low(pairs[i]), a1 = high(pairs[i]), b0 = low(pairs[i + APART]), b1 = high(pairs[i + APART]);
            turn_pair(a0, b0, c.x, s.x);
            turn_pair(a1, b1, c.y, s.y);
            pairs[i] = pack_act(a0, a1), pairs[i + APART] = pack_act(b0, b1);
        }
    }
}

__device__ __forceinline__ u32 add_pair(u32 a, u32 b) { return pack_act(low(a) + low(b), high(a) + high(b)); }

// Writes output_scale · (acc + bias), finished, to y [m, n], from a row and a column on; n is a multiple of 8.
__device__ __forceinline__ void store(Act *y, const float (&acc)[COLUMNS / 2], const float *bias, const Finish &finish, int row, int column,
                                      int m, int n, float output_scale) {
    int lane = threadIdx.x % 32;
    row += threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        u32 pairs[COLUMNS / 8];
#pragma unroll
        for (int run = 0; run < COLUMNS / 8; run++) {
            int at = column + 8 * run + lane % 4 * 2;
            float first = acc[4 * run + 2 * half], second = acc[4 * run + 2 * half + 1];
            if (bias && at < n) first += bias[at], second += bias[at + 1];
            pairs[run] = pack_act(first * output_scale, second * output_scale);
        }
        if (finish.cos) {
            if (finish.head_dim == 128)
                turn<128>(pairs, finish, min(row, m - 1));
            else
                turn<64>(pairs, finish, min(row, m - 1));
        }
#pragma unroll
        for (int runs = 0; runs < COLUMNS / 8; runs += 4) {
            uint4 run = gather_run(pairs[runs], pairs[runs + 1], pairs[runs + 2], pairs[runs + 3]);
            int at = column + 8 * (runs + lane % 4);
            if (row >= m || at >= n) continue;
            u64 to = (u64)row * n + at;
            if (finish.residual) {
                uint4 more = *(const uint4 *)(finish.residual + to);
                run = uint4{add_pair(run.x, more.x), add_pair(run.y, more.y), add_pair(run.z, more.z), add_pair(run.w, more.w)};
            }
            *(uint4 *)(y + to) = run;
        }
    }
}

// y [m, n] = output_scale · (x [m, k] · Wᵀ + bias + scale · u [m, r] · Bᵀ), finished; W [n, k], B [n, r]: `base` has x and W, `lora` u and B,
// whose r is at most 16 · STEPS, or any where STEPS fill a stage.
template <int STEPS>
__device__ __forceinline__ void linear(Act *y, const Operands &base, const Operands &lora, const float *bias, const Finish &finish, int m,
                                       int n, float scale, float output_scale) {
    Block block;
    Tiles tiles(m, n);
    int row, column;
    Ring<STAGES> stage;
    bool computes = divide_block<40, 232>([&]() {
        if (threadIdx.x > 0) return;
        for (u32 parity = 0;; parity ^= 1) {
            int tile = block.draw_tile(parity, tiles.count());
            if (tile < 0) break;
            tiles.place(tile, block.rank, row, column);
            bring(block, stage, lora, row, column);
            bring(block, stage, base, row, column);
        }
    });
    if (computes) {
        int warpgroup = uniform(threadIdx.x / 128) - 1;
        for (u32 parity = 0;; parity ^= 1) {
            int tile = block.next_tile(parity);
            if (tile < 0) break;
            tiles.place(tile, block.rank, row, column);
            float acc[COLUMNS / 2];
            multiply<STEPS>(acc, block, stage, warpgroup, lora.k, false);
            if (scale != 1.0f) {
#pragma unroll
                for (int e = 0; e < COLUMNS / 2; e++) acc[e] *= scale;
            }
            multiply<DEPTH / 16>(acc, block, stage, warpgroup, base.k, true);
            store(y, acc, bias, finish, row + 64 * warpgroup, column, m, n, output_scale);
        }
    }
    // The other block writes here and tells barriers here until both are done.
    pair_wait();
}

#define LORA_LINEAR(NAME, STEPS)                                                                                                  \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)                                            \
        NAME(Act *y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,                               \
             const __grid_constant__ TensorMap u, const __grid_constant__ TensorMap b, const float *bias, const float *cos,       \
             const float *sin, int head_dim, const Act *residual, int m, int n, int k, int r, float scale, float output_scale) {  \
        const Finish finish = {cos, sin, head_dim, residual};                                                                     \
        linear<STEPS>(y, Operands{&x, &weight, k}, Operands{&u, &b, r}, bias, finish, m, n, scale, output_scale);                 \
    }
LORA_LINEAR(lora_linear_hopper_16, 1)
LORA_LINEAR(lora_linear_hopper, DEPTH / 16)
