//! One AdamW update, in the order of operations of `torch.optim.AdamW`.

use anyhow::Result;
use rayon::prelude::*;

use crate::device::{AdamW, AdamWOps};
use crate::simd::vectorize;

use super::Cpu;

/// Elements that one thread updates at a time.
const CHUNK: usize = 1 << 14;

impl AdamWOps for Cpu {
    fn adamw(&self, args: AdamW<'_, Cpu>) -> Result<()> {
        args.num_elements()?;
        let (param, m, v) = (args.param.host_mut(), args.exp_avg.host_mut(), args.exp_avg_sq.host_mut());
        let grad = args.grad.host();
        let bias_correction1 = 1.0 - args.beta1.powi(args.step as i32);
        let bias_correction2_sqrt = ((1.0 - args.beta2.powi(args.step as i32)).sqrt()) as f32;
        let step_size = (args.learning_rate / bias_correction1) as f32;
        let decay = (1.0 - args.learning_rate * args.weight_decay) as f32;
        let (beta2, epsilon) = (args.beta2 as f32, args.epsilon as f32);
        let (weight1, weight2) = ((1.0 - args.beta1) as f32, (1.0 - args.beta2) as f32);
        type Chunk<'a> = (((&'a mut [f32], &'a mut [f32]), &'a mut [f32]), &'a [f32]);
        let update = |(((param, m), v), grad): Chunk<'_>| {
            vectorize(
                #[inline(always)]
                || {
                    for (((p, m), v), g) in param.iter_mut().zip(&mut *m).zip(&mut *v).zip(grad) {
                        let g = g * args.grad_scale;
                        *p *= decay;
                        *m += weight1 * (g - *m);
                        *v = *v * beta2 + weight2 * g * g;
                        *p -= step_size * (*m / (v.sqrt() / bias_correction2_sqrt + epsilon));
                    }
                },
            );
        };
        if self.num_threads == 1 {
            update((((param, m), v), grad));
        } else {
            let (m, v) = (m.par_chunks_mut(CHUNK), v.par_chunks_mut(CHUNK));
            param.par_chunks_mut(CHUNK).zip(m).zip(v).zip(grad.par_chunks(CHUNK)).for_each(update);
        }
        Ok(())
    }
}
