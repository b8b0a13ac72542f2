// y = f(gate) · up, and its backward, for each f. One thread eight elements; the host sees to it that len divides by 8.
#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

extern "C" __global__ void swiglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], out;
        for (int j = 0; j < 8; j++) {
            float value = to_f32(g.at[j]);
            out.at[j] = to_act(value * sigmoid(value) * to_f32(u.at[j]));
        }
        y[i] = out;
    }
}

extern "C" __global__ void swiglu_backward(Act8 *d_gate, Act8 *d_up, const Act8 *d_y, const Act8 *gate, const Act8 *up,
                                           u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g8 = gate[i], u8_ = up[i], d8 = d_y[i], out_gate, out_up;
        for (int j = 0; j < 8; j++) {
            float g = to_f32(g8.at[j]), d = to_f32(d8.at[j]), s = sigmoid(g);
            out_up.at[j] = to_act(d * g * s);
            out_gate.at[j] = to_act(d * to_f32(u8_.at[j]) * s * (1.0f + g * (1.0f - s)));
        }
        d_gate[i] = out_gate;
        d_up[i] = out_up;
    }
}

// √(2/π), and the factor of x³ in GELU by tanh.
#define GELU_FACTOR 0.797884561f
#define GELU_CUBIC 0.044715f

// tanh(√(2/π) · (x + 0.044715x³))
__device__ __forceinline__ float gelu_tanh(float x) { return tanhf(GELU_FACTOR * x * (1.0f + GELU_CUBIC * x * x)); }

// f(x) = ½x · (1 + t) with t = gelu_tanh(x)
extern "C" __global__ void geglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], out;
        for (int j = 0; j < 8; j++) {
            float value = to_f32(g.at[j]);
            out.at[j] = to_act(0.5f * value * (1.0f + gelu_tanh(value)) * to_f32(u.at[j]));
        }
        y[i] = out;
    }
}

// f'(x) = ½(1 + t) + ½x · (1 − t²) · √(2/π) · (1 + 3 · 0.044715x²)
extern "C" __global__ void geglu_backward(Act8 *d_gate, Act8 *d_up, const Act8 *d_y, const Act8 *gate, const Act8 *up,
                                          u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g8 = gate[i], u8_ = up[i], d8 = d_y[i], out_gate, out_up;
        for (int j = 0; j < 8; j++) {
            float g = to_f32(g8.at[j]), d = to_f32(d8.at[j]), t = gelu_tanh(g);
            float slope = GELU_FACTOR * (1.0f + 3.0f * GELU_CUBIC * g * g);
            out_up.at[j] = to_act(d * 0.5f * g * (1.0f + t));
            out_gate.at[j] = to_act(d * to_f32(u8_.at[j]) * 0.5f * (1.0f + t + g * (1.0f - t * t) * slope));
        }
        d_gate[i] = out_gate;
        d_up[i] = out_up;
    }
}
