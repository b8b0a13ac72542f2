//! One AdamW update.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// One AdamW update as `torch.optim.AdamW` does it (decoupled decay, bias correction), all f32 and of one length.
pub struct AdamW<'a, D> {
    pub param: ViewMut<'a, D, f32>,
    pub exp_avg: ViewMut<'a, D, f32>,
    pub exp_avg_sq: ViewMut<'a, D, f32>,
    pub grad: View<'a, D, f32>,
    /// Multiplies the gradient first (clipping).
    pub grad_scale: f32,
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// 1 at the first update.
    pub step: u32,
}

/// The optimizer's update.
pub trait AdamWOps: Device {
    /// See [`AdamW`].
    fn adamw(&self, args: AdamW<'_, Self>) -> Result<()>;
}

impl<D: Device> AdamW<'_, D> {
    /// Checks all lengths; returns the one that they have.
    pub(super) fn num_elements(&self) -> Result<usize> {
        let len = self.param.len();
        let others = [self.exp_avg.len(), self.exp_avg_sq.len(), self.grad.len()];
        ensure!(others == [len; 3], "adamw: param {len}, moments and grad {others:?}");
        Ok(len)
    }
}
