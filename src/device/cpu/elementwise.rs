//! Sums, biases, and the sum of squares.

use anyhow::Result;
use rayon::prelude::*;

use crate::device::elementwise::{bias_lens, same_len};
use crate::device::{Device, ElementwiseOps, SUM_LANES, SUM_PARTS, View, ViewMut};
use crate::simd::vectorize;

use super::Cpu;

impl ElementwiseOps for Cpu {
    fn add(&self, y: ViewMut<'_, Cpu, f32>, x: View<'_, Cpu, f32>) -> Result<()> {
        same_len("add", y.len(), x.len())?;
        let x = x.host();
        self.for_rows(y.host_mut(), 1, |first, y| {
            for (y, x) in y.iter_mut().zip(&x[first..]) {
                *y += x;
            }
        });
        Ok(())
    }

    fn add_bias(&self, x: ViewMut<'_, Cpu, f32>, bias: View<'_, Cpu, f32>, scale: f32) -> Result<()> {
        let [_, features] = bias_lens(x.len(), bias.len())?;
        for row in x.host_mut().chunks_exact_mut(features) {
            for (x, b) in row.iter_mut().zip(bias.host()) {
                *x += scale * b;
            }
        }
        Ok(())
    }

    fn add_scalar(&self, x: ViewMut<'_, Cpu, f32>, value: f32) -> Result<()> {
        x.host_mut().iter_mut().for_each(|x| *x += value);
        Ok(())
    }

    fn cast(&self, y: ViewMut<'_, Cpu, f32>, x: View<'_, Cpu, f32>) -> Result<()> {
        same_len("cast", y.len(), x.len())?;
        self.copy(y, x)
    }

    fn round(y: &mut [f32], x: &[f32]) {
        y.copy_from_slice(x);
    }

    fn rounded(x: f32) -> f32 {
        x
    }

    fn sums_of_squares(&self, x: &[View<'_, Cpu, f32>]) -> Result<Vec<f64>> {
        Ok(x.iter().map(|x| sum_of_squares(x.host(), self.num_threads)).collect())
    }
}

fn sum_of_squares(x: &[f32], num_threads: usize) -> f64 {
    let part = x.len().div_ceil(SUM_PARTS).max(1);
    let mut sums = [0f64; SUM_PARTS];
    sums.par_iter_mut()
        .zip(x.par_chunks(part))
        .with_min_len(SUM_PARTS.div_ceil(num_threads))
        .for_each(|(sum, x)| *sum = sum_of_part(x));
    sums.iter().sum()
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
