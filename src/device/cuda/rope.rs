//! Rotary position embedding.

use anyhow::{Result, ensure};

use crate::device::{Rope, RopeOps};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> RopeOps for Cuda<A> {
    fn rope(&self, args: Rope<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.num_tokens()?;
        let Rope { x, cos, sin, num_heads, head_dim, inverse } = args;
        let half = head_dim / 2;
        ensure!(half.is_multiple_of(8), "rope: head_dim {head_dim}, allowed: a multiple of 16");
        let sign: f32 = if inverse { -1.0 } else { 1.0 };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch("rope", Grid::rows(tokens), args![x, cos, sin, num_heads as u32, (half / 8) as u32, sign])
        }
    }
}
