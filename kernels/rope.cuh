// The rotation of a pair of features by an angle. Which products are fused into sums is written down, so that every kernel that turns
// heads rounds alike.
#pragma once

__device__ __forceinline__ void turn_pair(float &a, float &b, float cos, float sin) {
    float turned = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
    b = __fmaf_rn(b, cos, __fmul_rn(a, sin));
    a = turned;
}
