//! The gated activation of an MLP, f(gate) · up, and its backward.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// The f of f(gate) · up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// f(x) = x · σ(x), which makes SwiGLU.
    Silu,
    /// f(x) = ½x · (1 + tanh(√(2/π) · (x + 0.044715x³))), the approximation of GELU by tanh, which makes GeGLU.
    GeluTanh,
}

/// y = f(gate) · up, elementwise.
pub struct GatedForward<'a, D: Device> {
    pub y: ViewMut<'a, D, D::Act>,
    pub gate: View<'a, D, D::Act>,
    pub up: View<'a, D, D::Act>,
    pub activation: Activation,
}

/// d_gate = d_y · up · f'(gate) takes the place of gate, and d_up = d_y · f(gate) that of up.
pub struct GatedBackward<'a, D: Device> {
    pub gate: ViewMut<'a, D, D::Act>,
    pub up: ViewMut<'a, D, D::Act>,
    pub d_y: View<'a, D, D::Act>,
    pub activation: Activation,
}

/// The gated activation and its backward.
pub trait GatedOps: Device {
    /// See [`GatedForward`].
    fn gated_forward(&self, args: GatedForward<'_, Self>) -> Result<()>;
    /// See [`GatedBackward`].
    fn gated_backward(&self, args: GatedBackward<'_, Self>) -> Result<()>;
}

impl<'a, D: GatedOps> GatedForward<'a, D> {
    /// Makes y and returns it.
    pub(super) fn made(self, ops: &D) -> Result<View<'a, D, D::Act>> {
        let GatedForward { mut y, gate, up, activation } = self;
        ops.gated_forward(GatedForward { y: y.range_mut(0..y.len()), gate, up, activation })?;
        Ok(y.into_view())
    }
}

impl<D: Device> GatedForward<'_, D> {
    /// Checks all lengths; returns the one that they have.
    pub(super) fn num_elements(&self) -> Result<usize> {
        let (len, inputs) = (self.y.len(), [self.gate.len(), self.up.len()]);
        ensure!(inputs == [len; 2], "gated: y {len}, gate and up {inputs:?}");
        Ok(len)
    }
}

impl<D: Device> GatedBackward<'_, D> {
    /// Checks all lengths; returns the one that they have.
    pub(super) fn num_elements(&self) -> Result<usize> {
        let (len, others) = (self.d_y.len(), [self.gate.len(), self.up.len()]);
        ensure!(others == [len; 2], "gated backward: d_y {len}, gate and up {others:?}");
        Ok(len)
    }
}
