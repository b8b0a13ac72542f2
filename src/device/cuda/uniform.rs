//! Numbers that look random.

use anyhow::Result;

use crate::device::{Uniform, UniformOps};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> UniformOps for Cuda<A> {
    fn uniform(&self, args: Uniform<'_, Cuda<A>>) -> Result<()> {
        let Uniform { y, seed, first, half_width } = args;
        let len = y.len();
        // SAFETY: the kernel writes the elements of y alone, and declares these arguments in this order.
        unsafe { self.launch("uniform", Grid::elements(len), args![y, len as u64, first, seed, half_width]) }
    }
}
