//! silu(gate) · up and its backward.

use anyhow::{Result, ensure};

use crate::device::{SwigluBackward, SwigluForward, SwigluOps};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

/// Eights of elements: how the kernels count.
fn eights(len: usize) -> Result<usize> {
    ensure!(len.is_multiple_of(8), "swiglu: {len} elements, allowed: a multiple of 8");
    Ok(len / 8)
}

impl<A: HalfType> SwigluOps for Cuda<A> {
    fn swiglu_forward(&self, args: SwigluForward<'_, Cuda<A>>) -> Result<()> {
        let eights = eights(args.num_elements()?)?;
        let SwigluForward { y, gate, up } = args;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("swiglu_forward", Grid::elements(eights), args![y, gate, up, eights as u64]) }
    }

    fn swiglu_backward(&self, args: SwigluBackward<'_, Cuda<A>>) -> Result<()> {
        let eights = eights(args.num_elements()?)?;
        let SwigluBackward { d_gate, d_up, d_y, gate, up } = args;
        let args = args![d_gate, d_up, d_y, gate, up, eights as u64];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("swiglu_backward", Grid::elements(eights), args) }
    }
}
