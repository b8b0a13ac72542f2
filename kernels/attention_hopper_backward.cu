// Gradients of attention on Hopper; see attention_hopper.cuh. Kernels each own what they write, so that no sum depends on the order
// in which blocks run: one for queries (three products), one for keys and values (four); both compute the probabilities again.
#include "attention_hopper.cuh"
#include "attention_sum.cuh"

__device__ u32 queries_ticket, keys_ticket;

// Σ d_out · out of a row, of which each of four threads reads a quarter.
template <int D> __device__ __forceinline__ float row_delta(const Act *d_out, const Act *out) {
    float sum = 0.0f;
#pragma unroll
    for (int i = threadIdx.x % 4 * 8; i < D; i += 32) {
        Act8 a = *(const Act8 *)(d_out + i), b = *(const Act8 *)(out + i);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += to_f32(a.at[j]) * to_f32(b.at[j]);
    }
    return sum;
}

// delta = Σ d_out · out over a head; d_q = scale · dS · K, dS = P ∘ (d_out · Vᵀ − delta).
template <int D>
__device__ void backward_queries(Act *d_q, float *delta, const TensorMap &d_out_map, const TensorMap &q_map, const TensorMap &k_map,
                                 const TensorMap &v_map, const Act *d_out, const Act *out, const float *lse, const u32 *positions,
                                 int tokens, int num_heads, int num_kv_heads, int max_reach, float scale) {
    const int KEYS = D == 64 ? 128 : 64, STAGES = KEYS == 64 ? 4 : 2;
    typedef ForQueries<D, KEYS, STAGES, 2> Block;
    typedef typename Block::Rows Rows;
    typedef typename Block::Keys Keys;
    __shared__ int drawn;
    Block block(tokens, num_heads);
    bool computes = divide_block<40, 232>([&]() {
        if (threadIdx.x == 0)
            block.produce(&queries_ticket, &drawn, {&q_map, &d_out_map}, k_map, v_map, positions, num_heads / num_kv_heads, 0,
                          max_reach);
    });
    if (!computes) return;
    Place place;
    Ring<STAGES> stage;
    float log2_scale = scale * LOG2_E;
    for (u32 parity = 0;; parity ^= 1) {
        int work = next_work(block.rows_full(), parity, drawn);
        if (work < 0) break;
        int head = block.head(work), first_row = block.first_row(work), row = first_row + place.row;
        int first_key = uniform(first_row - reach(positions, first_row, max_reach)), key = first_row + ROWS - KEYS;
        Sight sight(positions, max_reach, first_row + place.warp_row, row, tokens, 0);
        float shift[2], deltas[2];
        for (int i = 0; i < 2; i++) {
            int t = row + 8 * i;
            u64 at = (u64)t * num_heads + head;
            shift[i] = t < tokens ? lse[at] * LOG2_E : 0.0f;
            float sum = t < tokens ? row_delta<D>(d_out + at * D, out + at * D) : 0.0f;
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            deltas[i] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
            if (t < tokens && place.column == 0) delta[at] = deltas[i];
        }
        float acc[D / 2], s[KEYS / 2], d_p[KEYS / 2];
        u32 d_s[KEYS / 16][4];
        auto scores = [&]() {
            barrier_wait(block.k_full(stage.index), stage.parity);
            products_begin();
            multiply_transposed<D, Rows, Keys>(s, block.shared, place.warpgroup * 64, block.k(stage.index));
            barrier_wait(block.v_full(stage.index), stage.parity);
            multiply_transposed<D, Rows, Keys>(d_p, block.shared + Rows::BYTES, place.warpgroup * 64, block.v(stage.index));
        };
        if (KEYS == 64 && place.warpgroup == 0) {
            // Its rows see none of the last keys.
            barrier_wait(block.k_full(stage.index), stage.parity);
            barrier_arrive(block.k_empty(stage.index));
            barrier_wait(block.v_full(stage.index), stage.parity);
            barrier_arrive(block.v_empty(stage.index));
            stage.next();
            key -= KEYS;
        }
        scores();
        u32 at;
        for (bool accumulate = false;; accumulate = true) {
            at = stage.index;
            products_wait<1>();
            pin(s);
#pragma unroll
            for (int e = 0; e < KEYS / 2; e++) s[e] = exp2_fast(s[e] * log2_scale - shift[e / 2 % 2]);
            sight.hide(s, key, place.column, 0.0f);
            products_wait<0>();
            pin(d_p);
            barrier_arrive(block.v_empty(at));
#pragma unroll
            for (int e = 0; e < KEYS / 2; e++) s[e] *= d_p[e] - deltas[e / 2 % 2];
            round_scores(d_s, s);
            products_begin();
            multiply<Keys>(acc, d_s, block.k(at), accumulate);
            stage.next();
            key -= KEYS;
            if (key <= first_key - KEYS) break;
            scores();
            products_wait<2>();
            barrier_arrive(block.k_empty(at));
        }
        products_wait<0>();
        pin(acc);
        barrier_arrive(block.k_empty(at));
        barrier_arrive(block.rows_empty());
        store_rows(d_q + head * D, acc, row, place.column, tokens, num_heads * D, scale, scale);
    }
}

// The shared memory of the kernel for keys: ROWS rows of keys and values; queries and their d_out pass in tiles, with the
// log-sum-exp, delta and position of each.
template <int D> struct ForKeys {
    static const int QUERIES = 64, STAGES = 3, WORDS_BYTES = 3 * QUERIES * 4;
    typedef Tile<D, ROWS> Rows;
    typedef Tile<D, QUERIES> Queries;
    static const int Q = 2 * Rows::BYTES, D_OUT = Q + STAGES * Queries::BYTES, WORDS = D_OUT + STAGES * Queries::BYTES,
                     BARRIERS = WORDS + STAGES * WORDS_BYTES;
    static_assert(BARRIERS + 16 + 16 * STAGES + ALIGNMENT <= MAX_SHARED_BYTES, "");
    u32 shared;
    // `parts` blocks of heads, `heads` each.
    int tokens, parts, heads, max_reach;

    __device__ __forceinline__ u32 rows_full() const { return shared + BARRIERS; }
    __device__ __forceinline__ u32 rows_empty() const { return shared + BARRIERS + 8; }
    __device__ __forceinline__ u32 full(u32 stage) const { return shared + BARRIERS + 16 + 16 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(stage) + 8; }
    __device__ __forceinline__ u32 q(u32 stage) const { return shared + Q + stage * Queries::BYTES; }
    __device__ __forceinline__ u32 d_out(u32 stage) const { return shared + D_OUT + stage * Queries::BYTES; }
    __device__ __forceinline__ u32 words(u32 stage) const { return shared + WORDS + stage * WORDS_BYTES; }
    // The first keys are seen by most queries: they come first.
    __device__ __forceinline__ int first_row(int work) const { return work / parts * ROWS; }
    __device__ __forceinline__ int part(int work) const { return work % parts; }
    __device__ __forceinline__ int num_work() const { return (tokens + ROWS - 1) / ROWS * parts; }

    __device__ __forceinline__ ForKeys(int tokens, int parts, int heads, int max_reach)
        : tokens(tokens), parts(parts), heads(heads), max_reach(max_reach) {
        shared = aligned_shared();
        if (threadIdx.x == 0) {
            barrier_init(rows_full(), 1);
            barrier_init(rows_empty(), CONSUMERS + 32);
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full(i), 1 + 32);
                barrier_init(empty(i), CONSUMERS);
            }
            barriers_begin();
        }
        __syncthreads();
    }

    // Calls f(head, first query) for each tile whose queries see some of a block's keys, and f(0, −1) at the end.
    template <class F> __device__ __forceinline__ void each_tile(int work, const u32 *positions, F f) const {
        int first = first_row(work), last_key = (first + ROWS < tokens ? first + ROWS : tokens) - 1, head = part(work) * heads;
        for (int end = head + heads; head < end; head++)
            // Later queries begin later: past the last one that sees these keys there is none.
            for (int tile = first; tile < tokens && tile - reach(positions, tile, max_reach) <= last_key; tile += QUERIES) f(head, tile);
        f(0, -1);
    }

    // One thread draws work and brings rows and tiles.
    __device__ __forceinline__ void produce(int *drawn, int *tile_row, const TensorMap &d_out_map, const TensorMap &q_map,
                                            const TensorMap &k_map, const TensorMap &v_map, const u32 *positions, int group) const {
        Ring<STAGES> stage;
        for (u32 parity = 1;; parity ^= 1) {
            int work = draw(&keys_ticket, num_work(), gridDim.x);
            barrier_wait(rows_empty(), parity);
            *drawn = work;
            if (work < 0) return barrier_arrive(rows_full());
            int column = part(work) * heads / group * D;
            barrier_arrive_expecting(rows_full(), 2 * Rows::BYTES);
            Rows::copy(shared, k_map, column, first_row(work), rows_full());
            Rows::copy(shared + Rows::BYTES, v_map, column, first_row(work), rows_full());
            each_tile(work, positions, [&](int head, int tile) {
                barrier_wait(empty(stage.index), stage.parity ^ 1);
                tile_row[stage.index] = tile;
                barrier_arrive_expecting(full(stage.index), tile < 0 ? 0 : 2 * Queries::BYTES);
                if (tile >= 0) {
                    Queries::copy(q(stage.index), q_map, head * D, tile, full(stage.index));
                    Queries::copy(d_out(stage.index), d_out_map, head * D, tile, full(stage.index));
                }
                stage.next();
            });
        }
    }

    // One warp brings the numbers of each query; those of a query that is not there are 0.
    __device__ __forceinline__ void produce_words(const int *drawn, const float *lse, const float *delta, const u32 *positions,
                                                  int num_heads) const {
        Ring<STAGES> stage;
        for (u32 parity = 0;; parity ^= 1) {
            int work = next_work(rows_full(), parity, *drawn);
            if (work < 0) return;
            each_tile(work, positions, [&](int head, int tile) {
                barrier_wait(empty(stage.index), stage.parity ^ 1);
                for (int i = threadIdx.x % 32; i < QUERIES && tile >= 0; i += 32) {
                    bool there = tile + i < tokens;
                    u64 t = there ? tile + i : 0, at = t * num_heads + head;
                    copy_word(words(stage.index) + i * 4, lse + at, there);
                    copy_word(words(stage.index) + (QUERIES + i) * 4, delta + at, there);
                    copy_word(words(stage.index) + (2 * QUERIES + i) * 4, positions + t, there);
                }
                barrier_arrive_after_words(full(stage.index));
                stage.next();
            });
            barrier_arrive(rows_empty());
        }
    }
};

// d_v = Σ Pᵀ · d_out, d_k = scale · Σ dSᵀ · Q over `heads` heads that share keys: d_k, d_v [T, num_heads / heads · D]. Works on
// transposed scores: rows are keys. The two warpgroups take turns to start products.
template <int D>
__device__ void backward_keys(Act *d_k, Act *d_v, const TensorMap &d_out_map, const TensorMap &q_map, const TensorMap &k_map,
                              const TensorMap &v_map, const float *lse, const float *delta, const u32 *positions, int tokens,
                              int num_heads, int num_kv_heads, int heads, int max_reach, float scale) {
    typedef ForKeys<D> Block;
    typedef typename Block::Rows Rows;
    typedef typename Block::Queries Queries;
    const int QUERIES = Block::QUERIES;
    __shared__ int drawn, tile_row[Block::STAGES];
    Block block(tokens, num_heads / heads, heads, max_reach);
    bool computes = divide_block<D == 128 ? 24 : 40, D == 128 ? 240 : 232>([&]() {
        if (threadIdx.x == 0)
            block.produce(&drawn, tile_row, d_out_map, q_map, k_map, v_map, positions, num_heads / num_kv_heads);
        else if (threadIdx.x / 32 == 1)
            block.produce_words(&drawn, lse, delta, positions, num_heads);
    });
    if (!computes) return;
    Place place;
    Ring<Block::STAGES> stage;
    float log2_scale = scale * LOG2_E;
    if (place.warpgroup == 1) named_arrive(1, CONSUMERS);
    for (u32 parity = 0;; parity ^= 1) {
        int work = next_work(block.rows_full(), parity, drawn);
        if (work < 0) break;
        int first_key = block.first_row(work) + place.warp_row, row = block.first_row(work) + place.row;
        float k_acc[D / 2], v_acc[D / 2], s[QUERIES / 2], d_p[QUERIES / 2];
        u32 p[QUERIES / 16][4], d_s[QUERIES / 16][4], at;
        auto next_tile = [&]() {
            barrier_wait(block.full(stage.index), stage.parity);
            return uniform(tile_row[stage.index]);
        };
        auto scores = [&]() {
            products_begin();
            multiply_transposed<D, Rows, Queries>(s, block.shared, place.warpgroup * 64, block.q(stage.index));
            multiply_transposed<D, Rows, Queries>(d_p, block.shared + Rows::BYTES, place.warpgroup * 64, block.d_out(stage.index));
        };
        int tile = next_tile();
        scores();
        for (bool accumulate = false;; accumulate = true) {
            at = stage.index;
            const float *query_lse = (const float *)shared_pointer(block.words(at)), *query_delta = query_lse + QUERIES;
            const u32 *query_position = (const u32 *)(query_delta + QUERIES);
            products_wait<1>();
            pin(s);
#pragma unroll
            for (int e = 0; e < QUERIES / 2; e += 4) {
                float2 shift = *(const float2 *)(query_lse + e * 2 + place.column);
#pragma unroll
                for (int i = 0; i < 4; i++) s[e + i] = exp2_fast(s[e + i] * log2_scale - (i % 2 ? shift.y : shift.x) * LOG2_E);
            }
            bool all = tile >= first_key + 15 && tile + QUERIES - 1 - reach(query_position, QUERIES - 1, max_reach) <= first_key;
            if (!all) {
#pragma unroll
                for (int e = 0; e < QUERIES / 2; e++) {
                    int query = e / 4 * 8 + place.column + e % 2, key = row + e / 2 % 2 * 8;
                    if (key > tile + query || key < tile + query - reach(query_position, query, max_reach)) s[e] = 0.0f;
                }
            }
            round_scores(p, s);
            products_begin();
            multiply<Queries>(v_acc, p, block.d_out(at), accumulate);
            products_wait<1>();
            pin(d_p);
            // From the rounded probabilities: the others would take registers that are not there.
#pragma unroll
            for (int e = 0; e < QUERIES / 2; e += 2) {
                float2 mean = *(const float2 *)(query_delta + e / 4 * 8 + place.column);
                u32 both = p[e / 8][e / 2 % 4];
                d_p[e] = to_f32(Act{(u16)both}) * (d_p[e] - mean.x);
                d_p[e + 1] = to_f32(Act{(u16)(both >> 16)}) * (d_p[e + 1] - mean.y);
            }
            round_scores(d_s, d_p);
            products_wait<0>();
            named_wait(1 + place.warpgroup, CONSUMERS);
            products_begin();
            multiply<Queries>(k_acc, d_s, block.q(at), accumulate);
            stage.next();
            tile = next_tile();
            if (tile < 0) break;
            scores();
            named_arrive(2 - place.warpgroup, CONSUMERS);
            products_wait<2>();
            barrier_arrive(block.empty(at));
        }
        named_arrive(2 - place.warpgroup, CONSUMERS);
        products_wait<0>();
        pin(k_acc);
        pin(v_acc);
        // The last tile, and the end of the list.
        barrier_arrive(block.empty(at));
        barrier_arrive(block.empty(stage.index));
        stage.next();
        barrier_arrive(block.rows_empty());
        u64 to = (u64)block.part(work) * D;
        store_rows(d_k + to, k_acc, row, place.column, tokens, block.parts * D, scale, scale);
        store_rows(d_v + to, v_acc, row, place.column, tokens, block.parts * D, 1.0f, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_queries(
    Act *d_q, float *delta, const __grid_constant__ TensorMap d_out_map, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const Act *d_out, const Act *out, const float *lse,
    const u32 *positions, int tokens, int num_heads, int num_kv_heads, int max_reach, float scale) {
    backward_queries<HEAD_DIM>(d_q, delta, d_out_map, q, k, v, d_out, out, lse, positions, tokens, num_heads, num_kv_heads,
                               max_reach, scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_hopper_backward_keys(
    Act *d_k, Act *d_v, const __grid_constant__ TensorMap d_out, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const float *lse, const float *delta,
    const u32 *positions, int tokens, int num_heads, int num_kv_heads, int heads, int max_reach, float scale) {
    backward_keys<HEAD_DIM>(d_k, d_v, d_out, q, k, v, lse, delta, positions, tokens, num_heads, num_kv_heads, heads, max_reach,
                            scale);
}
