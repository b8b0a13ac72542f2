//! A gated MLP: x + norm(down · (f(gate · n) ∘ up · n)) with n = norm(x). Norms are there or not.

use anyhow::Result;

use crate::device::{
    Activation, Arena, Buffer, Finish, GatedBackward, GatedForward, Input, Normed, Ops, View, ViewMut,
};
use crate::model::linear::{Backward, GatedLinears, Linears, LoraInputs};
use crate::model::spec::{Module, ModuleId, Norm, Rows};

use super::{Saved, Scratch, StageContext, Widths};

/// The stage as a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// Norm of the input.
    pub norm: Option<Norm>,
    /// Norm of the output, before it is added to the residual stream.
    pub output_norm: Option<Norm>,
    /// The modules that give gate and up, and last [`ModuleId::Down`], in the order of use.
    pub modules: Vec<Module>,
    pub gate: Rows,
    pub up: Rows,
    pub activation: Activation,
    pub intermediate_size: usize,
}

impl Mlp {
    /// Norms, in the order of use.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        [&self.norm, &self.output_norm].into_iter().flatten()
    }

    /// The modules that read the normed input.
    pub fn inputs(&self) -> impl DoubleEndedIterator<Item = &Module> {
        self.modules.iter().filter(|module| module.id != ModuleId::Down)
    }

    /// The module that reads the activation.
    pub fn outputs(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(|module| module.id == ModuleId::Down)
    }

    /// That module as a group of its own, and all of its rows.
    fn output<'a, D: Ops>(&'a self, ctx: &StageContext<'a, D>) -> Result<(Linears<'a, D>, Rows)> {
        let output = Linears::new(ctx, self.outputs())?;
        Ok((output, Rows { module: ModuleId::Down, rows: 0..ctx.spec.hidden_size }))
    }
}

/// The values that backward needs.
pub struct MlpSaves<'a, D: Ops> {
    pub products: &'a mut Products<D>,
    pub rest: &'a mut Rest<D>,
    /// Group [`Saved::lora`].
    pub u: &'a mut LoraInputs<D>,
}

/// Group [`Saved::mlp`].
pub struct Products<D: Ops> {
    /// The stage's input, `[T, hidden]`: the stage before leaves its branch here, to which the residual stream is
    /// added.
    pub input: Buffer<D, D::Act>,
    /// `[T, intermediate]`
    gate: Buffer<D, D::Act>,
    up: Buffer<D, D::Act>,
    /// The output before its norm `[T, hidden]`, where there is one, and its 1/rms `[T]`.
    before: Buffer<D, D::Act>,
    output_rstd: Buffer<D, f32>,
}

/// Group [`Saved::rest`].
pub struct Rest<D: Ops> {
    /// The normed input `[T, hidden]`, its 1/rms `[T]`.
    normed: Buffer<D, D::Act>,
    rstd: Buffer<D, f32>,
    /// f(gate) · up, `[T, intermediate]`; not there after a recompute that does not need it.
    act: Buffer<D, D::Act>,
    has_act: bool,
}

impl<D: Ops> Products<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let f = |part: &str| format!("{name}/{part}");
        Ok(Self {
            input: arena.carve(&f("h"), tokens * widths.hidden)?,
            gate: arena.carve(&f("gate"), tokens * widths.intermediate)?,
            up: arena.carve(&f("up"), tokens * widths.intermediate)?,
            before: arena.carve(&f("down_before"), tokens * widths.mlp_output)?,
            output_rstd: arena.carve(&f("down_rstd"), if widths.mlp_output > 0 { tokens } else { 0 })?,
        })
    }
}

impl<D: Ops> Rest<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        Ok(Self {
            normed: arena.carve(&format!("{name}/norm2"), tokens * widths.hidden)?,
            rstd: arena.carve(&format!("{name}/rstd2"), tokens)?,
            act: arena.carve(&format!("{name}/act"), tokens * widths.intermediate)?,
            has_act: false,
        })
    }
}

/// The residual stream after the stage goes to `out` `[T, hidden]`. Where [`Saved::mlp`] is not there,
/// [`Products::input`] holds the branch of the stage before, and x is added to it first. `out: None` makes it a
/// recompute, which stops before the last module, because backward does not need its output.
pub fn forward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Mlp,
    out: Option<&mut Buffer<D, D::Act>>,
    saves: &mut MlpSaves<'_, D>,
    saved: Saved,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (hidden, inner) = (t * ctx.spec.hidden_size, t * stage.intermediate_size);
    let MlpSaves { products, rest, u } = saves;
    let Products { input, gate, up, before, output_rstd } = &mut **products;
    // 1. Norm.
    match &stage.norm {
        Some(norm) if !saved.mlp || !saved.rest => {
            let x = match saved.mlp {
                true => Normed::Plain(input.first(hidden)),
                false => Normed::Sum { sum: input.first_mut(hidden), addend: x },
            };
            ctx.norm_forward(norm, rest.normed.first_mut(hidden), rest.rstd.first_mut(t), x)?;
        }
        None if !saved.mlp => ops.add(input.first_mut(hidden), x)?,
        _ => {}
    }
    // 2. Gate and up, and their activation. Backward makes it of both where the last module is not computed.
    let ends_here = out.is_none() && (saved.mlp || saved.lora && stage.output_norm.is_none());
    if !saved.rest {
        rest.has_act = !ends_here;
    }
    let (act, activation) = ((!saved.rest && rest.has_act).then(|| rest.act.first_mut(inner)), stage.activation);
    if !saved.mlp {
        let x = if stage.norm.is_some() { rest.normed.first(hidden) } else { input.first(hidden) };
        let linears = Linears::new(ctx, stage.inputs())?;
        if !saved.lora {
            linears.down(ops, u, x, ctx.dropout_mask(), &mut scratch.dropped)?;
        }
        let (gate, up) = ((&stage.gate, gate.first_mut(inner)), (&stage.up, up.first_mut(inner)));
        let args = GatedLinears { gate, up, act, activation, keeps_inputs: ctx.needed.mlp };
        linears.gated_forward(ops, args, u, x)?;
    } else if let Some(y) = act {
        ops.gated_forward(GatedForward { y, gate: gate.first(inner), up: up.first(inner), activation })?;
    }
    if ends_here {
        return Ok(());
    }
    // 3. Down projection, its norm, and the residual stream.
    let ((last, rows), act) = (stage.output(ctx)?, rest.act.first(inner));
    if !saved.lora {
        last.down(ops, u, act, ctx.dropout_mask(), &mut scratch.dropped)?;
    }
    let project = |y: ViewMut<'_, D, D::Act>, finish| last.forward(ops, [(&rows, y, finish)], u, act);
    match (&stage.output_norm, out) {
        (None, None) => Ok(()),
        (None, Some(out)) => project(out.first_mut(hidden), Finish::Add(input.first(hidden))),
        (Some(norm), out) => {
            project(before.first_mut(hidden), Finish::Nothing)?;
            let (x, rstd) = (Normed::Plain(before.first(hidden)), output_rstd.first_mut(t));
            match out {
                // Backward needs rstd; the normed output is of no use.
                None => ctx.norm_forward(norm, scratch.d_norm.first_mut(hidden), rstd, x),
                Some(out) => {
                    ctx.norm_forward(norm, out.first_mut(hidden), rstd, x)?;
                    ops.add(out.first_mut(hidden), input.first(hidden))
                }
            }
        }
    }
}

/// `d` `[T, hidden]` is the gradient of the residual stream after the stage and becomes that before it. Gradients of
/// trainable values are added to `grads`. The gradients of gate and up take the places of these in `saves`.
pub fn backward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Mlp,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    saves: MlpSaves<'_, D>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (hidden, inner) = (t * ctx.spec.hidden_size, t * stage.intermediate_size);
    let Scratch { dropped, d_u, d_norm, d_wide: d_act, .. } = scratch;
    let MlpSaves { products: Products { input, gate, up, before, output_rstd }, rest, u } = saves;
    // 3. The output's norm, and the down projection.
    let d_y = match &stage.output_norm {
        None => d.first(hidden),
        Some(norm) => {
            ops.fill_bytes(d_norm.first_mut(hidden), 0)?;
            let (before, rstd) = (before.first(hidden), output_rstd.first(t));
            ctx.norm_backward(norm, d_norm.first_mut(hidden), d.first(hidden), before, rstd)?;
            d_norm.first(hidden)
        }
    };
    let ((down, rows), d_x, mask) = (stage.output(ctx)?, d_act.first_mut(inner), ctx.dropout_mask());
    let x = match rest.has_act {
        true => Input::Plain(rest.act.first(inner)),
        false => Input::Gated(GatedForward {
            y: rest.act.first_mut(inner),
            gate: gate.first(inner),
            up: up.first(inner),
            activation: stage.activation,
        }),
    };
    let grads_down = &mut *grads;
    let args = Backward { d_x, accumulate: false, grads: grads_down, x, mask, u, dropped, d_u };
    down.backward(ops, [(&rows, d_y)], args)?;
    // 2. The activation, gate and up.
    let (d_y, activation) = (d_act.first(inner), stage.activation);
    let gated = GatedBackward { gate: gate.first_mut(inner), up: up.first_mut(inner), d_y, activation };
    let (d_x, accumulate, x) = match stage.norm {
        Some(_) => (d_norm.first_mut(hidden), false, rest.normed.first(hidden)),
        None => (d.first_mut(hidden), true, input.first(hidden)),
    };
    let args = Backward { d_x, accumulate, grads, x: Input::Plain(x), mask, u, dropped, d_u };
    Linears::new(ctx, stage.inputs().rev())?.gated_backward(ops, gated, [&stage.gate, &stage.up], args)?;
    // 1. Norm.
    let Some(norm) = &stage.norm else { return Ok(()) };
    ctx.norm_backward(norm, d.first_mut(hidden), d_norm.first(hidden), input.first(hidden), rest.rstd.first(t))
}
