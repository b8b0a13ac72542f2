// LoRA's products with dropout drawn inside: u = dropout(x) · Aᵀ, dA += d_uᵀ · dropout(x), d_x += mask ∘ (d_u · A); and dropout alone.
//
// The mask is that of src/device/cpu/lora.rs, number for number: Philox4x32-10 with word 0 feature / 8 and the module above it, word 1
// position, word 2 sample, word 3 step. One call serves eight neighbouring features.
//
// The products run on tensor cores (mma.sync m16n8k16, f32 accumulation) straight from global memory. A thread always loads eight
// neighbouring features, 16 bytes, of one row: lane = 4 · (row % 8) + eight, so a warp covers 32 features. The four pairs of features of
// all lanes are four 8x8 matrices; matrix j holds features 8 · (column / 2) + 2 · j + column % 2. A sum over features may take them in
// any order as long as both operands do, so the pairs are operands as they are; where rows are summed over, movmatrix transposes them.
// Each block owns what it writes, and adds what its warps have in a fixed order.
#include "common.cuh"

// A dropout mask; without one the pointers are null and the scale is 1.
struct Mask {
    const u64 *sample_idx;
    const u32 *positions;
    u64 seed;
    u32 module, step, threshold;
    float scale;
    __device__ __forceinline__ bool is_there() const { return positions != nullptr; }
};

// A mask as the parameters of a kernel.
#define MASK_PARAMETERS const u64 *sample_idx, const u32 *positions, u64 seed, u32 module, u32 step, u32 threshold, float scale
#define MASK \
    Mask { sample_idx, positions, seed, module, step, threshold, scale }

__device__ __forceinline__ void philox(u32 words[4], u32 key0, u32 key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u32 low0 = words[0] * 0xD2511F53u, high0 = __umulhi(words[0], 0xD2511F53u);
        u32 low1 = words[2] * 0xCD9E8D57u, high1 = __umulhi(words[2], 0xCD9E8D57u);
        words[0] = high1 ^ words[1] ^ key0;
        words[2] = high0 ^ words[3] ^ key1;
        words[1] = low1;
        words[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Eight numbers of 16 bits, for features 8 · eight and after it of a token.
__device__ __forceinline__ void draw(u32 words[4], const Mask &mask, u32 token, u32 eight) {
    words[0] = (mask.module << 20) + eight;
    words[1] = mask.positions[token];
    words[2] = (u32)mask.sample_idx[token];
    words[3] = mask.step;
    philox(words, (u32)mask.seed, (u32)(mask.seed >> 32));
}

__device__ __forceinline__ bool is_kept(const u32 words[4], int j, u32 threshold) {
    return (j % 2 == 0 ? words[j / 2] & 0xFFFFu : words[j / 2] >> 16) >= threshold;
}

// Four pairs of activations.
struct alignas(16) Pairs {
    u32 at[4];
};

__device__ __forceinline__ float low(u32 pair) { return to_f32(Act{(u16)pair}); }
__device__ __forceinline__ float high(u32 pair) { return to_f32(Act{(u16)(pair >> 16)}); }

// Eight features of a row, or zeros where it does not exist.
__device__ __forceinline__ Pairs load(const Act *x, u32 row, u32 eight, u32 rows, u32 eights) {
    Pairs pairs = {};
    if (row < rows && eight < eights) pairs = ((const Pairs *)x)[(u64)row * eights + eight];
    return pairs;
}

// Eight features of a token after dropout.
__device__ __forceinline__ Pairs drop(Pairs pairs, u32 token, u32 eight, u32 tokens, const Mask &mask) {
    if (!mask.is_there()) return pairs;
    u32 words[4];
    // A token that does not exist is all zeros, whatever is drawn for it.
    draw(words, mask, min(token, tokens - 1), eight);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float first = is_kept(words, 2 * j, mask.threshold) ? low(pairs.at[j]) * mask.scale : 0.0f;
        float second = is_kept(words, 2 * j + 1, mask.threshold) ? high(pairs.at[j]) * mask.scale : 0.0f;
        pairs.at[j] = pack_act(first, second);
    }
    return pairs;
}

// c [16, 8] += a [16, 16] · b [16, 8]
__device__ __forceinline__ void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ACT_NAME "." ACT_NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 transpose(u32 rows) {
    u32 columns;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

// Adds the sums of all warps into those of warp 0: the upper half to the lower half, until one is left.
template <int WARPS, int N> __device__ __forceinline__ void add_warps(float *sums) {
    __shared__ float shared[WARPS / 2][N * 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = WARPS / 2; half > 0; half /= 2) {
        if (warp >= half && warp < 2 * half)
            for (int i = 0; i < N; i++) shared[warp - half][i * 32 + lane] = sums[i];
        __syncthreads();
        if (warp < half)
            for (int i = 0; i < N; i++) sums[i] += shared[warp][i * 32 + lane];
        __syncthreads();
    }
}

// y = x · mask / (1 − p), or y += that. A thread takes eight features at a time.
extern "C" __global__ void lora_dropout(Act8 *y, const Act8 *x, MASK_PARAMETERS, u64 num_eights, u32 eights_per_row, u32 accumulate) {
    Mask mask = MASK;
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        u32 words[4];
        draw(words, mask, i / eights_per_row, i % eights_per_row);
        Act8 in = x[i], out;
        if (accumulate) out = y[i];
        for (int j = 0; j < 8; j++) {
            float kept = is_kept(words, j, mask.threshold) ? to_f32(in.at[j]) * mask.scale : 0.0f;
            out.at[j] = to_act(accumulate ? to_f32(out.at[j]) + kept : kept);
        }
        y[i] = out;
    }
}

// u [T, r] = dropout(x) [T, features] · Aᵀ, A [r, features]; r is 8 · R8. A block has TILES · 16 tokens; its warps take turns at the
// chunks of 32 features, and load the next chunk while they work on one. x is read once.
template <int R8, int TILES, int WARPS>
__device__ __forceinline__ void down(Act *u, const Act *x, const Act *a, Mask mask, u32 tokens, u32 eights) {
    u32 lane = threadIdx.x % 32, row = lane / 4, first_token = blockIdx.x * 16 * TILES;
    u32 eight = threadIdx.x / 32 * 4 + lane % 4, num_chunks = (eights + 3) / 4;
    float sums[TILES * R8][4] = {};
    Pairs next_x[2 * TILES], next_a[R8];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) next_x[i] = load(x, first_token + 8 * i + row, eight, tokens, eights);
#pragma unroll
    for (int n = 0; n < R8; n++) next_a[n] = load(a, 8 * n + row, eight, 8 * R8, eights);
    for (u32 chunk = threadIdx.x / 32; chunk < num_chunks; chunk += WARPS) {
        Pairs these[2 * TILES], columns[R8];
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            these[i] = next_x[i];
            next_x[i] = load(x, first_token + 8 * i + row, eight + WARPS * 4, tokens, eights);
        }
#pragma unroll
        for (int n = 0; n < R8; n++) {
            columns[n] = next_a[n];
            next_a[n] = load(a, 8 * n + row, eight + WARPS * 4, 8 * R8, eights);
        }
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) these[i] = drop(these[i], first_token + 8 * i + row, eight, tokens, mask);
        eight += WARPS * 4;
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int n = 0; n < R8; n++) {
                const Pairs &top = these[2 * m], &bottom = these[2 * m + 1];
                float *c = sums[m * R8 + n];
                mma(c, top.at[0], bottom.at[0], top.at[1], bottom.at[1], columns[n].at[0], columns[n].at[1]);
                mma(c, top.at[2], bottom.at[2], top.at[3], bottom.at[3], columns[n].at[2], columns[n].at[3]);
            }
    }
    add_warps<WARPS, 4 * TILES * R8>(&sums[0][0]);
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < R8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 token = first_token + 16 * m + 8 * half + row;
                const float *c = sums[m * R8 + n] + 2 * half;
                if (token < tokens) ((u32 *)u)[((u64)token * (8 * R8) + 8 * n) / 2 + lane % 4] = pack_act(c[0], c[1]);
            }
}

// d_a [r, features] += d_uᵀ · dropout(x): d_u [T, r], x [T, features]; r is 8 · R8. A block has 32 features; its warps take turns at the
// chunks of 16 tokens, and load the next chunk while they work on one. x is read once.
template <int R8, int WARPS>
__device__ __forceinline__ void grad_a(float *d_a, const Act *d_u, const Act *x, Mask mask, u32 tokens, u32 eights) {
    const int M = (R8 + 1) / 2;
    u32 lane = threadIdx.x % 32, row = lane / 4, eight = blockIdx.x * 4 + lane % 4;
    float sums[4 * M][4] = {};
    u32 chunk = threadIdx.x / 32 * 16;
    Pairs next[2] = {load(x, chunk + row, eight, tokens, eights), load(x, chunk + 8 + row, eight, tokens, eights)};
    for (; chunk < tokens; chunk += WARPS * 16) {
        Pairs these[2] = {next[0], next[1]};
        u32 following = chunk + WARPS * 16 + row;
        next[0] = load(x, following, eight, tokens, eights);
        next[1] = load(x, following + 8, eight, tokens, eights);
        // Matrix i of d_u: tokens i / 2, ranks i % 2; before it is transposed a row is a token.
        u32 rows[M][4] = {};
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 token = chunk + i / 2 * 8 + row, pair = (16 * m + i % 2 * 8) / 2 + lane % 4;
                if (2 * m + i % 2 < R8 && token < tokens) rows[m][i] = ((const u32 *)d_u)[(u64)token * (4 * R8) + pair];
            }
        u32 columns[4][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Pairs dropped = drop(these[half], chunk + 8 * half + row, eight, tokens, mask);
#pragma unroll
            for (int j = 0; j < 4; j++) columns[j][half] = transpose(dropped.at[j]);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) rows[m][i] = transpose(rows[m][i]);
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma(sums[m * 4 + j], rows[m][0], rows[m][1], rows[m][2], rows[m][3], columns[j][0], columns[j][1]);
        }
    }
    add_warps<WARPS, 16 * M>(&sums[0][0]);
    if (threadIdx.x >= 32 || eight >= eights) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (2 * m + half >= R8) continue;
            Float8 *to = (Float8 *)d_a + (u64)(16 * m + 8 * half + row) * eights + eight;
            Float8 values = *to;
#pragma unroll
            for (int j = 0; j < 8; j++) values.at[j] += sums[m * 4 + j / 2][2 * half + j % 2];
            *to = values;
        }
}

// d_x [T, features] += mask ∘ (d_u · A): d_u [T, r], A [r, features]; r is 8 · R8. A block has 64 tokens and 256 features, a warp 32 of
// these, whose part of A stays in its registers.
template <int R8> __device__ __forceinline__ void grad_x(Act *d_x, const Act *d_u, const Act *a, Mask mask, u32 tokens, u32 eights) {
    const int K = (R8 + 1) / 2;
    u32 lane = threadIdx.x % 32, row = lane / 4, eight = (blockIdx.y * 8 + threadIdx.x / 32) * 4 + lane % 4;
    u32 columns[K][4][2];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Pairs pairs = load(a, 16 * k + 8 * half + row, eight, 8 * R8, eights);
#pragma unroll
            for (int j = 0; j < 4; j++) columns[k][j][half] = transpose(pairs.at[j]);
        }
#pragma unroll 2
    for (u32 tile = 0; tile < 4; tile++) {
        u32 first_token = blockIdx.x * 64 + tile * 16;
        if (first_token >= tokens) return;
        float sums[4][4] = {};
#pragma unroll
        for (int k = 0; k < K; k++) {
            u32 rows[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Operand i: tokens i % 2, ranks i / 2.
                u32 token = first_token + i % 2 * 8 + row, pair = (16 * k + i / 2 * 8) / 2 + lane % 4;
                if (2 * k + i / 2 < R8 && token < tokens) rows[i] = ((const u32 *)d_u)[(u64)token * (4 * R8) + pair];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) mma(sums[j], rows[0], rows[1], rows[2], rows[3], columns[k][j][0], columns[k][j][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 token = first_token + 8 * half + row;
            if (token >= tokens || eight >= eights) continue;
            Pairs *to = (Pairs *)d_x + (u64)token * eights + eight;
            Pairs values = *to;
            u32 words[4];
            if (mask.is_there()) draw(words, mask, token, eight);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float first = sums[j][2 * half] * mask.scale, second = sums[j][2 * half + 1] * mask.scale;
                if (mask.is_there() && !is_kept(words, 2 * j, mask.threshold)) first = 0.0f;
                if (mask.is_there() && !is_kept(words, 2 * j + 1, mask.threshold)) second = 0.0f;
                values.at[j] = pack_act(low(values.at[j]) + first, high(values.at[j]) + second);
            }
            *to = values;
        }
    }
}

// TILES: of 16 tokens, in a block of lora_down. WARPS: in a block of lora_down and of lora_grad_a. BLOCKS: of lora_down, at a time
// on a multiprocessor. The host has the same numbers.
#define LORA_KERNELS(R, TILES, WARPS, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                  \
        lora_down_##R(Act *u, const Act *x, const Act *a, MASK_PARAMETERS, u32 tokens, u32 eights) {                  \
        down<R / 8, TILES, WARPS>(u, x, a, MASK, tokens, eights);                                                     \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                       \
        lora_grad_a_##R(float *d_a, const Act *d_u, const Act *x, MASK_PARAMETERS, u32 tokens, u32 eights) {          \
        grad_a<R / 8, WARPS>(d_a, d_u, x, MASK, tokens, eights);                                                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                              \
        lora_grad_x_##R(Act *d_x, const Act *d_u, const Act *a, MASK_PARAMETERS, u32 tokens, u32 eights) {            \
        grad_x<R / 8>(d_x, d_u, a, MASK, tokens, eights);                                                             \
    }
LORA_KERNELS(8, 1, 16, 2)
LORA_KERNELS(16, 1, 16, 2)
LORA_KERNELS(32, 2, 8, 2)
LORA_KERNELS(64, 2, 8, 1)
