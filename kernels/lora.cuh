// Dropout's masks and the tiles of LoRA's products.
//
// The mask is that of src/device/cpu/lora.rs, number for number: Philox4x32-10 with word 0 feature / 8 and the module above it, word 1
// position, word 2 sample, word 3 step. One call serves eight neighbouring features. 1 / (1 − p) multiplies sums and not their addends.
//
// The products run on tensor cores (mma.sync m16n8k16, f32 accumulation) straight from global memory. A thread always loads eight
// neighbouring features, 16 bytes, of one row: lane = 4 · (row % 8) + eight, so a warp covers 32 features. The four pairs of features of
// all lanes are four 8x8 matrices; matrix j holds features 8 · (column / 2) + 2 · j + column % 2. A sum over features may take them in
// any order as long as both operands do, so the pairs are operands as they are; where rows are summed over, movmatrix transposes them.
// Each block owns what it writes, and adds what its warps have in a fixed order.
#pragma once
#include "common.cuh"

// The dropout of a step; without one the pointers are null, the threshold is 0 and the scale 1.
struct Mask {
    const u64 *sample_idx;
    const u32 *positions;
    u64 seed;
    u32 step, threshold;
    float scale;
    __device__ __forceinline__ bool is_there() const { return positions != nullptr; }
};

// A mask as the parameters of a kernel.
#define MASK_PARAMETERS const u64 *sample_idx, const u32 *positions, u64 seed, u32 step, u32 threshold, float scale
#define MASK \
    Mask { sample_idx, positions, seed, step, threshold, scale }

// One round of Philox; the key is that of the round.
__device__ __forceinline__ void philox_round(u32 words[4], u32 key0, u32 key1) {
    u32 low0 = words[0] * 0xD2511F53u, high0 = __umulhi(words[0], 0xD2511F53u);
    u32 low1 = words[2] * 0xCD9E8D57u, high1 = __umulhi(words[2], 0xCD9E8D57u);
    words[0] = high1 ^ words[1] ^ key0;
    words[2] = high0 ^ words[3] ^ key1;
    words[1] = low1;
    words[3] = low0;
}

static const u32 KEY_STEP0 = 0x9E3779B9u, KEY_STEP1 = 0xBB67AE85u;

// The first two rounds never multiply what comes from words 0 and 3 (module, eight and step) with what comes from words 1 and 2
// (position and sample): each half of the counter goes through them alone, once for all counters that have it.
struct Half {
    u32 word0, word1, word2;
};

__device__ __forceinline__ Half of_features(const Mask &mask, u32 module, u32 eight) {
    u32 key1 = (u32)(mask.seed >> 32), word0 = (module << 20) + eight;
    u32 low = word0 * 0xD2511F53u, high = __umulhi(word0, 0xD2511F53u) ^ mask.step ^ key1;
    return Half{__umulhi(high, 0xCD9E8D57u), high * 0xCD9E8D57u, low ^ (key1 + KEY_STEP1)};
}

__device__ __forceinline__ Half of_token(const Mask &mask, u32 sample, u32 position) {
    u32 key0 = (u32)mask.seed;
    u32 low = sample * 0xCD9E8D57u, high = __umulhi(sample, 0xCD9E8D57u) ^ position ^ key0;
    return Half{low ^ (key0 + KEY_STEP0), high * 0xD2511F53u, __umulhi(high, 0xD2511F53u)};
}

// Eight numbers of 16 bits, for eight features of a token.
__device__ __forceinline__ void draw(u32 words[4], const Mask &mask, const Half &features, const Half &token) {
    words[0] = features.word0 ^ token.word0;
    words[1] = features.word1;
    words[2] = features.word2 ^ token.word2;
    words[3] = token.word1;
    u32 key0 = (u32)mask.seed, key1 = (u32)(mask.seed >> 32);
#pragma unroll
    for (u32 round = 2; round < 10; round++) philox_round(words, key0 + round * KEY_STEP0, key1 + round * KEY_STEP1);
}

// The half of a token; one that does not exist is all zeros, whatever is drawn for it.
__device__ __forceinline__ Half load_token(const Mask &mask, u32 token, u32 tokens) {
    if (!mask.is_there()) return Half{};
    token = min(token, tokens - 1);
    return of_token(mask, (u32)mask.sample_idx[token], mask.positions[token]);
}

__device__ __forceinline__ bool is_kept(const u32 words[4], int j, u32 threshold) {
    return (j % 2 == 0 ? words[j / 2] & 0xFFFFu : words[j / 2] >> 16) >= threshold;
}

// Four pairs of activations.
struct alignas(16) Pairs {
    u32 at[4];
};

// Eight features of a row, or zeros where it does not exist.
__device__ __forceinline__ Pairs load(const Act *x, u32 row, u32 eight, u32 rows, u32 eights) {
    Pairs pairs = {};
    if (row < rows && eight < eights) pairs = ((const Pairs *)x)[(u64)row * eights + eight];
    return pairs;
}

// The pair of the numbers of a word that are kept.
__device__ __forceinline__ u32 keep(u32 pair, u32 word, u32 threshold) {
    return pair & (((word & 0xFFFFu) >= threshold ? 0xFFFFu : 0u) | (word >> 16 >= threshold ? 0xFFFF0000u : 0u));
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

// One of the modules that share an input. Forward writes u, backward reads it as d_u.
struct Module {
    Act *u;
    const Act *a;
    u32 number;
};

// The modules as the parameters of a kernel; those that are not there are null.
#define MODULE_PARAMETERS Act *u0, Act *u1, Act *u2, const Act *a0, const Act *a1, const Act *a2, u32 number0, u32 number1, u32 number2
#define MODULES {{u0, a0, number0}, {u1, a1, number1}, {u2, a2, number2}}
