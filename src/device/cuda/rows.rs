//! Rows picked by index.

use anyhow::{Result, ensure};

use crate::device::{Device, RowIndices, RowsOps, View, ViewMut};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> RowsOps for Cuda<A> {
    fn gather_rows(
        &self,
        y: ViewMut<'_, Cuda<A>, A>,
        x: View<'_, Cuda<A>, A>,
        rows: &RowIndices<Cuda<A>>,
        width: usize,
    ) -> Result<()> {
        let num_rows = rows.check("gather_rows", y.len(), x.len(), width)?;
        ensure!(width.is_multiple_of(8), "gather_rows: rows of {width}, allowed: a multiple of 8");
        // SAFETY: the lengths were checked above and every index is below the bound, and the kernel declares these
        // arguments in this order.
        unsafe { self.launch("gather_rows", Grid::rows(num_rows), args![y, x, rows.view(), (width / 8) as u32]) }
    }

    fn scatter_rows(
        &self,
        mut y: ViewMut<'_, Cuda<A>, A>,
        x: View<'_, Cuda<A>, A>,
        rows: &RowIndices<Cuda<A>>,
        width: usize,
    ) -> Result<()> {
        let all = y.len();
        let num_rows = rows.check("scatter_rows", x.len(), all, width)?;
        ensure!(width.is_multiple_of(8), "scatter_rows: rows of {width}, allowed: a multiple of 8");
        self.fill_bytes(y.range_mut(0..all), 0)?;
        // SAFETY: the lengths were checked above and every index is below the bound, and the kernel declares these
        // arguments in this order.
        unsafe { self.launch("scatter_rows", Grid::rows(num_rows), args![y, x, rows.view(), (width / 8) as u32]) }
    }
}
