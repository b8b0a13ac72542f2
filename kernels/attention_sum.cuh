// The last step of attention's gradients, on all GPUs.
#pragma once

#include "common.cuh"

// y [T, kv_heads · D] = the sum of x [T, kv_heads · group · D] over the parts of a group, in their order; by eights.
extern "C" __global__ void attention_sum_heads(Act8 *y, const Act8 *x, u64 eights, u32 group, u32 head_eights) {
    for (u64 i = thread_idx(); i < eights; i += num_threads()) {
        u64 first = i / head_eights * group * head_eights + i % head_eights;
        float sum[8] = {};
        for (u32 g = 0; g < group; g++) {
            Act8 part = x[first + g * head_eights];
            for (int j = 0; j < 8; j++) sum[j] += to_f32(part.at[j]);
        }
        Act8 rounded;
        for (int j = 0; j < 8; j++) rounded.at[j] = to_act(sum[j]);
        y[i] = rounded;
    }
}
