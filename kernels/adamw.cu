// One AdamW update in the order of operations of torch.optim.AdamW; all f32. One thread an element. Each product and sum is
// rounded by itself, so that the result is that of src/device/cpu/adamw.rs to the bit, wherever the values are kept.
#include "common.cuh"

extern "C" __global__ void adamw(float *param, float *exp_avg, float *exp_avg_sq, const float *grad, u64 len, float grad_scale,
                                 float step_size, float decay, float weight1, float beta2, float weight2,
                                 float bias_correction2_sqrt, float epsilon) {
    for (u64 i = thread_idx(); i < len; i += num_threads()) {
        float g = __fmul_rn(grad[i], grad_scale);
        float m = __fadd_rn(exp_avg[i], __fmul_rn(weight1, __fsub_rn(g, exp_avg[i])));
        float v = __fadd_rn(__fmul_rn(exp_avg_sq[i], beta2), __fmul_rn(__fmul_rn(weight2, g), g));
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), bias_correction2_sqrt), epsilon);
        param[i] = __fsub_rn(__fmul_rn(param[i], decay), __fmul_rn(step_size, __fdiv_rn(m, denominator)));
    }
}
