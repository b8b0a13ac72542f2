//! Rotary position embedding.

use anyhow::{Result, ensure};

use crate::device::ops::Rope;

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn rope_act(&self, args: Rope<'_, Cuda<A>>) -> Result<()> {
        let Rope { x, cos, sin, num_heads, head_dim, inverse } = args;
        let half = head_dim / 2;
        ensure!(
            x.len() == 2 * cos.len() * num_heads && cos.len() == sin.len() && half.is_multiple_of(8),
            "rope: x {} cos {} head_dim {head_dim}",
            x.len(),
            cos.len()
        );
        let sign: f32 = if inverse { -1.0 } else { 1.0 };
        let tokens = cos.len() / half;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch("rope", Grid::rows(tokens), args![x, cos, sin, num_heads as u32, (half / 8) as u32, sign])
        }
    }
}
