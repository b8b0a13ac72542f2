// y = f(gate) · up, and its backward, whose results take the places of gate and up, for each f. A thread computes eight elements at a
// time; the host checks that the length is a multiple of 8.
#include "gated.cuh"

template <class F> __device__ __forceinline__ void forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], out;
        for (int j = 0; j < 8; j++) out.at[j] = to_act(gated<F>(to_f32(g.at[j]), to_f32(u.at[j])));
        y[i] = out;
    }
}

template <class F>
__device__ __forceinline__ void backward(Act8 *gate, Act8 *up, const Act8 *d_y, u64 num_eights) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        Act8 g = gate[i], u = up[i], d8 = d_y[i], out_gate, out_up;
        for (int j = 0; j < 8; j++) {
            float d = to_f32(d8.at[j]);
            F f(to_f32(g.at[j]));
            out_up.at[j] = to_act(f.times_value(d));
            out_gate.at[j] = to_act(f.times_slope(d * to_f32(u.at[j])));
        }
        gate[i] = out_gate;
        up[i] = out_up;
    }
}

extern "C" __global__ void swiglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    forward<Silu>(y, gate, up, num_eights);
}

extern "C" __global__ void swiglu_backward(Act8 *gate, Act8 *up, const Act8 *d_y, u64 num_eights) {
    backward<Silu>(gate, up, d_y, num_eights);
}

extern "C" __global__ void geglu_forward(Act8 *y, const Act8 *gate, const Act8 *up, u64 num_eights) {
    forward<GeluTanh>(y, gate, up, num_eights);
}

extern "C" __global__ void geglu_backward(Act8 *gate, Act8 *up, const Act8 *d_y, u64 num_eights) {
    backward<GeluTanh>(gate, up, d_y, num_eights);
}
