//! Rows picked by index.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// Rows picked by index.
pub trait RowsOps: Device {
    /// `y[i] = x[rows[i]]`; rows of `width`.
    fn gather_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()>;
    /// `y = 0`, then `y[rows[i]] = x[i]`; rows of `width`, all different.
    fn scatter_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: View<'_, Self, u32>,
        width: usize,
    ) -> Result<()>;
}

/// Checks that `picked` elements are `num_rows` rows of `width`.
pub(super) fn check(op: &str, picked: usize, num_rows: usize, width: usize) -> Result<()> {
    ensure!(picked == num_rows * width, "{op}: {picked} elements for {num_rows} rows of {width}");
    Ok(())
}
