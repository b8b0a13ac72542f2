// Types and functions that every kernel uses. No header of CUDA is included: NVRTC alone compiles these files.
//
// `Act` is the type of activations and dense weights: bf16, or fp16 with -DACT_F16. Sums are f32 everywhere.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITY_F32 __int_as_float(0x7f800000)

struct Act {
    u16 bits;
};

// Eight activations: the widest load.
struct alignas(16) Act8 {
    Act at[8];
};

// Eight numbers that go with them.
struct alignas(16) Float8 {
    float at[8];
};

#ifdef ACT_F16
#define ACT_NAME "f16"
#else
#define ACT_NAME "bf16"
#endif

__device__ __forceinline__ float f16_to_f32(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float bf16_to_f32(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float to_f32(Act a) {
#ifdef ACT_F16
    return f16_to_f32(a.bits);
#else
    return bf16_to_f32(a.bits);
#endif
}

// Rounded to nearest, ties to even; `low` goes to the low half.
__device__ __forceinline__ u32 pack_act(float low, float high) {
    u32 packed;
    asm("cvt.rn." ACT_NAME "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The numbers of a pair.
__device__ __forceinline__ float low(u32 pair) { return to_f32(Act{(u16)pair}); }
__device__ __forceinline__ float high(u32 pair) { return to_f32(Act{(u16)(pair >> 16)}); }

__device__ __forceinline__ Act to_act(float value) { return Act{(u16)pack_act(value, 0.0f)}; }

// Sum over the threads of a block, in an order that depends on the block's size alone. Every thread gets it.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) sum += partial[warp];
    __syncthreads();
    return sum;
}

// Largest value over the threads of a block. Every thread gets it.
__device__ __forceinline__ float block_max(float value) {
    __shared__ float partial[32];
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float max = partial[0];
    for (int warp = 1; warp < (int)blockDim.x / 32; warp++) max = fmaxf(max, partial[warp]);
    __syncthreads();
    return max;
}

// Index of this thread in a one-dimensional grid, and the number of all threads.
__device__ __forceinline__ u64 thread_idx() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 num_threads() { return (u64)gridDim.x * blockDim.x; }
