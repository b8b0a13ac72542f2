// Attention of attention.cu for Hopper (sm_90a), in the manner of FlashAttention-3 (Shah and others, 2024): a warp brings tiles by
// bulk copies while two warpgroups multiply them (wgmma), each of them 64 of a block's 128 rows, so that exponentials of one run
// beside products of the other. There are as many blocks as multiprocessors, and they draw their work.
#pragma once

#include "attention.cuh"
#include "hopper.cuh"

static const int ROWS = 128, THREADS = 384, CONSUMERS = 256;

// The place of a thread's elements of an accumulator [64, N]: element e is in row `row` + e / 2 % 2 · 8 of the block, column
// e / 4 · 8 + `column` + e % 2.
struct Place {
    int warpgroup, warp_row, row, column;
    __device__ __forceinline__ Place() {
        warpgroup = uniform(threadIdx.x / 128) - 1;
        warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;
        row = warp_row + threadIdx.x % 32 / 4;
        column = threadIdx.x % 4 * 2;
    }
};

// c [64, N] = A · Bᵀ, rows of A from `row` on, A [.., D] and B [N, D] tiles.
template <int D, class A, class B, int HALF>
__device__ __forceinline__ void multiply_transposed(float (&c)[HALF], u32 a, int row, u32 b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) Product<2 * HALF>::run(c, A::by_columns(a, row, k), B::by_columns(b, 0, k), k > 0);
    products_commit();
}

// c [64, D] = (accumulate ? c : 0) + P · B, B [16 · N, D] a tile.
template <class B, int HALF, int N>
__device__ __forceinline__ void multiply(float (&c)[HALF], const u32 (&p)[N][4], u32 b, bool accumulate) {
#pragma unroll
    for (int k = 0; k < N; k++) Product<2 * HALF, 0, 1>::run(c, p[k], B::by_rows(b, k), accumulate || k > 0);
    products_commit();
}

// An accumulator, rounded, as the first operand of a product.
template <int HALF, int N> __device__ __forceinline__ void round_scores(u32 (&p)[N][4], const float (&s)[HALF]) {
#pragma unroll
    for (int e = 0; e < HALF; e += 2) p[e / 8][e / 2 % 4] = pack_act(s[e], s[e + 1]);
}

// Writes a thread's elements of an accumulator [64, D] times the factor of their row; rows at or past `end` are left out.
template <int HALF>
__device__ __forceinline__ void store_rows(Act *head, const float (&c)[HALF], int row, int column, int end, int stride, float low,
                                           float high) {
#pragma unroll
    for (int e = 0; e < HALF; e += 2) {
        int t = row + e / 2 % 2 * 8;
        float factor = e / 2 % 2 ? high : low;
        if (t < end) *(u32 *)(head + (u64)t * stride + e / 4 * 8 + column) = pack_act(c[e] * factor, c[e + 1] * factor);
    }
}

// The keys that this thread's two rows see, and those that all rows of its warp see.
struct Sight {
    int first_key[2], last_key[2], all_first, all_last;
    __device__ __forceinline__ Sight(const u32 *positions, int max_reach, int warp_row, int row, int tokens, int past) {
        for (int i = 0; i < 2; i++) {
            int t = row + 8 * i;
            first_key[i] = t < tokens ? past + t - reach(positions, t, max_reach) : 1;
            last_key[i] = t < tokens ? past + t : 0;
        }
        int last_row = warp_row + 15;
        all_first = last_row < tokens ? past + last_row - reach(positions, last_row, max_reach) : 0x7fffffff;
        all_last = past + warp_row;
    }
    // Replaces the scores that are not seen; `key` is that of the first column.
    template <int HALF> __device__ __forceinline__ void hide(float (&s)[HALF], int key, int column, float hidden) const {
        if (key >= all_first && key + 2 * HALF - 1 <= all_last) return;
#pragma unroll
        for (int e = 0; e < HALF; e++) {
            int at = key + e / 4 * 8 + column + e % 2;
            if (at < first_key[e / 2 % 2] || at > last_key[e / 2 % 2]) s[e] = hidden;
        }
    }
};

// The common part of kernels for queries: `TENSORS` tensors of which a block has ROWS rows, and the keys and values that they see,
// which pass in tiles of KEYS from the last ones to the first.
template <int D, int KEYS, int STAGES, int TENSORS> struct ForQueries {
    typedef Tile<D, ROWS> Rows;
    typedef Tile<D, KEYS> Keys;
    static const int K = TENSORS * Rows::BYTES, V = K + STAGES * Keys::BYTES, BARRIERS = V + STAGES * Keys::BYTES;
    static_assert(BARRIERS + 16 + 32 * STAGES + ALIGNMENT <= MAX_SHARED_BYTES, "");
    u32 shared;
    int tiles, num_heads;

    __device__ __forceinline__ u32 rows_full() const { return shared + BARRIERS; }
    __device__ __forceinline__ u32 rows_empty() const { return shared + BARRIERS + 8; }
    __device__ __forceinline__ u32 k_full(u32 stage) const { return shared + BARRIERS + 16 + 32 * stage; }
    __device__ __forceinline__ u32 k_empty(u32 stage) const { return k_full(stage) + 8; }
    __device__ __forceinline__ u32 v_full(u32 stage) const { return k_full(stage) + 16; }
    __device__ __forceinline__ u32 v_empty(u32 stage) const { return k_full(stage) + 24; }
    __device__ __forceinline__ u32 k(u32 stage) const { return shared + K + stage * Keys::BYTES; }
    __device__ __forceinline__ u32 v(u32 stage) const { return shared + V + stage * Keys::BYTES; }
    __device__ __forceinline__ int head(int work) const { return work % num_heads; }
    // The last queries see most keys: they come first.
    __device__ __forceinline__ int first_row(int work) const { return (tiles - 1 - work / num_heads) * ROWS; }

    __device__ __forceinline__ ForQueries(int tokens, int num_heads) : num_heads(num_heads) {
        shared = aligned_shared();
        tiles = (tokens + ROWS - 1) / ROWS;
        if (threadIdx.x == 0) {
            barrier_init(rows_full(), 1);
            barrier_init(rows_empty(), CONSUMERS);
            for (int i = 0; i < STAGES; i++) {
                barrier_init(k_full(i), 1);
                barrier_init(v_full(i), 1);
                barrier_init(k_empty(i), CONSUMERS);
                barrier_init(v_empty(i), CONSUMERS);
            }
            barriers_begin();
        }
        __syncthreads();
    }

    // One thread draws work and brings what it needs; `drawn` tells the others, −1 at the end.
    __device__ __forceinline__ void produce(u32 *ticket, int *drawn, const TensorMap *const (&rows)[TENSORS],
                                            const TensorMap &k_map, const TensorMap &v_map, const u32 *positions, int group,
                                            int past, int max_reach) const {
        Ring<STAGES> stage;
        for (u32 parity = 1;; parity ^= 1) {
            int work = draw(ticket, tiles * num_heads, gridDim.x);
            barrier_wait(rows_empty(), parity);
            *drawn = work;
            if (work < 0) return barrier_arrive(rows_full());
            int row = first_row(work), column = head(work) / group * D, first_key = past + row - reach(positions, row, max_reach);
            barrier_arrive_expecting(rows_full(), TENSORS * Rows::BYTES);
            for (int i = 0; i < TENSORS; i++) Rows::copy(shared + i * Rows::BYTES, *rows[i], head(work) * D, row, rows_full());
            for (int key = past + row + ROWS - KEYS; key > first_key - KEYS; key -= KEYS, stage.next()) {
                barrier_wait(k_empty(stage.index), stage.parity ^ 1);
                barrier_arrive_expecting(k_full(stage.index), Keys::BYTES);
                Keys::copy(k(stage.index), k_map, column, key, k_full(stage.index));
                barrier_wait(v_empty(stage.index), stage.parity ^ 1);
                barrier_arrive_expecting(v_full(stage.index), Keys::BYTES);
                Keys::copy(v(stage.index), v_map, column, key, v_full(stage.index));
            }
        }
    }
};
