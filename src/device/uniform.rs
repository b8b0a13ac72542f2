//! Numbers that look random: weights of a model that was never trained.

use anyhow::Result;

use super::{Device, ViewMut};

/// `y[i]` is a number in ±half_width that looks random and depends on seed (below 2²⁴) and first + i alone.
pub struct Uniform<'a, D> {
    pub y: ViewMut<'a, D, f32>,
    pub seed: u64,
    pub first: u64,
    pub half_width: f32,
}

/// Synthetic numbers.
pub trait UniformOps: Device {
    /// See [`Uniform`].
    fn uniform(&self, args: Uniform<'_, Self>) -> Result<()>;
}
