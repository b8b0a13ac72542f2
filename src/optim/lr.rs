//! Learning-rate schedules, as `transformers.get_scheduler` names and computes them.

use crate::choices::choices;

choices! {
    /// The shape of the learning rate over the steps.
    LrScheduler {
        Constant = "constant",
        ConstantWithWarmup = "constant_with_warmup",
        Linear = "linear",
        Cosine = "cosine",
    }
}

impl LrScheduler {
    /// Factor of the learning rate at a step counted from 0; warm-up starts at 0.
    pub fn factor(self, step: usize, warmup_steps: usize, num_steps: usize) -> f64 {
        if self == LrScheduler::Constant {
            return 1.0;
        }
        if step < warmup_steps {
            return step as f64 / warmup_steps.max(1) as f64;
        }
        let left = num_steps.saturating_sub(warmup_steps).max(1) as f64;
        match self {
            LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
            LrScheduler::Linear => (num_steps.saturating_sub(step)) as f64 / left,
            LrScheduler::Cosine => {
                let progress = (step - warmup_steps) as f64 / left;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_transformers_computes_them() {
        let all = |s: LrScheduler| (0..6).map(|i| s.factor(i, 2, 6)).collect::<Vec<_>>();
        assert_eq!(all(LrScheduler::Constant), [1.0; 6]);
        assert_eq!(all(LrScheduler::ConstantWithWarmup), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(all(LrScheduler::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        let cosine = all(LrScheduler::Cosine);
        assert_eq!(cosine[..3], [0.0, 0.5, 1.0]);
        assert!((cosine[3] - 0.853_553).abs() < 1e-6 && (cosine[4] - 0.5).abs() < 1e-12);
    }
}
