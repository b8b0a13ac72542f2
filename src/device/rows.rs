//! Rows picked by index.

use anyhow::{Result, bail, ensure};

use super::{Arena, Buffer, Device, View, ViewMut};

/// Indices of rows in a device's memory. The host has checked each of them against a bound, and a matrix of fewer
/// rows than that is refused: no kernel that follows an index reads or writes elsewhere.
pub struct RowIndices<D: Device> {
    indices: Buffer<D, u32>,
    /// Number of indices.
    len: usize,
    /// Every index is smaller than this.
    bound: usize,
}

impl<D: Device> RowIndices<D> {
    /// Carves room for `capacity` indices; none are there yet.
    pub fn carve(arena: &mut Arena<D>, name: &str, capacity: usize) -> Result<Self> {
        Ok(Self { indices: arena.carve(name, capacity)?, len: 0, bound: 0 })
    }

    /// Replaces all indices. Fails when one is not smaller than `bound`, the number of rows to choose from, or when
    /// there are more than there is room for; then there are none.
    pub fn put(&mut self, device: &D, indices: &[u32], bound: usize) -> Result<()> {
        (self.len, self.bound) = (0, 0);
        if let Some((i, row)) = indices.iter().enumerate().find(|&(_, &row)| row as usize >= bound) {
            bail!("index {i} is row {row}, allowed: rows below {bound}");
        }
        let (len, capacity) = (indices.len(), self.indices.len());
        ensure!(len <= capacity, "{len} indices of rows, allowed: at most {capacity}");
        device.upload(self.indices.first_mut(len), indices)?;
        (self.len, self.bound) = (len, bound);
        Ok(())
    }

    /// The indices, for a kernel.
    pub(super) fn view(&self) -> View<'_, D, u32> {
        self.indices.first(self.len)
    }

    /// Checks that `picked` elements are one row of `width` for each index, and that `all` elements are as many rows
    /// as the indices may reach; returns the number of indices.
    pub(super) fn check(&self, op: &str, picked: usize, all: usize, width: usize) -> Result<usize> {
        let RowIndices { len, bound, .. } = *self;
        ensure!(picked == len * width, "{op}: {picked} elements for {len} rows of {width}");
        ensure!(all >= bound * width, "{op}: {all} elements, indices reach {bound} rows of {width}");
        Ok(len)
    }
}

/// Rows picked by index.
pub trait RowsOps: Device {
    /// `y[i] = x[rows[i]]`; rows of `width`.
    fn gather_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: &RowIndices<Self>,
        width: usize,
    ) -> Result<()>;
    /// `y = 0`, then `y[rows[i]] = x[i]`; rows of `width`, all different.
    fn scatter_rows(
        &self,
        y: ViewMut<'_, Self, Self::Act>,
        x: View<'_, Self, Self::Act>,
        rows: &RowIndices<Self>,
        width: usize,
    ) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn a_row_that_is_not_there_is_refused_where_it_is_put() {
        let cpu = Cpu::new(1);
        let mut rows = Arena::carved(&cpu, |arena| RowIndices::carve(arena, "rows", 3)).unwrap();
        rows.put(&cpu, &[4, 0], 5).unwrap();
        assert_eq!(rows.view().host(), [4, 0]);
        let error = rows.put(&cpu, &[0, 5, 1], 5).unwrap_err().to_string();
        assert_eq!(error, "index 1 is row 5, allowed: rows below 5");
        assert_eq!(rows.view().len(), 0, "none are left of the time before");
        assert!(rows.put(&cpu, &[u32::MAX], u32::MAX as usize).is_err());
        let error = rows.put(&cpu, &[0; 4], 5).unwrap_err().to_string();
        assert_eq!(error, "4 indices of rows, allowed: at most 3");
    }
}
