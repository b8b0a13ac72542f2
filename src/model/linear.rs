//! A linear map with LoRA, forward and backward.

use anyhow::Result;

use crate::device::ops::{DropoutMask, Gemm, LoraDropout, Transpose};
use crate::device::{Buffer, Ops, View, ViewMut};

use super::lora::{LoraConfig, LoraEntry};
use super::weights::Linear;

use Transpose::{No, Yes};

/// LoRA of one projection during a call: scale, r, and the dropout mask when there is one.
pub struct LoraCall<'a, D> {
    pub config: &'a LoraConfig,
    /// `None` without dropout: evaluation, or probability 0.
    pub mask: Option<DropoutMask<'a, D>>,
}

/// y `[T, out]` = x `[T, in]` · Wᵀ + bias + scale · u · Bᵀ, u `[T, r]` = dropout(x) · Aᵀ. With `y: None` only u is
/// computed (the last projection of a recompute). `dropped` is scratch.
pub fn forward<D: Ops>(
    ops: &D,
    linear: &Linear<'_, D>,
    call: &LoraCall<'_, D>,
    y: Option<ViewMut<'_, D, D::Act>>,
    u: &mut Buffer<D, D::Act>,
    x: View<'_, D, D::Act>,
    dropped: &mut Buffer<D, D::Act>,
) -> Result<()> {
    let (n, k) = (linear.base.out_features, linear.base.in_features);
    let (m, r) = (x.len() / k, call.config.lora_rank);
    if let Some(lora) = &linear.lora {
        let x = dropout(ops, call, x, dropped)?;
        product(ops, u.first_mut(m * r), x, (lora.a, Yes), [m, r, k], 1.0, 0.0)?;
    }
    let Some(mut y) = y else { return Ok(()) };
    product(ops, y.range_mut(0..m * n), x, (linear.base.weight.view(), Yes), [m, n, k], 1.0, 0.0)?;
    if let Some(bias) = &linear.base.bias {
        ops.add_bias(y.range_mut(0..m * n), bias.view())?;
    }
    if let Some(lora) = &linear.lora {
        product(ops, y, u.first(m * r), (lora.b, Yes), [m, n, r], call.config.scale, 1.0)?;
    }
    Ok(())
}

/// The outputs and inputs of one projection's backward.
pub struct Backward<'a, D: Ops> {
    /// `[T, in]`, overwritten, or added to with `accumulate`.
    pub d_x: ViewMut<'a, D, D::Act>,
    pub accumulate: bool,
    /// The layer's LoRA gradients, which are added to.
    pub grads: &'a mut Buffer<D, f32>,
    pub d_y: View<'a, D, D::Act>,
    pub x: View<'a, D, D::Act>,
    pub u: &'a Buffer<D, D::Act>,
    pub dropped: &'a mut Buffer<D, D::Act>,
    pub d_u: &'a mut Buffer<D, D::Act>,
}

/// d_x = d_y · W + mask ∘ (d_u · A); dB += scale · d_yᵀ · u; dA += d_uᵀ · dropout(x); d_u = scale · d_y · B.
pub fn backward<D: Ops>(
    ops: &D,
    linear: &Linear<'_, D>,
    call: &LoraCall<'_, D>,
    entry: Option<&LoraEntry>,
    args: Backward<'_, D>,
) -> Result<()> {
    let Backward { mut d_x, accumulate, grads, d_y, x, u, dropped, d_u } = args;
    let (out, input) = (linear.base.out_features, linear.base.in_features);
    let (m, r, scale) = (x.len() / input, call.config.lora_rank, call.config.scale);
    let beta = if accumulate { 1.0 } else { 0.0 };
    product(ops, d_x.range_mut(0..m * input), d_y, (linear.base.weight.view(), No), [m, input, out], 1.0, beta)?;
    let (Some(lora), Some(entry)) = (&linear.lora, entry) else { return Ok(()) };
    product(ops, d_u.first_mut(m * r), d_y, (lora.b, No), [m, r, out], scale, 0.0)?;
    let (a_grad, b_grad) = grads.view_mut().into_range(entry.a.start..entry.b.end).split_at(entry.a.len());
    // Both products sum over tokens: [out, T] · [T, r] and [r, T] · [T, in].
    let (transpose_a, transpose_b, beta) = (Yes, No, 1.0);
    let (u, (n, k)) = (u.first(m * r), (r, m));
    ops.gemm_grad(Gemm { c: b_grad, a: d_y, b: u, transpose_a, transpose_b, m: out, n, k, alpha: scale, beta })?;
    let (a, b) = (d_u.first(m * r), dropout(ops, call, x, dropped)?);
    ops.gemm_grad(Gemm { c: a_grad, a, b, transpose_a, transpose_b, m: r, n: input, k, alpha: 1.0, beta })?;
    match &call.mask {
        None => product(ops, d_x, d_u.first(m * r), (lora.a, No), [m, input, r], 1.0, 1.0),
        Some(mask) => {
            product(ops, dropped.first_mut(m * input), d_u.first(m * r), (lora.a, No), [m, input, r], 1.0, 0.0)?;
            ops.lora_dropout(LoraDropout { y: d_x, x: dropped.first(m * input), mask: *mask, accumulate: true })
        }
    }
}

/// c `[m, n]` = alpha · a `[m, k]` · b + beta · c, b `[k, n]` after its transposition.
fn product<D: Ops>(
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

/// Returns x itself where there is no mask, else dropout(x) in the scratch buffer.
fn dropout<'a, D: Ops>(
    ops: &D,
    call: &LoraCall<'_, D>,
    x: View<'a, D, D::Act>,
    dropped: &'a mut Buffer<D, D::Act>,
) -> Result<View<'a, D, D::Act>> {
    let Some(mask) = call.mask else { return Ok(x) };
    ops.lora_dropout(LoraDropout { y: dropped.first_mut(x.len()), x, mask, accumulate: false })?;
    Ok(dropped.first(x.len()))
}
