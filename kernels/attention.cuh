// Types and functions that the kernels of attention share, on all GPUs.
#pragma once

#include "common.cuh"

#define LOG2_E 1.4426950408889634f

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Returns the number of keys before itself that token t sees: those of its document, or as many as a window has.
__device__ __forceinline__ int reach(const u32 *positions, int t, int max_reach) { return min((int)positions[t], max_reach); }
