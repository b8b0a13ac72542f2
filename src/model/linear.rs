//! A linear map with LoRA, forward and backward.

use anyhow::Result;

use crate::device::{
    Buffer, DropoutMask, Gemm, LoraDown, LoraGradA, LoraGradX, LoraLinear, Ops, Transpose, View, ViewMut, product,
};

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
    let (m, lora_rank, mask) = (x.len() / k, call.config.lora_rank, call.mask);
    let (weight, bias) = (linear.base.weight.view(), linear.base.bias.as_ref().map(Buffer::view));
    let Some(lora) = &linear.lora else {
        let Some(mut y) = y else { return Ok(()) };
        product(ops, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], 1.0, 0.0)?;
        return bias.map_or(Ok(()), |bias| ops.add_bias(y, bias));
    };
    ops.lora_down(LoraDown {
        u: u.first_mut(m * lora_rank),
        x,
        a: lora.a,
        mask,
        lora_rank,
        scratch: dropped.view_mut(),
    })?;
    let Some(y) = y else { return Ok(()) };
    let (u, b, scale) = (u.first(m * lora_rank), lora.b, call.config.scale);
    ops.lora_linear(LoraLinear { y, x, weight, bias, u, b, lora_rank, scale })
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
    // A sum over tokens: [out, T] · [T, r].
    let (transpose_a, transpose_b, beta) = (Yes, No, 1.0);
    let (u, (n, k)) = (u.first(m * r), (r, m));
    ops.gemm_grad(Gemm { c: b_grad, a: d_y, b: u, transpose_a, transpose_b, m: out, n, k, alpha: scale, beta })?;
    let (mask, lora_rank, d_u) = (call.mask, r, d_u.first(m * r));
    ops.lora_grad_a(LoraGradA { d_a: a_grad, d_u, x, mask, lora_rank, scratch: dropped.view_mut() })?;
    ops.lora_grad_x(LoraGradX { d_x, d_u, a: lora.a, mask, lora_rank, scratch: dropped.view_mut() })
}
