// Rotates pairs (i, i + head_dim/2) of each head in place. x [T, heads · head_dim]; cos, sin [T, head_dim/2] f32; sign −1
// rotates back. One thread a pair.
#include "common.cuh"

extern "C" __global__ void rope(Act *x, const float *cos, const float *sin, u64 num_pairs, u32 num_heads, u32 half, float sign) {
    for (u64 pair = thread_idx(); pair < num_pairs; pair += num_threads()) {
        u64 head = pair / half;
        u32 i = pair % half;
        u64 angle = head / num_heads * half + i;
        Act *low = x + head * 2 * half + i, *high = low + half;
        float a = to_f32(*low), b = to_f32(*high), c = cos[angle], s = sin[angle] * sign;
        *low = to_act(a * c - b * s);
        *high = to_act(b * c + a * s);
    }
}
