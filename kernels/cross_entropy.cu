// A streaming cross-entropy over pieces of the vocabulary. One kernel takes a piece in, between the product that
// makes its logits and the product that uses its probabilities; another ends it. One block a token.
#include "common.cuh"

// W logits that lie together, and as many activations.
template <int W> struct alignas(4 * W) Logits {
    float at[W];
};
template <int W> struct alignas(2 * W) Probabilities {
    Act at[W];
};

// The bound of a logit, c·tanh(logit / c), and its derivative at a bounded logit.
__device__ __forceinline__ float capped(float logit, float softcap) { return softcap * tanhf(logit / softcap); }
__device__ __forceinline__ float slope(float logit, float softcap) { return 1.0f - (logit / softcap) * (logit / softcap); }

// The running max, sum and target_logit take a piece in; `acc` [hidden] is rescaled to the new maximum. The row of logits f32
// [rows] becomes exp(logit − new max) as activations, in its first half: every thread has read what it needs before any writes.
// A thread takes W logits at a time, rows is a multiple of W. hidden is 0 where there is no acc. CAPPED logits are bounded first, and
// the activations have the factor of the bound's derivative.
template <int W, bool CAPPED>
__device__ __forceinline__ void take_piece(float *max, float *sum, float *target_logit, float *acc, float *logits,
                                           const u32 *target_ids, u32 rows, u32 first_id, u32 hidden, float softcap) {
    const int PER_THREAD = 16 / W;
    u64 token = blockIdx.x;
    float *row = logits + token * rows;
    Logits<W> values[PER_THREAD];
    float largest = -INFINITY_F32;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        u32 i = j * 256 + threadIdx.x;
        if (i * W < rows) values[j] = ((const Logits<W> *)row)[i];
#pragma unroll
        for (int w = 0; w < W; w++) {
            if (i * W >= rows) values[j].at[w] = -INFINITY_F32;
            else if (CAPPED) values[j].at[w] = capped(values[j].at[w], softcap);
            largest = fmaxf(largest, values[j].at[w]);
        }
    }
    u32 target = target_ids[token] - first_id;
    if (threadIdx.x == 0 && target < rows) target_logit[token] = CAPPED ? capped(row[target], softcap) : row[target];
    float old_max = max[token], new_max = fmaxf(old_max, block_max(largest));
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        u32 i = j * 256 + threadIdx.x;
        Probabilities<W> rounded;
#pragma unroll
        for (int w = 0; w < W; w++) {
            float value = expf(values[j].at[w] - new_max);
            rounded.at[w] = to_act(CAPPED ? value * slope(values[j].at[w], softcap) : value);
            total += value;
        }
        if (i * W < rows) ((Probabilities<W> *)row)[i] = rounded;
    }
    total = block_sum(total);
    float rescale = expf(old_max - new_max);
    if (threadIdx.x == 0) {
        sum[token] = sum[token] * rescale + total;
        max[token] = new_max;
    }
    if (rescale != 1.0f)
        for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) acc[token * hidden + i] *= rescale;
}

// blockDim 256, rows ≤ 4096. A softcap of 0 bounds nothing.
extern "C" __global__ void cross_entropy_piece(float *max, float *sum, float *target_logit, float *acc, float *logits,
                                               const u32 *target_ids, u32 rows, u32 first_id, u32 hidden, float softcap) {
#define TAKE(W, CAPPED) take_piece<W, CAPPED>(max, sum, target_logit, acc, logits, target_ids, rows, first_id, hidden, softcap)
    if (softcap == 0.0f) rows % 4 == 0 ? TAKE(4, false) : TAKE(1, false);
    else rows % 4 == 0 ? TAKE(4, true) : TAKE(1, true);
}

// target_rows[i] = W[target] where the target lies in this piece; other rows are left as they are.
extern "C" __global__ void gather_target_rows(Act8 *target_rows, const Act8 *weight, const u32 *target_ids, u32 rows, u32 first_id,
                                              u32 hidden_eights) {
    u32 target = target_ids[blockIdx.x] - first_id;
    if (target >= rows) return;
    Act8 *to = target_rows + (u64)blockIdx.x * hidden_eights;
    const Act8 *from = weight + (u64)target * hidden_eights;
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) to[i] = from[i];
}

// d_x = coefficient · (acc / sum − W[target]), where W[target] has the factor of the bound's derivative. The product with it is not
// contracted into the difference, so that a factor of 1 changes no bit.
extern "C" __global__ void cross_entropy_finish(Act8 *d_x, const Float8 *acc, const float *sum, const float *target_logit,
                                                const Act8 *target_rows, const float *coefficients, u32 hidden_eights,
                                                float softcap) {
    float factor = softcap == 0.0f ? 1.0f : slope(target_logit[blockIdx.x], softcap);
    float reciprocal = 1.0f / sum[blockIdx.x], coefficient = coefficients[blockIdx.x];
    u64 row = (u64)blockIdx.x * hidden_eights;
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) {
        Float8 a = acc[row + i];
        Act8 target = target_rows[row + i], out;
        for (int j = 0; j < 8; j++) {
            float w = __fmul_rn(factor, to_f32(target.at[j]));
            out.at[j] = to_act(coefficient * (a.at[j] * reciprocal - w));
        }
        d_x[row + i] = out;
    }
}
