//! One AdamW update.

use anyhow::Result;

use crate::device::{AdamW, AdamWOps};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> AdamWOps for Cuda<A> {
    fn adamw(&self, args: AdamW<'_, Cuda<A>>) -> Result<()> {
        let len = args.num_elements()?;
        let AdamW { param, exp_avg, exp_avg_sq, grad, grad_scale, learning_rate, beta1, beta2, epsilon, .. } = args;
        let bias_correction1 = 1.0 - beta1.powi(args.step as i32);
        let bias_correction2_sqrt = (1.0 - beta2.powi(args.step as i32)).sqrt() as f32;
        let step_size = (learning_rate / bias_correction1) as f32;
        let decay = (1.0 - learning_rate * args.weight_decay) as f32;
        let (weight1, weight2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let args = args![
            param,
            exp_avg,
            exp_avg_sq,
            grad,
            len as u64,
            grad_scale,
            step_size,
            decay,
            weight1,
            beta2 as f32,
            weight2,
            bias_correction2_sqrt,
            epsilon as f32
        ];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("adamw", Grid::elements(len), args) }
    }
}
