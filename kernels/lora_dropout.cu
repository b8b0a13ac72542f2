// y = x · mask / (1 − p), or y += that. The mask is that of src/device/cpu/lora_dropout.rs, number for number: Philox4x32-10
// with word 0 feature / 8 and the module above it, word 1 position, word 2 sample, word 3 step. One thread eight features;
// the host sees to it that features divide by 8.
#include "common.cuh"

__device__ __forceinline__ void philox(u32 words[4], u32 key0, u32 key1) {
    for (int round = 0; round < 10; round++) {
        u32 low0 = words[0] * 0xD2511F53u, high0 = __umulhi(words[0], 0xD2511F53u);
        u32 low1 = words[2] * 0xCD9E8D57u, high1 = __umulhi(words[2], 0xCD9E8D57u);
        words[0] = high1 ^ words[1] ^ key0;
        words[2] = high0 ^ words[3] ^ key1;
        words[1] = low1;
        words[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

extern "C" __global__ void lora_dropout(Act8 *y, const Act8 *x, const u64 *sample_idx, const u32 *positions, u64 num_eights,
                                        u32 eights_per_row, u32 module, u32 step, u64 seed, u32 threshold, float scale,
                                        u32 accumulate) {
    for (u64 i = thread_idx(); i < num_eights; i += num_threads()) {
        u64 token = i / eights_per_row;
        u32 words[4] = {(module << 20) + (u32)(i % eights_per_row), positions[token], (u32)sample_idx[token], step};
        philox(words, (u32)seed, (u32)(seed >> 32));
        Act8 in = x[i], out;
        if (accumulate) out = y[i];
        for (int j = 0; j < 8; j++) {
            u32 number = j % 2 == 0 ? words[j / 2] & 0xFFFFu : words[j / 2] >> 16;
            float kept = number < threshold ? 0.0f : to_f32(in.at[j]) * scale;
            out.at[j] = to_act(accumulate ? to_f32(out.at[j]) + kept : kept);
        }
        y[i] = out;
    }
}
