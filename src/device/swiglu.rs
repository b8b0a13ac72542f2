//! silu(gate) · up and its backward.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// y = silu(gate) · up, elementwise.
pub struct SwigluForward<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub gate: View<'a, D, D::Act>,
    pub up: View<'a, D, D::Act>,
}

/// d_gate = d_y · up · silu'(gate), d_up = d_y · silu(gate).
pub struct SwigluBackward<'a, D: Device> {
    pub d_gate: ViewMut<'a, D, D::Act>,
    pub d_up: ViewMut<'a, D, D::Act>,
    pub d_y: View<'a, D, D::Act>,
    pub gate: View<'a, D, D::Act>,
    pub up: View<'a, D, D::Act>,
}

/// SwiGLU and its backward.
pub trait SwigluOps: Device {
    /// See [`SwigluForward`].
    fn swiglu_forward(&self, args: SwigluForward<'_, Self>) -> Result<()>;
    /// See [`SwigluBackward`].
    fn swiglu_backward(&self, args: SwigluBackward<'_, Self>) -> Result<()>;
}

impl<D: Device> SwigluForward<'_, D> {
    /// Checks all lengths; returns the one that they have.
    pub(super) fn num_elements(&self) -> Result<usize> {
        let (len, inputs) = (self.y.len(), [self.gate.len(), self.up.len()]);
        ensure!(inputs == [len; 2], "swiglu: y {len}, gate and up {inputs:?}");
        Ok(len)
    }
}

impl<D: Device> SwigluBackward<'_, D> {
    /// Checks all lengths; returns the one that they have.
    pub(super) fn num_elements(&self) -> Result<usize> {
        let (len, others) = (self.d_y.len(), [self.d_gate.len(), self.d_up.len(), self.gate.len(), self.up.len()]);
        ensure!(others == [len; 4], "swiglu backward: d_y {len}, d_gate, d_up, gate and up {others:?}");
        Ok(len)
    }
}
