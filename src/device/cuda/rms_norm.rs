//! RMSNorm and its backward.

use anyhow::{Result, ensure};

use crate::device::{Normed, RmsNormBackward, RmsNormForward, RmsNormOps};

use super::launch::{Arg, Grid, args};
use super::{Cuda, HalfType};

/// Eights of elements of a row: how the kernels count.
fn eights(hidden: usize) -> Result<u32> {
    ensure!(hidden.is_multiple_of(8), "rms_norm: rows of {hidden}, allowed: a multiple of 8");
    Ok((hidden / 8) as u32)
}

impl<A: HalfType> RmsNormOps for Cuda<A> {
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Cuda<A>>) -> Result<()> {
        let [rows, hidden] = args.sizes()?;
        let hidden_eights = eights(hidden)?;
        let RmsNormForward { y, rstd, x, weight, eps } = args;
        let (x, addend) = match x {
            Normed::Plain(x) => (Arg::from(x), None),
            Normed::Sum { sum, addend } => (Arg::from(sum), Some(addend)),
        };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch("rms_norm_forward", Grid::rows(rows), args![y, rstd, x, addend, weight, hidden_eights, eps])
        }
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Cuda<A>>) -> Result<()> {
        let [rows, hidden] = args.sizes()?;
        let hidden_eights = eights(hidden)?;
        let RmsNormBackward { d_x, d_y, x, rstd, weight } = args;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("rms_norm_backward", Grid::rows(rows), args![d_x, d_y, x, rstd, weight, hidden_eights]) }
    }
}
