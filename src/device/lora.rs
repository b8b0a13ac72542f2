//! LoRA's products by other ops: the reference, and the way of a device for shapes that it has no kernel for.

use anyhow::{Result, ensure};

use super::ops::{DropoutMask, Gemm, LoraDown, LoraDropout, LoraGradA, LoraGradX, LoraLinear, Ops, Transpose};
use super::{View, ViewMut};

use Transpose::{No, Yes};

/// See [`LoraLinear`]: the base, then the bias, then LoRA.
pub fn linear<D: Ops>(ops: &D, args: LoraLinear<'_, D>) -> Result<()> {
    let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale } = args;
    let [m, n, k] = [u.len() / r, b.len() / r, weight.len() * r / b.len()];
    product(ops, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], 1.0, 0.0)?;
    if let Some(bias) = bias {
        ops.add_bias(y.range_mut(0..m * n), bias)?;
    }
    product(ops, y, u, (b, Yes), [m, n, r], scale, 1.0)
}

/// See [`LoraDown`].
pub fn down<D: Ops>(ops: &D, args: LoraDown<'_, D>) -> Result<()> {
    let LoraDown { u, x, a, mask, lora_rank: r, scratch } = args;
    let (m, k) = (u.len() / r, a.len() / r);
    let mut scratch = scratch;
    let x = dropout(ops, mask, x, &mut scratch)?;
    product(ops, u, x, (a, Yes), [m, r, k], 1.0, 0.0)
}

/// See [`LoraGradA`].
pub fn grad_a<D: Ops>(ops: &D, args: LoraGradA<'_, D>) -> Result<()> {
    let LoraGradA { d_a, d_u, x, mask, lora_rank: r, mut scratch } = args;
    let (k, n) = (d_u.len() / r, d_a.len() / r);
    let b = dropout(ops, mask, x, &mut scratch)?;
    let (transpose_a, transpose_b) = (Yes, No);
    ops.gemm_grad(Gemm { c: d_a, a: d_u, b, transpose_a, transpose_b, m: r, n, k, alpha: 1.0, beta: 1.0 })
}

/// See [`LoraGradX`].
pub fn grad_x<D: Ops>(ops: &D, args: LoraGradX<'_, D>) -> Result<()> {
    let LoraGradX { d_x, d_u, a, mask, lora_rank: r, mut scratch } = args;
    let (m, n) = (d_u.len() / r, a.len() / r);
    let Some(mask) = mask else { return product(ops, d_x, d_u, (a, No), [m, n, r], 1.0, 1.0) };
    ensure!(scratch.len() >= m * n, "the scratch of LoRA has {} elements, {} are needed", scratch.len(), m * n);
    product(ops, scratch.range_mut(0..m * n), d_u, (a, No), [m, n, r], 1.0, 0.0)?;
    ops.lora_dropout(LoraDropout { y: d_x, x: scratch.view().range(0..m * n), mask, accumulate: true })
}

/// Returns x itself where there is no mask, else dropout(x), which is made in `scratch`.
fn dropout<'a, D: Ops>(
    ops: &D,
    mask: Option<DropoutMask<'_, D>>,
    x: View<'a, D, D::Act>,
    scratch: &'a mut ViewMut<'_, D, D::Act>,
) -> Result<View<'a, D, D::Act>> {
    let (Some(mask), len) = (mask, x.len()) else { return Ok(x) };
    ensure!(scratch.len() >= len, "the scratch of LoRA has {} elements, {len} are needed", scratch.len());
    ops.lora_dropout(LoraDropout { y: scratch.range_mut(0..len), x, mask, accumulate: false })?;
    Ok(scratch.view().range(0..len))
}

/// c `[m, n]` = alpha · a `[m, k]` · b + beta · c, b `[k, n]` after its transposition.
pub fn product<D: Ops>(
    ops: &D,
    c: ViewMut<'_, D, D::Act>,
    a: View<'_, D, D::Act>,
    (b, transpose_b): (View<'_, D, D::Act>, Transpose),
    [m, n, k]: [usize; 3],
    alpha: f32,
    beta: f32,
) -> Result<()> {
    ops.gemm(Gemm { c, a, b, transpose_a: No, transpose_b, m, n, k, alpha, beta })
}
