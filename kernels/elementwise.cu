// Sums, biases, casts, and the sum of squares.
#include "common.cuh"

// y += x
extern "C" __global__ void add(Act8 *y, const Act8 *x, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 a = y[i], b = x[i];
        for (int j = 0; j < 8; j++) a.at[j] = to_act(to_f32(a.at[j]) + to_f32(b.at[j]));
        y[i] = a;
    }
}

// Each row of x [T, features] += scale · bias [features]
extern "C" __global__ void add_bias(Act *x, const float *bias, float scale, u64 len, u32 features) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) x[i] = to_act(to_f32(x[i]) + scale * bias[i % features]);
}

// x += value
extern "C" __global__ void add_scalar(float *x, float value, u64 len) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) x[i] += value;
}

// y = x as activations
extern "C" __global__ void cast(Act *y, const float *x, u64 len) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) y[i] = to_act(x[i]);
}

// sum[i] = parts[i] + parts[len + i] + …, in that order
extern "C" __global__ void sum_parts(float *sum, const float *parts, u64 len, u32 num_parts) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) {
        float total = parts[i];
        for (u32 part = 1; part < num_parts; part++) total += parts[part * len + i];
        sum[i] = total;
    }
}

// sums[block] = Σ x² of the block's part, in f64, by 1024 threads, always in the same order.
extern "C" __global__ void sum_of_squares(double *sums, const float *x, u64 len) {
    __shared__ double partial[1024];
    u64 part = (len + gridDim.x - 1) / gridDim.x, end = min(len, (blockIdx.x + 1) * part);
    double own = 0.0;
    for (u64 i = blockIdx.x * part + threadIdx.x; i < end; i += blockDim.x) own += (double)x[i] * (double)x[i];
    partial[threadIdx.x] = own;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// Keeps a stream busy for some time, so that a missing wait shows in a test.
extern "C" __global__ void spin(u64 nanoseconds) {
    u64 begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - begin < nanoseconds);
}
