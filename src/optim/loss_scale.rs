//! Dynamic loss scaling, as `torch.amp.GradScaler` does it: where activations are fp16, small gradients vanish unless
//! the loss is scaled up, and a scale that is too large makes some of them infinite.

use serde::{Deserialize, Serialize};

/// The scale and what has happened since it changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    /// `None` if nothing is scaled.
    scale: Option<f32>,
    good_steps: u32,
}

const INITIAL_SCALE: f32 = 65_536.0;
/// Steps without an overflow after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2_000;
/// Gradients that overflow even at this scale are not the scale's fault.
const MIN_SCALE: f32 = 1.0;

impl LossScaler {
    /// Makes the scaler of activations that need one; for others the scale is 1 and stays.
    pub fn new(needed: bool) -> LossScaler {
        LossScaler { scale: needed.then_some(INITIAL_SCALE), good_steps: 0 }
    }

    /// Returns this scaler, which a checkpoint may have kept, or a new one if it does not scale and is `needed` to, or the other way round.
    pub fn fitted(self, needed: bool) -> LossScaler {
        if self.scale.is_some() == needed { self } else { LossScaler::new(needed) }
    }

    pub fn scale(&self) -> f32 {
        self.scale.unwrap_or(1.0)
    }

    /// Takes note of a step that has `updated`, or whose gradients overflowed. Returns false if they did and no
    /// smaller scale can help.
    pub fn note(&mut self, updated: bool) -> bool {
        if updated {
            self.good_steps += 1;
            if let (Some(scale), GROWTH_INTERVAL) = (self.scale, self.good_steps) {
                (self.scale, self.good_steps) = (Some(scale * 2.0), 0);
            }
            return true;
        }
        let Some(scale) = self.scale.filter(|&scale| scale > MIN_SCALE) else { return false };
        (self.scale, self.good_steps) = (Some(scale / 2.0), 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halved_by_an_overflow_and_doubled_after_many_good_steps() {
        let mut scaler = LossScaler::new(true);
        assert!(scaler.note(false) && scaler.note(false));
        assert_eq!(scaler.scale(), 16_384.0);
        assert!((0..2_000).all(|_| scaler.note(true)));
        assert_eq!(scaler.scale(), 32_768.0);
    }

    #[test]
    fn a_run_begins_with_the_scale_that_its_activations_need_and_goes_on_with_its_own() {
        assert_eq!(LossScaler::default().fitted(true), LossScaler::new(true));
        assert_eq!(LossScaler::default().fitted(false).scale(), 1.0);
        let mut lower = LossScaler::new(true);
        assert!(lower.note(false));
        assert_eq!(lower.fitted(true).scale(), 32_768.0);
        assert_eq!(lower.fitted(false), LossScaler::new(false));
    }

    #[test]
    fn the_lowest_scale_is_left_again() {
        let mut scaler = LossScaler::new(true);
        assert_eq!((0..20).filter(|_| scaler.note(false)).count(), 16);
        assert_eq!(scaler.scale(), 1.0);
        assert!((0..4_000).all(|_| scaler.note(true)));
        assert_eq!(scaler.scale(), 4.0);
    }

    #[test]
    fn without_scaling_nothing_changes() {
        let mut one = LossScaler::new(false);
        assert!((0..5_000).all(|_| one.note(true)));
        assert!(!one.note(false) && one.scale() == 1.0);
    }
}
