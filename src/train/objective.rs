//! Objectives of training: from the log-probabilities of target tokens to a loss and a coefficient for each of them.

use crate::fsdp::run::Objective;

/// Supervised fine-tuning: the mean of −log p over the target tokens of the step.
#[derive(Clone, Copy, Debug)]
pub struct Sft {
    /// Number of target tokens of the step on all ranks.
    pub num_target_tokens: f64,
    /// Factor of the loss, for gradients in fp16.
    pub loss_scale: f32,
}

impl Objective for Sft {
    fn coefficients(&self, micro: usize, log_probabilities: &[Vec<f64>]) -> Vec<f32> {
        vec![(f64::from(self.loss_scale) / self.num_target_tokens) as f32; log_probabilities[micro].len()]
    }
}
