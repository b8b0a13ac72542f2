//! Clipping by the global norm, as `torch.nn.utils.clip_grad_norm_`.

/// Returns the factor for gradients of this norm: max_norm / (norm + 1e-6), at most 1.
pub fn coefficient(norm: f64, max_norm: Option<f64>) -> f32 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gradients_are_left_alone() {
        assert_eq!(coefficient(0.5, Some(1.0)), 1.0);
        assert_eq!(coefficient(5.0, None), 1.0);
        assert!((coefficient(4.0, Some(1.0)) - 0.25).abs() < 1e-6);
    }
}
