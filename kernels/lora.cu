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

// Eight features of a token after dropout; zeros where the token or the features do not exist.
__device__ __forceinline__ Pairs load_dropped(const Act *x, u32 token, u32 eight, u32 tokens, u32 eights, const Mask &mask) {
    Pairs pairs = {};
    if (token >= tokens || eight >= eights) return pairs;
    pairs = ((const Pairs *)x)[(u64)token * eights + eight];
    if (!mask.is_there()) return pairs;
    u32 words[4];
    draw(words, mask, token, eight);
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

// u [T, r] = dropout(x) [T, features] · Aᵀ, A [r, features]; r is 8 · R8. A block has 32 tokens; its eight warps take turns at the
// chunks of 32 features. x is read once.
template <int R8> __device__ __forceinline__ void down(Act *u, const Act *x, const Act *a, Mask mask, u32 tokens, u32 eights) {
    const int WARPS = 8;
    u32 lane = threadIdx.x % 32, row = lane / 4, first_token = blockIdx.x * 32;
    float sums[2 * R8][4] = {};
    for (u32 chunk = threadIdx.x / 32 * 4; chunk < eights; chunk += WARPS * 4) {
        u32 eight = chunk + lane % 4;
        Pairs tokens_of[4];
#pragma unroll
        for (int i = 0; i < 4; i++) tokens_of[i] = load_dropped(x, first_token + 8 * i + row, eight, tokens, eights, mask);
#pragma unroll
        for (int n = 0; n < R8; n++) {
            Pairs columns = {};
            if (eight < eights) columns = ((const Pairs *)a)[(u64)(8 * n + row) * eights + eight];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const Pairs &top = tokens_of[2 * m], &bottom = tokens_of[2 * m + 1];
                float *c = sums[m * R8 + n];
                mma(c, top.at[0], bottom.at[0], top.at[1], bottom.at[1], columns.at[0], columns.at[1]);
                mma(c, top.at[2], bottom.at[2], top.at[3], bottom.at[3], columns.at[2], columns.at[3]);
            }
        }
    }
    add_warps<WARPS, 8 * R8>(&sums[0][0]);
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int m = 0; m < 2; m++)
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
// chunks of 16 tokens. x is read once.
template <int R8> __device__ __forceinline__ void grad_a(float *d_a, const Act *d_u, const Act *x, Mask mask, u32 tokens, u32 eights) {
    const int WARPS = R8 == 8 ? 8 : 16, M = (R8 + 1) / 2;
    u32 lane = threadIdx.x % 32, row = lane / 4, eight = blockIdx.x * 4 + lane % 4;
    float sums[4 * M][4] = {};
    for (u32 chunk = threadIdx.x / 32 * 16; chunk < tokens; chunk += WARPS * 16) {
        Pairs top = load_dropped(x, chunk + row, eight, tokens, eights, mask);
        Pairs bottom = load_dropped(x, chunk + 8 + row, eight, tokens, eights, mask);
        u32 columns[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            columns[j][0] = transpose(top.at[j]);
            columns[j][1] = transpose(bottom.at[j]);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            u32 rows[4] = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Matrix i: tokens i / 2, ranks i % 2; before it is transposed a row is a token.
                u32 token = chunk + i / 2 * 8 + row, pair = (16 * m + i % 2 * 8) / 2 + lane % 4;
                u32 values = 0;
                if (2 * m + i % 2 < R8 && token < tokens) values = ((const u32 *)d_u)[(u64)token * (4 * R8) + pair];
                rows[i] = transpose(values);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) mma(sums[m * 4 + j], rows[0], rows[1], rows[2], rows[3], columns[j][0], columns[j][1]);
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
            Pairs pairs = {};
            if (2 * k + half < R8 && eight < eights) pairs = ((const Pairs *)a)[(u64)(16 * k + 8 * half + row) * eights + eight];
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

#define LORA_KERNELS(R, GRAD_A_THREADS, GRAD_A_BLOCKS)                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        lora_down_##R(Act *u, const Act *x, const Act *a, MASK_PARAMETERS, u32 tokens, u32 eights) {                  \
        down<R / 8>(u, x, a, MASK, tokens, eights);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(GRAD_A_THREADS, GRAD_A_BLOCKS)                                       \
        lora_grad_a_##R(float *d_a, const Act *d_u, const Act *x, MASK_PARAMETERS, u32 tokens, u32 eights) {          \
        grad_a<R / 8>(d_a, d_u, x, MASK, tokens, eights);                                                             \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        lora_grad_x_##R(Act *d_x, const Act *d_u, const Act *a, MASK_PARAMETERS, u32 tokens, u32 eights) {            \
        grad_x<R / 8>(d_x, d_u, a, MASK, tokens, eights);                                                             \
    }
LORA_KERNELS(8, 512, 2)
LORA_KERNELS(16, 512, 2)
LORA_KERNELS(32, 512, 1)
LORA_KERNELS(64, 256, 1)
