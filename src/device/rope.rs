//! Rotary position embedding.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// Rotates each head's pairs (i, i + head_dim/2) in place, as `transformers` pairs them; `inverse` rotates back, which
/// is the backward. x `[T, num_heads · head_dim]`; cos, sin `[T, head_dim / 2]` with any attention scaling in them.
pub struct Rope<'a, D: Device> {
    pub x: ViewMut<'a, D, D::Act>,
    pub cos: View<'a, D, f32>,
    pub sin: View<'a, D, f32>,
    pub num_heads: usize,
    pub head_dim: usize,
    pub inverse: bool,
}

/// Rotary position embedding.
pub trait RopeOps: Device {
    /// See [`Rope`].
    fn rope(&self, args: Rope<'_, Self>) -> Result<()>;
}

impl<D: Device> Rope<'_, D> {
    /// Checks all lengths; returns T.
    pub(super) fn num_tokens(&self) -> Result<usize> {
        let Rope { num_heads, head_dim, .. } = *self;
        let [x, cos, sin] = [self.x.len(), self.cos.len(), self.sin.len()];
        ensure!(
            head_dim > 0 && head_dim.is_multiple_of(2) && cos.is_multiple_of(head_dim / 2),
            "rope: cos {cos} for heads of {head_dim}"
        );
        ensure!(x == 2 * cos * num_heads && sin == cos, "rope: x {x} cos {cos} sin {sin} for {num_heads} heads");
        Ok(cos / (head_dim / 2))
    }
}
