// Types and functions that the kernels of attention share, on all GPUs.
#pragma once

#include "common.cuh"

#define LOG2_E 1.4426950408889634f

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
