// One AdamW update in the order of operations of torch.optim.AdamW; all f32. One thread an element.
#include "common.cuh"

extern "C" __global__ void adamw(float *param, float *exp_avg, float *exp_avg_sq, const float *grad, u64 len, float grad_scale,
                                 float step_size, float decay, float weight1, float beta2, float weight2,
                                 float bias_correction2_sqrt, float epsilon) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) {
        float g = grad[i] * grad_scale;
        float m = exp_avg[i] + weight1 * (g - exp_avg[i]);
        float v = exp_avg_sq[i] * beta2 + weight2 * g * g;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = param[i] * decay - step_size * (m / (sqrtf(v) / bias_correction2_sqrt + epsilon));
    }
}
