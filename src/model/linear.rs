//! Linear modules with LoRA that share an input, forward and backward. A module may give several quantities, each from
//! rows of its own (`qkv_proj`); they share the module's A.

use std::ops::Range;

use anyhow::{Context, Result};

use crate::device::{
    Activation, Arena, Buffer, Device, DownModule, DropoutMask, Finish, GatedBackward, GatedForward, Input, InputLora,
    InputModule, LoraDown, LoraGatedBackward, LoraGatedForward, LoraInput, LoraLinear, Ops, OutputLora, Transpose::Yes,
    View, ViewMut, product,
};

use super::spec::{Module, ModuleId, Rows, TensorId};
use super::stage::StageContext;
use super::trainable::{Kind, LoraModule};
use super::weights::LoraMatrices;

/// Rows of a module, their y `[T, rows]`, and its finish.
pub type Output<'a, D> = (&'a Rows, ViewMut<'a, D, <D as Device>::Act>, Finish<'a, D>);

/// The modules that read one input.
pub struct Linears<'a, D: Ops>(Vec<Linear<'a, D>>);

/// A module as the math sees it: dense weights and LoRA.
struct Linear<'a, D: Ops> {
    module: &'a Module,
    weight: View<'a, D, D::Act>,
    bias: Option<View<'a, D, f32>>,
    lora: Option<Lora<'a, D>>,
}

struct Lora<'a, D: Ops> {
    lora_rank: usize,
    scale: f32,
    matrices: LoraMatrices<'a, D>,
    /// Places of the gradients of A and B among the layer's.
    a_range: Range<usize>,
    b_range: Range<usize>,
    /// Number of values of d_u for each token that lie before this module's.
    before: usize,
}

impl<D: Ops> Lora<'_, D> {
    /// The place of d_u `[T, r]` among those of the modules that read one input.
    fn d_u(&self, tokens: usize) -> Range<usize> {
        tokens * self.before..tokens * (self.before + self.lora_rank)
    }
}

/// Number of values that a token has in d_u for a module: more than the rank, so that the next module's begin at a
/// multiple of 16 bytes.
pub fn d_u_width(lora_rank: usize) -> usize {
    lora_rank.next_multiple_of(8)
}

impl<'a, D: Ops> Linear<'a, D> {
    fn new(ctx: &StageContext<'a, D>, module: &'a Module) -> Result<Linear<'a, D>> {
        let weight = ctx.weights.linear(module.id, module.out_features * module.in_features)?;
        let bias = match module.has_bias {
            true => Some(ctx.weights.vector(TensorId::Bias(module.id), module.out_features)?),
            false => None,
        };
        let lora = ctx.trainables.and_then(|(_, layout)| {
            let LoraModule { lora_rank, scale, .. } = *layout.module(module.id)?;
            Some(Lora {
                lora_rank,
                scale,
                matrices: ctx.weights.lora(module.id, layout)?,
                a_range: layout.get(module.id, Kind::A)?.range.clone(),
                b_range: layout.get(module.id, Kind::B)?.range.clone(),
                before: 0,
            })
        });
        Ok(Linear { module, weight, bias, lora })
    }

    /// Rows of the weight.
    fn weight(&self, rows: &Range<usize>) -> View<'a, D, D::Act> {
        self.weight.range(rows.start * self.module.in_features..rows.end * self.module.in_features)
    }

    /// y `[T, rows]` = output_scale · (x `[T, in]` · Wᵀ + bias + scale · u · Bᵀ), finished, for some rows of the module,
    /// with u `[T, r]`.
    fn forward(
        &self,
        ops: &D,
        rows: &Range<usize>,
        mut y: ViewMut<'_, D, D::Act>,
        finish: Finish<'_, D>,
        x: View<'_, D, D::Act>,
        u: &LoraInputs<D>,
    ) -> Result<()> {
        if let Some(lora) = &self.lora {
            return ops.lora_linear(self.lora_linear(lora, rows, y, finish, x, u)?);
        }
        let Module { in_features: k, output_scale, .. } = *self.module;
        let (m, n) = (x.len() / k, rows.len());
        product(ops, y.range_mut(0..m * n), x, (self.weight(rows), Yes), [m, n, k], output_scale, 0.0)?;
        if let Some(bias) = self.bias {
            ops.add_bias(y.range_mut(0..m * n), bias.range(rows.clone()), output_scale)?;
        }
        finish.run(ops, y)
    }

    /// The op of [`Linear::forward`] with an adapter.
    fn lora_linear<'b>(
        &'b self,
        lora: &'b Lora<'a, D>,
        rows: &Range<usize>,
        y: ViewMut<'b, D, D::Act>,
        finish: Finish<'b, D>,
        x: View<'b, D, D::Act>,
        u: &'b LoraInputs<D>,
    ) -> Result<LoraLinear<'b, D>> {
        let Module { in_features, output_scale, id, .. } = *self.module;
        let (weight, bias) = (self.weight(rows), self.bias.map(|bias| bias.range(rows.clone())));
        let Lora { lora_rank, scale, matrices, .. } = lora;
        let (lora_rank, scale) = (*lora_rank, *scale);
        let u = u.get(id)?.first(x.len() / in_features * lora_rank);
        let b = matrices.b.range(rows.start * lora_rank..rows.end * lora_rank);
        Ok(LoraLinear { y, x, weight, bias, u, b, lora_rank, scale, output_scale, finish })
    }
}

impl<'a, D: Ops> Linears<'a, D> {
    /// The modules, in the order in which their parts of d_x are added.
    pub fn new(ctx: &StageContext<'a, D>, modules: impl Iterator<Item = &'a Module>) -> Result<Linears<'a, D>> {
        let (mut linears, mut before) = (Vec::new(), 0);
        for module in modules {
            let mut linear = Linear::new(ctx, module)?;
            if let Some(lora) = &mut linear.lora {
                (lora.before, before) = (before, before + d_u_width(lora.lora_rank));
            }
            linears.push(linear);
        }
        Ok(Linears(linears))
    }

    /// u `[T, r]` = dropout(x `[T, in]`) · Aᵀ of each module. `dropped` is scratch.
    pub fn down(
        &self,
        ops: &D,
        u: &mut LoraInputs<D>,
        x: View<'_, D, D::Act>,
        mask: Option<DropoutMask<'_, D>>,
        dropped: &mut Buffer<D, D::Act>,
    ) -> Result<()> {
        let mut modules = Vec::with_capacity(self.0.len());
        for (id, u) in &mut u.0 {
            let found = self.0.iter().find(|linear| linear.module.id == *id);
            let Some((module, lora)) = found.and_then(|linear| Some((linear.module, linear.lora.as_ref()?))) else {
                continue;
            };
            let u = u.first_mut(x.len() / module.in_features * lora.lora_rank);
            modules.push(DownModule { u, a: lora.matrices.a, lora_rank: lora.lora_rank, number: module.number });
        }
        if modules.is_empty() {
            return Ok(());
        }
        ops.lora_down(LoraDown { modules: &mut modules[..], x, mask, scratch: dropped.view_mut() })
    }

    /// For each of `outputs`: y = output_scale · (x `[T, in]` · Wᵀ + bias + scale · u · Bᵀ), finished, with the module's u
    /// `[T, r]` of [`Linears::down`].
    pub fn forward<const N: usize>(
        &self,
        ops: &D,
        outputs: [Output<'_, D>; N],
        u: &LoraInputs<D>,
        x: View<'_, D, D::Act>,
    ) -> Result<()> {
        for (rows, y, finish) in outputs {
            self.of(rows.module)?.forward(ops, &rows.rows, y, finish, x, u)?;
        }
        Ok(())
    }

    /// gate and up as [`Linears::forward`] gives them, and their activation.
    pub fn gated_forward(
        &self,
        ops: &D,
        args: GatedLinears<'_, D>,
        u: &LoraInputs<D>,
        x: View<'_, D, D::Act>,
    ) -> Result<()> {
        let GatedLinears { gate: (gate_rows, mut gate), up: (up_rows, mut up), act, activation, keeps_inputs } = args;
        let (of_gate, of_up) = (self.of(gate_rows.module)?, self.of(up_rows.module)?);
        if let (Some(gate_lora), Some(up_lora)) = (&of_gate.lora, &of_up.lora) {
            let gate = of_gate.lora_linear(gate_lora, &gate_rows.rows, gate, Finish::Nothing, x, u)?;
            let up = of_up.lora_linear(up_lora, &up_rows.rows, up, Finish::Nothing, x, u)?;
            return ops.lora_gated_forward(LoraGatedForward { act, gate, up, activation, keeps_inputs });
        }
        for (linear, rows, y) in [(of_gate, gate_rows, &mut gate), (of_up, up_rows, &mut up)] {
            linear.forward(ops, &rows.rows, y.range_mut(0..y.len()), Finish::Nothing, x, u)?;
        }
        let (gate, up) = (gate.into_view(), up.into_view());
        match act {
            Some(y) => ops.gated_forward(GatedForward { y, gate, up, activation }),
            None => Ok(()),
        }
    }

    /// With the d_y of each output, times output_scale: d_x = d_y · W + mask ∘ (d_u · A); dB += scale · d_yᵀ · u; dA +=
    /// d_uᵀ · dropout(x); d_u = scale · d_y · B. d_x and dA are sums over the modules and their outputs.
    pub fn backward<const N: usize>(
        &self,
        ops: &D,
        d_outputs: [(&Rows, View<'_, D, D::Act>); N],
        args: Backward<'_, D>,
    ) -> Result<()> {
        let tokens = args.d_x.len() / self.in_features()?;
        for (i, (rows, d_y)) in d_outputs.iter().enumerate() {
            let is_next = d_outputs[..i].iter().any(|(before, _)| before.module == rows.module);
            if let Some(lora) = self.output_lora(rows, is_next, tokens, args.u)? {
                let (mut d_u, mut grads, mut scratch) =
                    (args.d_u.view_mut(), args.grads.view_mut(), args.dropped.view_mut());
                ops.lora_output(lora.output(*d_y, &mut d_u, &mut grads, &mut scratch))?;
            }
        }
        self.input_backward(ops, d_outputs, args)
    }

    /// [`GatedBackward`], and then [`Linears::backward`] of gate and up, the outputs of these rows.
    pub fn gated_backward(
        &self,
        ops: &D,
        mut gated: GatedBackward<'_, D>,
        [gate, up]: [&Rows; 2],
        args: Backward<'_, D>,
    ) -> Result<()> {
        let (tokens, len) = (args.d_x.len() / self.in_features()?, gated.d_y.len());
        ops.lora_gated_backward(LoraGatedBackward {
            backward: GatedBackward { gate: gated.gate.range_mut(0..len), up: gated.up.range_mut(0..len), ..gated },
            d_u: args.d_u.view_mut(),
            grads: args.grads.view_mut(),
            gate: self.output_lora(gate, false, tokens, args.u)?,
            up: self.output_lora(up, gate.module == up.module, tokens, args.u)?,
            scratch: args.dropped.view_mut(),
        })?;
        self.input_backward(ops, [(gate, gated.gate.view()), (up, gated.up.view())], args)
    }

    /// Features of the input.
    fn in_features(&self) -> Result<usize> {
        Ok(self.0.first().context("no module reads this input")?.module.in_features)
    }

    /// The adapter of an output, if its module is a target. `is_next` says that d_u is a sum, which another output of the
    /// module has begun.
    fn output_lora<'s>(
        &'s self,
        Rows { module, rows }: &Rows,
        is_next: bool,
        tokens: usize,
        u: &'s LoraInputs<D>,
    ) -> Result<Option<OutputLora<'s, D>>> {
        let linear = self.of(*module)?;
        let Some(lora) = &linear.lora else { return Ok(None) };
        let Lora { lora_rank: r, scale, matrices, b_range, .. } = lora;
        Ok(Some(OutputLora {
            d_u_range: lora.d_u(tokens),
            b_range: b_range.start + rows.start * r..b_range.start + rows.end * r,
            u: u.get(*module)?.first(tokens * r),
            b: matrices.b.range(rows.start * r..rows.end * r),
            lora_rank: *r,
            scale: linear.module.output_scale * scale,
            accumulate: is_next,
        }))
    }

    /// d_x and dA of [`Linears::backward`], of which d_u is made already.
    fn input_backward<const N: usize>(
        &self,
        ops: &D,
        d_outputs: [(&Rows, View<'_, D, D::Act>); N],
        args: Backward<'_, D>,
    ) -> Result<()> {
        let Backward { d_x, accumulate, grads, x, mask, dropped, d_u, .. } = args;
        let in_features = self.in_features()?;
        let tokens = d_x.len() / in_features;
        let module = |linear: &Linear<'a, D>| {
            let mine = d_outputs.iter().filter(|(rows, _)| rows.module == linear.module.id);
            let lora = linear.lora.as_ref().map(|lora| InputLora {
                d_u: d_u.view().range(lora.d_u(tokens)),
                a: lora.matrices.a,
                a_range: lora.a_range.clone(),
                lora_rank: lora.lora_rank,
                number: linear.module.number,
            });
            InputModule {
                outputs: mine.map(|(rows, d_y)| [linear.weight(&rows.rows), *d_y]).collect(),
                output_scale: linear.module.output_scale,
                lora,
            }
        };
        let modules: Vec<_> = self.0.iter().map(module).collect();
        let (modules, grads, scratch) = (&modules[..], grads.view_mut(), dropped.view_mut());
        ops.lora_input(LoraInput { d_x, accumulate, grads, modules, x, in_features, mask, scratch })
    }

    /// A module that reads this input.
    fn of(&self, id: ModuleId) -> Result<&Linear<'a, D>> {
        let found = self.0.iter().find(|linear| linear.module.id == id);
        found.with_context(|| format!("{id} does not read this input"))
    }
}

/// The outputs of an MLP's forward through gate and up, each `[T, intermediate]`; see [`LoraGatedForward`].
pub struct GatedLinears<'a, D: Ops> {
    pub gate: (&'a Rows, ViewMut<'a, D, D::Act>),
    pub up: (&'a Rows, ViewMut<'a, D, D::Act>),
    pub act: Option<ViewMut<'a, D, D::Act>>,
    pub activation: Activation,
    pub keeps_inputs: bool,
}

/// The outputs and inputs of a backward, besides d_y.
pub struct Backward<'a, D: Ops> {
    /// `[T, in]`, overwritten, or added to with `accumulate`.
    pub d_x: ViewMut<'a, D, D::Act>,
    pub accumulate: bool,
    /// The layer's gradients, which are added to.
    pub grads: &'a mut Buffer<D, f32>,
    pub x: Input<'a, D>,
    /// `None` without dropout.
    pub mask: Option<DropoutMask<'a, D>>,
    pub u: &'a LoraInputs<D>,
    pub dropped: &'a mut Buffer<D, D::Act>,
    /// `[modules, T, r]`, see [`d_u_width`]
    pub d_u: &'a mut Buffer<D, D::Act>,
}

/// The values that backward needs of each module of a stage besides its input: u = dropout(x) · Aᵀ, `[T, r]`.
pub struct LoraInputs<D: Ops>(Vec<(ModuleId, Buffer<D, D::Act>)>);

impl<D: Ops> LoraInputs<D> {
    /// Each module has the rank that is the largest of all layers.
    pub fn carve(arena: &mut Arena<D>, name: &str, modules: &[(ModuleId, usize)], tokens: usize) -> Result<Self> {
        let carve = |&(id, r): &(ModuleId, usize)| Ok((id, arena.carve(&format!("{name}/lora_u_{id}"), tokens * r)?));
        Ok(Self(modules.iter().map(carve).collect::<Result<_>>()?))
    }

    fn get(&self, id: ModuleId) -> Result<&Buffer<D, D::Act>> {
        let found = self.0.iter().find(|(of, _)| *of == id);
        found.map(|(_, u)| u).with_context(|| format!("the layer has no {id}"))
    }
}
