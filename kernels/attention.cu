// Causal grouped-query attention over packed documents, in the manner of FlashAttention-2 (Dao, 2023): tiles of queries and
// keys, an online softmax, tensor cores (mma.sync m16n8k16, f32 accumulation); scores never leave the registers. A token t sees
// the keys from past + t − positions[t], the first of its document, to past + t. q, out, d_q, d_out [T, heads · D]; k, v, d_k, d_v
// [past + T, kv_heads · D]; lse, delta [T, heads] f32.
//
// Backward is kernels that each own what they write, so that no sum depends on the order in which blocks run: one for queries, one
// for the keys and values that one head sees, and one that adds heads which share them.
#include "common.cuh"

static const int WARPS = 4, THREADS = 32 * WARPS;
static const float LOG2_E = 1.4426950408889634f;

// Rows of shared memory are eight elements longer than they need be: ldmatrix then finds its rows in different banks.
template <int D> struct Row { static const int LEN = D + 8; };

// Four 8x8 matrices of 16-bit elements; each lane gives the address of one row.
__device__ __forceinline__ void ldmatrix(u32 r[4], const Act *row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 r[4], const Act *row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// c [16, 8] += a [16, 16] · b [16, 8]
__device__ __forceinline__ void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ACT_NAME "." ACT_NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows `first..first + ROWS` of one head to shared memory; rows at or past `end` become zeros.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(Act *tile, const Act *head, int first, int end, int stride) {
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        uint4 value = {0, 0, 0, 0};
        if (first + row < end) value = *(const uint4 *)(head + (u64)(first + row) * stride + column);
        *(uint4 *)(tile + row * Row<D>::LEN + column) = value;
    }
}

// The A operand of 16 rows that begin at `tile`: a[k] covers columns 16k to 16k + 15.
template <int D>
__device__ __forceinline__ void load_a(u32 a[4], const Act *tile, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix(a, tile + lane % 16 * Row<D>::LEN + k * 16 + lane / 16 * 8);
}

// c [16, 8 · N] += A [16, D] · Bᵀ, B [8 · N, D] in shared memory; `a(k)` gives the A operand of step k.
template <int D, int N, typename A>
__device__ __forceinline__ void multiply_transposed(float (*c)[4], A a, const Act *b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 rows[4];
        a(rows, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 columns[4];
            ldmatrix(columns, b + (n * 8 + lane % 8 + lane / 16 * 8) * Row<D>::LEN + k * 16 + lane / 8 % 2 * 8);
            mma(c[n], rows, columns[0], columns[1]);
            mma(c[n + 1], rows, columns[2], columns[3]);
        }
    }
}

// c [16, D] += P [16, 8 · N] · B, B [8 · N, D] in shared memory; p is an accumulator, rounded to activations here.
template <int D, int N>
__device__ __forceinline__ void multiply(float (*c)[4], const float (*p)[4], const Act *b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 rows[4] = {pack_act(p[2 * k][0], p[2 * k][1]), pack_act(p[2 * k][2], p[2 * k][3]),
                       pack_act(p[2 * k + 1][0], p[2 * k + 1][1]), pack_act(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 columns[4];
            ldmatrix_transposed(columns, b + (k * 16 + lane % 16) * Row<D>::LEN + n * 8 + lane / 16 * 8);
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
template <int D>
__device__ __forceinline__ void store_rows(Act *head, const float (*c)[4], int row, int end, int stride, float low, float high) {
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        if (row < end) *(u32 *)(head + (u64)row * stride + n * 8 + column) = pack_act(c[n][0] * low, c[n][1] * low);
        if (row + 8 < end)
            *(u32 *)(head + (u64)(row + 8) * stride + n * 8 + column) = pack_act(c[n][2] * high, c[n][3] * high);
    }
}

// One block a tile of 64 queries of one head; each warp has 16 of them.
template <int D>
__device__ void forward(Act *out, float *lse, const Act *q, const Act *k, const Act *v, const u32 *positions, int tokens,
                        int num_heads, int num_kv_heads, int past, float scale) {
    const int KEYS = 64;
    __shared__ alignas(16) Act k_tile[KEYS * Row<D>::LEN], v_tile[KEYS * Row<D>::LEN];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, kv = head / (num_heads / num_kv_heads);
    // The last tiles see most keys: they begin first.
    int width = num_heads * D, kv_width = num_kv_heads * D, first_query = (gridDim.x - 1 - blockIdx.x) * 64;
    load_tile<D, 64>(k_tile, q + head * D, first_query, tokens, width);
    __syncthreads();
    u32 queries[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; i++) load_a<D>(queries[i], k_tile + warp * 16 * Row<D>::LEN, i);
    __syncthreads();
    // This lane's accumulators belong to queries row and row + 8.
    int row = first_query + warp * 16 + lane / 4;
    int first_key[2], last_key[2];
    for (int i = 0; i < 2; i++) {
        int t = row + 8 * i;
        first_key[i] = t < tokens ? past + t - (int)positions[t] : 1;
        last_key[i] = t < tokens ? past + t : 0;
    }
    float acc[D / 8][4], max[2] = {-INFINITY_F32, -INFINITY_F32}, sum[2] = {0.0f, 0.0f};
    clear<D / 8>(acc);
    int end = past + (first_query + 64 < tokens ? first_query + 64 : tokens);
    for (int tile = past + first_query - (int)positions[first_query]; tile < end; tile += KEYS) {
        load_tile<D, KEYS>(k_tile, k + kv * D, tile, end, kv_width);
        load_tile<D, KEYS>(v_tile, v + kv * D, tile, end, kv_width);
        __syncthreads();
        float s[KEYS / 8][4];
        clear<KEYS / 8>(s);
        multiply_transposed<D, KEYS / 8>(s, [&](u32 a[4], int i) {
            for (int j = 0; j < 4; j++) a[j] = queries[i][j];
        }, k_tile);
        float new_max[2] = {max[0], max[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = tile + n * 8 + lane % 4 * 2 + e % 2;
                bool seen = key >= first_key[e / 2] && key <= last_key[e / 2];
                s[n][e] = seen ? s[n][e] * scale * LOG2_E : -INFINITY_F32;
                new_max[e / 2] = fmaxf(new_max[e / 2], s[n][e]);
            }
        float rescale[2];
        for (int i = 0; i < 2; i++) {
            new_max[i] = fmaxf(new_max[i], __shfl_xor_sync(0xffffffffu, new_max[i], 1));
            new_max[i] = fmaxf(new_max[i], __shfl_xor_sync(0xffffffffu, new_max[i], 2));
            // A row that has seen no key yet keeps zeros: its maximum stands for 0.
            float shift = new_max[i] == -INFINITY_F32 ? 0.0f : new_max[i];
            rescale[i] = exp2f(max[i] - shift);
            max[i] = new_max[i];
            new_max[i] = shift;
            sum[i] *= rescale[i];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2f(s[n][e] - new_max[e / 2]);
                sum[e / 2] += s[n][e];
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[n][e] *= rescale[e / 2];
        multiply<D, KEYS / 8>(acc, s, v_tile);
        __syncthreads();
    }
    float reciprocal[2];
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        reciprocal[i] = 1.0f / sum[i];
        if (lane % 4 == 0 && row + 8 * i < tokens) lse[(u64)(row + 8 * i) * num_heads + head] = max[i] / LOG2_E + logf(sum[i]);
    }
    store_rows<D>(out + head * D, acc, row, tokens, width, reciprocal[0], reciprocal[1]);
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

// d_q = scale · dS · K, dS = P ∘ (d_out · Vᵀ − delta). One block a tile of 64 queries of one head.
template <int D>
__device__ void backward_queries(Act *d_q, const Act *d_out, const float *lse, const float *delta, const Act *q, const Act *k,
                                 const Act *v, const u32 *positions, int tokens, int num_heads, int num_kv_heads, float scale) {
    const int KEYS = 32;
    __shared__ alignas(16) Act tiles[2 * KEYS * Row<D>::LEN];
    Act *k_tile = tiles, *v_tile = tiles + KEYS * Row<D>::LEN;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, kv = head / (num_heads / num_kv_heads);
    int width = num_heads * D, kv_width = num_kv_heads * D, first_query = (gridDim.x - 1 - blockIdx.x) * 64;
    u32 queries[D / 16][4], d_rows[D / 16][4];
    load_tile<D, 64>(tiles, q + head * D, first_query, tokens, width);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < D / 16; i++) load_a<D>(queries[i], tiles + warp * 16 * Row<D>::LEN, i);
    __syncthreads();
    load_tile<D, 64>(tiles, d_out + head * D, first_query, tokens, width);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < D / 16; i++) load_a<D>(d_rows[i], tiles + warp * 16 * Row<D>::LEN, i);
    __syncthreads();
    int row = first_query + warp * 16 + lane / 4;
    int first_key[2], last_key[2];
    float row_lse[2], row_delta[2];
    for (int i = 0; i < 2; i++) {
        int t = row + 8 * i;
        bool there = t < tokens;
        first_key[i] = there ? t - (int)positions[t] : 1;
        last_key[i] = there ? t : 0;
        row_lse[i] = there ? lse[(u64)t * num_heads + head] * LOG2_E : 0.0f;
        row_delta[i] = there ? delta[(u64)t * num_heads + head] : 0.0f;
    }
    float acc[D / 8][4];
    clear<D / 8>(acc);
    int end = first_query + 64 < tokens ? first_query + 64 : tokens;
    for (int tile = first_query - (int)positions[first_query]; tile < end; tile += KEYS) {
        load_tile<D, KEYS>(k_tile, k + kv * D, tile, end, kv_width);
        load_tile<D, KEYS>(v_tile, v + kv * D, tile, end, kv_width);
        __syncthreads();
        float s[KEYS / 8][4], d_p[KEYS / 8][4];
        clear<KEYS / 8>(s);
        clear<KEYS / 8>(d_p);
        multiply_transposed<D, KEYS / 8>(s, [&](u32 a[4], int i) {
            for (int j = 0; j < 4; j++) a[j] = queries[i][j];
        }, k_tile);
        multiply_transposed<D, KEYS / 8>(d_p, [&](u32 a[4], int i) {
            for (int j = 0; j < 4; j++) a[j] = d_rows[i][j];
        }, v_tile);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = tile + n * 8 + lane % 4 * 2 + e % 2;
                bool seen = key >= first_key[e / 2] && key <= last_key[e / 2];
                float p = seen ? exp2f(s[n][e] * scale * LOG2_E - row_lse[e / 2]) : 0.0f;
                s[n][e] = p * (d_p[n][e] - row_delta[e / 2]);
            }
        multiply<D, KEYS / 8>(acc, s, k_tile);
        __syncthreads();
    }
    store_rows<D>(d_q + head * D, acc, row, tokens, width, scale, scale);
}

// d_v = Σ Pᵀ · d_out, d_k = scale · Σ dSᵀ · Q over the queries of one head: d_k, d_v [T, heads · D]. One block a tile of 64 keys;
// each warp has 16 of them. Works on transposed scores: rows are keys. Shared memory is dynamic: K and V tiles of 64 rows, Q and
// d_out tiles of 32.
template <int D>
__device__ void backward_keys(Act *d_k, Act *d_v, const Act *d_out, const float *lse, const float *delta, const Act *q,
                              const Act *k, const Act *v, const u32 *positions, int tokens, int num_heads, int num_kv_heads,
                              float scale) {
    const int QUERIES = 32;
    extern __shared__ uint4 dynamic[];
    Act *k_tile = (Act *)dynamic, *v_tile = k_tile + 64 * Row<D>::LEN, *q_tile = v_tile + 64 * Row<D>::LEN;
    Act *d_tile = q_tile + QUERIES * Row<D>::LEN;
    __shared__ float query_lse[QUERIES], query_delta[QUERIES];
    __shared__ int query_first_key[QUERIES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, kv = head / (num_heads / num_kv_heads);
    int width = num_heads * D, kv_width = num_kv_heads * D, first_key = blockIdx.x * 64;
    load_tile<D, 64>(k_tile, k + kv * D, first_key, tokens, kv_width);
    load_tile<D, 64>(v_tile, v + kv * D, first_key, tokens, kv_width);
    int row = first_key + warp * 16 + lane / 4;
    int last_key = (first_key + 64 < tokens ? first_key + 64 : tokens) - 1;
    float k_acc[D / 8][4], v_acc[D / 8][4];
    clear<D / 8>(k_acc);
    clear<D / 8>(v_acc);
    for (int tile = first_key; tile < tokens; tile += QUERIES) {
        // Later queries begin later: past the last one that sees these keys there is none.
        if (tile - (int)positions[tile] > last_key) break;
        __syncthreads();
        load_tile<D, QUERIES>(q_tile, q + head * D, tile, tokens, width);
        load_tile<D, QUERIES>(d_tile, d_out + head * D, tile, tokens, width);
        if (threadIdx.x < QUERIES) {
            int t = tile + threadIdx.x;
            bool there = t < tokens;
            query_lse[threadIdx.x] = there ? lse[(u64)t * num_heads + head] * LOG2_E : 0.0f;
            query_delta[threadIdx.x] = there ? delta[(u64)t * num_heads + head] : 0.0f;
            query_first_key[threadIdx.x] = there ? t - (int)positions[t] : tokens;
        }
        __syncthreads();
        float p[QUERIES / 8][4], d_p[QUERIES / 8][4];
        clear<QUERIES / 8>(p);
        clear<QUERIES / 8>(d_p);
        multiply_transposed<D, QUERIES / 8>(p, [&](u32 a[4], int i) {
            load_a<D>(a, k_tile + warp * 16 * Row<D>::LEN, i);
        }, q_tile);
        multiply_transposed<D, QUERIES / 8>(d_p, [&](u32 a[4], int i) {
            load_a<D>(a, v_tile + warp * 16 * Row<D>::LEN, i);
        }, d_tile);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int query = n * 8 + lane % 4 * 2 + e % 2, key = row + e / 2 * 8;
                bool seen = key >= query_first_key[query] && key <= tile + query;
                p[n][e] = seen ? exp2f(p[n][e] * scale * LOG2_E - query_lse[query]) : 0.0f;
                d_p[n][e] = p[n][e] * (d_p[n][e] - query_delta[query]);
            }
        multiply<D, QUERIES / 8>(v_acc, p, d_tile);
        multiply<D, QUERIES / 8>(k_acc, d_p, q_tile);
    }
    store_rows<D>(d_k + head * D, k_acc, row, tokens, width, scale, scale);
    store_rows<D>(d_v + head * D, v_acc, row, tokens, width, 1.0f, 1.0f);
}

// y [T, kv_heads · D] = the sum of x [T, heads · D] over the heads of a group, in their order; by eights.
extern "C" __global__ void attention_sum_heads(Act8 *y, const Act8 *x, u64 eights, u32 group, u32 head_eights) {
    for (u64 i = thread_idx(); i < eights; i += num_threads()) {
        u64 first = i / head_eights * group * head_eights + i % head_eights;
        float sum[8] = {};
        for (u32 g = 0; g < group; g++) {
            Act8 part = x[first + g * head_eights];
            for (int j = 0; j < 8; j++) sum[j] += to_f32(part.at[j]);
        }
        Act8 rounded;
        for (int j = 0; j < 8; j++) rounded.at[j] = to_act(sum[j]);
        y[i] = rounded;
    }
}

#define INSTANCES(D)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_forward_##D(                                                \
        Act *out, float *lse, const Act *q, const Act *k, const Act *v, const u32 *positions, int tokens, int num_heads,        \
        int num_kv_heads, int past, float scale) {                                                                              \
        forward<D>(out, lse, q, k, v, positions, tokens, num_heads, num_kv_heads, past, scale);                                 \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries_##D(                                       \
        Act *d_q, const Act *d_out, const float *lse, const float *delta, const Act *q, const Act *k, const Act *v,             \
        const u32 *positions, int tokens, int num_heads, int num_kv_heads, float scale) {                                       \
        backward_queries<D>(d_q, d_out, lse, delta, q, k, v, positions, tokens, num_heads, num_kv_heads, scale);                \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys_##D(                                          \
        Act *d_k, Act *d_v, const Act *d_out, const float *lse, const float *delta, const Act *q, const Act *k, const Act *v,   \
        const u32 *positions, int tokens, int num_heads, int num_kv_heads, float scale) {                                       \
        backward_keys<D>(d_k, d_v, d_out, lse, delta, q, k, v, positions, tokens, num_heads, num_kv_heads, scale);              \
    }

INSTANCES(64)
INSTANCES(96)
INSTANCES(128)
