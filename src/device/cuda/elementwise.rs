//! Sums, biases, casts, rows picked by index, and the sum of squares.

use anyhow::{Result, ensure};
use cudarc::driver::CudaStream;

use crate::device::ops::{SUM_LANES, SUM_PARTS};
use crate::device::{Device, View, ViewMut};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn add_act(&self, y: ViewMut<'_, Cuda<A>, A>, x: View<'_, Cuda<A>, A>) -> Result<()> {
        let len = y.len();
        ensure!(x.len() == len && len.is_multiple_of(8), "add: y {len} x {}", x.len());
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("add", Grid::elements(len / 8), args![y, x, (len / 8) as u64]) }
    }

    pub(super) fn add_bias_act(&self, x: ViewMut<'_, Cuda<A>, A>, bias: View<'_, Cuda<A>, f32>) -> Result<()> {
        let (len, features) = (x.len(), bias.len());
        ensure!(features > 0 && len.is_multiple_of(features), "add_bias: x {len} bias {features}");
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("add_bias", Grid::elements(len), args![x, bias, len as u64, features as u32]) }
    }

    pub(super) fn cast_to_act(&self, y: ViewMut<'_, Cuda<A>, A>, x: View<'_, Cuda<A>, f32>) -> Result<()> {
        let len = y.len();
        ensure!(x.len() == len, "cast: y {len} x {}", x.len());
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("cast", Grid::elements(len), args![y, x, len as u64]) }
    }

    pub(super) fn gather_rows_act(
        &self,
        y: ViewMut<'_, Cuda<A>, A>,
        x: View<'_, Cuda<A>, A>,
        rows: View<'_, Cuda<A>, u32>,
        width: usize,
    ) -> Result<()> {
        let len = y.len();
        let num_rows = rows.len();
        ensure!(
            len == num_rows * width && width.is_multiple_of(8),
            "gather_rows: y {len} rows {num_rows} width {width}"
        );
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("gather_rows", Grid::rows(num_rows), args![y, x, rows, (width / 8) as u32]) }
    }

    pub(super) fn scatter_rows_act(
        &self,
        mut y: ViewMut<'_, Cuda<A>, A>,
        x: View<'_, Cuda<A>, A>,
        rows: View<'_, Cuda<A>, u32>,
        width: usize,
    ) -> Result<()> {
        let (all, len, num_rows) = (y.len(), x.len(), rows.len());
        ensure!(
            len == num_rows * width && width.is_multiple_of(8),
            "scatter_rows: x {len} rows {num_rows} width {width}"
        );
        self.fill_bytes(y.range_mut(0..all), 0)?;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("scatter_rows", Grid::rows(num_rows), args![y, x, rows, (width / 8) as u32]) }
    }

    /// sum = the first part of `parts` + the second + …, on a stream.
    pub fn sum_parts_on(
        &self,
        stream: &CudaStream,
        sum: ViewMut<'_, Cuda<A>, f32>,
        parts: View<'_, Cuda<A>, f32>,
    ) -> Result<()> {
        let len = sum.len();
        ensure!(len > 0 && parts.len().is_multiple_of(len), "sum_parts: sum {len} parts {}", parts.len());
        let num_parts = (parts.len() / len) as u32;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_on(stream, "sum_parts", Grid::elements(len), args![sum, parts, len as u64, num_parts]) }
    }

    pub(super) fn sum_of_squares_f64(&self, x: View<'_, Cuda<A>, f32>) -> Result<f64> {
        let grid = Grid { blocks: (SUM_PARTS, 1), threads: SUM_LANES as u32, shared_bytes: 0 };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("sum_of_squares", grid, args![self.tables.sums(), x, x.len() as u64]) }?;
        Ok(self.read_sums()?.iter().sum())
    }
}
