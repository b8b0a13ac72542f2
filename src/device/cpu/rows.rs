//! Rows picked by index.

use anyhow::Result;

use crate::device::{RowIndices, RowsOps, View, ViewMut};

use super::Cpu;

impl RowsOps for Cpu {
    fn gather_rows(
        &self,
        y: ViewMut<'_, Cpu, f32>,
        x: View<'_, Cpu, f32>,
        rows: &RowIndices<Cpu>,
        width: usize,
    ) -> Result<()> {
        rows.check("gather_rows", y.len(), x.len(), width)?;
        let x = x.host();
        for (y, &row) in y.host_mut().chunks_exact_mut(width).zip(rows.view().host()) {
            y.copy_from_slice(&x[row as usize * width..][..width]);
        }
        Ok(())
    }

    fn scatter_rows(
        &self,
        y: ViewMut<'_, Cpu, f32>,
        x: View<'_, Cpu, f32>,
        rows: &RowIndices<Cpu>,
        width: usize,
    ) -> Result<()> {
        rows.check("scatter_rows", x.len(), y.len(), width)?;
        let y = y.host_mut();
        y.fill(0.0);
        for (x, &row) in x.host().chunks_exact(width).zip(rows.view().host()) {
            y[row as usize * width..][..width].copy_from_slice(x);
        }
        Ok(())
    }
}
