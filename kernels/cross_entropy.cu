// One piece of the vocabulary of a streaming cross-entropy, between the product that makes its logits and the one that uses
// its probabilities; and the end of it. One block a token.
#include "common.cuh"

// The running max, sum and target_logit take a piece in; `acc` [hidden] is rescaled to the new maximum. The row of logits f32
// [rows] becomes exp(logit − new max) as activations, in its first half: every thread has read what it needs before any writes.
// blockDim 256, rows ≤ 4096; hidden is 0 where there is no acc.
extern "C" __global__ void cross_entropy_piece(float *max, float *sum, float *target_logit, float *acc, float *logits,
                                               const u32 *target_ids, u32 rows, u32 first_id, u32 hidden) {
    const int PER_THREAD = 16;
    u64 token = blockIdx.x;
    float *row = logits + token * rows;
    float values[PER_THREAD];
    float largest = -INFINITY_F32;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        u32 i = j * 256 + threadIdx.x;
        values[j] = i < rows ? row[i] : -INFINITY_F32;
        largest = fmaxf(largest, values[j]);
    }
    u32 target = target_ids[token] - first_id;
    if (threadIdx.x == 0 && target < rows) target_logit[token] = row[target];
    float old_max = max[token], new_max = fmaxf(old_max, block_max(largest));
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        u32 i = j * 256 + threadIdx.x;
        values[j] = expf(values[j] - new_max);
        if (i < rows) ((Act *)row)[i] = to_act(values[j]);
        total += values[j];
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

// target_rows[i] = W[target] where the target lies in this piece; other rows are left as they are.
extern "C" __global__ void gather_target_rows(Act *target_rows, const Act *weight, const u32 *target_ids, u32 rows, u32 first_id,
                                              u32 hidden) {
    u32 target = target_ids[blockIdx.x] - first_id;
    if (target >= rows) return;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x)
        target_rows[(u64)blockIdx.x * hidden + i] = weight[(u64)target * hidden + i];
}

// d_x = coefficient · (acc / sum − W[target])
extern "C" __global__ void cross_entropy_finish(Act *d_x, const float *acc, const float *sum, const Act *target_rows,
                                                const float *coefficients, u32 hidden) {
    float reciprocal = 1.0f / sum[blockIdx.x], coefficient = coefficients[blockIdx.x];
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        u64 at = (u64)blockIdx.x * hidden + i;
        d_x[at] = to_act(coefficient * (acc[at] * reciprocal - to_f32(target_rows[at])));
    }
}
