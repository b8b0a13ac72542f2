//! RMSNorm and its backward.

use anyhow::{Result, ensure};

use crate::device::ops::{Normed, RmsNormBackward, RmsNormForward};

use super::launch::{Arg, Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn rms_norm_forward_act(&self, args: RmsNormForward<'_, Cuda<A>>) -> Result<()> {
        let RmsNormForward { y, rstd, x, weight, eps } = args;
        let (rows, hidden) = (rstd.len(), weight.len());
        let (len, hidden_eights) = (x.len(), (hidden / 8) as u32);
        ensure!(len == y.len() && len == rows * hidden, "rms_norm: x {len} rstd {rows}");
        ensure!(hidden.is_multiple_of(8), "rms_norm: rows of {hidden}, allowed: a multiple of 8");
        let (x, addend) = match x {
            Normed::Plain(x) => (Arg::from(x), None),
            Normed::Sum { sum, addend } => {
                ensure!(addend.len() == len, "rms_norm: x {len} addend {}", addend.len());
                (Arg::from(sum), Some(addend))
            }
        };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch("rms_norm_forward", Grid::rows(rows), args![y, rstd, x, addend, weight, hidden_eights, eps])
        }
    }

    pub(super) fn rms_norm_backward_act(&self, args: RmsNormBackward<'_, Cuda<A>>) -> Result<()> {
        let RmsNormBackward { d_x, d_y, x, rstd, weight } = args;
        let (rows, hidden) = (rstd.len(), weight.len());
        ensure!([x.len(), d_y.len(), d_x.len()] == [rows * hidden; 3], "rms_norm backward: x {} rstd {rows}", x.len());
        ensure!(hidden.is_multiple_of(8), "rms_norm: rows of {hidden}, allowed: a multiple of 8");
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch("rms_norm_backward", Grid::rows(rows), args![d_x, d_y, x, rstd, weight, (hidden / 8) as u32])
        }
    }
}
