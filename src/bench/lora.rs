//! LoRA's products and dropout in the linear modules that share an input.

use anyhow::Result;

use crate::device::*;
use crate::model::spec::{Module, Rows};
use crate::model::stage::Mlp;
use crate::model::trainable::LoraModule;

use super::kernels::Kernels;
use super::timer::Amount;

impl<D: Ops> Kernels<'_, D> {
    /// Times the products of a module with this adapter, and those of the `sharing` modules that have its input. Amounts are what must be
    /// read and written at least.
    pub(super) fn lora(&self, module: &Module, lora: LoraModule, sharing: usize) -> Result<()> {
        let k = module.in_features;
        let (x, positions, sample_idx) =
            (self.act(self.tokens * k)?, self.zeros(self.tokens)?, self.zeros(self.tokens)?);
        let (probability, sample_idx, positions) = (self.lora.dropout, sample_idx.view(), positions.view());
        let mask = (probability > 0.0).then_some(DropoutMask { probability, seed: 1, step: 1, sample_idx, positions });
        self.dropout(module, x.view(), mask)?;
        self.down(module, lora.lora_rank, sharing, x.view(), mask)?;
        self.linear(module, lora, x.view())?;
        self.output(module, lora)?;
        self.input(module, lora.lora_rank, sharing, x.view(), mask)
    }

    /// The amount of that many elements of activations, read or written.
    fn moved(&self, elements: usize) -> Amount {
        Amount::Bytes((elements * size_of::<D::Act>()) as f64)
    }

    fn dropout(&self, module: &Module, x: View<D, D::Act>, mask: Option<DropoutMask<D>>) -> Result<()> {
        let Some(mask) = mask else { return Ok(()) };
        let mut y = self.act(x.len())?;
        self.timer.time(&format!("{} dropout(x)", module.id), self.moved(2 * x.len()), || {
            self.device.lora_dropout(LoraDropout { y: y.view_mut(), x, mask, module: module.number, accumulate: false })
        })
    }

    fn down(
        &self,
        module: &Module,
        r: usize,
        sharing: usize,
        x: View<D, D::Act>,
        mask: Option<DropoutMask<D>>,
    ) -> Result<()> {
        let k = module.in_features;
        let (a, mut scratch) = (self.act(r * k)?, self.act(x.len())?);
        let mut all_u: Vec<_> = (0..sharing).map(|_| self.act(self.tokens * r)).collect::<Result<_>>()?;
        let name = format!("{} u = {}·Aᵀ of {sharing}, r {r}", module.id, dropped(mask.is_some()));
        self.timer.time(&name, self.moved(x.len()), || {
            let modules = all_u.iter_mut().zip(0..);
            let modules = modules.map(|(u, number)| DownModule { u: u.view_mut(), a: a.view(), lora_rank: r, number });
            let (modules, scratch) = (&mut modules.collect::<Vec<_>>()[..], scratch.view_mut());
            self.device.lora_down(LoraDown { modules, x, mask, scratch })
        })
    }

    fn linear(&self, module: &Module, lora: LoraModule, x: View<D, D::Act>) -> Result<()> {
        let Module { id, out_features: n, in_features: k, output_scale, .. } = *module;
        let (tokens, r, scale) = (self.tokens, lora.lora_rank, lora.scale);
        let (mut y, weight, u, b) = (self.act(tokens * n)?, self.act(n * k)?, self.act(tokens * r)?, self.act(n * r)?);
        let bias = if module.has_bias { Some(self.f32s(n)?) } else { None };
        let flops = Amount::Flops(2.0 * (tokens * (k + r) * n) as f64);
        self.timer.time(&format!("{id} x·Wᵀ + {scale}·u·Bᵀ, r {r}"), flops, || {
            let (y, weight, u, b) = (y.view_mut(), weight.view(), u.view(), b.view());
            let bias = bias.as_ref().map(|bias| bias.view());
            let finish = Finish::Nothing;
            self.device.lora_linear(LoraLinear { y, x, weight, bias, u, b, lora_rank: r, scale, output_scale, finish })
        })
    }

    /// Gate and up of an MLP with their activation, as a forward does it that keeps both, and one that keeps the activation alone. Both
    /// modules are like the one that is given.
    pub(super) fn gated_forward(&self, module: &Module, lora: LoraModule, activation: Activation) -> Result<()> {
        let Module { out_features: n, in_features: k, output_scale, .. } = *module;
        let (tokens, r, scale) = (self.tokens, lora.lora_rank, lora.scale);
        let (x, weights, u, b) = (self.act(tokens * k)?, self.act(2 * n * k)?, self.act(tokens * r)?, self.act(n * r)?);
        let [mut act, mut gate, mut up] = [self.act(tokens * n)?, self.act(tokens * n)?, self.act(tokens * n)?];
        let flops = Amount::Flops(4.0 * (tokens * (k + r) * n) as f64);
        for (keeps_inputs, kept) in [(true, "gate, up and their activation"), (false, "the activation of gate and up")]
        {
            self.timer.time(&format!("{kept}, r {r}"), flops, || {
                let linear = |y, range| LoraLinear {
                    y,
                    x: x.view(),
                    weight: weights.view().range(range),
                    bias: None,
                    u: u.view(),
                    b: b.view(),
                    lora_rank: r,
                    scale,
                    output_scale,
                    finish: Finish::Nothing,
                };
                let (gate, up) = (linear(gate.view_mut(), 0..n * k), linear(up.view_mut(), n * k..2 * n * k));
                self.device.lora_gated_forward(LoraGatedForward {
                    act: Some(act.view_mut()),
                    gate,
                    up,
                    activation,
                    keeps_inputs,
                })
            })?;
        }
        Ok(())
    }

    fn output(&self, module: &Module, lora: LoraModule) -> Result<()> {
        let Module { id, out_features: n, output_scale, .. } = *module;
        let (tokens, r) = (self.tokens, lora.lora_rank);
        let (d_y, u, b) = (self.act(tokens * n)?, self.act(tokens * r)?, self.act(n * r)?);
        let (mut d_u, mut d_b, mut scratch) = (self.act(tokens * r)?, self.f32s(n * r)?, self.act(tokens * n)?);
        self.timer.time(&format!("{id} d_u = d_y·B, dB += d_yᵀ·u, r {r}"), self.moved(tokens * n), || {
            let (d_u, d_b, d_y, u, b) = (d_u.view_mut(), d_b.view_mut(), d_y.view(), u.view(), b.view());
            let (scale, accumulate, scratch) = (output_scale * lora.scale, false, scratch.view_mut());
            self.device.lora_output(LoraOutput { d_u, d_b, d_y, u, b, lora_rank: r, scale, accumulate, scratch })
        })
    }

    /// The gated activation's backward with the products of gate and up, if both have an adapter.
    pub(super) fn gated_backward(&self) -> Result<()> {
        let Mlp { gate: of_gate, up: of_up, activation, intermediate_size: n, .. } = &self.layer.mlp;
        let (tokens, activation) = (self.tokens, *activation);
        let adapter = |rows: &Rows| self.modules().iter().find(|lora| lora.id == rows.module).copied();
        let (Some(lora), Some(lora_up)) = (adapter(of_gate), adapter(of_up)) else { return Ok(()) };
        let (r, r_up) = (lora.lora_rank, lora_up.lora_rank);
        let (mut gate, mut up, d_y) = (self.act(tokens * n)?, self.act(tokens * n)?, self.act(tokens * n)?);
        let (u, b) = (self.act(tokens * r.max(r_up))?, self.act(n * r.max(r_up))?);
        let (mut d_u, mut grads) = (self.act(tokens * (r + r_up))?, self.f32s(n * (r + r_up))?);
        let mut scratch = self.act(tokens * n)?;
        let output = |lora_rank: usize, before: usize| OutputLora {
            d_u_range: tokens * before..tokens * (before + lora_rank),
            b_range: n * before..n * (before + lora_rank),
            u: u.first(tokens * lora_rank),
            b: b.first(n * lora_rank),
            lora_rank,
            scale: lora.scale,
            accumulate: false,
        };
        let name = format!("gated backward, d_u and dB of {} and {}, r {r} and {r_up}", of_gate.module, of_up.module);
        self.timer.time(&name, self.moved(5 * tokens * n), || {
            self.device.lora_gated_backward(LoraGatedBackward {
                backward: GatedBackward { gate: gate.view_mut(), up: up.view_mut(), d_y: d_y.view(), activation },
                d_u: d_u.view_mut(),
                grads: grads.view_mut(),
                gate: Some(output(r, 0)),
                up: Some(output(r_up, r)),
                scratch: scratch.view_mut(),
            })
        })
    }

    /// The gradient of the input, without the base's products.
    fn input(
        &self,
        module: &Module,
        r: usize,
        sharing: usize,
        x: View<D, D::Act>,
        mask: Option<DropoutMask<D>>,
    ) -> Result<()> {
        let k = module.in_features;
        let (d_u, a) = (self.act(self.tokens * r)?, self.act(r * k)?);
        let (mut d_x, mut d_a, mut scratch) = (self.act(x.len())?, self.f32s(sharing * r * k)?, self.act(x.len())?);
        let module_of = |i: usize| InputModule {
            outputs: Vec::new(),
            output_scale: 1.0,
            lora: Some(InputLora {
                d_u: d_u.view(),
                a: a.view(),
                a_range: i * r * k..(i + 1) * r * k,
                lora_rank: r,
                number: i as u32,
            }),
        };
        let modules: Vec<_> = (0..sharing).map(module_of).collect();
        let d_x_of = if mask.is_some() { "mask ∘ (d_u·A)" } else { "d_u·A" };
        let name = format!("{} dA += d_uᵀ·{}, d_x = {d_x_of} of {sharing}, r {r}", module.id, dropped(mask.is_some()));
        self.timer.time(&name, self.moved(2 * x.len()), || {
            let (d_x, grads, modules) = (d_x.view_mut(), d_a.view_mut(), &modules[..]);
            let (accumulate, in_features, scratch) = (false, k, scratch.view_mut());
            let x = Input::Plain(x);
            self.device.lora_input(LoraInput { d_x, accumulate, grads, modules, x, in_features, mask, scratch })
        })
    }
}

/// LoRA's input, as the name of a product has it.
fn dropped(has_dropout: bool) -> &'static str {
    if has_dropout { "dropout(x)" } else { "x" }
}
