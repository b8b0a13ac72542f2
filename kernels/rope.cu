// Rotates pairs (i, i + rotary_dim/2) of the first rotary_dim elements of each head in place. x [T, heads · head_dim]; cos, sin
// [T, rotary_dim/2] f32; sign −1 rotates back. One block a token, a thread eight pairs at a time: every access is 16 bytes wide, and the
// angles, which all heads of a token share, come from the L1 cache. half_eights is rotary_dim / 16, head_eights is head_dim / 8.
#include "common.cuh"
#include "rope.cuh"

extern "C" __global__ void rope(Act8 *x, const Float8 *cos, const Float8 *sin, u32 num_heads, u32 half_eights, u32 head_eights, float sign) {
    u64 token = blockIdx.x;
    Act8 *heads = x + token * num_heads * head_eights;
    const Float8 *cos_row = cos + token * half_eights, *sin_row = sin + token * half_eights;
    for (u32 eight = threadIdx.x; eight < num_heads * half_eights; eight += blockDim.x) {
        u32 i = eight % half_eights;
        Act8 *low = heads + eight / half_eights * head_eights + i, *high = low + half_eights;
        Act8 a8 = *low, b8 = *high;
        Float8 c8 = cos_row[i], s8 = sin_row[i];
        for (int j = 0; j < 8; j++) {
            float a = to_f32(a8.at[j]), b = to_f32(b8.at[j]);
            turn_pair(a, b, c8.at[j], s8.at[j] * sign);
            a8.at[j] = to_act(a);
            b8.at[j] = to_act(b);
        }
        *low = a8;
        *high = b8;
    }
}
