//! Sums, biases, rounding, and the sum of squares.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// A sum of squares adds this many parts of equal length, one after the other. A part adds [`SUM_LANES`] lanes: lane i
/// sums elements i, i + SUM_LANES, …, and then the upper half of the lanes is added to the lower until one is left.
pub const SUM_PARTS: usize = 128;
pub const SUM_LANES: usize = 1024;

/// Ops that treat each element, or each column, alike.
pub trait ElementwiseOps: Device {
    /// y += x.
    fn add(&self, y: ViewMut<'_, Self, Self::Act>, x: View<'_, Self, Self::Act>) -> Result<()>;
    /// Each row of x `[T, features]` += scale · bias `[features]`.
    fn add_bias(&self, x: ViewMut<'_, Self, Self::Act>, bias: View<'_, Self, f32>, scale: f32) -> Result<()>;
    /// x += value.
    fn add_scalar(&self, x: ViewMut<'_, Self, f32>, value: f32) -> Result<()>;
    /// y = x in the activation type.
    fn cast(&self, y: ViewMut<'_, Self, Self::Act>, x: View<'_, Self, f32>) -> Result<()>;
    /// y = x on the host, in the activation type; of one length.
    fn round(y: &mut [Self::Act], x: &[f32]);
    /// x as the activation type has it.
    fn rounded(x: f32) -> f32;
    /// The sum of squares of each x in f64, always in the same order ([`SUM_PARTS`], [`SUM_LANES`]). Waits for the
    /// compute queue.
    fn sums_of_squares(&self, x: &[View<'_, Self, f32>]) -> Result<Vec<f64>>;
}

/// Checks that y and x have one length, and returns it.
pub(super) fn same_len(op: &str, y: usize, x: usize) -> Result<usize> {
    ensure!(y == x, "{op}: y {y} x {x}");
    Ok(x)
}

/// Checks that x is rows as long as the bias; returns the length of both.
pub(super) fn bias_lens(x: usize, bias: usize) -> Result<[usize; 2]> {
    ensure!(bias > 0 && x.is_multiple_of(bias), "add_bias: x {x} bias {bias}");
    Ok([x, bias])
}
