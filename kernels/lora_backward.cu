// LoRA's backward: of up to three modules that share an input x, dA += d_uᵀ · dropout(x) and d_x = Σ mask ∘ (d_u · A), or d_x += that; of
// one output, d_u = d_y · B and dB += d_yᵀ · u.
#include "gated.cuh"
#include "lora.cuh"

// The modules' input x [T, features]; in a kernel whose input is gated, x is the gate of f(x) · up.
struct Input {
    const Act *x, *up;
    u64 is_gelu;
};

// Eight features of a token, as they are loaded, and as they go into products.
template <bool GATED> struct Features {
    Pairs x;
    __device__ __forceinline__ void load_from(const Input &input, u32 row, u32 eight, u32 rows, u32 eights) {
        x = load(input.x, row, eight, rows, eights);
    }
    __device__ __forceinline__ Pairs value(bool) const { return x; }
};
template <> struct Features<true> {
    Pairs gate, up;
    __device__ __forceinline__ void load_from(const Input &input, u32 row, u32 eight, u32 rows, u32 eights) {
        gate = load(input.x, row, eight, rows, eights);
        up = load(input.up, row, eight, rows, eights);
    }
    template <class F> __device__ __forceinline__ Pairs made() const {
        Pairs x;
#pragma unroll
        for (int j = 0; j < 4; j++)
            x.at[j] = pack_act(gated<F>(low(gate.at[j]), low(up.at[j])), gated<F>(high(gate.at[j]), high(up.at[j])));
        return x;
    }
    __device__ __forceinline__ Pairs value(bool is_gelu) const { return is_gelu ? made<GeluTanh>() : made<Silu>(); }
};

// A chunk of 16 tokens, as a warp of `input` loads it. Matrix i of a d_u: tokens i / 2, ranks i % 2.
template <int N, int M, bool GATED> struct Chunk {
    Features<GATED> x[2];
    u32 sample[2], position[2];
    u32 d_u[N][M][4];
};

template <int R8, int N, int M, bool GATED>
__device__ __forceinline__ Chunk<N, M, GATED> load_chunk(const Module *modules, const Input &x, const Mask &mask, u32 first,
                                                         u32 eight, u32 end, u32 eights) {
    u32 lane = threadIdx.x % 32, row = lane / 4;
    Chunk<N, M, GATED> chunk = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 token = first + 8 * half + row;
        chunk.x[half].load_from(x, token, eight, end, eights);
        if (token < end && mask.is_there()) {
            chunk.sample[half] = (u32)mask.sample_idx[token];
            chunk.position[half] = mask.positions[token];
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 token = first + i / 2 * 8 + row, pair = (16 * m + i % 2 * 8) / 2 + lane % 4;
                if (2 * m + i % 2 < R8 && token < end) chunk.d_u[n][m][i] = ((const u32 *)modules[n].u)[(u64)token * (4 * R8) + pair];
            }
    return chunk;
}

// d_A [r, features] = d_uᵀ · dropout(x) of N modules, and d_x = Σ mask ∘ (d_u · A) [T, features], or d_x += that: d_u [T, r],
// x [T, features]; r is 8 · R8. A block has 32 features of the tokens of one part; its warps take turns at the chunks of 16 tokens, and
// load the next chunk while they work on one. x is read once, and each mask drawn once. The sums of a part go to `parts`
// [part, module, r, features].
template <int R8, int N, int WARPS, bool GATED>
__device__ __forceinline__ void input(Act *d_x, float *parts, const Module *modules, const Input &x, const Mask &mask, u32 tokens,
                                       u32 eights, u32 part_tokens, bool accumulate) {
    const int M = (R8 + 1) / 2;
    // A as an operand, for each lane.
    __shared__ Pairs a[N][M][2][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, eight = blockIdx.x * 4 + lane % 4;
    Half features[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        features[n] = of_features(mask, modules[n].number, eight);
        for (int i = warp; i < 2 * M; i += WARPS) {
            Pairs rows = load(modules[n].a, 8 * i + row, eight, 8 * R8, eights);
#pragma unroll
            for (int j = 0; j < 4; j++) rows.at[j] = transpose(rows.at[j]);
            a[n][i / 2][i % 2][lane] = rows;
        }
    }
    __syncthreads();
    float sums[N * 4 * M][4] = {};
    u32 end = min((blockIdx.y + 1) * part_tokens, tokens), first = blockIdx.y * part_tokens + 16 * warp;
    Chunk<N, M, GATED> next = load_chunk<R8, N, M, GATED>(modules, x, mask, first, eight, end, eights);
    for (; first < end; first += WARPS * 16) {
        Chunk<N, M, GATED> chunk = next;
        next = load_chunk<R8, N, M, GATED>(modules, x, mask, first + WARPS * 16, eight, end, eights);
        Pairs x_of[2] = {chunk.x[0].value(x.is_gelu), chunk.x[1].value(x.is_gelu)};
        Half halves[2];
        if (mask.is_there())
#pragma unroll
            for (int half = 0; half < 2; half++) halves[half] = of_token(mask, chunk.sample[half], chunk.position[half]);
        float d[2][8];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float products[4][4] = {};
#pragma unroll
            for (int m = 0; m < M; m++) {
                const Pairs top = a[n][m][0][lane], bottom = a[n][m][1][lane];
                const u32 *rows = chunk.d_u[n][m];
#pragma unroll
                for (int j = 0; j < 4; j++) mma(products[j], rows[0], rows[2], rows[1], rows[3], top.at[j], bottom.at[j]);
            }
            u32 words[2][4] = {}, columns[4][2];
            if (mask.is_there())
#pragma unroll
                for (int half = 0; half < 2; half++) draw(words[half], mask, features[n], halves[half]);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    columns[j][half] = transpose(keep(x_of[half].at[j], words[half][j], mask.threshold));
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float kept = is_kept(words[half], 2 * j + i, mask.threshold) ? products[j][2 * half + i] : 0.0f;
                        d[half][2 * j + i] = n == 0 ? kept : d[half][2 * j + i] + kept;
                    }
                }
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 rows[4];
#pragma unroll
                for (int i = 0; i < 4; i++) rows[i] = transpose(chunk.d_u[n][m][i]);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mma(sums[(n * M + m) * 4 + j], rows[0], rows[1], rows[2], rows[3], columns[j][0], columns[j][1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 token = first + 8 * half + row;
            if (token >= end || eight >= eights) continue;
            Pairs *to = (Pairs *)d_x + (u64)token * eights + eight;
            Pairs before = {}, after;
            if (accumulate) before = *to;
#pragma unroll
            for (int j = 0; j < 4; j++)
                after.at[j] = pack_act(low(before.at[j]) + d[half][2 * j] * mask.scale,
                                       high(before.at[j]) + d[half][2 * j + 1] * mask.scale);
            *to = after;
        }
    }
    add_warps<WARPS, 16 * N * M>(&sums[0][0]);
    if (threadIdx.x >= 32 || eight >= eights) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (2 * m + half >= R8) continue;
                u64 rank = (u64)(blockIdx.y * N + n) * (8 * R8) + 16 * m + 8 * half + row;
                Float8 values;
#pragma unroll
                for (int j = 0; j < 8; j++) values.at[j] = sums[(n * M + m) * 4 + j / 2][2 * half + j % 2] * mask.scale;
                ((Float8 *)parts)[rank * eights + eight] = values;
            }
}

// u [T, 8 · R8] of a chunk of 16 tokens, as a warp loads it. Matrix i: tokens i / 2, ranks i % 2.
template <int R8> struct Ranks {
    static const int M = (R8 + 1) / 2;
    u32 at[M][4];
    __device__ __forceinline__ void load_from(const Act *u, u32 first, u32 end) {
        u32 row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 token = first + i / 2 * 8 + row, pair = (16 * m + i % 2 * 8) / 2 + quad;
                at[m][i] = 2 * m + i % 2 < R8 && token < end ? ((const u32 *)u)[(u64)token * (4 * R8) + pair] : 0u;
            }
    }
    __device__ __forceinline__ void transpose_all() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) at[m][i] = transpose(at[m][i]);
    }
};

// 32 features of an output, as a warp has them: B [features, r] as an operand, and the sums of d_B.
template <int R8> struct Columns {
    static const int M = (R8 + 1) / 2, R = 8 * R8;
    u32 b[R8][4];
    float sums[M * 4][4];
    __device__ __forceinline__ void begin(const Act *from, u32 eight, u32 eights) {
        u32 row = threadIdx.x % 32 / 4;
#pragma unroll
        for (int n = 0; n < R8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u16 *pair = (const u16 *)from + (u64)(8 * eight + 2 * j) * R + 8 * n + row;
                b[n][j] = eight < eights ? pair[0] | (u32)pair[R] << 16 : 0u;
            }
#pragma unroll
        for (int i = 0; i < M * 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][j] = 0.0f;
    }
    // products [16, r] += d_y · B
    __device__ __forceinline__ void multiply(float products[R8][4], const Pairs &top, const Pairs &bottom) const {
#pragma unroll
        for (int n = 0; n < R8; n++) {
            mma(products[n], top.at[0], bottom.at[0], top.at[1], bottom.at[1], b[n][0], b[n][1]);
            mma(products[n], top.at[2], bottom.at[2], top.at[3], bottom.at[3], b[n][2], b[n][3]);
        }
    }
    // d_B += d_yᵀ · u, of which u is transposed already.
    __device__ __forceinline__ void add(const Pairs &d_top, const Pairs &d_bottom, const Ranks<R8> &u) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 top = transpose(d_top.at[j]), bottom = transpose(d_bottom.at[j]);
#pragma unroll
            for (int m = 0; m < M; m++) mma(sums[m * 4 + j], u.at[m][0], u.at[m][1], u.at[m][2], u.at[m][3], top, bottom);
        }
    }
    // The sums of a part go to d_b [features, r].
    __device__ __forceinline__ void end(float *d_b, u32 eight, u32 eights) const {
        u32 row = threadIdx.x % 32 / 4;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (2 * m + half >= R8 || eight >= eights) continue;
                float *to = d_b + (u64)eight * 8 * R + 16 * m + 8 * half + row;
#pragma unroll
                for (int j = 0; j < 8; j++) to[j * R] = sums[m * 4 + j / 2][2 * half + j % 2];
            }
    }
};

// Adds products [16, r] over the warps of a block, by way of `shared`, into d_u [T, r] of the chunk. It has one barrier, after which the
// warps read `shared`.
template <int R8, int WARPS>
__device__ __forceinline__ void add_products(float *d_u, float (*shared)[16 * 8 * R8], const float products[R8][4], u32 first, u32 end) {
    const int R = 8 * R8;
    u32 warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < R8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            *(float2 *)&shared[warp][(8 * half + row) * R + 8 * n + 2 * quad] = float2{products[n][2 * half], products[n][2 * half + 1]};
    __syncthreads();
    for (u32 i = threadIdx.x; i < 16 * R; i += WARPS * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int of = 0; of < WARPS; of++) sum += shared[of][i];
        if (first + i / R < end) d_u[(u64)first * R + i] = sum;
    }
}

// d_u [T, r] = d_y [T, features] · B and d_B [features, r] = d_yᵀ · u of the features and tokens of a block: B [features, r], u [T, r];
// r is 8 · R8. A warp has 64 features, two sets of 32; the block's warps go through the chunks of 16 tokens of its part side by side, and
// load the next chunk while they work on one. d_y is read once. The sums go to `parts_u` [block of features, T, r] and `parts_b`
// [part, features, r].
template <int R8, int WARPS>
__device__ __forceinline__ void output(float *parts_u, float *parts_b, const Act *d_y, const Act *b, const Act *u, u32 tokens, u32 eights,
                                        u32 part_tokens) {
    const int SETS = 2, R = 8 * R8;
    __shared__ float shared[2][WARPS][16 * R];
    u32 warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    u32 first_eight = (blockIdx.x * WARPS + warp) * 4 * SETS + quad;
    Columns<R8> columns[SETS];
#pragma unroll
    for (int set = 0; set < SETS; set++) columns[set].begin(b, first_eight + 4 * set, eights);
    u32 end = min((blockIdx.y + 1) * part_tokens, tokens), first = blockIdx.y * part_tokens;
    Pairs next[SETS][2];
    Ranks<R8> next_u;
    auto load_next = [&](u32 first) {
#pragma unroll
        for (int set = 0; set < SETS; set++)
#pragma unroll
            for (int half = 0; half < 2; half++) next[set][half] = load(d_y, first + 8 * half + row, first_eight + 4 * set, end, eights);
        next_u.load_from(u, first, end);
    };
    load_next(first);
    parts_u += (u64)blockIdx.x * tokens * R;
    for (int buffer = 0; first < end; first += 16, buffer ^= 1) {
        Pairs these[SETS][2];
#pragma unroll
        for (int set = 0; set < SETS; set++) these[set][0] = next[set][0], these[set][1] = next[set][1];
        Ranks<R8> these_u = next_u;
        load_next(first + 16);
        float products[R8][4] = {};
#pragma unroll
        for (int set = 0; set < SETS; set++) columns[set].multiply(products, these[set][0], these[set][1]);
        these_u.transpose_all();
#pragma unroll
        for (int set = 0; set < SETS; set++) columns[set].add(these[set][0], these[set][1], these_u);
        // A warp writes into this buffer again only after the barrier of the next chunk.
        add_products<R8, WARPS>(parts_u, shared[buffer], products, first, end);
    }
#pragma unroll
    for (int set = 0; set < SETS; set++) columns[set].end(parts_b + (u64)blockIdx.y * eights * 8 * R, first_eight + 4 * set, eights);
}

// Eight features of a token in the backward of a gated activation.
struct GatedEight {
    Pairs d_y, gate, up;
    // d_gate and d_up take the places of gate and up, with the formulas and the roundings of gated.cu.
    template <class F> __device__ __forceinline__ void backward() {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float d0 = low(d_y.at[j]), d1 = high(d_y.at[j]);
            F f0(low(gate.at[j])), f1(high(gate.at[j]));
            gate.at[j] = pack_act(f0.times_slope(d0 * low(up.at[j])), f1.times_slope(d1 * high(up.at[j])));
            up.at[j] = pack_act(f0.times_value(d0), f1.times_value(d1));
        }
    }
};

// The backward of a gated activation [T, features], and `output` of gate and of up with the gradients d_gate and d_up, which take the
// places of gate and up. A warp has 32 features of both. d_y, gate and up are read once. Each kind of sums goes first to the part of
// gate and then to that of up: `parts_u` [output, block of features, T, r], `parts_b` [output, part, features, r].
template <class F, int R8, int WARPS>
__device__ __forceinline__ void gated_output(float *parts_u, float *parts_b, Act *gate, Act *up, const Act *d_y, const Act *b_gate,
                                             const Act *b_up, const Act *u_gate, const Act *u_up, u32 tokens, u32 eights, u32 part_tokens) {
    const int R = 8 * R8;
    __shared__ float shared[2][WARPS][16 * R];
    u32 row = threadIdx.x % 32 / 4, eight = blockIdx.x * WARPS * 4 + threadIdx.x / 32 * 4 + threadIdx.x % 4;
    Columns<R8> of_gate, of_up;
    of_gate.begin(b_gate, eight, eights);
    of_up.begin(b_up, eight, eights);
    u32 end = min((blockIdx.y + 1) * part_tokens, tokens), first = blockIdx.y * part_tokens;
    auto load_half = [&](u32 token) {
        return GatedEight{load(d_y, token, eight, end, eights), load(gate, token, eight, end, eights), load(up, token, eight, end, eights)};
    };
    GatedEight next[2] = {load_half(first + row), load_half(first + 8 + row)};
    Ranks<R8> next_u[2];
    next_u[0].load_from(u_gate, first, end);
    next_u[1].load_from(u_up, first, end);
    parts_u += (u64)blockIdx.x * tokens * R;
    for (; first < end; first += 16) {
        GatedEight these[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 token = first + 8 * half + row;
            these[half] = next[half];
            next[half] = load_half(token + 16);
            these[half].template backward<F>();
            if (token >= end || eight >= eights) continue;
            ((Pairs *)gate)[(u64)token * eights + eight] = these[half].gate;
            ((Pairs *)up)[(u64)token * eights + eight] = these[half].up;
        }
        // Each output has a buffer, into which a warp writes again only after the barrier of the other.
        Ranks<R8> u = next_u[0];
        next_u[0].load_from(u_gate, first + 16, end);
        float products[R8][4] = {};
        of_gate.multiply(products, these[0].gate, these[1].gate);
        u.transpose_all();
        of_gate.add(these[0].gate, these[1].gate, u);
        add_products<R8, WARPS>(parts_u, shared[0], products, first, end);
        u = next_u[1];
        next_u[1].load_from(u_up, first + 16, end);
        float products_up[R8][4] = {};
        of_up.multiply(products_up, these[0].up, these[1].up);
        u.transpose_all();
        of_up.add(these[0].up, these[1].up, u);
        add_products<R8, WARPS>(parts_u + (u64)gridDim.x * tokens * R, shared[1], products_up, first, end);
    }
    u64 part = (u64)eights * 8 * R;
    of_gate.end(parts_b + blockIdx.y * part, eight, eights);
    of_up.end(parts_b + (gridDim.y + blockIdx.y) * part, eight, eights);
}

// d_u = scale · the sums of all blocks of features, added to d_u where `accumulate` says so, and d_B += scale · the sums of all parts.
extern "C" __global__ void lora_add_output(Act *d_u, float *d_b, const float *parts_u, const float *parts_b, u32 len_u,
                                           u32 len_b, u32 num_u, u32 num_b, float scale, u32 accumulate) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len_u) {
        float sum = 0.0f;
        for (u32 part = 0; part < num_u; part++) sum += parts_u[(u64)part * len_u + i];
        d_u[i] = to_act((accumulate ? to_f32(d_u[i]) : 0.0f) + scale * sum);
    } else if (i - len_u < len_b) {
        i -= len_u;
        float sum = 0.0f;
        for (u32 part = 0; part < num_b; part++) sum += parts_b[(u64)part * len_b + i];
        d_b[i] += scale * sum;
    }
}

// d_A += the sums of all parts, for each module.
extern "C" __global__ void lora_add_input(float *d_a0, float *d_a1, float *d_a2, const float *parts, u32 num_modules,
                                          u32 num_parts, u32 len) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    float *d_a = (blockIdx.y == 0 ? d_a0 : blockIdx.y == 1 ? d_a1 : d_a2) + i;
    float sum = *d_a;
    for (u32 part = 0; part < num_parts; part++) sum += parts[(u64)(part * num_modules + blockIdx.y) * len + i];
    *d_a = sum;
}

// Kernels of N modules, in blocks of 4 warps. BLOCKS: at a time on a multiprocessor.
#define LORA_INPUT_KERNEL(NAME, R, N, GATED, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                                               \
        NAME(Act *d_x, float *parts, MODULE_PARAMETERS, Input x, MASK_PARAMETERS, u32 tokens, u32 eights,                   \
             u32 part_tokens, u32 accumulate) {                                                                             \
        const Module modules[] = MODULES;                                                                                   \
        input<R / 8, N, 4, GATED>(d_x, parts, modules, x, MASK, tokens, eights, part_tokens, accumulate);                   \
    }
#define LORA_INPUT(R, N, BLOCKS) LORA_INPUT_KERNEL(lora_input_##R##_##N, R, N, false, BLOCKS)
#define LORA_INPUT_GATED(R, BLOCKS) LORA_INPUT_KERNEL(lora_input_##R##_gated, R, 1, true, BLOCKS)
LORA_INPUT(8, 1, 5)
LORA_INPUT(8, 2, 3)
LORA_INPUT(8, 3, 3)
LORA_INPUT(16, 1, 5)
LORA_INPUT(16, 2, 3)
LORA_INPUT(16, 3, 3)
LORA_INPUT(32, 1, 3)
LORA_INPUT(64, 1, 2)
LORA_INPUT_GATED(8, 4)
LORA_INPUT_GATED(16, 4)
LORA_INPUT_GATED(32, 3)
LORA_INPUT_GATED(64, 2)

// WARPS: in a block, of 64 features each. The host has the same numbers.
#define LORA_OUTPUT(R, WARPS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                             \
        lora_output_##R(float *parts_u, float *parts_b, const Act *d_y, const Act *b, const Act *u, u32 tokens, u32 eights, \
                        u32 part_tokens) {                                                                                  \
        output<R / 8, WARPS>(parts_u, parts_b, d_y, b, u, tokens, eights, part_tokens);                                     \
    }
LORA_OUTPUT(8, 16)
LORA_OUTPUT(16, 16)
LORA_OUTPUT(32, 8)

// WARPS: in a block, of 32 features each. The host has the same numbers.
#define GATED_OUTPUT(NAME, F, R, WARPS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                             \
        NAME(float *parts_u, float *parts_b, Act *gate, Act *up, const Act *d_y, const Act *b_gate, const Act *b_up,        \
             const Act *u_gate, const Act *u_up, u32 tokens, u32 eights, u32 part_tokens) {                                 \
        gated_output<F, R / 8, WARPS>(parts_u, parts_b, gate, up, d_y, b_gate, b_up, u_gate, u_up, tokens, eights,          \
                                      part_tokens);                                                                         \
    }
#define GATED_OUTPUTS(R, WARPS)                                                                                             \
    GATED_OUTPUT(lora_output_##R##_swiglu, Silu, R, WARPS)                                                                  \
    GATED_OUTPUT(lora_output_##R##_geglu, GeluTanh, R, WARPS)
GATED_OUTPUTS(8, 16)
GATED_OUTPUTS(16, 16)
GATED_OUTPUTS(32, 8)
