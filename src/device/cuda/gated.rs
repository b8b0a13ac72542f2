//! The gated activation of an MLP, f(gate) · up, and its backward.

use anyhow::{Result, ensure};

use crate::device::{Activation, GatedBackward, GatedForward, GatedOps};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

/// Eights of elements: how the kernels count.
fn eights(len: usize) -> Result<usize> {
    ensure!(len.is_multiple_of(8), "gated: {len} elements, allowed: a multiple of 8");
    Ok(len / 8)
}

impl<A: HalfType> GatedOps for Cuda<A> {
    fn gated_forward(&self, args: GatedForward<'_, Cuda<A>>) -> Result<()> {
        let eights = eights(args.num_elements()?)?;
        let GatedForward { y, gate, up, activation } = args;
        let kernel = match activation {
            Activation::Silu => "swiglu_forward",
            Activation::GeluTanh => "geglu_forward",
        };
        // SAFETY: the lengths were checked above, and both kernels declare these arguments in this order.
        unsafe { self.launch(kernel, Grid::elements(eights), args![y, gate, up, eights as u64]) }
    }

    fn gated_backward(&self, args: GatedBackward<'_, Cuda<A>>) -> Result<()> {
        let eights = eights(args.num_elements()?)?;
        let GatedBackward { gate, up, d_y, activation } = args;
        let kernel = match activation {
            Activation::Silu => "swiglu_backward",
            Activation::GeluTanh => "geglu_backward",
        };
        let args = args![gate, up, d_y, eights as u64];
        // SAFETY: the lengths were checked above, and both kernels declare these arguments in this order.
        unsafe { self.launch(kernel, Grid::elements(eights), args) }
    }
}
