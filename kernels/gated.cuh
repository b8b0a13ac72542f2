// The f of a gated activation f(gate) · up: a struct that is made from x and has
//     value()         f(x)
//     times_value(d)  d · f(x)
//     times_slope(d)  d · f'(x)
// The order of the products decides how they are rounded, so times_value is more than d * value().
#pragma once
#include "common.cuh"

// f(x) = x · s with s = 1 / (1 + e⁻ˣ)
struct Silu {
    float x, s;
    __device__ __forceinline__ Silu(float x) : x(x), s(1.0f / (1.0f + expf(-x))) {}
    __device__ __forceinline__ float value() const { return x * s; }
    __device__ __forceinline__ float times_value(float d) const { return d * x * s; }
    __device__ __forceinline__ float times_slope(float d) const { return d * s * (1.0f + x * (1.0f - s)); }
};

// √(2/π), and the factor of x³ in GELU by tanh.
#define GELU_FACTOR 0.797884561f
#define GELU_CUBIC 0.044715f

// f(x) = ½x · (1 + t) with t = tanh(√(2/π) · (x + 0.044715x³))
// f'(x) = ½(1 + t) + ½x · (1 − t²) · √(2/π) · (1 + 3 · 0.044715x²)
struct GeluTanh {
    float x, t;
    __device__ __forceinline__ GeluTanh(float x) : x(x), t(tanhf(GELU_FACTOR * x * (1.0f + GELU_CUBIC * x * x))) {}
    __device__ __forceinline__ float value() const { return 0.5f * x * (1.0f + t); }
    __device__ __forceinline__ float times_value(float d) const { return d * 0.5f * x * (1.0f + t); }
    __device__ __forceinline__ float times_slope(float d) const {
        float slope = GELU_FACTOR * (1.0f + 3.0f * GELU_CUBIC * x * x);
        return d * 0.5f * (1.0f + t + x * (1.0f - t * t) * slope);
    }
};

template <class F> __device__ __forceinline__ float gated(float gate, float up) { return F(gate).value() * up; }
