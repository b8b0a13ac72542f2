//! A decoder layer, forward and backward.

use anyhow::Result;

use crate::device::*;

use super::activations::{BatchBuffers, LayerActivations, MlpPart, Parts, RestPart, Scratch};
use super::config::ModelConfig;
use super::linear::{self, Backward, LoraCall};
use super::lora::{LoraConfig, LoraLayout};
use super::names::Projection;
use super::weights::{LayerWeights, Linear};

/// The inputs of a layer's computation, besides activations.
pub struct LayerContext<'a, D: Ops> {
    pub ops: &'a D,
    pub config: &'a ModelConfig,
    pub weights: &'a LayerWeights<D>,
    pub batch: &'a BatchBuffers<D>,
    pub lora: Option<&'a LayerLora>,
    pub layer_idx: usize,
    /// Seed and step of the dropout masks; `None` switches dropout off (evaluation).
    pub dropout: Option<(u64, u32)>,
}

/// The adapter of a model: its numbers, and where the matrices of a layer lie.
pub struct LayerLora {
    pub config: LoraConfig,
    pub layout: LoraLayout,
}

impl<'a, D: Ops> LayerContext<'a, D> {
    fn linear(&self, projection: Projection) -> Linear<'a, D> {
        self.weights.linear(projection, self.lora.map(|l| &l.layout))
    }

    fn call(&self, projection: Projection) -> LoraCall<'a, D> {
        let no_lora: &LoraConfig = &NO_LORA;
        let config = self.lora.map_or(no_lora, |l| &l.config);
        let mask = self.dropout.filter(|_| config.dropout > 0.0).map(|(seed, step)| DropoutMask {
            probability: config.dropout,
            seed,
            step,
            module: (self.layer_idx * Projection::ALL.len() + projection as usize) as u32,
            sample_idx: self.batch.sample_idx.first(self.batch.num_tokens),
            positions: self.batch.documents.positions(),
        });
        LoraCall { config, mask }
    }

    fn attention_shape(&self) -> AttentionShape<'a, D> {
        AttentionShape {
            num_heads: self.config.num_attention_heads,
            num_key_value_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            softcap: None,
            window: None,
            documents: &self.batch.documents,
        }
    }

    fn rope(&self, x: ViewMut<'_, D, D::Act>, num_heads: usize, inverse: bool) -> Result<()> {
        let head_dim = self.config.head_dim;
        let len = self.batch.num_tokens * head_dim / 2;
        let (cos, sin) = (self.batch.cos.first(len), self.batch.sin.first(len));
        self.ops.rope(Rope { x, cos, sin, num_heads, head_dim, inverse })
    }
}

impl LayerLora {
    pub fn new(model: &ModelConfig, config: LoraConfig) -> LayerLora {
        LayerLora { layout: LoraLayout::new(model, &config), config }
    }
}

/// Stands for an adapter that is off; its numbers are never read.
static NO_LORA: LoraConfig = LoraConfig { lora_rank: 0, scale: 0.0, dropout: 0.0, targets: Vec::new() };

/// out = layer(x); x, out `[T, hidden]`. Parts that are `there` are left as they are. `out: None` makes it a
/// recompute, which stops before the last projection, because backward does not need its output.
pub fn forward<D: Ops>(
    ctx: &LayerContext<'_, D>,
    out: Option<&mut Buffer<D, D::Act>>,
    mut acts: LayerActivations<'_, D>,
    there: Parts,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    forward_attention(ctx, &mut acts, there, x, scratch)?;
    let (ops, t) = (ctx.ops, ctx.batch.num_tokens);
    let (hidden, inner) = (t * ctx.config.hidden_size, t * ctx.config.intermediate_size);
    let MlpPart { h, gate, up, lora_u: [u_o, u_gate, u_up, u_down] } = acts.mlp;
    let RestPart { norm2, rstd2, act, .. } = acts.rest;
    let mut project = |p, y: Option<ViewMut<'_, D, D::Act>>, u: &mut Buffer<D, D::Act>, x: View<'_, D, D::Act>| {
        linear::forward(ops, &ctx.linear(p), &ctx.call(p), y, u, x, &mut scratch.dropped)
    };
    // 5. Output projection onto the residual stream; 6. its norm, which adds x to it.
    if !there.mlp {
        let attention = acts.attention.out.first(t * ctx.config.num_attention_heads * ctx.config.head_dim);
        project(Projection::O, Some(h.first_mut(hidden)), u_o, attention)?;
    }
    if !there.mlp || !there.rest {
        let x = if there.mlp {
            Normed::Plain(h.first(hidden))
        } else {
            Normed::Sum { sum: h.first_mut(hidden), addend: x }
        };
        let (y, rstd) = (norm2.first_mut(hidden), rstd2.first_mut(t));
        let weight = ctx.weights.post_attention_norm.view();
        ops.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: ctx.config.rms_norm_eps })?;
    }
    // 7. MLP.
    if !there.mlp {
        project(Projection::Gate, Some(gate.first_mut(inner)), u_gate, norm2.first(hidden))?;
        project(Projection::Up, Some(up.first_mut(inner)), u_up, norm2.first(hidden))?;
    }
    if !there.rest {
        let (gate, up) = (gate.first(inner), up.first(inner));
        ops.swiglu_forward(SwigluForward { y: act.first_mut(inner), gate, up })?;
    }
    match out {
        None if there.mlp => Ok(()),
        None => project(Projection::Down, None, u_down, act.first(inner)),
        Some(out) => {
            project(Projection::Down, Some(out.first_mut(hidden)), u_down, act.first(inner))?;
            ops.add(out.first_mut(hidden), h.first(hidden))
        }
    }
}

/// The first half of [`forward`], up to attention's output.
fn forward_attention<D: Ops>(
    ctx: &LayerContext<'_, D>,
    acts: &mut LayerActivations<'_, D>,
    there: Parts,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, config, t) = (ctx.ops, ctx.config, ctx.batch.num_tokens);
    let kv_width = config.num_key_value_heads * config.head_dim;
    let (hidden, q_len) = (t * config.hidden_size, t * config.num_attention_heads * config.head_dim);
    let past = ctx.batch.documents.num_past_tokens() * kv_width;
    let (new, all) = (past..past + t * kv_width, past + t * kv_width);
    let LayerActivations { attention, rest, key_value: kv, .. } = acts;
    let RestPart { norm1, rstd1, q, lora_u: [u_q, u_k, u_v], .. } = &mut **rest;
    if !there.rest {
        // 1. Norm.
        let (y, rstd, weight) = (norm1.first_mut(hidden), rstd1.first_mut(t), ctx.weights.input_norm.view());
        ops.rms_norm_forward(RmsNormForward { y, rstd, x: Normed::Plain(x), weight, eps: config.rms_norm_eps })?;
        // 2. Queries, keys, values; the new keys and values go behind the past ones.
        let mut project = |p, y: ViewMut<'_, D, D::Act>, u: &mut Buffer<D, D::Act>| {
            let x = norm1.first(hidden);
            linear::forward(ops, &ctx.linear(p), &ctx.call(p), Some(y), u, x, &mut scratch.dropped)
        };
        project(Projection::Q, q.first_mut(q_len), u_q)?;
        project(Projection::K, kv.k.view_mut().into_range(new.clone()), u_k)?;
        project(Projection::V, kv.v.view_mut().into_range(new.clone()), u_v)?;
        // 3. Positions.
        ctx.rope(q.first_mut(q_len), config.num_attention_heads, false)?;
        ctx.rope(kv.k.view_mut().into_range(new), config.num_key_value_heads, false)?;
    }
    if there.attention {
        return Ok(());
    }
    // 4. Attention.
    ops.attention_forward(AttentionForward {
        out: attention.out.first_mut(q_len),
        lse: attention.lse.first_mut(t * config.num_attention_heads),
        q: q.first(q_len),
        k: kv.k.first(all),
        v: kv.v.first(all),
        shape: ctx.attention_shape(),
    })
}

/// `d` `[T, hidden]` is the gradient of the layer's output and becomes the gradient of its input x. LoRA gradients
/// are added to `grads`. `acts` are those of [`forward`].
pub fn backward<D: Ops>(
    ctx: &LayerContext<'_, D>,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    acts: LayerActivations<'_, D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, config, t) = (ctx.ops, ctx.config, ctx.batch.num_tokens);
    let hidden = t * config.hidden_size;
    let q_len = t * config.num_attention_heads * config.head_dim;
    let kv_len = t * config.num_key_value_heads * config.head_dim;
    let inner = t * config.intermediate_size;
    let Scratch { dropped, d_u, d_norm, d_attention, d_q, d_k, d_v, delta, d_act, d_gate, d_up } = scratch;
    let LayerActivations { attention, mlp, rest, key_value: kv } = acts;
    let ([u_q, u_k, u_v], [u_o, u_gate, u_up, u_down]) = (&rest.lora_u, &mlp.lora_u);
    let mut project = |p: Projection,
                       d_x: ViewMut<'_, D, D::Act>,
                       accumulate: bool,
                       d_y: View<'_, D, D::Act>,
                       x: View<'_, D, D::Act>,
                       u: &Buffer<D, D::Act>| {
        let entry = ctx.lora.and_then(|l| l.layout.get(p));
        let args = Backward { d_x, accumulate, grads: &mut *grads, d_y, x, u, dropped: &mut *dropped, d_u: &mut *d_u };
        linear::backward(ops, &ctx.linear(p), &ctx.call(p), entry, args)
    };
    // 7. MLP.
    project(Projection::Down, d_act.first_mut(inner), false, d.first(hidden), rest.act.first(inner), u_down)?;
    ops.swiglu_backward(SwigluBackward {
        d_gate: d_gate.first_mut(inner),
        d_up: d_up.first_mut(inner),
        d_y: d_act.first(inner),
        gate: mlp.gate.first(inner),
        up: mlp.up.first(inner),
    })?;
    project(Projection::Up, d_norm.first_mut(hidden), false, d_up.first(inner), rest.norm2.first(hidden), u_up)?;
    project(Projection::Gate, d_norm.first_mut(hidden), true, d_gate.first(inner), rest.norm2.first(hidden), u_gate)?;
    // 6. Norm, onto the residual stream's gradient.
    ops.rms_norm_backward(RmsNormBackward {
        d_x: d.first_mut(hidden),
        d_y: d_norm.first(hidden),
        x: mlp.h.first(hidden),
        rstd: rest.rstd2.first(t),
        weight: ctx.weights.post_attention_norm.view(),
    })?;
    // 5. Output projection.
    project(Projection::O, d_attention.first_mut(q_len), false, d.first(hidden), attention.out.first(q_len), u_o)?;
    // 4. Attention.
    ops.attention_backward(AttentionBackward {
        d_q: d_q.first_mut(q_len),
        d_k: d_k.first_mut(kv_len),
        d_v: d_v.first_mut(kv_len),
        delta: delta.first_mut(t * config.num_attention_heads),
        // The MLP is done with these.
        head_d_k: d_gate.first_mut(q_len),
        head_d_v: d_up.first_mut(q_len),
        d_out: d_attention.first(q_len),
        out: attention.out.first(q_len),
        lse: attention.lse.first(t * config.num_attention_heads),
        q: rest.q.first(q_len),
        k: kv.k.first(kv_len),
        v: kv.v.first(kv_len),
        shape: ctx.attention_shape(),
    })?;
    // 3. Positions.
    ctx.rope(d_q.first_mut(q_len), config.num_attention_heads, true)?;
    ctx.rope(d_k.first_mut(kv_len), config.num_key_value_heads, true)?;
    // 2. Queries, keys, values.
    project(Projection::Q, d_norm.first_mut(hidden), false, d_q.first(q_len), rest.norm1.first(hidden), u_q)?;
    project(Projection::K, d_norm.first_mut(hidden), true, d_k.first(kv_len), rest.norm1.first(hidden), u_k)?;
    project(Projection::V, d_norm.first_mut(hidden), true, d_v.first(kv_len), rest.norm1.first(hidden), u_v)?;
    // 1. Norm.
    let (weight, rstd) = (ctx.weights.input_norm.view(), rest.rstd1.first(t));
    ops.rms_norm_backward(RmsNormBackward { d_x: d.first_mut(hidden), d_y: d_norm.first(hidden), x, rstd, weight })
}
