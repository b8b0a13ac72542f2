// y[i] = a number in ±half_width that looks random, of (seed, first + i) alone: the finalizer of MurmurHash3 (Appleby 2011), its
// upper 24 bits. Number for number that of src/device/cpu/uniform.rs. One thread an element.
#include "common.cuh"

extern "C" __global__ void uniform(float *y, u64 len, u64 first, u64 seed, float half_width) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) {
        u64 z = first + i + (seed << 40);
        z = (z ^ (z >> 33)) * 0xFF51AFD7ED558CCDull;
        z = (z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53ull;
        y[i] = __fmul_rn((float)(u32)(z >> 40) / 8388608.0f - 1.0f, half_width);
    }
}
