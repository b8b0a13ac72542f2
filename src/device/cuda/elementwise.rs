//! Sums, biases, casts, and the sum of squares.

use anyhow::{Result, ensure};
use cudarc::driver::CudaStream;

use crate::device::elementwise::{bias_lens, same_len};
use crate::device::{ElementwiseOps, SUM_LANES, SUM_PARTS, View, ViewMut};

use super::launch::{Grid, args};
use super::memory::NUM_SUMS;
use super::{Cuda, HalfType};

impl<A: HalfType> ElementwiseOps for Cuda<A> {
    fn add(&self, y: ViewMut<'_, Cuda<A>, A>, x: View<'_, Cuda<A>, A>) -> Result<()> {
        let len = same_len("add", y.len(), x.len())?;
        ensure!(len.is_multiple_of(8), "add: {len} elements, allowed: a multiple of 8");
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("add", Grid::elements(len / 8), args![y, x, (len / 8) as u64]) }
    }

    fn add_bias(&self, x: ViewMut<'_, Cuda<A>, A>, bias: View<'_, Cuda<A>, f32>, scale: f32) -> Result<()> {
        let [len, features] = bias_lens(x.len(), bias.len())?;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("add_bias", Grid::elements(len), args![x, bias, scale, len as u64, features as u32]) }
    }

    fn add_scalar(&self, x: ViewMut<'_, Cuda<A>, f32>, value: f32) -> Result<()> {
        let len = x.len();
        // SAFETY: the kernel declares these arguments in this order, and writes no more than the elements of x.
        unsafe { self.launch("add_scalar", Grid::elements(len), args![x, value, len as u64]) }
    }

    fn cast(&self, y: ViewMut<'_, Cuda<A>, A>, x: View<'_, Cuda<A>, f32>) -> Result<()> {
        let len = same_len("cast", y.len(), x.len())?;
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("cast", Grid::elements(len), args![y, x, len as u64]) }
    }

    fn round(y: &mut [A], x: &[f32]) {
        A::round(y, x);
    }

    fn rounded(x: f32) -> f32 {
        let mut rounded = [A::zeroed()];
        A::round(&mut rounded, &[x]);
        rounded[0].into()
    }

    fn sums_of_squares(&self, x: &[View<'_, Cuda<A>, f32>]) -> Result<Vec<f64>> {
        let grid = Grid { blocks: (SUM_PARTS, 1), threads: SUM_LANES as u32, shared_bytes: 0 };
        let mut sums = Vec::with_capacity(x.len());
        for x in x.chunks(NUM_SUMS) {
            for (i, x) in x.iter().enumerate() {
                // SAFETY: the kernel writes as many sums as there are blocks, which is what a row of the table holds, and declares
                // these arguments in this order.
                unsafe { self.launch("sum_of_squares", grid, args![self.tables.sums(i), *x, x.len() as u64]) }?;
            }
            sums.extend(self.read_sums(x.len())?.chunks_exact(SUM_PARTS).map(|parts| parts.iter().sum::<f64>()));
        }
        Ok(sums)
    }
}

impl<A: HalfType> Cuda<A> {
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
}
