// LoRA's forward, of up to three modules that share an input x: u = dropout(x) · Aᵀ; and dropout alone.
#include "lora.cuh"

// y = x · mask / (1 − p), or y += that. A thread takes eight features at a time.
extern "C" __global__ void lora_dropout(Act8 *y, const Act8 *x, MASK_PARAMETERS, u32 module, u64 num_eights,
                                        u32 eights_per_row, u32 accumulate) {
    Mask mask = MASK;
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        u32 words[4], token = i / eights_per_row;
        draw(words, mask, of_features(mask, module, i % eights_per_row), load_token(mask, token, token + 1));
        Act8 in = x[i], out;
        if (accumulate) out = y[i];
        for (int j = 0; j < 8; j++) {
            float kept = is_kept(words, j, mask.threshold) ? to_f32(in.at[j]) * mask.scale : 0.0f;
            out.at[j] = to_act(accumulate ? to_f32(out.at[j]) + kept : kept);
        }
        y[i] = out;
    }
}

// u [T, r] = dropout(x) [T, features] · Aᵀ of N modules, A [r, features]; r is 8 · R8. A block has TILES · 16 tokens; its warps take
// turns at the chunks of 32 features, and load the next chunk while they work on one. x is read once.
template <int R8, int N, int TILES, int WARPS>
__device__ __forceinline__ void down(const Module *modules, const Act *x, const Mask &mask, u32 tokens, u32 eights) {
    u32 lane = threadIdx.x % 32, row = lane / 4, first_token = blockIdx.x * 16 * TILES;
    u32 eight = threadIdx.x / 32 * 4 + lane % 4, num_chunks = (eights + 3) / 4;
    float sums[N * TILES * R8][4] = {};
    Pairs next[2 * TILES];
    Half halves[2 * TILES];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        next[i] = load(x, first_token + 8 * i + row, eight, tokens, eights);
        halves[i] = load_token(mask, first_token + 8 * i + row, tokens);
    }
    for (u32 chunk = threadIdx.x / 32; chunk < num_chunks; chunk += WARPS) {
        Pairs these[2 * TILES];
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            these[i] = next[i];
            next[i] = load(x, first_token + 8 * i + row, eight + WARPS * 4, tokens, eights);
        }
#pragma unroll
        for (int module = 0; module < N; module++) {
            Pairs columns[R8], dropped[2 * TILES];
#pragma unroll
            for (int n = 0; n < R8; n++) columns[n] = load(modules[module].a, 8 * n + row, eight, 8 * R8, eights);
            u32 words[2 * TILES][4] = {};
            if (mask.is_there()) {
                Half features = of_features(mask, modules[module].number, eight);
#pragma unroll
                for (int i = 0; i < 2 * TILES; i++) draw(words[i], mask, features, halves[i]);
            }
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) dropped[i].at[j] = keep(these[i].at[j], words[i][j], mask.threshold);
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int n = 0; n < R8; n++) {
                    const Pairs &top = dropped[2 * m], &bottom = dropped[2 * m + 1];
                    float *c = sums[(module * TILES + m) * R8 + n];
                    mma(c, top.at[0], bottom.at[0], top.at[1], bottom.at[1], columns[n].at[0], columns[n].at[1]);
                    mma(c, top.at[2], bottom.at[2], top.at[3], bottom.at[3], columns[n].at[2], columns[n].at[3]);
                }
        }
        eight += WARPS * 4;
    }
    add_warps<WARPS, 4 * N * TILES * R8>(&sums[0][0]);
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int module = 0; module < N; module++)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int n = 0; n < R8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 token = first_token + 16 * m + 8 * half + row;
                    const float *c = sums[(module * TILES + m) * R8 + n] + 2 * half;
                    u32 *u = (u32 *)modules[module].u + ((u64)token * (8 * R8) + 8 * n) / 2 + lane % 4;
                    if (token < tokens) *u = pack_act(c[0] * mask.scale, c[1] * mask.scale);
                }
}

// Kernels of N modules. TILES: of 16 tokens, in a block of lora_down. WARPS: in such a block. BLOCKS: at a time on a multiprocessor. The
// host has the same numbers.
#define LORA_DOWN(R, N, TILES, WARPS, BLOCKS)                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                        \
        lora_down_##R##_##N(MODULE_PARAMETERS, const Act *x, MASK_PARAMETERS, u32 tokens, u32 eights) {                     \
        const Module modules[] = MODULES;                                                                                   \
        down<R / 8, N, TILES, WARPS>(modules, x, MASK, tokens, eights);                                                     \
    }
LORA_DOWN(8, 1, 1, 16, 2)
LORA_DOWN(8, 2, 1, 16, 1)
LORA_DOWN(8, 3, 1, 16, 1)
LORA_DOWN(16, 1, 1, 16, 2)
LORA_DOWN(16, 2, 1, 16, 1)
LORA_DOWN(16, 3, 1, 16, 1)
LORA_DOWN(32, 1, 2, 8, 2)
LORA_DOWN(64, 1, 2, 8, 1)
