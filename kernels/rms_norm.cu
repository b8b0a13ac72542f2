// y = x · rstd · weight, rstd = 1 / sqrt(mean(x²) + eps), and its backward. One block a row, a thread eight elements at a time;
// x, y, d_x, d_y [T, hidden], rstd [T], weight [hidden] f32; hidden is a multiple of 8. A row is read twice, the second time from
// the L1 cache, and written once.
#include "common.cuh"

// An addend is added to x first, rounded to activations, which makes x the residual stream.
extern "C" __global__ void rms_norm_forward(Act8 *y, float *rstd, Act8 *x, const Act8 *addend, const Float8 *weight,
                                            u32 hidden_eights, float eps) {
    u64 row = (u64)blockIdx.x * hidden_eights;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) {
        Act8 value = x[row + i];
        if (addend) {
            Act8 more = addend[row + i];
            for (int j = 0; j < 8; j++) value.at[j] = to_act(to_f32(value.at[j]) + to_f32(more.at[j]));
            x[row + i] = value;
        }
        for (int j = 0; j < 8; j++) sum += to_f32(value.at[j]) * to_f32(value.at[j]);
    }
    float scale = rsqrtf(block_sum(sum) / (hidden_eights * 8) + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) {
        Act8 value = x[row + i], out;
        Float8 w = weight[i];
        for (int j = 0; j < 8; j++) out.at[j] = to_act(to_f32(value.at[j]) * scale * w.at[j]);
        y[row + i] = out;
    }
}

// d_x += rstd · (d_y·w − x · rstd² · mean(d_y·w·x))
extern "C" __global__ void rms_norm_backward(Act8 *d_x, const Act8 *d_y, const Act8 *x, const float *rstd, const Float8 *weight,
                                             u32 hidden_eights) {
    u64 row = (u64)blockIdx.x * hidden_eights;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) {
        Act8 d = d_y[row + i], value = x[row + i];
        Float8 w = weight[i];
        for (int j = 0; j < 8; j++) sum += to_f32(d.at[j]) * w.at[j] * to_f32(value.at[j]);
    }
    float scale = rstd[blockIdx.x];
    float mean = block_sum(sum) * scale * scale / (hidden_eights * 8);
    for (u32 i = threadIdx.x; i < hidden_eights; i += blockDim.x) {
        Act8 d = d_y[row + i], value = x[row + i], out = d_x[row + i];
        Float8 w = weight[i];
        for (int j = 0; j < 8; j++) {
            float centered = to_f32(d.at[j]) * w.at[j] - to_f32(value.at[j]) * mean;
            out.at[j] = to_act(to_f32(out.at[j]) + scale * centered);
        }
        d_x[row + i] = out;
    }
}
