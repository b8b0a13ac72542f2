//! Rotary position embedding.

use anyhow::{Result, ensure};

use crate::device::{Rope, RopeOps, Rotation};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> RopeOps for Cuda<A> {
    fn rope(&self, args: Rope<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.rotation.num_tokens(args.x.len())?;
        let Rope { x, rotation: Rotation { cos, sin, num_heads, head_dim, rotary_dim }, inverse } = args;
        ensure!(rotary_dim.is_multiple_of(16), "rope: {rotary_dim} elements turn, allowed: a multiple of 16");
        ensure!(head_dim.is_multiple_of(8), "rope: head_dim {head_dim}, allowed: a multiple of 8");
        let sign: f32 = if inverse { -1.0 } else { 1.0 };
        let (half_eights, head_eights) = ((rotary_dim / 16) as u32, (head_dim / 8) as u32);
        let args = args![x, cos, sin, num_heads as u32, half_eights, head_eights, sign];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("rope", Grid::rows(tokens), args) }
    }
}
