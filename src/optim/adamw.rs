//! The numbers of an AdamW update.

use crate::device::AdamW;
use crate::device::{View, ViewMut};

/// One AdamW update of all trainable values.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    pub learning_rate: f64,
    /// The learning rate of B over that of all other matrices: 1, but for LoRA+.
    pub lr_ratio: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// `None` switches clipping off.
    pub max_grad_norm: Option<f64>,
    /// Factor by which the gradients are too large, because the loss was scaled.
    pub loss_scale: f32,
    /// 1 at the first update.
    pub step: u32,
}

impl Update {
    /// The op's arguments for one buffer, whose learning rate is `lr_ratio` times that of the update.
    pub fn args<'a, D>(
        &self,
        lr_ratio: f64,
        param: ViewMut<'a, D, f32>,
        exp_avg: ViewMut<'a, D, f32>,
        exp_avg_sq: ViewMut<'a, D, f32>,
        grad: View<'a, D, f32>,
        grad_scale: f32,
    ) -> AdamW<'a, D> {
        let Update { beta1, beta2, epsilon, weight_decay, step, .. } = *self;
        let learning_rate = self.learning_rate * lr_ratio;
        AdamW { param, exp_avg, exp_avg_sq, grad, grad_scale, learning_rate, beta1, beta2, epsilon, weight_decay, step }
    }
}
