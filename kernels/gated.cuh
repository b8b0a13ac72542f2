// The f of a gated activation f(gate) · up: a struct that is made from x and has
//     value()         f(x)
//     times_value(d)  d · f(x)
//     times_slope(d)  d · f'(x)
// The order of the products decides how they are rounded, so times_value is more than d * value().
#pragma once
#include "common.cuh"

// σ(x) = 1 / (1 + e⁻ˣ) with the GPU's approximations of 2ˣ and 1/x, whose errors are far below the rounding of an activation.
__device__ __forceinline__ float sigmoid(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return inverse;
}

// f(x) = x · σ(x)
struct Silu {
    float x, s;
    __device__ __forceinline__ Silu(float x) : x(x), s(sigmoid(x)) {}
    __device__ __forceinline__ float value() const { return x * s; }
    __device__ __forceinline__ float times_value(float d) const { return d * x * s; }
    __device__ __forceinline__ float times_slope(float d) const { return d * s * (1.0f + x * (1.0f - s)); }
};

// Twice √(2/π), and the factor of x³ in GELU by tanh.
#define GELU_FACTOR 1.595769122f
#define GELU_CUBIC 0.044715f

// f(x) = ½x · (1 + tanh(z)) with z = √(2/π) · (x + 0.044715x³), which is x · σ(2z)
// f'(x) = σ(2z) · (1 + x · (1 − σ(2z)) · 2z') with z' = √(2/π) · (1 + 3 · 0.044715x²)
struct GeluTanh {
    float x, s;
    __device__ __forceinline__ GeluTanh(float x) : x(x), s(sigmoid(GELU_FACTOR * x * (1.0f + GELU_CUBIC * x * x))) {}
    __device__ __forceinline__ float value() const { return x * s; }
    __device__ __forceinline__ float times_value(float d) const { return d * x * s; }
    __device__ __forceinline__ float times_slope(float d) const {
        float slope = GELU_FACTOR * (1.0f + 3.0f * GELU_CUBIC * x * x);
        return d * s * (1.0f + x * (1.0f - s) * slope);
    }
};

template <class F> __device__ __forceinline__ float gated(float gate, float up) { return F(gate).value() * up; }
