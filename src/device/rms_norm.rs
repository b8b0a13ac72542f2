//! RMSNorm and its backward.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// y = x · rstd · weight per row, rstd = 1 / sqrt(mean(x²) + eps). x, y `[T, H]`; rstd `[T]`; weight `[H]`.
pub struct RmsNormForward<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub rstd: ViewMut<'a, D, f32>,
    pub x: Normed<'a, D>,
    pub weight: View<'a, D, f32>,
    pub eps: f32,
}

/// The input of a norm, `[T, H]`.
pub enum Normed<'a, D: Device> {
    Plain(View<'a, D, D::Act>),
    /// sum += addend first: the residual stream.
    Sum {
        sum: ViewMut<'a, D, D::Act>,
        addend: View<'a, D, D::Act>,
    },
}

impl<D: Device> Normed<'_, D> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Normed::Plain(x) => x.len(),
            Normed::Sum { sum, .. } => sum.len(),
        }
    }

    /// True for an input of no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// d_x += rstd · (d_y·w − x · rstd² · mean(d_y·w·x)) per row. All `[T, H]`; d_x holds the residual's gradient before.
pub struct RmsNormBackward<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub d_y: View<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub rstd: View<'a, D, f32>,
    pub weight: View<'a, D, f32>,
}

/// RMSNorm and its backward.
pub trait RmsNormOps: Device {
    /// See [`RmsNormForward`].
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Self>) -> Result<()>;
    /// See [`RmsNormBackward`].
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<()>;
}

impl<D: Device> RmsNormForward<'_, D> {
    /// Checks all lengths; returns T and H.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let (rows, hidden, x, y) = (self.rstd.len(), self.weight.len(), self.x.len(), self.y.len());
        ensure!([x, y] == [rows * hidden; 2], "rms_norm: x {x} y {y} for {rows} rows of {hidden}");
        if let Normed::Sum { addend, .. } = &self.x {
            ensure!(addend.len() == x, "rms_norm: x {x} addend {}", addend.len());
        }
        Ok([rows, hidden])
    }
}

impl<D: Device> RmsNormBackward<'_, D> {
    /// Checks all lengths; returns T and H.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let (rows, hidden) = (self.rstd.len(), self.weight.len());
        let found = [self.d_x.len(), self.d_y.len(), self.x.len()];
        ensure!(found == [rows * hidden; 3], "rms_norm backward: d_x, d_y, x {found:?} for {rows} rows of {hidden}");
        Ok([rows, hidden])
    }
}
