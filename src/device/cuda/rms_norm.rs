//! RMSNorm and its backward.

use anyhow::{Result, ensure};

use crate::device::ops::{RmsNormBackward, RmsNormForward};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn rms_norm_forward_act(&self, args: RmsNormForward<'_, Cuda<A>>) -> Result<()> {
        let RmsNormForward { y, rstd, x, weight, eps } = args;
        let (rows, hidden) = (rstd.len(), weight.len());
        ensure!(x.len() == y.len() && x.len() == rows * hidden, "rms_norm: x {} rstd {rows}", x.len());
        self.launch("rms_norm_forward", Grid::rows(rows), args![y, rstd, x, weight, hidden as u32, eps])
    }

    pub(super) fn rms_norm_backward_act(&self, args: RmsNormBackward<'_, Cuda<A>>) -> Result<()> {
        let RmsNormBackward { d_x, d_y, x, rstd, weight } = args;
        let (rows, hidden) = (rstd.len(), weight.len());
        ensure!([x.len(), d_y.len(), d_x.len()] == [rows * hidden; 3], "rms_norm backward: x {} rstd {rows}", x.len());
        self.launch("rms_norm_backward", Grid::rows(rows), args![d_x, d_y, x, rstd, weight, hidden as u32])
    }
}
