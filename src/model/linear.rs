//! A linear module with LoRA, forward and backward. A module may give several quantities, each from rows of its own (`qkv_proj`); they
//! share the module's A.

use std::ops::Range;

use anyhow::{Context, Result};

use crate::device::{
    Arena, Buffer, Device, DropoutMask, Gemm, LoraDown, LoraGradA, LoraGradX, LoraLinear, Ops, Transpose, View,
    ViewMut, product,
};

use super::spec::{Module, ModuleId, TensorId};
use super::stage::StageContext;
use super::trainable::{Kind, LoraConfig};
use super::weights::LoraMatrices;

use Transpose::{No, Yes};

/// A module as the math sees it: dense weights, LoRA, and the dropout mask of this call.
pub struct Linear<'a, D: Ops> {
    module: &'a Module,
    weight: View<'a, D, D::Act>,
    bias: Option<View<'a, D, f32>>,
    lora: Option<Lora<'a, D>>,
}

struct Lora<'a, D: Ops> {
    config: &'a LoraConfig,
    matrices: LoraMatrices<'a, D>,
    /// Places of the gradients of A and B among the layer's.
    a_range: Range<usize>,
    b_range: Range<usize>,
    /// `None` without dropout: evaluation, or probability 0.
    mask: Option<DropoutMask<'a, D>>,
}

impl<'a, D: Ops> Linear<'a, D> {
    pub fn new(ctx: &StageContext<'a, D>, module: &'a Module) -> Result<Linear<'a, D>> {
        let weight = ctx.weights.linear(module.id, module.out_features * module.in_features)?;
        let bias = match module.has_bias {
            true => Some(ctx.weights.vector(TensorId::Bias(module.id), module.out_features)?),
            false => None,
        };
        let lora = ctx.trainables.and_then(|(config, layout)| {
            Some(Lora {
                config,
                matrices: ctx.weights.lora(module.id, layout)?,
                a_range: layout.get(module.id, Kind::A)?.range.clone(),
                b_range: layout.get(module.id, Kind::B)?.range.clone(),
                mask: ctx.dropout_mask(config, module.number),
            })
        });
        Ok(Linear { module, weight, bias, lora })
    }

    /// Rows of the weight.
    fn weight(&self, rows: &Range<usize>) -> View<'a, D, D::Act> {
        self.weight.range(rows.start * self.module.in_features..rows.end * self.module.in_features)
    }

    /// For each of `outputs`, rows of the module and their y `[T, rows]`:
    /// y = output_scale · (x `[T, in]` · Wᵀ + bias + scale · u · Bᵀ), with u `[T, r]` = dropout(x) · Aᵀ for all of them. Without outputs only
    /// u is computed, which is all that backward needs of a layer's last module. `dropped` is scratch.
    pub fn forward<'y>(
        &self,
        ops: &D,
        outputs: impl IntoIterator<Item = (Range<usize>, ViewMut<'y, D, D::Act>)>,
        u: &mut Buffer<D, D::Act>,
        x: View<'_, D, D::Act>,
        dropped: &mut Buffer<D, D::Act>,
    ) -> Result<()>
    where
        D: 'y,
    {
        let Module { in_features: k, output_scale, .. } = *self.module;
        let m = x.len() / k;
        if let Some(Lora { config, matrices, mask, .. }) = &self.lora {
            let (lora_rank, scratch) = (config.lora_rank, dropped.view_mut());
            let u = u.first_mut(m * lora_rank);
            ops.lora_down(LoraDown { u, x, a: matrices.a, mask: *mask, lora_rank, scratch })?;
        }
        for (rows, mut y) in outputs {
            let (n, weight) = (rows.len(), self.weight(&rows));
            let bias = self.bias.map(|bias| bias.range(rows.clone()));
            match &self.lora {
                None => {
                    product(ops, y.range_mut(0..m * n), x, (weight, Yes), [m, n, k], output_scale, 0.0)?;
                    bias.map_or(Ok(()), |bias| ops.add_bias(y, bias, output_scale))?;
                }
                Some(Lora { config, matrices, .. }) => {
                    let (lora_rank, scale) = (config.lora_rank, config.scale);
                    let (u, b) =
                        (u.first(m * lora_rank), matrices.b.range(rows.start * lora_rank..rows.end * lora_rank));
                    ops.lora_linear(LoraLinear { y, x, weight, bias, u, b, lora_rank, scale, output_scale })?;
                }
            }
        }
        Ok(())
    }

    /// With the d_y of each output, times output_scale: d_x = d_y · W + mask ∘ (d_u · A); dB += scale · d_yᵀ · u; dA += d_uᵀ · dropout(x);
    /// d_u = scale · d_y · B.
    pub fn backward<const N: usize>(
        &self,
        ops: &D,
        d_outputs: [Option<RowsGrad<'_, D>>; N],
        args: Backward<'_, D>,
    ) -> Result<()> {
        let Backward { mut d_x, accumulate, grads, x, u, dropped, d_u } = args;
        let Module { in_features: input, output_scale, .. } = *self.module;
        let m = x.len() / input;
        let outputs = || d_outputs.iter().flatten();
        for (i, (rows, d_y)) in outputs().enumerate() {
            let (beta, weight) = (if accumulate || i > 0 { 1.0 } else { 0.0 }, self.weight(rows));
            product(ops, d_x.range_mut(0..m * input), *d_y, (weight, No), [m, input, rows.len()], output_scale, beta)?;
        }
        let Some(Lora { config, matrices, a_range, b_range, mask }) = &self.lora else { return Ok(()) };
        let (r, scale) = (config.lora_rank, output_scale * config.scale);
        for (i, (rows, d_y)) in outputs().enumerate() {
            let (beta, b) = (if i > 0 { 1.0 } else { 0.0 }, matrices.b.range(rows.start * r..rows.end * r));
            product(ops, d_u.first_mut(m * r), *d_y, (b, No), [m, r, rows.len()], scale, beta)?;
        }
        for (rows, d_y) in outputs() {
            // A sum over tokens: [rows, T] · [T, r].
            let c = grads.view_mut().into_range(b_range.start + rows.start * r..b_range.start + rows.end * r);
            let (transpose_a, transpose_b, beta, alpha) = (Yes, No, 1.0, scale);
            let (b, n) = (u.first(m * r), r);
            ops.gemm_grad(Gemm { c, a: *d_y, b, transpose_a, transpose_b, m: rows.len(), n, k: m, alpha, beta })?;
        }
        let (mask, lora_rank, d_u) = (*mask, r, d_u.first(m * r));
        let d_a = grads.view_mut().into_range(a_range.clone());
        ops.lora_grad_a(LoraGradA { d_a, d_u, x, mask, lora_rank, scratch: dropped.view_mut() })?;
        ops.lora_grad_x(LoraGradX { d_x, d_u, a: matrices.a, mask, lora_rank, scratch: dropped.view_mut() })
    }
}

/// Rows of a module, and the gradient of what they give, `[T, rows]`.
type RowsGrad<'a, D> = (Range<usize>, View<'a, D, <D as Device>::Act>);

/// The outputs and inputs of a module's backward, besides d_y.
pub struct Backward<'a, D: Ops> {
    /// `[T, in]`, overwritten, or added to with `accumulate`.
    pub d_x: ViewMut<'a, D, D::Act>,
    pub accumulate: bool,
    /// The layer's gradients, which are added to.
    pub grads: &'a mut Buffer<D, f32>,
    pub x: View<'a, D, D::Act>,
    pub u: &'a Buffer<D, D::Act>,
    pub dropped: &'a mut Buffer<D, D::Act>,
    pub d_u: &'a mut Buffer<D, D::Act>,
}

/// The values that backward needs of each module of a stage: u = dropout(x) · Aᵀ, `[T, r]`.
pub struct LoraInputs<D: Ops>(Vec<(ModuleId, Buffer<D, D::Act>)>);

impl<D: Ops> LoraInputs<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, modules: &[ModuleId], len: usize) -> Result<Self> {
        let carve = |&id: &ModuleId| Ok((id, arena.carve(&format!("{name}/lora_u_{id}"), len)?));
        Ok(Self(modules.iter().map(carve).collect::<Result<_>>()?))
    }

    pub fn get(&self, id: ModuleId) -> Result<&Buffer<D, D::Act>> {
        let found = self.0.iter().find(|(of, _)| *of == id);
        found.map(|(_, u)| u).with_context(|| format!("the layer has no {id}"))
    }

    pub fn get_mut(&mut self, id: ModuleId) -> Result<&mut Buffer<D, D::Act>> {
        let found = self.0.iter_mut().find(|(of, _)| *of == id);
        found.map(|(_, u)| u).with_context(|| format!("the layer has no {id}"))
    }
}
