// The rotation of a pair of features by an angle.
#pragma once

__device__ __forceinline__ void turn_pair(float &a, float &b, float cos, float sin) {
    float turned = a * cos - b * sin;
    b = b * cos + a * sin;
    a = turned;
}
