// y = silu(gate) · up, and its backward. One thread eight elements; the host sees to it that len divides by 8.
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
