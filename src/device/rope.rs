//! Rotary position embedding.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// Rotates pairs (i, i + rotary_dim/2) of the first `rotary_dim` elements of each head in place, as `transformers`
/// pairs them, and leaves the others as they are; `inverse` rotates back, which is the backward. x `[T, num_heads ·
/// head_dim]`; cos, sin `[T, rotary_dim / 2]` with any attention scaling in them.
pub struct Rope<'a, D: Device> {
    pub x: ViewMut<'a, D, D::Act>,
    pub rotation: Rotation<'a, D>,
    pub inverse: bool,
}

/// The angles of T tokens and the heads that turn by them.
pub struct Rotation<'a, D: Device> {
    pub cos: View<'a, D, f32>,
    pub sin: View<'a, D, f32>,
    pub num_heads: usize,
    pub head_dim: usize,
    /// Even, `head_dim` at most.
    pub rotary_dim: usize,
}

/// Rotary position embedding.
pub trait RopeOps: Device {
    /// See [`Rope`].
    fn rope(&self, args: Rope<'_, Self>) -> Result<()>;
}

impl<D: Device> Clone for Rotation<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Rotation<'_, D> {}

impl<D: Device> Rotation<'_, D> {
    /// Checks all lengths, with that of what turns; returns T.
    pub(super) fn num_tokens(&self, x: usize) -> Result<usize> {
        let Rotation { cos, sin, num_heads, head_dim, rotary_dim } = *self;
        let [cos, sin] = [cos.len(), sin.len()];
        ensure!(
            rotary_dim > 0 && rotary_dim.is_multiple_of(2) && cos.is_multiple_of(rotary_dim / 2),
            "rope: cos {cos} for {rotary_dim} elements of a head"
        );
        let tokens = cos / (rotary_dim / 2);
        ensure!(
            rotary_dim <= head_dim && x == tokens * num_heads * head_dim && sin == cos,
            "rope: x {x} cos {cos} sin {sin} for {num_heads} heads of {head_dim}, of which {rotary_dim} turn"
        );
        Ok(tokens)
    }
}
