//! silu(gate) · up and its backward.

use anyhow::{Result, ensure};

use crate::device::ops::{SwigluBackward, SwigluForward};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn swiglu_forward_act(&self, args: SwigluForward<'_, Cuda<A>>) -> Result<()> {
        let SwigluForward { y, gate, up } = args;
        let len = y.len();
        ensure!([gate.len(), up.len()] == [len; 2] && len.is_multiple_of(8), "swiglu: y {len} gate {}", gate.len());
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("swiglu_forward", Grid::elements(len / 8), args![y, gate, up, (len / 8) as u64]) }
    }

    pub(super) fn swiglu_backward_act(&self, args: SwigluBackward<'_, Cuda<A>>) -> Result<()> {
        let SwigluBackward { d_gate, d_up, d_y, gate, up } = args;
        let len = d_y.len();
        let lengths = [d_gate.len(), d_up.len(), gate.len(), up.len()];
        ensure!(lengths == [len; 4] && len.is_multiple_of(8), "swiglu backward: d_y {len} gate {}", gate.len());
        let args = args![d_gate, d_up, d_y, gate, up, (len / 8) as u64];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("swiglu_backward", Grid::elements(len / 8), args) }
    }
}
