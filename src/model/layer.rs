//! A decoder layer, forward and backward.

use anyhow::Result;

use crate::device::ops::*;
use crate::device::{Buffer, Ops, View, ViewMut};

use super::activations::{BatchBuffers, KeyValue, LayerActivations, Scratch};
use super::config::ModelConfig;
use super::linear::{self, Backward, LoraCall};
use super::lora::{LoraConfig, LoraLayout};
use super::names::Projection;
use super::weights::{LayerWeights, Linear};

/// What a layer computes with, besides activations.
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

/// The adapter of a model: what it is, and where a layer's matrices lie.
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
            positions: self.batch.positions.first(self.batch.num_tokens),
        });
        LoraCall { config, mask }
    }

    fn attention_shape(&self) -> AttentionShape<'a, D> {
        AttentionShape {
            num_heads: self.config.num_attention_heads,
            num_key_value_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            documents: &self.batch.documents,
            positions: self.batch.positions.first(self.batch.num_tokens),
            num_past_tokens: self.batch.num_past_tokens,
        }
    }

    fn rope(&self, x: ViewMut<'_, D, D::Act>, num_heads: usize, inverse: bool) -> Result<()> {
        let head_dim = self.config.head_dim;
        let len = self.batch.num_tokens * head_dim / 2;
        let (cos, sin) = (self.batch.cos.first(len), self.batch.sin.first(len));
        self.ops.rope(Rope { x, cos, sin, num_heads, head_dim, inverse })
    }
}

/// Stands for an adapter that is off: nothing reads its numbers.
static NO_LORA: LoraConfig = LoraConfig { lora_rank: 0, scale: 0.0, dropout: 0.0, targets: Vec::new() };

/// out = layer(x). With `out: None` it stops before the last projection, whose output backward does not need: that is a
/// recompute. x, out `[T, hidden]`.
pub fn forward<D: Ops>(
    ctx: &LayerContext<'_, D>,
    out: Option<&mut Buffer<D, D::Act>>,
    acts: &mut LayerActivations<D>,
    kv: &mut KeyValue<D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, config, t) = (ctx.ops, ctx.config, ctx.batch.num_tokens);
    let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
    let (q_len, kv_width) =
        (t * config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let (inner, past) = (t * config.intermediate_size, ctx.batch.num_past_tokens * kv_width);
    let LayerActivations { norm1, rstd1, q, attention, lse, h, norm2, rstd2, gate, up, act, lora_u } = acts;
    let (new, all) = (past..past + t * kv_width, past + t * kv_width);
    let mut project = |p: Projection, y: Option<ViewMut<'_, D, D::Act>>, x: View<'_, D, D::Act>| {
        linear::forward(ops, &ctx.linear(p), &ctx.call(p), y, &mut lora_u[p as usize], x, &mut scratch.dropped)
    };
    // 1. Norm.
    let weight = ctx.weights.input_norm.view();
    ops.rms_norm_forward(RmsNormForward {
        y: norm1.first_mut(t * hidden),
        rstd: rstd1.first_mut(t),
        x: Normed::Plain(x),
        weight,
        eps,
    })?;
    // 2. Queries, keys, values; the new keys and values go behind the past ones.
    project(Projection::Q, Some(q.first_mut(q_len)), norm1.first(t * hidden))?;
    project(Projection::K, Some(kv.k.view_mut().into_range(new.clone())), norm1.first(t * hidden))?;
    project(Projection::V, Some(kv.v.view_mut().into_range(new.clone())), norm1.first(t * hidden))?;
    // 3. Positions.
    ctx.rope(q.first_mut(q_len), config.num_attention_heads, false)?;
    ctx.rope(kv.k.view_mut().into_range(new), config.num_key_value_heads, false)?;
    // 4. Attention.
    ops.attention_forward(AttentionForward {
        out: attention.first_mut(q_len),
        lse: lse.first_mut(t * config.num_attention_heads),
        q: q.first(q_len),
        k: kv.k.first(all),
        v: kv.v.first(all),
        shape: ctx.attention_shape(),
    })?;
    // 5. Output projection onto the residual stream.
    project(Projection::O, Some(h.first_mut(t * hidden)), attention.first(q_len))?;
    // 6. Norm of the residual stream, which the projection is added to.
    let weight = ctx.weights.post_attention_norm.view();
    let (y, rstd) = (norm2.first_mut(t * hidden), rstd2.first_mut(t));
    let x = Normed::Sum { sum: h.first_mut(t * hidden), addend: x };
    ops.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps })?;
    // 7. MLP.
    project(Projection::Gate, Some(gate.first_mut(inner)), norm2.first(t * hidden))?;
    project(Projection::Up, Some(up.first_mut(inner)), norm2.first(t * hidden))?;
    ops.swiglu_forward(SwigluForward { y: act.first_mut(inner), gate: gate.first(inner), up: up.first(inner) })?;
    let Some(out) = out else { return project(Projection::Down, None, act.first(inner)) };
    project(Projection::Down, Some(out.first_mut(t * hidden)), act.first(inner))?;
    ops.add(out.first_mut(t * hidden), h.first(t * hidden))
}

/// d (`[T, hidden]`) is the gradient of the layer's output and becomes that of its input x; LoRA gradients are added to
/// `grads`. `acts` and `kv` are those of forward.
pub fn backward<D: Ops>(
    ctx: &LayerContext<'_, D>,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    acts: &LayerActivations<D>,
    kv: &KeyValue<D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let (ops, config, t) = (ctx.ops, ctx.config, ctx.batch.num_tokens);
    let hidden = t * config.hidden_size;
    let q_len = t * config.num_attention_heads * config.head_dim;
    let kv_len = t * config.num_key_value_heads * config.head_dim;
    let inner = t * config.intermediate_size;
    let Scratch { dropped, d_u, d_norm, d_attention, d_q, d_k, d_v, delta, d_act, d_gate, d_up } = scratch;
    let mut project = |p: Projection,
                       d_x: ViewMut<'_, D, D::Act>,
                       accumulate: bool,
                       d_y: View<'_, D, D::Act>,
                       x: View<'_, D, D::Act>| {
        let entry = ctx.lora.and_then(|l| l.layout.get(p));
        let args = Backward {
            d_x,
            accumulate,
            grads: &mut *grads,
            d_y,
            x,
            u: &acts.lora_u[p as usize],
            dropped: &mut *dropped,
            d_u: &mut *d_u,
        };
        linear::backward(ops, &ctx.linear(p), &ctx.call(p), entry, args)
    };
    // 7. MLP.
    project(Projection::Down, d_act.first_mut(inner), false, d.first(hidden), acts.act.first(inner))?;
    ops.swiglu_backward(SwigluBackward {
        d_gate: d_gate.first_mut(inner),
        d_up: d_up.first_mut(inner),
        d_y: d_act.first(inner),
        gate: acts.gate.first(inner),
        up: acts.up.first(inner),
    })?;
    project(Projection::Up, d_norm.first_mut(hidden), false, d_up.first(inner), acts.norm2.first(hidden))?;
    project(Projection::Gate, d_norm.first_mut(hidden), true, d_gate.first(inner), acts.norm2.first(hidden))?;
    // 6. Norm, onto the residual stream's gradient.
    ops.rms_norm_backward(RmsNormBackward {
        d_x: d.first_mut(hidden),
        d_y: d_norm.first(hidden),
        x: acts.h.first(hidden),
        rstd: acts.rstd2.first(t),
        weight: ctx.weights.post_attention_norm.view(),
    })?;
    // 5. Output projection.
    project(Projection::O, d_attention.first_mut(q_len), false, d.first(hidden), acts.attention.first(q_len))?;
    // 4. Attention.
    ops.attention_backward(AttentionBackward {
        d_q: d_q.first_mut(q_len),
        d_k: d_k.first_mut(kv_len),
        d_v: d_v.first_mut(kv_len),
        delta: delta.first_mut(t * config.num_attention_heads),
        d_out: d_attention.first(q_len),
        out: acts.attention.first(q_len),
        lse: acts.lse.first(t * config.num_attention_heads),
        q: acts.q.first(q_len),
        k: kv.k.first(kv_len),
        v: kv.v.first(kv_len),
        shape: ctx.attention_shape(),
    })?;
    // 3. Positions.
    ctx.rope(d_q.first_mut(q_len), config.num_attention_heads, true)?;
    ctx.rope(d_k.first_mut(kv_len), config.num_key_value_heads, true)?;
    // 2. Queries, keys, values.
    project(Projection::Q, d_norm.first_mut(hidden), false, d_q.first(q_len), acts.norm1.first(hidden))?;
    project(Projection::K, d_norm.first_mut(hidden), true, d_k.first(kv_len), acts.norm1.first(hidden))?;
    project(Projection::V, d_norm.first_mut(hidden), true, d_v.first(kv_len), acts.norm1.first(hidden))?;
    // 1. Norm.
    let (weight, rstd) = (ctx.weights.input_norm.view(), acts.rstd1.first(t));
    ops.rms_norm_backward(RmsNormBackward { d_x: d.first_mut(hidden), d_y: d_norm.first(hidden), x, rstd, weight })
}
