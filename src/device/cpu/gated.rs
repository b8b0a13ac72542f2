//! The gated activation of an MLP, f(gate) · up, and its backward.

use anyhow::Result;

use crate::device::{Activation, GatedBackward, GatedForward, GatedOps};

use super::{Cpu, math};

impl GatedOps for Cpu {
    fn gated_forward(&self, args: GatedForward<'_, Cpu>) -> Result<()> {
        args.num_elements()?;
        match args.activation {
            Activation::Silu => forward(self, args, silu),
            Activation::GeluTanh => forward(self, args, gelu),
        }
        Ok(())
    }

    fn gated_backward(&self, args: GatedBackward<'_, Cpu>) -> Result<()> {
        args.num_elements()?;
        match args.activation {
            Activation::Silu => backward(self, args, silu_backward),
            Activation::GeluTanh => backward(self, args, gelu_backward),
        }
        Ok(())
    }
}

#[inline(always)]
fn silu(gate: f32) -> f32 {
    gate * math::sigmoid(gate)
}

/// Returns (d_gate, d_up).
#[inline(always)]
fn silu_backward(d_y: f32, gate: f32, up: f32) -> (f32, f32) {
    let s = math::sigmoid(gate);
    (d_y * up * s * (1.0 + gate * (1.0 - s)), d_y * gate * s)
}

/// √(2/π), and the factor of x³ in GELU by tanh.
const GELU_FACTOR: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// tanh(√(2/π) · (x + 0.044715x³))
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    math::tanh(GELU_FACTOR * x * (1.0 + GELU_CUBIC * x * x))
}

#[inline(always)]
fn gelu(gate: f32) -> f32 {
    0.5 * gate * (1.0 + gelu_tanh(gate))
}

/// Returns (d_gate, d_up), where f'(x) = ½(1 + t) + ½x · (1 − t²) · √(2/π) · (1 + 3 · 0.044715x²) with t =
/// [`gelu_tanh`].
#[inline(always)]
fn gelu_backward(d_y: f32, gate: f32, up: f32) -> (f32, f32) {
    let t = gelu_tanh(gate);
    let slope = GELU_FACTOR * (1.0 + 3.0 * GELU_CUBIC * gate * gate);
    (d_y * up * 0.5 * (1.0 + t + gate * (1.0 - t * t) * slope), d_y * 0.5 * gate * (1.0 + t))
}

/// y = f(gate) · up.
fn forward(cpu: &Cpu, args: GatedForward<'_, Cpu>, f: impl Fn(f32) -> f32 + Copy + Sync) {
    let (y, gate, up) = (args.y.host_mut(), args.gate.host(), args.up.host());
    cpu.for_rows(y, 1, |first, y| {
        let (gate, up) = (&gate[first..first + y.len()], &up[first..first + y.len()]);
        crate::simd::vectorize(
            #[inline(always)]
            || {
                for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                    *y = f(*g) * u;
                }
            },
        );
    });
}

/// (gate, up) = f(d_y, gate, up).
fn backward(cpu: &Cpu, args: GatedBackward<'_, Cpu>, f: impl Fn(f32, f32, f32) -> (f32, f32) + Copy + Sync) {
    let GatedBackward { gate, up, d_y, .. } = args;
    let (gate, up, d_y) = (gate.host_mut(), up.host_mut(), d_y.host());
    let part = |first: usize, gate: &mut [f32], up: &mut [f32]| {
        let d_y = &d_y[first..first + gate.len()];
        crate::simd::vectorize(
            #[inline(always)]
            || {
                for ((g, u), d) in gate.iter_mut().zip(&mut *up).zip(d_y) {
                    (*g, *u) = f(*d, *g, *u);
                }
            },
        );
    };
    let rows = cpu.rows_per_thread(d_y.len());
    rayon::scope(|scope| {
        for (i, (gate, up)) in gate.chunks_mut(rows).zip(up.chunks_mut(rows)).enumerate() {
            let part = &part;
            scope.spawn(move |_| part(i * rows, gate, up));
        }
    });
}
