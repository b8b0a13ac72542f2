// y = f(gate) · up, and its backward, for each f. A thread computes eight elements at a time; the host checks that the
// length is a multiple of 8.
//
// An f is a struct that is made from x and has
//     value()         f(x)
//     times_value(d)  d · f(x)
//     times_slope(d)  d · f'(x)
// The order of the products decides how they are rounded, so times_value is more than d * value().
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

template <class F> __device__ __forceinline__ void forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], out;
        for (int j = 0; j < 8; j++)
            out.at[j] = to_act(F(to_f32(g.at[j])).value() * to_f32(u.at[j]));
        y[i] = out;
    }
}

template <class F>
__device__ __forceinline__ void backward(Act8 *d_gate, Act8 *d_up, const Act8 *d_y, const Act8 *gate, const Act8 *up,
                                         u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], d8 = d_y[i], out_gate, out_up;
        for (int j = 0; j < 8; j++) {
            float d = to_f32(d8.at[j]);
            F f(to_f32(g.at[j]));
            out_up.at[j] = to_act(f.times_value(d));
            out_gate.at[j] = to_act(f.times_slope(d * to_f32(u.at[j])));
        }
        d_gate[i] = out_gate;
        d_up[i] = out_up;
    }
}

extern "C" __global__ void swiglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    forward<Silu>(y, gate, up, num_eights);
}

extern "C" __global__ void swiglu_backward(Act8 *d_gate, Act8 *d_up, const Act8 *d_y, const Act8 *gate, const Act8 *up,
                                           u64 num_eights) {
    backward<Silu>(d_gate, d_up, d_y, gate, up, num_eights);
}

extern "C" __global__ void geglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    forward<GeluTanh>(y, gate, up, num_eights);
}

extern "C" __global__ void geglu_backward(Act8 *d_gate, Act8 *d_up, const Act8 *d_y, const Act8 *gate, const Act8 *up,
                                          u64 num_eights) {
    backward<GeluTanh>(d_gate, d_up, d_y, gate, up, num_eights);
}
