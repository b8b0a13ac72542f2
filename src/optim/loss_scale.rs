//! Dynamic loss scaling, as `torch.amp.GradScaler` does it: where activations are fp16, small gradients vanish unless the loss
//! is scaled up, and a scale that is too large makes some of them infinite.

/// The scale and what has happened since it changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaler {
    scale: f32,
    good_steps: u32,
}

const INITIAL_SCALE: f32 = 65_536.0;
/// Steps without an overflow after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2_000;

impl LossScaler {
    /// For activations that need it; for others the scale is 1 and stays.
    pub fn new(needed: bool) -> LossScaler {
        LossScaler { scale: if needed { INITIAL_SCALE } else { 1.0 }, good_steps: 0 }
    }

    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Takes note of a step; false when its gradients were not finite, so that it made no update and the scale is halved.
    pub fn update(&mut self, grad_norm: f64) -> bool {
        if !grad_norm.is_finite() {
            (self.scale, self.good_steps) = ((self.scale / 2.0).max(1.0), 0);
            return false;
        }
        self.good_steps += 1;
        if self.scale > 1.0 && self.good_steps == GROWTH_INTERVAL {
            (self.scale, self.good_steps) = (self.scale * 2.0, 0);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halved_by_an_overflow_and_doubled_after_many_good_steps() {
        let mut scaler = LossScaler::new(true);
        assert!(!scaler.update(f64::INFINITY) && !scaler.update(f64::NAN));
        assert_eq!(scaler.scale(), 16_384.0);
        assert!((0..2_000).all(|_| scaler.update(1.0)));
        assert_eq!(scaler.scale(), 32_768.0);
        let mut one = LossScaler::new(false);
        assert!((0..5_000).all(|_| one.update(1.0)));
        assert_eq!(one.scale(), 1.0);
    }
}
