//! Learning-rate schedules, as `transformers.get_scheduler` of transformers 5.24 names and computes them.

use std::f64::consts::PI;

use crate::choices::choices;

choices! {
    /// The names of the schedules.
    LrSchedulerType {
        Constant = "constant",
        ConstantWithWarmup = "constant_with_warmup",
        Linear = "linear",
        Cosine = "cosine",
        CosineWithRestarts = "cosine_with_restarts",
        Polynomial = "polynomial",
        CosineWithMinLr = "cosine_with_min_lr",
        CosineWarmupWithMinLr = "cosine_warmup_with_min_lr",
        InverseSqrt = "inverse_sqrt",
        WarmupStableDecay = "warmup_stable_decay",
    }
}

choices! {
    /// The shape of a rise or a fall in `warmup_stable_decay`.
    Curve {
        Linear = "linear",
        Cosine = "cosine",
        /// 1 − the root of what is left.
        Root = "1-sqrt",
    }
}

/// A schedule with its numbers, which have the names that they have in transformers. Rates (`…_rate`, `…_ratio`) are
/// fractions of the highest learning rate.
#[derive(Clone, Debug, PartialEq)]
pub enum LrScheduler {
    /// There is no warm-up.
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine {
        num_cycles: f64,
    },
    CosineWithRestarts {
        num_cycles: f64,
    },
    Polynomial {
        power: f64,
        lr_end: f64,
        /// The highest learning rate.
        lr_init: f64,
    },
    CosineWithMinLr {
        num_cycles: f64,
        min_lr_rate: f64,
    },
    CosineWarmupWithMinLr {
        num_cycles: f64,
        min_lr_rate: f64,
        /// The rate at which the warm-up begins; `None` means 1 / its steps.
        warmup_lr_rate: Option<f64>,
    },
    InverseSqrt {
        /// In steps; `None` means as many as the warm-up has, or 10000 without one.
        timescale: Option<usize>,
    },
    WarmupStableDecay {
        /// `None` means all steps but those of the warm-up and of the decay.
        num_stable_steps: Option<usize>,
        num_decay_steps: usize,
        warmup_type: Curve,
        decay_type: Curve,
        min_lr_ratio: f64,
        num_cycles: f64,
    },
}

impl LrScheduler {
    /// Returns the factor of the learning rate at a step of a run, counted from 0. The warm-up has fewer steps than
    /// the run.
    pub fn factor(&self, step: usize, warmup_steps: usize, num_steps: usize) -> f64 {
        if *self == LrScheduler::Constant {
            return 1.0;
        }
        if step < warmup_steps {
            return self.rising(step as f64, warmup_steps as f64);
        }
        let left = num_steps.saturating_sub(warmup_steps).max(1) as f64;
        let since = (step - warmup_steps) as f64;
        let progress = since / left;
        match *self {
            LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
            LrScheduler::Linear => (num_steps.saturating_sub(step)) as f64 / left,
            LrScheduler::Cosine { num_cycles } => half_wave(num_cycles, progress).max(0.0),
            LrScheduler::CosineWithRestarts { num_cycles } if progress < 1.0 => {
                (0.5 * (1.0 + (PI * ((num_cycles * progress) % 1.0)).cos())).max(0.0)
            }
            LrScheduler::CosineWithRestarts { .. } => 0.0,
            LrScheduler::Polynomial { power, lr_end, lr_init } => {
                ((lr_init - lr_end) * (1.0 - progress).max(0.0).powf(power) + lr_end) / lr_init
            }
            LrScheduler::CosineWithMinLr { num_cycles, min_lr_rate } => {
                at_least(min_lr_rate, half_wave(num_cycles, progress))
            }
            LrScheduler::CosineWarmupWithMinLr { num_cycles, min_lr_rate, .. } => {
                at_least(min_lr_rate, half_wave(num_cycles, (since + 1.0) / left))
            }
            LrScheduler::InverseSqrt { timescale } => {
                let default = if warmup_steps > 0 { warmup_steps } else { 10_000 };
                let timescale = timescale.unwrap_or(default) as f64;
                1.0 / ((step as f64 + (timescale - warmup_steps as f64)) / timescale).sqrt()
            }
            LrScheduler::WarmupStableDecay {
                num_stable_steps,
                num_decay_steps,
                decay_type,
                min_lr_ratio,
                num_cycles,
                ..
            } => {
                let of_run = num_steps.saturating_sub(warmup_steps).saturating_sub(num_decay_steps);
                let since_stable = since - num_stable_steps.unwrap_or(of_run) as f64;
                if since_stable < 0.0 {
                    return 1.0;
                }
                if since_stable >= num_decay_steps as f64 {
                    return min_lr_ratio;
                }
                let progress = since_stable / num_decay_steps.max(1) as f64;
                let factor = match decay_type {
                    Curve::Linear => 1.0 - progress,
                    Curve::Cosine => half_wave(num_cycles, progress),
                    Curve::Root => 1.0 - progress.sqrt(),
                };
                at_least(min_lr_ratio, factor)
            }
        }
    }

    /// Returns the factor at a step of the warm-up.
    fn rising(&self, step: f64, warmup_steps: f64) -> f64 {
        let progress = step / warmup_steps;
        match *self {
            LrScheduler::CosineWarmupWithMinLr { warmup_lr_rate: None, .. } => (step + 1.0) / warmup_steps,
            LrScheduler::CosineWarmupWithMinLr { warmup_lr_rate: Some(rate), .. } => {
                rate + (1.0 - rate) * step / (warmup_steps - 1.0).max(1.0)
            }
            LrScheduler::WarmupStableDecay { warmup_type, min_lr_ratio, .. } => {
                let factor = match warmup_type {
                    Curve::Linear => progress,
                    Curve::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
                    Curve::Root => 1.0 - (1.0 - progress).sqrt(),
                };
                at_least(min_lr_ratio, factor)
            }
            _ => progress,
        }
    }
}

/// Returns a wave that goes from 1 to 0 and back `num_cycles` times while `progress` goes from 0 to 1.
fn half_wave(num_cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos())
}

/// Returns a factor between 0 and 1 as one between the rate and 1.
fn at_least(rate: f64, factor: f64) -> f64 {
    (factor * (1.0 - rate) + rate).max(0.0)
}
