// y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps), and its backward. One block a row; x, y, d_x, d_y [T, hidden],
// rstd [T], weight [hidden] f32. Forward reads a row twice (the second time from the L1 cache) and writes it once.
#include "common.cuh"

extern "C" __global__ void rms_norm_forward(Act *y, float *rstd, const Act *x, const float *weight, u32 hidden, float eps) {
    u64 row = (u64)blockIdx.x * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = to_f32(x[row + i]);
        sum += value * value;
    }
    float scale = rsqrtf(block_sum(sum) / hidden + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) y[row + i] = to_act(to_f32(x[row + i]) * scale * weight[i]);
}

// d_x += rstd · (d_y·w − x · rstd² · mean(d_y·w·x))
extern "C" __global__ void rms_norm_backward(Act *d_x, const Act *d_y, const Act *x, const float *rstd, const float *weight,
                                             u32 hidden) {
    u64 row = (u64)blockIdx.x * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) sum += to_f32(d_y[row + i]) * weight[i] * to_f32(x[row + i]);
    float scale = rstd[blockIdx.x];
    float mean = block_sum(sum) * scale * scale / hidden;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float d = to_f32(d_y[row + i]) * weight[i] - to_f32(x[row + i]) * mean;
        d_x[row + i] = to_act(to_f32(d_x[row + i]) + scale * d);
    }
}
