// A module's product with what LoRA adds, on Hopper (sm_90a): y is summed in f32, and written once. The products of an MLP's gate and up are
// made together with their activation.
//
// A block makes tiles of 128 rows and 256 columns of y, or of 128 columns of gate and as many of up. One warp brings 64 columns of both
// operands at a time by bulk copies while two warpgroups multiply them (wgmma), each of them 64 rows. Two blocks whose tiles lie one below
// the other are a pair, and each of them brings half of the second operand for both. The pairs draw their tiles, in an order in which those
// that run side by side make a square of tiles, so that the L2 cache holds what they share.
#include "common.cuh"
#include "gated.cuh"
#include "hopper.cuh"
#include "rope.cuh"

static const int ROWS = 128, COLUMNS = 256, HALF = COLUMNS / PAIR, DEPTH = 64, STAGES = 4, THREADS = 384;

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

// One thread brings the operands of a tile, stage by stage: rows of A from `row` on for this block, and rows of B from `first` on, which are
// this block's half of a tile's columns, for both blocks. What lies outside of the operands becomes zeros.
__device__ __forceinline__ void bring(const Block &block, Ring<STAGES> &stage, const Operands &operands, int row, int first) {
    const int BOXES_A = ROWS / Block::A::BOX_ROWS, BOXES_B = HALF / Block::A::BOX_ROWS;
    for (int k = 0; k < operands.k; k += DEPTH, stage.next()) {
        barrier_wait(block.empty(stage.index), stage.parity ^ 1);
        u32 full = block.full(stage.index);
        barrier_arrive_expecting(full, Block::STAGE_BYTES);
        for (int box = 0; box < BOXES_A; box++)
            copy_box(block.a(stage.index) + box * Block::BOX_BYTES, *operands.a, k, row + box * Block::A::BOX_ROWS, full);
        for (int i = 0; i < BOXES_B; i++) {
            u32 to = block.b(stage.index) + (block.rank * BOXES_B + i) * Block::BOX_BYTES;
            copy_box_to_pair(to, *operands.b, k, first + i * Block::A::BOX_ROWS, full);
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

// Writes four pairs of features of a thread, of four runs of eight columns from a column on, to a row of y [m, n]; n is a multiple of 8. A
// residual [m, n] is added if there is one.
__device__ __forceinline__ void write_runs(Act *y, const u32 *pairs, const Act *residual, int row, int column, int m, int n) {
    uint4 run = gather_run(pairs[0], pairs[1], pairs[2], pairs[3]);
    int at = column + 8 * (threadIdx.x % 4);
    if (row >= m || at >= n) return;
    u64 to = (u64)row * n + at;
    if (residual) {
        uint4 more = *(const uint4 *)(residual + to);
        run = uint4{add_pair(run.x, more.x), add_pair(run.y, more.y), add_pair(run.z, more.z), add_pair(run.w, more.w)};
    }
    *(uint4 *)(y + to) = run;
}

// Output of one module: y [m, n] = output_scale · (sum + bias), finished.
struct Linear {
    // Number of adapters whose parts are summed.
    static const int ADAPTERS = 1;
    Act *y;
    const float *bias;
    Finish finish;
    int m, n;
    float output_scale;

    __device__ __forceinline__ int num_columns() const { return n; }
    // The first row of the base's weight, or of an adapter's B, that the block of this number brings for a tile.
    __device__ __forceinline__ int first_of_base(u32 rank, int column) const { return column + rank * HALF; }
    __device__ __forceinline__ int first_of_adapter(int, u32 rank, int column) const { return column + rank * HALF; }

    // Writes the output of a warpgroup's sums, from a row and a column on.
    __device__ __forceinline__ void store(const float (&acc)[COLUMNS / 2], int row, int column) const {
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
            for (int runs = 0; runs < COLUMNS / 8; runs += 4)
                write_runs(y, pairs + runs, finish.residual, row, column + 8 * runs, m, n);
        }
    }
};

// Outputs of an MLP's gate and up, which read one input: gate, up [m, n] = output_scale · sum, and act = f(gate) · up of the rounded values.
// Each is left out where it has no address. The first half of a tile's columns is gate's, the second one up's.
struct Gated {
    static const int ADAPTERS = 2;
    Act *act, *gate, *up;
    bool is_gelu;
    int m, n;
    float output_scale;

    __device__ __forceinline__ int num_columns() const { return 2 * n; }
    __device__ __forceinline__ int first_of_base(u32, int column) const { return column / 2; }
    // An adapter adds to the half of its own module. The other half gets rows behind the last one of B, which are zeros.
    __device__ __forceinline__ int first_of_adapter(int adapter, u32 rank, int column) const { return rank == adapter ? column / 2 : n; }

    template <class F, bool WRITES_ACT> __device__ __forceinline__ void store_as(const float (&acc)[COLUMNS / 2], int row, int column) const {
        row += threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int half = 0; half < 2; half++, row += 8)
#pragma unroll
            for (int runs = 0; runs < HALF / 8; runs += 4) {
                u32 pairs[3][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int of_gate = 4 * (runs + i) + 2 * half, of_up = of_gate + HALF / 2;
                    u32 g = pack_act(acc[of_gate] * output_scale, acc[of_gate + 1] * output_scale);
                    u32 u = pack_act(acc[of_up] * output_scale, acc[of_up + 1] * output_scale);
                    if (WRITES_ACT) pairs[0][i] = pack_act(gated<F>(low(g), low(u)), gated<F>(high(g), high(u)));
                    pairs[1][i] = g, pairs[2][i] = u;
                }
                int at = column / 2 + 8 * runs;
                if (WRITES_ACT) write_runs(act, pairs[0], nullptr, row, at, m, n);
                if (gate) write_runs(gate, pairs[1], nullptr, row, at, m, n);
                if (up) write_runs(up, pairs[2], nullptr, row, at, m, n);
            }
    }
    __device__ __forceinline__ void store(const float (&acc)[COLUMNS / 2], int row, int column) const {
        if (!act)
            store_as<Silu, false>(acc, row, column);
        else if (is_gelu)
            store_as<GeluTanh, true>(acc, row, column);
        else
            store_as<Silu, true>(acc, row, column);
    }
};

// Makes the output of x [m, k] · Wᵀ + scale · u [m, r] · Bᵀ with W [n, k] and B [n, r], whose r is at most 16 · STEPS, or any where STEPS fill
// a stage: `base` has x and this block's W, `adapters` have each u and B.
template <int STEPS, class Output>
__device__ __forceinline__ void linear(const Output &output, const Operands &base, const Operands (&adapters)[Output::ADAPTERS], float scale) {
    Block block;
    Tiles tiles(output.m, output.num_columns());
    int row, column;
    Ring<STAGES> stage;
    bool computes = divide_block<40, 232>([&]() {
        if (threadIdx.x > 0) return;
        for (u32 parity = 0;; parity ^= 1) {
            int tile = block.draw_tile(parity, tiles.count());
            if (tile < 0) break;
            tiles.place(tile, block.rank, row, column);
#pragma unroll
            for (int i = 0; i < Output::ADAPTERS; i++) bring(block, stage, adapters[i], row, output.first_of_adapter(i, block.rank, column));
            bring(block, stage, base, row, output.first_of_base(block.rank, column));
        }
    });
    if (computes) {
        int warpgroup = uniform(threadIdx.x / 128) - 1;
        // The columns of all adapters, in whole stages.
        const int depth = Output::ADAPTERS * ((adapters[0].k + DEPTH - 1) / DEPTH * DEPTH);
        for (u32 parity = 0;; parity ^= 1) {
            int tile = block.next_tile(parity);
            if (tile < 0) break;
            tiles.place(tile, block.rank, row, column);
            float acc[COLUMNS / 2];
            multiply<STEPS>(acc, block, stage, warpgroup, depth, false);
            if (scale != 1.0f) {
#pragma unroll
                for (int e = 0; e < COLUMNS / 2; e++) acc[e] *= scale;
            }
            multiply<DEPTH / 16>(acc, block, stage, warpgroup, base.k, true);
            output.store(acc, row + 64 * warpgroup, column);
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
        const Linear output = {y, bias, {cos, sin, head_dim, residual}, m, n, output_scale};                                      \
        const Operands adapters[] = {{&u, &b, r}};                                                                                \
        linear<STEPS>(output, Operands{&x, &weight, k}, adapters, scale);                                                         \
    }
LORA_LINEAR(lora_linear_hopper_16, 1)
LORA_LINEAR(lora_linear_hopper, DEPTH / 16)

#define LORA_GATED(NAME, STEPS)                                                                                                   \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)                                            \
        NAME(Act *act, Act *gate, Act *up, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap gate_weight,    \
             const __grid_constant__ TensorMap up_weight, const __grid_constant__ TensorMap gate_u,                               \
             const __grid_constant__ TensorMap up_u, const __grid_constant__ TensorMap gate_b,                                    \
             const __grid_constant__ TensorMap up_b, int is_gelu, int m, int n, int k, int r, float scale, float output_scale) {  \
        const Gated output = {act, gate, up, is_gelu != 0, m, n, output_scale};                                                   \
        const Operands adapters[] = {{&gate_u, &gate_b, r}, {&up_u, &up_b, r}};                                                   \
        linear<STEPS>(output, Operands{&x, pair_rank() == 0 ? &gate_weight : &up_weight, k}, adapters, scale);                    \
    }
LORA_GATED(lora_gated_hopper_16, 1)
LORA_GATED(lora_gated_hopper, DEPTH / 16)
