//! Attention: x + norm(o · attention(rope(norm(q · n)), rope(norm(k · n)), v · n)) with n = norm(x). Norms and rotation
//! are there or not.

use anyhow::Result;

use crate::device::{
    Arena, AttentionBackward, AttentionForward, AttentionShape, Buffer, Finish, Input, Normed, Ops, Rope, Rotation,
    View,
};
use crate::model::linear::{Backward, Linears, LoraInputs};
use crate::model::spec::{Module, ModuleId, Norm, Rows};

use super::{Saved, Scratch, StageContext, Widths};

/// The stage as a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Norm of the input.
    pub norm: Option<Norm>,
    /// Norm of the output, before it is added to the residual stream.
    pub output_norm: Option<Norm>,
    /// Norms of queries and keys before their rotation: of each head, or of all heads together.
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
    /// The modules that give queries, keys and values, and last [`ModuleId::O`], in the order of use.
    pub modules: Vec<Module>,
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    pub num_heads: usize,
    /// Divides `num_heads`.
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Factor of the scores, 1/√head_dim in most families.
    pub scale: f32,
    /// Bound of the scores: c·tanh(score / c).
    pub softcap: Option<f32>,
    /// Number of keys that a query sees, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// Index of the rotation in [`crate::model::spec::ModelSpec::ropes`]; `None` rotates nothing.
    pub rope: Option<usize>,
    /// Index of a rotation that queries have for themselves; `None`: they share that of the keys.
    pub q_rope: Option<usize>,
}

impl Attention {
    /// Features of all queries of a token.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Features of all keys, and of all values, of a token.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Norms, in the order of use.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        [&self.norm, &self.q_norm, &self.k_norm, &self.output_norm].into_iter().flatten()
    }

    /// The modules that read the normed input.
    pub fn inputs(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(|module| module.id != ModuleId::O)
    }

    /// The module that reads the output of attention.
    pub fn outputs(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(|module| module.id == ModuleId::O)
    }

    /// That module as a group of its own, and all of its rows.
    fn output<'a, D: Ops>(&'a self, ctx: &StageContext<'a, D>) -> Result<(Linears<'a, D>, Rows)> {
        let output = Linears::new(ctx, self.outputs())?;
        Ok((output, Rows { module: ModuleId::O, rows: 0..ctx.spec.hidden_size }))
    }

    fn shape<'a, D: Ops>(&self, ctx: &StageContext<'a, D>) -> AttentionShape<'a, D> {
        AttentionShape {
            num_heads: self.num_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            softcap: self.softcap,
            window: self.window,
            documents: &ctx.batch.documents,
        }
    }

    /// The rotation of queries to their positions, where there is one.
    fn q_rotation<'a, D: Ops>(&self, ctx: &StageContext<'a, D>) -> Option<Rotation<'a, D>> {
        self.rotation(ctx, self.q_rope.or(self.rope)?, self.num_heads)
    }

    /// The rotation of keys.
    fn k_rotation<'a, D: Ops>(&self, ctx: &StageContext<'a, D>) -> Option<Rotation<'a, D>> {
        self.rotation(ctx, self.rope?, self.num_key_value_heads)
    }

    fn rotation<'a, D: Ops>(
        &self,
        ctx: &StageContext<'a, D>,
        rope: usize,
        num_heads: usize,
    ) -> Option<Rotation<'a, D>> {
        let (rotary_dim, (cos, sin)) = (ctx.spec.ropes[rope].rotary_dim, ctx.batch.rotation(rope));
        Some(Rotation { cos, sin, num_heads, head_dim: self.head_dim, rotary_dim })
    }
}

/// The values that backward needs, besides the stage's input.
pub struct AttentionSaves<'a, D: Ops> {
    pub scores: &'a mut Scores<D>,
    pub inputs: &'a mut Inputs<D>,
    pub key_value: &'a mut KeyValue<D>,
    pub output: &'a mut Output<D>,
    /// Group [`Saved::lora`].
    pub u: &'a mut LoraInputs<D>,
}

/// Group [`Saved::attention`].
pub struct Scores<D: Ops> {
    /// Attention's output, `[T, q]`.
    out: Buffer<D, D::Act>,
    /// Log-sum-exp of the scores, `[T, heads]`.
    lse: Buffer<D, f32>,
}

/// Group [`Saved::rest`].
pub struct Inputs<D: Ops> {
    /// The normed input `[T, hidden]`, its 1/rms `[T]`.
    normed: Buffer<D, D::Act>,
    rstd: Buffer<D, f32>,
    /// Rotated queries, `[T, q]`.
    q: Buffer<D, D::Act>,
    /// Queries and keys before their norms, where there are any, and 1/rms of each run that is normed.
    q_before: Buffer<D, D::Act>,
    k_before: Buffer<D, D::Act>,
    q_rstd: Buffer<D, f32>,
    k_rstd: Buffer<D, f32>,
}

/// Group [`Saved::rest`] too, in buffers of its own because generation keeps it: rotated keys, and values, `[T, kv]`,
/// or `[past + T, kv]` in generation.
pub struct KeyValue<D: Ops> {
    k: Buffer<D, D::Act>,
    v: Buffer<D, D::Act>,
}

/// Group [`Saved::mlp`].
pub struct Output<D: Ops> {
    /// The output before its norm `[T, hidden]`, where there is one, and its 1/rms `[T]`.
    before: Buffer<D, D::Act>,
    rstd: Buffer<D, f32>,
}

impl<D: Ops> Scores<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let out = arena.carve(&format!("{name}/out"), tokens * widths.q)?;
        Ok(Self { out, lse: arena.carve(&format!("{name}/lse"), tokens * widths.heads)? })
    }
}

impl<D: Ops> Inputs<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let f = |part: &str| format!("{name}/{part}");
        Ok(Self {
            normed: arena.carve(&f("norm1"), tokens * widths.hidden)?,
            rstd: arena.carve(&f("rstd1"), tokens)?,
            q: arena.carve(&f("q"), tokens * widths.q)?,
            q_before: arena.carve(&f("q_before"), tokens * widths.normed_q)?,
            k_before: arena.carve(&f("k_before"), tokens * widths.normed_kv)?,
            q_rstd: arena.carve(&f("q_rstd"), tokens * widths.q_rstd)?,
            k_rstd: arena.carve(&f("k_rstd"), tokens * widths.k_rstd)?,
        })
    }
}

impl<D: Ops> KeyValue<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let mut carve = |part: &str| arena.carve(&format!("{name}/{part}"), tokens * widths.kv);
        Ok(Self { k: carve("k")?, v: carve("v")? })
    }
}

impl<D: Ops> Output<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        Ok(Self {
            before: arena.carve(&format!("{name}/o_before"), tokens * widths.attention_output)?,
            rstd: arena.carve(&format!("{name}/o_rstd"), if widths.attention_output > 0 { tokens } else { 0 })?,
        })
    }
}

/// `branch` `[T, hidden]` = the stage's output without the residual stream, whose value before is x. Groups that are
/// `saved` are left as they are, and `branch` too where [`Saved::mlp`] is one.
pub fn forward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Attention,
    branch: &mut Buffer<D, D::Act>,
    saves: &mut AttentionSaves<'_, D>,
    saved: Saved,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (q_len, hidden) = (t * stage.q_width(), t * ctx.spec.hidden_size);
    if !saved.rest {
        project(ctx, stage, saves, saved, x, scratch)?;
    }
    let AttentionSaves { scores, inputs, key_value, output, u } = saves;
    if !saved.attention {
        let all = (ctx.batch.documents.num_past_tokens() + t) * stage.kv_width();
        ops.attention_forward(AttentionForward {
            out: scores.out.first_mut(q_len),
            lse: scores.lse.first_mut(t * stage.num_heads),
            q: inputs.q.first(q_len),
            k: key_value.k.first(all),
            v: key_value.v.first(all),
            shape: stage.shape(ctx),
        })?;
    }
    if saved.mlp {
        return Ok(());
    }
    // 5. Output projection, and its norm.
    let (o, rows) = stage.output(ctx)?;
    let y = if stage.output_norm.is_some() { &mut output.before } else { &mut *branch };
    let x = scores.out.first(q_len);
    if !saved.lora {
        o.down(ops, u, x, ctx.dropout_mask(), &mut scratch.dropped)?;
    }
    o.forward(ops, [(&rows, y.first_mut(hidden), Finish::Nothing)], u, x)?;
    let Some(norm) = &stage.output_norm else { return Ok(()) };
    let x = Normed::Plain(output.before.first(hidden));
    ctx.norm_forward(norm, branch.first_mut(hidden), output.rstd.first_mut(t), x)
}

/// Heads turn to their positions where there is a rotation.
fn turned<'a, D: Ops>(rotation: Option<Rotation<'a, D>>) -> Finish<'a, D> {
    rotation.map_or(Finish::Nothing, Finish::Rotate)
}

/// The part of [`forward`] before the scores: rotated queries and keys, and values.
fn project<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Attention,
    saves: &mut AttentionSaves<'_, D>,
    saved: Saved,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (hidden, q_len, kv_len) = (t * ctx.spec.hidden_size, t * stage.q_width(), t * stage.kv_width());
    let past = ctx.batch.documents.num_past_tokens() * stage.kv_width();
    // New keys and values go behind the past ones.
    let new = past..past + kv_len;
    let Inputs { normed, rstd, q, q_before, k_before, q_rstd, k_rstd } = &mut *saves.inputs;
    let KeyValue { k, v } = &mut *saves.key_value;
    // 1. Norm.
    let x = match &stage.norm {
        None => x,
        Some(norm) => {
            ctx.norm_forward(norm, normed.first_mut(hidden), rstd.first_mut(t), Normed::Plain(x))?;
            normed.first(hidden)
        }
    };
    // 2. Queries, keys, values. Where queries or keys are normed, they turn to their positions afterwards.
    let (q_rotation, k_rotation) = (stage.q_rotation(ctx), stage.k_rotation(ctx));
    let q_finish = turned(q_rotation.filter(|_| stage.q_norm.is_none()));
    let k_finish = turned(k_rotation.filter(|_| stage.k_norm.is_none()));
    let q_out = if stage.q_norm.is_some() { q_before.first_mut(q_len) } else { q.first_mut(q_len) };
    let k_out = match stage.k_norm {
        Some(_) => k_before.first_mut(kv_len),
        None => k.view_mut().into_range(new.clone()),
    };
    let v_out = v.view_mut().into_range(new.clone());
    let outputs = [(&stage.q, q_out, q_finish), (&stage.k, k_out, k_finish), (&stage.v, v_out, Finish::Nothing)];
    let linears = Linears::new(ctx, stage.inputs())?;
    if !saved.lora {
        linears.down(ops, saves.u, x, ctx.dropout_mask(), &mut scratch.dropped)?;
    }
    linears.forward(ops, outputs, saves.u, x)?;
    // 3. Norms of queries and keys.
    if let Some(norm) = &stage.q_norm {
        let rstd = q_rstd.first_mut(q_len / norm.width);
        ctx.norm_forward(norm, q.first_mut(q_len), rstd, Normed::Plain(q_before.first(q_len)))?;
        turned(q_rotation).run(ops, q.first_mut(q_len))?;
    }
    if let Some(norm) = &stage.k_norm {
        let rstd = k_rstd.first_mut(kv_len / norm.width);
        ctx.norm_forward(norm, k.view_mut().into_range(new.clone()), rstd, Normed::Plain(k_before.first(kv_len)))?;
        turned(k_rotation).run(ops, k.view_mut().into_range(new))?;
    }
    Ok(())
}

/// `d` `[T, hidden]` is the gradient of the residual stream after the stage and becomes that before it, x. Gradients of
/// trainable values are added to `grads`.
pub fn backward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Attention,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    saves: &AttentionSaves<'_, D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (hidden, q_len) = (t * ctx.spec.hidden_size, t * stage.q_width());
    let Scratch { dropped, d_u, d_norm, d_attention, .. } = scratch;
    let AttentionSaves { scores, output, u, .. } = saves;
    // 5. The output's norm, and its projection.
    let d_y = match &stage.output_norm {
        None => d.first(hidden),
        Some(norm) => {
            ops.fill_bytes(d_norm.first_mut(hidden), 0)?;
            let (before, rstd) = (output.before.first(hidden), output.rstd.first(t));
            ctx.norm_backward(norm, d_norm.first_mut(hidden), d.first(hidden), before, rstd)?;
            d_norm.first(hidden)
        }
    };
    let ((o, rows), d_x, mask) = (stage.output(ctx)?, d_attention.first_mut(q_len), ctx.dropout_mask());
    let (x_o, grads_o) = (Input::Plain(scores.out.first(q_len)), &mut *grads);
    let args = Backward { d_x, accumulate: false, grads: grads_o, x: x_o, mask, u, dropped, d_u };
    o.backward(ops, [(&rows, d_y)], args)?;
    scores_backward(ctx, stage, saves, scratch)?;
    project_backward(ctx, stage, d, grads, saves, x, scratch)
}

/// Makes the gradients of queries and keys before their rotation and norms, and of values, from that of attention's
/// output. They are in `d_q`, or the first half of `d_wide` where queries are normed; in `d_k`, or the second half; in
/// `d_v`.
fn scores_backward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Attention,
    saves: &AttentionSaves<'_, D>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (q_len, kv_len) = (t * stage.q_width(), t * stage.kv_width());
    let Scratch { d_attention, d_q, d_k, d_v, delta, d_wide, .. } = scratch;
    let AttentionSaves { scores, inputs, key_value, .. } = saves;
    let (mut first, mut second) = d_wide.first_mut(2 * q_len).split_at(q_len);
    // 4. Scores.
    ops.attention_backward(AttentionBackward {
        d_q: d_q.first_mut(q_len),
        d_k: d_k.first_mut(kv_len),
        d_v: d_v.first_mut(kv_len),
        delta: delta.first_mut(t * stage.num_heads),
        head_d_k: first.range_mut(0..q_len),
        head_d_v: second.range_mut(0..q_len),
        d_out: d_attention.first(q_len),
        out: scores.out.first(q_len),
        lse: scores.lse.first(t * stage.num_heads),
        q: inputs.q.first(q_len),
        k: key_value.k.first(kv_len),
        v: key_value.v.first(kv_len),
        shape: stage.shape(ctx),
    })?;
    // 3. Positions, and norms of queries and keys.
    let back = |x, rotation: Option<Rotation<'_, D>>| {
        rotation.map_or(Ok(()), |rotation| ops.rope(Rope { x, rotation, inverse: true }))
    };
    back(d_q.first_mut(q_len), stage.q_rotation(ctx))?;
    back(d_k.first_mut(kv_len), stage.k_rotation(ctx))?;
    if let Some(norm) = &stage.q_norm {
        ops.fill_bytes(first.range_mut(0..q_len), 0)?;
        let (x, rstd) = (inputs.q_before.first(q_len), inputs.q_rstd.first(q_len / norm.width));
        ctx.norm_backward(norm, first, d_q.first(q_len), x, rstd)?;
    }
    if let Some(norm) = &stage.k_norm {
        ops.fill_bytes(second.range_mut(0..kv_len), 0)?;
        let (x, rstd) = (inputs.k_before.first(kv_len), inputs.k_rstd.first(kv_len / norm.width));
        ctx.norm_backward(norm, second.into_range(0..kv_len), d_k.first(kv_len), x, rstd)?;
    }
    Ok(())
}

/// Makes the gradient of the stage's input from those that [`scores_backward`] leaves, and adds it to `d`.
fn project_backward<D: Ops>(
    ctx: &StageContext<'_, D>,
    stage: &Attention,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    saves: &AttentionSaves<'_, D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, t) = (ctx.ops, ctx.tokens());
    let (hidden, q_len, kv_len) = (t * ctx.spec.hidden_size, t * stage.q_width(), t * stage.kv_width());
    let Scratch { dropped, d_u, d_norm, d_q, d_k, d_v, d_wide, .. } = scratch;
    let (inputs, normed) = (&saves.inputs, stage.norm.is_some());
    // 2. Queries, keys, values.
    let d_q = if stage.q_norm.is_some() { d_wide.first(q_len) } else { d_q.first(q_len) };
    let d_k = if stage.k_norm.is_some() { d_wide.view().range(q_len..q_len + kv_len) } else { d_k.first(kv_len) };
    let d_outputs = [(&stage.q, d_q), (&stage.k, d_k), (&stage.v, d_v.first(kv_len))];
    let (d_x, x_in) = match normed {
        true => (d_norm.first_mut(hidden), inputs.normed.first(hidden)),
        false => (d.first_mut(hidden), x),
    };
    let (accumulate, mask, u) = (!normed, ctx.dropout_mask(), &*saves.u);
    let args = Backward { d_x, accumulate, grads, x: Input::Plain(x_in), mask, u, dropped, d_u };
    Linears::new(ctx, stage.inputs())?.backward(ops, d_outputs, args)?;
    // 1. Norm.
    let Some(norm) = &stage.norm else { return Ok(()) };
    ctx.norm_backward(norm, d.first_mut(hidden), d_norm.first(hidden), x, inputs.rstd.first(t))
}
