//! The stages of a layer, each a residual branch in a file of its own: its tensors, forward, backward, the values that
//! it saves for backward, its scratch and its cost. Nothing elsewhere knows what is in a stage.

pub mod attention;
pub mod cost;
pub mod mlp;

pub use attention::Attention;
pub use mlp::Mlp;

use std::collections::BTreeMap;

use anyhow::Result;

use crate::device::{Arena, Buffer, Device, DropoutMask, Normed, Ops, RmsNormBackward, RmsNormForward, View, ViewMut};

use super::batch::BatchBuffers;
use super::linear::d_u_width;
use super::spec::{LayerSpec, ModelSpec, Module, ModuleId, Norm, TensorId};
use super::trainable::{LayerTrainables, LoraConfig, Trainables};
use super::weights::LayerWeights;

/// Tells for each group of saved values whether it is valid. Backward needs all four. A layer keeps a group, or
/// computes it again. A layer that keeps any other group keeps `lora` too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// LoRA's u = dropout(x) · Aᵀ of all modules. It costs most to compute again for its size.
    pub lora: bool,
    /// Attention's output and log-sum-exp.
    pub attention: bool,
    /// Outputs of the large products after attention.
    pub mlp: bool,
    /// Everything else: norms, the projections before attention, the activation. It is the cheapest to compute again
    /// for its size.
    pub rest: bool,
}

impl Saved {
    pub const NOTHING: Saved = Saved { lora: false, attention: false, mlp: false, rest: false };
    pub const EVERYTHING: Saved = Saved { lora: true, attention: true, mlp: true, rest: true };

    /// Returns whether backward needs no recompute.
    pub fn all(self) -> bool {
        self == Saved::EVERYTHING
    }

    /// Returns the groups that a recompute makes valid.
    pub fn missing(self) -> Saved {
        Saved { lora: !self.lora, attention: !self.attention, mlp: !self.mlp, rest: !self.rest }
    }
}

/// The inputs of a stage's computation, besides activations.
pub struct StageContext<'a, D: Ops> {
    pub ops: &'a D,
    pub spec: &'a ModelSpec,
    pub weights: LayerWeights<'a, D>,
    pub batch: &'a BatchBuffers<D>,
    /// The adapter's numbers and the layer's matrices; `None` computes with the base alone.
    pub trainables: Option<(&'a LoraConfig, &'a LayerTrainables)>,
    /// Seed and step of the dropout masks; `None` switches dropout off (evaluation).
    pub dropout: Option<(u64, u32)>,
    /// The groups of saved values that backward reads as a forward leaves them. Others are computed again, or never used.
    pub needed: Saved,
}

impl<'a, D: Ops> StageContext<'a, D> {
    /// Number of tokens.
    fn tokens(&self) -> usize {
        self.batch.num_tokens
    }

    /// The dropout masks of this call: `None` without dropout, in an evaluation or with a probability of 0.
    fn dropout_mask(&self) -> Option<DropoutMask<'a, D>> {
        let (seed, step) = self.dropout?;
        let (config, _) = self.trainables.filter(|(config, _)| config.dropout > 0.0)?;
        let (sample_idx, positions) = (self.batch.sample_idx.first(self.tokens()), self.batch.documents.positions());
        Some(DropoutMask { probability: config.dropout, seed, step, sample_idx, positions })
    }

    fn norm_forward(
        &self,
        norm: &Norm,
        y: ViewMut<'_, D, D::Act>,
        rstd: ViewMut<'_, D, f32>,
        x: Normed<'_, D>,
    ) -> Result<()> {
        let weight = self.weights.vector(TensorId::Norm(norm.id), norm.width)?;
        self.ops.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: self.spec.norm_eps })
    }

    /// Adds to d_x.
    fn norm_backward(
        &self,
        norm: &Norm,
        d_x: ViewMut<'_, D, D::Act>,
        d_y: View<'_, D, D::Act>,
        x: View<'_, D, D::Act>,
        rstd: View<'_, D, f32>,
    ) -> Result<()> {
        let weight = self.weights.vector(TensorId::Norm(norm.id), norm.width)?;
        self.ops.rms_norm_backward(RmsNormBackward { d_x, d_y, x, rstd, weight })
    }
}

/// Widths of buffers, each the largest of all layers, and the modules that layers have.
#[derive(Clone, Debug)]
pub struct Widths {
    pub hidden: usize,
    /// Features of all queries of a token, of all keys, and number of heads.
    pub q: usize,
    pub kv: usize,
    pub heads: usize,
    /// Features of queries and keys that are normed, and the number of runs that each norm takes for itself.
    pub normed_q: usize,
    pub normed_kv: usize,
    pub q_rstd: usize,
    pub k_rstd: usize,
    pub intermediate: usize,
    /// Features of outputs that are normed.
    pub attention_output: usize,
    pub mlp_output: usize,
    /// The modules that read attention's input, that which reads its output, and those of the MLP, each with its rank.
    pub attention_modules: Vec<(ModuleId, usize)>,
    pub mlp_modules: Vec<(ModuleId, usize)>,
    /// Values that a token has in d_u for the modules that read one input.
    pub d_u: usize,
}

impl Widths {
    pub fn new(spec: &ModelSpec, trainables: Option<&Trainables>) -> Widths {
        let runs = |norm: &Option<Norm>, width: usize| norm.as_ref().map_or(0, |norm| width / norm.width);
        let normed = |norm: &Option<Norm>, width: usize| if norm.is_some() { width } else { 0 };
        let hidden = spec.hidden_size;
        let rank = |layer: usize, id: ModuleId| {
            trainables.and_then(|trainables| trainables.layers[layer].module(id)).map_or(0, |module| module.lora_rank)
        };
        let ranks = |modules: fn(&LayerSpec) -> &[Module]| {
            let mut ranks: BTreeMap<ModuleId, usize> = BTreeMap::new();
            for (i, layer) in spec.layers.iter().enumerate() {
                for module in modules(layer) {
                    let largest = ranks.entry(module.id).or_default();
                    *largest = rank(i, module.id).max(*largest);
                }
            }
            ranks.into_iter().collect()
        };
        let d_u = |i: usize, modules: &mut dyn Iterator<Item = &Module>| {
            modules.map(|module| d_u_width(rank(i, module.id))).sum::<usize>()
        };
        let d_u = spec.layers.iter().enumerate().flat_map(|(i, LayerSpec { attention, mlp })| {
            let (a, b) = (d_u(i, &mut attention.inputs()), d_u(i, &mut attention.outputs()));
            [a, b, d_u(i, &mut mlp.inputs()), d_u(i, &mut mlp.outputs())]
        });
        Widths {
            hidden,
            q: spec.widest(|layer| layer.attention.q_width()),
            kv: spec.widest(|layer| layer.attention.kv_width()),
            heads: spec.widest(|layer| layer.attention.num_heads),
            normed_q: spec.widest(|layer| normed(&layer.attention.q_norm, layer.attention.q_width())),
            normed_kv: spec.widest(|layer| normed(&layer.attention.k_norm, layer.attention.kv_width())),
            q_rstd: spec.widest(|layer| runs(&layer.attention.q_norm, layer.attention.q_width())),
            k_rstd: spec.widest(|layer| runs(&layer.attention.k_norm, layer.attention.kv_width())),
            intermediate: spec.widest(|layer| layer.mlp.intermediate_size),
            attention_output: spec.widest(|layer| normed(&layer.attention.output_norm, hidden)),
            mlp_output: spec.widest(|layer| normed(&layer.mlp.output_norm, hidden)),
            attention_modules: ranks(|layer| &layer.attention.modules),
            mlp_modules: ranks(|layer| &layer.mlp.modules),
            d_u: d_u.max().unwrap_or(0),
        }
    }

    /// Widest input or output of a module.
    pub fn widest(&self) -> usize {
        self.hidden.max(self.q).max(self.intermediate)
    }
}

/// Scratch memory, which stages share because they run one after the other.
pub struct Scratch<D: Device> {
    /// dropout(x), d_u · A before its mask, or partial sums of LoRA's gradients: `[T, widest]`.
    pub dropped: Buffer<D, D::Act>,
    /// `[modules that share an input, T, r]`, see [`d_u_width`].
    pub d_u: Buffer<D, D::Act>,
    /// Gradients: `[T, hidden]`, `[T, q]`, `[T, kv]`.
    pub d_norm: Buffer<D, D::Act>,
    pub d_attention: Buffer<D, D::Act>,
    pub d_q: Buffer<D, D::Act>,
    pub d_k: Buffer<D, D::Act>,
    pub d_v: Buffer<D, D::Act>,
    /// Row sums of d_out · out in attention's backward, `[T, heads]`.
    pub delta: Buffer<D, f32>,
    /// The gradient of the MLP's activation `[T, intermediate]`. In attention's backward it is two halves of `[T, q]`:
    /// the gradients of keys and values of each query head, and after them those of queries and keys before their norms.
    pub d_wide: Buffer<D, D::Act>,
}

impl<D: Device> Scratch<D> {
    /// Without `backward` only the buffers that forward uses have a size.
    pub fn carve(arena: &mut Arena<D>, widths: &Widths, tokens: usize, backward: bool) -> Result<Self> {
        let back = if backward { tokens } else { 0 };
        let lora = if widths.d_u > 0 { tokens } else { 0 };
        Ok(Self {
            dropped: arena.carve("scratch/dropped", lora * widths.widest())?,
            d_u: arena.carve("scratch/d_u", back * widths.d_u)?,
            d_norm: arena.carve("scratch/d_norm", back * widths.hidden)?,
            d_attention: arena.carve("scratch/d_attention", back * widths.q)?,
            d_q: arena.carve("scratch/d_q", back * widths.q)?,
            d_k: arena.carve("scratch/d_k", back * widths.kv)?,
            d_v: arena.carve("scratch/d_v", back * widths.kv)?,
            delta: arena.carve("scratch/delta", back * widths.heads)?,
            d_wide: arena.carve("scratch/d_wide", back * widths.intermediate.max(2 * widths.q))?,
        })
    }
}
