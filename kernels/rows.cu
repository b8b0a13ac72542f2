// Rows picked by index.
#include "common.cuh"

// y[i] = x[rows[i]], rows of `width_eights` times eight elements. One block a row.
extern "C" __global__ void gather_rows(Act8 *y, const Act8 *x, const u32 *rows, u32 width_eights) {
    Act8 *to = y + (u64)blockIdx.x * width_eights;
    const Act8 *from = x + (u64)rows[blockIdx.x] * width_eights;
    for (u32 i = threadIdx.x; i < width_eights; i += blockDim.x) to[i] = from[i];
}

// y[rows[i]] = x[i], rows of `width_eights` times eight elements, all different. One block a row.
extern "C" __global__ void scatter_rows(Act8 *y, const Act8 *x, const u32 *rows, u32 width_eights) {
    Act8 *to = y + (u64)rows[blockIdx.x] * width_eights;
    const Act8 *from = x + (u64)blockIdx.x * width_eights;
    for (u32 i = threadIdx.x; i < width_eights; i += blockDim.x) to[i] = from[i];
}
