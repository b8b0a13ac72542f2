//! Sums, biases and rows picked by index.

use anyhow::{Result, ensure};

use rayon::prelude::*;

use crate::device::ops::{SUM_LANES, SUM_PARTS};
use crate::simd::vectorize;

use super::Cpu;

impl Cpu {
    pub(super) fn sum_of_squares_f64(&self, x: &[f32]) -> f64 {
        let part = x.len().div_ceil(SUM_PARTS).max(1);
        let mut sums = [0f64; SUM_PARTS];
        let parts = x.par_chunks(part);
        sums.par_iter_mut()
            .zip(parts)
            .with_min_len(SUM_PARTS.div_ceil(self.num_threads))
            .for_each(|(sum, x)| *sum = sum_of_part(x));
        sums.iter().sum()
    }

    pub(super) fn add_f32(&self, y: &mut [f32], x: &[f32]) -> Result<()> {
        ensure!(y.len() == x.len(), "add: y {} x {}", y.len(), x.len());
        self.for_rows(y, 1, |first, y| {
            for (y, x) in y.iter_mut().zip(&x[first..]) {
                *y += x;
            }
        });
        Ok(())
    }

    pub(super) fn add_bias_f32(&self, x: &mut [f32], bias: &[f32]) -> Result<()> {
        ensure!(!bias.is_empty() && x.len().is_multiple_of(bias.len()), "add_bias: x {} bias {}", x.len(), bias.len());
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                *x += b;
            }
        }
        Ok(())
    }

    pub(super) fn gather_rows_f32(&self, y: &mut [f32], x: &[f32], rows: &[u32], width: usize) -> Result<()> {
        ensure!(y.len() == rows.len() * width, "gather_rows: y {} rows {} width {width}", y.len(), rows.len());
        for (y, &row) in y.chunks_exact_mut(width).zip(rows) {
            y.copy_from_slice(&x[row as usize * width..][..width]);
        }
        Ok(())
    }

    pub(super) fn scatter_rows_f32(&self, y: &mut [f32], x: &[f32], rows: &[u32], width: usize) -> Result<()> {
        ensure!(x.len() == rows.len() * width, "scatter_rows: x {} rows {} width {width}", x.len(), rows.len());
        y.fill(0.0);
        for (x, &row) in x.chunks_exact(width).zip(rows) {
            y[row as usize * width..][..width].copy_from_slice(x);
        }
        Ok(())
    }
}

fn sum_of_part(x: &[f32]) -> f64 {
    let mut lanes = [0f64; SUM_LANES];
    vectorize(
        #[inline(always)]
        || {
            for chunk in x.chunks(SUM_LANES) {
                for (lane, &v) in lanes.iter_mut().zip(chunk) {
                    *lane += f64::from(v) * f64::from(v);
                }
            }
        },
    );
    let mut half = SUM_LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
        half /= 2;
    }
    lanes[0]
}
