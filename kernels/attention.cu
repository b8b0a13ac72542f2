// Causal grouped-query attention over packed documents, in the manner of FlashAttention-2 (Dao, 2023): tiles of queries and
// keys, an online softmax, tensor cores (mma.sync m16n8k16, f32 accumulation); scores never leave the registers. A token t sees
// the keys from past + t − reach(t) to past + t. q, out, d_q, d_out [T, heads · D]; k, v, d_k, d_v [past + T, kv_heads · D];
// lse, delta [T, heads] f32. Compiled for one D (HEAD_DIM: 64, 96, 128 or 256), with or without CAPPED.
//
// A block has 128 queries (or keys) of one head, each warp 16 of them, whose rows stay in its registers; tiles of the other side
// pass through shared memory, the next one being fetched while one is worked on. Backward is kernels that each own what they
// write, so that no sum depends on the order in which blocks run: one for queries, one for the keys and values that one head
// sees, and one that adds heads which share them.
//
// Registers are short where D is 256: tiles are smaller, backward leaves the second of its rows in shared memory, and different
// blocks compute the gradients of keys and of values, which makes eight products of seven. Their 96 KiB of shared memory are
// what every GPU since Ampere gives a block.
#include "attention.cuh"
#include "attention_sum.cuh"

static const int D = HEAD_DIM, WARPS = 8, THREADS = 32 * WARPS;
static const bool WIDE = D > 128;
// Rows of a block, and of a tile that passes.
static const int ROWS = 16 * WARPS, FORWARD_PASSING = WIDE ? 32 : 64, BACKWARD_PASSING = WIDE ? 16 : 64;
static const int ROW_BYTES = D * 2;

// Shared memory is two stages of two tiles; in a wide backward the rows that stay there follow.
extern __shared__ uint4 dynamic[];

// A tile's rows are D elements in chunks of eight; the chunks of a row change places by the row, so that the eight rows that
// ldmatrix reads at once lie in different banks.
__device__ __forceinline__ int turn(int row) { return D == 96 ? row / 2 % 4 : row % 8; }

// Starts to copy rows `first..first + NUM` of one head; rows at or past `end` become zeros.
template <int NUM>
__device__ __forceinline__ void fetch_rows(u32 tile, const Act *head, int first, int end, int stride) {
#pragma unroll
    for (int i = threadIdx.x; i < NUM * (D / 8); i += THREADS) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool there = first + row < end;
        const Act *from = head + (there ? (u64)(first + row) * stride + chunk * 8 : 0);
        u32 to = tile + (row * (D / 8) + (chunk ^ turn(row))) * 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
    }
}

// Starts to copy a stage: the same rows of two tensors.
template <int NUM>
__device__ __forceinline__ void fetch_tiles(u32 stage, const Act *x, const Act *y, int first, int end, int stride) {
    fetch_rows<NUM>(stage, x, first, end, stride);
    fetch_rows<NUM>(stage + NUM * ROW_BYTES, y, first, end, stride);
}

// Starts to copy one number, or puts 0.
__device__ __forceinline__ void fetch_word(void *to, const void *from, bool there) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// All that was fetched is there, for all threads, and all of them are past what they did before.
__device__ __forceinline__ void wait_for_rows() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

// Four 8x8 matrices of 16-bit elements; each lane gives the address of one row.
__device__ __forceinline__ void ldmatrix(u32 r[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 r[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Returns the address of chunk `even + odd` of a row, for this lane; modulo 8 the row is the lane. Only `even` is known when this is compiled.
__device__ __forceinline__ u32 chunk_of(u32 tile, int row, int even, int odd) {
    return tile + row * ROW_BYTES + (((odd ^ turn(threadIdx.x % 8)) ^ even) * 16);
}

// c [16, 8] += a [16, 16] · b [16, 8]
__device__ __forceinline__ void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ACT_NAME "." ACT_NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The first operand of a product, 16 of ROWS rows for each warp: read from shared memory for each 16 columns, or held in registers.
struct Lying {
    u32 tiles;
    __device__ __forceinline__ void get(u32 a[4], int k) const {
        int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
        ldmatrix(a, chunk_of(tiles, row, 2 * k, lane / 16));
    }
};
struct Held {
    u32 at[D / 16][4];
    __device__ __forceinline__ void load(u32 tiles) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) Lying{tiles}.get(at[k], k);
    }
    __device__ __forceinline__ void get(u32 a[4], int k) const {
        for (int i = 0; i < 4; i++) a[i] = at[k][i];
    }
};

// A block's rows of two tensors. The first are held; so are the second, unless D is wide.
template <bool WIDE> struct TwoRows {
    Held x, y;
    // Shared memory is free again after it.
    __device__ __forceinline__ void load(u32 shared, const Act *from_x, const Act *from_y, int first, int end, int stride) {
        fetch_rows<ROWS>(shared, from_x, first, end, stride);
        fetch_rows<ROWS>(shared + ROWS * ROW_BYTES, from_y, first, end, stride);
        wait_for_rows();
        x.load(shared);
        y.load(shared + ROWS * ROW_BYTES);
        __syncthreads();
    }
};
template <> struct TwoRows<true> {
    Held x;
    Lying y;
    // The second rows are on their way when it returns; there are none where `from_y` is null.
    __device__ __forceinline__ void load(u32 shared, const Act *from_x, const Act *from_y, int first, int end, int stride) {
        y.tiles = shared + 4 * BACKWARD_PASSING * ROW_BYTES;
        fetch_rows<ROWS>(y.tiles, from_x, first, end, stride);
        wait_for_rows();
        x.load(y.tiles);
        __syncthreads();
        if (from_y) fetch_rows<ROWS>(y.tiles, from_y, first, end, stride);
    }
};

// c [16, 8 · N] += A [16, D] · Bᵀ, B [8 · N, D] in shared memory.
template <int N, class A> __device__ __forceinline__ void multiply_transposed(float (*c)[4], const A &a, u32 b) {
    int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 rows[4];
        a.get(rows, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 columns[4];
            ldmatrix(columns, chunk_of(b, n * 8 + row, 2 * k, lane / 8 % 2));
            mma(c[n], rows, columns[0], columns[1]);
            mma(c[n + 1], rows, columns[2], columns[3]);
        }
    }
}

// c [16, D] += P [16, 8 · N] · B, B [8 · N, D] in shared memory; p is an accumulator, rounded to activations here.
template <int N> __device__ __forceinline__ void multiply(float (*c)[4], const float (*p)[4], u32 b) {
    int lane = threadIdx.x % 32, row = lane % 16;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 rows[4] = {pack_act(p[2 * k][0], p[2 * k][1]), pack_act(p[2 * k][2], p[2 * k][3]),
                       pack_act(p[2 * k + 1][0], p[2 * k + 1][1]), pack_act(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 columns[4];
            ldmatrix_transposed(columns, chunk_of(b, k * 16 + row, n, lane / 16));
            mma(c[n], rows, columns[0], columns[1]);
            mma(c[n + 1], rows, columns[2], columns[3]);
        }
    }
}

template <int N> __device__ __forceinline__ void clear(float (*c)[4]) {
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

// Writes rows of an accumulator times their factor; `row` is that of this lane's first half, rows past `end` are left out.
__device__ __forceinline__ void store_rows(Act *head, const float (*c)[4], int row, int end, int stride, float low, float high) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        if (row < end) *(u32 *)(head + (u64)row * stride + n * 8 + column) = pack_act(c[n][0] * low, c[n][1] * low);
        if (row + 8 < end)
            *(u32 *)(head + (u64)(row + 8) * stride + n * 8 + column) = pack_act(c[n][2] * high, c[n][3] * high);
    }
}

// The keys that 16 queries of a warp see.
struct Sight {
    // The keys that each of this lane's rows sees; a row that is not there sees none.
    int first_key[2], last_key[2];
    // The keys that any row sees, and those that all rows see which are there.
    int any_first, any_last, all_first, all_last;

    __device__ __forceinline__ Sight(const u32 *positions, int max_reach, int warp_row, int tokens, int past) {
        for (int i = 0; i < 2; i++) {
            int t = warp_row + threadIdx.x % 32 / 4 + 8 * i;
            first_key[i] = t < tokens ? past + t - reach(positions, t, max_reach) : 1;
            last_key[i] = t < tokens ? past + t : 0;
        }
        bool there = warp_row < tokens;
        int last_row = warp_row + 15 < tokens ? warp_row + 15 : tokens - 1;
        any_first = there ? past + warp_row - reach(positions, warp_row, max_reach) : 0;
        any_last = there ? past + last_row : -1;
        all_first = there ? past + last_row - reach(positions, last_row, max_reach) : 0;
        all_last = past + warp_row;
    }
    __device__ __forceinline__ bool any(int first, int num) const { return first <= any_last && first + num > any_first; }
    __device__ __forceinline__ bool all(int first, int num) const { return first >= all_first && first + num - 1 <= all_last; }
    // Returns whether element `e` of an accumulator is seen; `key` is that of its column 0.
    __device__ __forceinline__ bool sees(int key, int e) const {
        key += threadIdx.x % 4 * 2 + e % 2;
        return key >= first_key[e / 2] && key <= last_key[e / 2];
    }
};

#ifdef CAPPED
static const bool CAPS = true;
#else
static const bool CAPS = false;
#endif

// The factors between products of queries with keys, scores and exponents of 2. Where scores are capped they replace the products.
struct Scores {
    float scale, softcap;
    // Score of one.
    __device__ __forceinline__ float unit() const { return CAPS ? 1.0f : scale; }
    // A product becomes softcap · tanh(scale · product / softcap); tanh(x) = 1 − 2r, r = 1 / (1 + e^2x). Returns 1 − tanh².
    __device__ __forceinline__ float cap(float &s) const {
        float r = reciprocal_fast(1.0f + exp2_fast(s * (2.0f * LOG2_E * scale / softcap)));
        s = softcap - 2.0f * softcap * r;
        return 4.0f * r * (1.0f - r);
    }
};

// One pass over the keys that a block's queries see, with the largest score and the sum so far of each row.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(Act *out, float *lse, const Act *q, const Act *k, const Act *v, const u32 *positions, int tokens,
                      int num_heads, int num_kv_heads, int past, int max_reach, float scale, float softcap) {
    const int PASSING = FORWARD_PASSING;
    const u32 TILE = PASSING * ROW_BYTES, STAGE = 2 * TILE;
    const u32 shared = (u32)__cvta_generic_to_shared(dynamic);
    const Scores scores = {scale, softcap};
    int lane = threadIdx.x % 32, head = blockIdx.y, kv = head / (num_heads / num_kv_heads);
    // The last tiles see most keys: they begin first.
    int width = num_heads * D, kv_width = num_kv_heads * D, first_query = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int end = past + (first_query + ROWS < tokens ? first_query + ROWS : tokens);
    auto fetch = [&](u32 stage, int tile) {
        fetch_tiles<PASSING>(shared + stage, k + kv * D, v + kv * D, tile, end, kv_width);
    };
    int tile = past + first_query - reach(positions, first_query, max_reach);
    Held queries;
    u32 stage = 0;
    fetch_rows<ROWS>(shared + STAGE, q + head * D, first_query, tokens, width);
    fetch(stage, tile);
    wait_for_rows();
    queries.load(shared + STAGE);
    int warp_row = first_query + threadIdx.x / 32 * 16, row = warp_row + lane / 4;
    Sight sight(positions, max_reach, warp_row, tokens, past);
    float acc[D / 8][4], max[2] = {-INFINITY_F32, -INFINITY_F32}, sum[2] = {0.0f, 0.0f}, log2_unit = scores.unit() * LOG2_E;
    clear<D / 8>(acc);
    for (; tile < end; tile += PASSING, stage ^= STAGE) {
        wait_for_rows();
        if (tile + PASSING < end) fetch(stage ^ STAGE, tile + PASSING);
        if (!sight.any(tile, PASSING)) continue;
        float s[PASSING / 8][4];
        clear<PASSING / 8>(s);
        multiply_transposed<PASSING / 8>(s, queries, shared + stage);
        if (CAPS) {
#pragma unroll
            for (int n = 0; n < PASSING / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores.cap(s[n][e]);
        }
        if (!sight.all(tile, PASSING)) {
#pragma unroll
            for (int n = 0; n < PASSING / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (!sight.sees(tile + n * 8, e)) s[n][e] = -INFINITY_F32;
        }
        float new_max[2] = {max[0], max[1]};
#pragma unroll
        for (int n = 0; n < PASSING / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
        float rescale[2], shift[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            new_max[i] = fmaxf(new_max[i], __shfl_xor_sync(0xffffffffu, new_max[i], 1));
            new_max[i] = fmaxf(new_max[i], __shfl_xor_sync(0xffffffffu, new_max[i], 2));
            // A row that has seen no key yet keeps zeros: its maximum stands for 0.
            shift[i] = new_max[i] == -INFINITY_F32 ? 0.0f : new_max[i] * log2_unit;
            rescale[i] = exp2_fast(max[i] * log2_unit - shift[i]);
            max[i] = new_max[i];
            sum[i] *= rescale[i];
        }
#pragma unroll
        for (int n = 0; n < PASSING / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_fast(s[n][e] * log2_unit - shift[e / 2]);
                sum[e / 2] += s[n][e];
            }
        if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[n][e] *= rescale[e / 2];
        }
        multiply<PASSING / 8>(acc, s, shared + stage + TILE);
    }
    float reciprocal[2];
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        reciprocal[i] = 1.0f / sum[i];
        if (lane % 4 == 0 && row + 8 * i < tokens) lse[(u64)(row + 8 * i) * num_heads + head] = max[i] * scores.unit() + logf(sum[i]);
    }
    store_rows(out + head * D, acc, row, tokens, width, reciprocal[0], reciprocal[1]);
}

// delta = Σ d_out · out over a head: one warp a (token, head).
extern "C" __global__ void attention_delta(float *delta, const Act *d_out, const Act *out, u64 num_rows, u32 head_dim) {
    u64 row = thread_idx() / 32;
    if (row >= num_rows) return;
    float sum = 0.0f;
    for (u32 i = threadIdx.x % 32; i < head_dim; i += 32)
        sum += to_f32(d_out[row * head_dim + i]) * to_f32(out[row * head_dim + i]);
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// d_q = scale · dS · K, dS = P ∘ (d_out · Vᵀ − delta) ∘ the cap's slope.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_queries(Act *d_q, const Act *d_out, const float *lse, const float *delta, const Act *q, const Act *k,
                               const Act *v, const u32 *positions, int tokens, int num_heads, int num_kv_heads, int max_reach,
                               float scale, float softcap) {
    const int PASSING = BACKWARD_PASSING, KEYS = WIDE ? 16 : 32;
    const u32 TILE = PASSING * ROW_BYTES, STAGE = 2 * TILE;
    const u32 shared = (u32)__cvta_generic_to_shared(dynamic);
    const Scores scores = {scale, softcap};
    int lane = threadIdx.x % 32, head = blockIdx.y, kv = head / (num_heads / num_kv_heads);
    int width = num_heads * D, kv_width = num_kv_heads * D, first_query = (gridDim.x - 1 - blockIdx.x) * ROWS;
    int end = first_query + ROWS < tokens ? first_query + ROWS : tokens;
    auto fetch = [&](u32 stage, int tile) {
        fetch_tiles<PASSING>(shared + stage, k + kv * D, v + kv * D, tile, end, kv_width);
    };
    u32 stage = 0;
    TwoRows<WIDE> rows;
    rows.load(shared, q + head * D, d_out + head * D, first_query, tokens, width);
    int tile = first_query - reach(positions, first_query, max_reach);
    fetch(stage, tile);
    int warp_row = first_query + threadIdx.x / 32 * 16, row = warp_row + lane / 4;
    Sight sight(positions, max_reach, warp_row, tokens, 0);
    float row_lse[2], row_delta[2], log2_unit = scores.unit() * LOG2_E;
    for (int i = 0; i < 2; i++) {
        int t = row + 8 * i;
        row_lse[i] = t < tokens ? lse[(u64)t * num_heads + head] * LOG2_E : 0.0f;
        row_delta[i] = t < tokens ? delta[(u64)t * num_heads + head] : 0.0f;
    }
    float acc[D / 8][4];
    clear<D / 8>(acc);
    for (; tile < end; tile += PASSING, stage ^= STAGE) {
        wait_for_rows();
        if (tile + PASSING < end) fetch(stage ^ STAGE, tile + PASSING);
#pragma unroll 2
        for (int part = 0; part < PASSING; part += KEYS) {
            int first_key = tile + part;
            if (!sight.any(first_key, KEYS)) continue;
            u32 k_tile = shared + stage + part * ROW_BYTES, v_tile = k_tile + TILE;
            float s[KEYS / 8][4], d_p[KEYS / 8][4];
            clear<KEYS / 8>(s);
            clear<KEYS / 8>(d_p);
            multiply_transposed<KEYS / 8>(s, rows.x, k_tile);
            multiply_transposed<KEYS / 8>(d_p, rows.y, v_tile);
            bool all = sight.all(first_key, KEYS);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float slope = CAPS ? scores.cap(s[n][e]) : 1.0f;
                    float p = exp2_fast(s[n][e] * log2_unit - row_lse[e / 2]);
                    if (!all && !sight.sees(first_key + n * 8, e)) p = 0.0f;
                    s[n][e] = p * (d_p[n][e] - row_delta[e / 2]);
                    if (CAPS) s[n][e] *= slope;
                }
            multiply<KEYS / 8>(acc, s, k_tile);
        }
    }
    store_rows(d_q + head * D, acc, row, tokens, width, scale, scale);
}

// d_v = Σ Pᵀ · d_out, d_k = scale · Σ dSᵀ · Q over the queries of one head, or one of both: d_k, d_v [T, heads · D]. Works on
// transposed scores: rows are keys.
template <bool FOR_K, bool FOR_V>
__device__ void backward_keys(Act *d_k, Act *d_v, const Act *d_out, const float *lse, const float *delta, const Act *q,
                              const Act *k, const Act *v, const u32 *positions, int tokens, int head, int num_heads,
                              int num_kv_heads, int max_reach, Scores scores) {
    const int PASSING = BACKWARD_PASSING, QUERIES = 16;
    const u32 TILE = PASSING * ROW_BYTES, STAGE = 2 * TILE;
    __shared__ float query_lse[2][PASSING], query_delta[2][PASSING];
    __shared__ u32 query_position[2][PASSING];
    const u32 shared = (u32)__cvta_generic_to_shared(dynamic);
    int lane = threadIdx.x % 32, kv = head / (num_heads / num_kv_heads);
    int width = num_heads * D, kv_width = num_kv_heads * D, first_key = blockIdx.x * ROWS;
    auto fetch = [&](u32 stage, int tile) {
        fetch_tiles<PASSING>(shared + stage, q + head * D, d_out + head * D, tile, tokens, width);
        int i = threadIdx.x % PASSING, t = tile + i;
        bool there = t < tokens;
        u64 at = there ? (u64)t * num_heads + head : 0;
        switch (threadIdx.x / PASSING) {
        case 0: fetch_word(&query_lse[stage != 0][i], lse + at, there); break;
        case 1: fetch_word(&query_delta[stage != 0][i], delta + at, there); break;
        case 2: fetch_word(&query_position[stage != 0][i], positions + (there ? t : 0), there);
        }
    };
    // The first key that a query of a tile sees; of one that is not there, no key.
    auto first_seen = [&](u32 stage, int tile, int i) { return tile + i - reach(query_position[stage != 0], i, max_reach); };
    u32 stage = 0;
    TwoRows<WIDE> rows;
    rows.load(shared, k + kv * D, FOR_K ? v + kv * D : nullptr, first_key, tokens, kv_width);
    fetch(stage, first_key);
    int warp_key = first_key + threadIdx.x / 32 * 16, row = warp_key + lane / 4;
    int last_key = (first_key + ROWS < tokens ? first_key + ROWS : tokens) - 1;
    float k_acc[FOR_K ? D / 8 : 1][4], v_acc[FOR_V ? D / 8 : 1][4], log2_unit = scores.unit() * LOG2_E;
    clear<FOR_K ? D / 8 : 1>(k_acc);
    clear<FOR_V ? D / 8 : 1>(v_acc);
    for (int tile = first_key; tile < tokens; tile += PASSING, stage ^= STAGE) {
        wait_for_rows();
        // Later queries begin later: past the last one that sees these keys there is none.
        if (first_seen(stage, tile, 0) > last_key) break;
        if (tile + PASSING < tokens) fetch(stage ^ STAGE, tile + PASSING);
#pragma unroll 2
        for (int part = 0; part < PASSING; part += QUERIES) {
            int first = tile + part;
            if (first + QUERIES <= warp_key || first_seen(stage, tile, part) > warp_key + 15) continue;
            u32 q_tile = shared + stage + part * ROW_BYTES, d_tile = q_tile + TILE;
            float p[QUERIES / 8][4], d_p[QUERIES / 8][4];
            clear<QUERIES / 8>(p);
            clear<QUERIES / 8>(d_p);
            multiply_transposed<QUERIES / 8>(p, rows.x, q_tile);
            if (FOR_K) multiply_transposed<QUERIES / 8>(d_p, rows.y, d_tile);
            bool all = first >= warp_key + 15 && first_seen(stage, tile, part + QUERIES - 1) <= warp_key;
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int query = part + n * 8 + lane % 4 * 2 + e % 2, key = row + e / 2 * 8;
                    float slope = CAPS ? scores.cap(p[n][e]) : 1.0f;
                    p[n][e] = exp2_fast(p[n][e] * log2_unit - query_lse[stage != 0][query] * LOG2_E);
                    if (!all && !(key >= first_seen(stage, tile, query) && key <= tile + query)) p[n][e] = 0.0f;
                    d_p[n][e] = p[n][e] * (d_p[n][e] - query_delta[stage != 0][query]);
                    if (CAPS) d_p[n][e] *= slope;
                }
            if (FOR_V) multiply<QUERIES / 8>(v_acc, p, d_tile);
            if (FOR_K) multiply<QUERIES / 8>(k_acc, d_p, q_tile);
        }
    }
    if (FOR_K) store_rows(d_k + head * D, k_acc, row, tokens, width, scores.scale, scores.scale);
    if (FOR_V) store_rows(d_v + head * D, v_acc, row, tokens, width, 1.0f, 1.0f);
}

// Where D is wide, blocks (·, num_heads and more) are those of the values.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_keys(Act *d_k, Act *d_v, const Act *d_out, const float *lse, const float *delta, const Act *q,
                            const Act *k, const Act *v, const u32 *positions, int tokens, int num_heads, int num_kv_heads,
                            int max_reach, float scale, float softcap) {
    int head = blockIdx.y;
    Scores scores = {scale, softcap};
    if (WIDE && head >= num_heads)
        backward_keys<false, true>(d_k, d_v, d_out, lse, delta, q, k, v, positions, tokens, head - num_heads, num_heads,
                                   num_kv_heads, max_reach, scores);
    else
        backward_keys<true, !WIDE>(d_k, d_v, d_out, lse, delta, q, k, v, positions, tokens, head, num_heads, num_kv_heads,
                                   max_reach, scores);
}
