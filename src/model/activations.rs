//! Buffers of activations: the values that forward leaves for backward, and scratch. They are sized for the largest
//! micro-batch.

use anyhow::Result;

use crate::device::{Arena, Buffer, Device, Documents, RowIndices};

use super::batch::{MicroBatch, NO_TARGET};
use super::config::ModelConfig;
use super::lora::LoraConfig;

/// Widths of a layer's activations.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    pub hidden: usize,
    pub q: usize,
    pub kv: usize,
    pub intermediate: usize,
    pub lora_rank: usize,
    /// Attention heads.
    pub heads: usize,
}

impl Widths {
    pub fn new(config: &ModelConfig, lora: Option<&LoraConfig>) -> Widths {
        Widths {
            hidden: config.hidden_size,
            q: config.num_attention_heads * config.head_dim,
            kv: config.num_key_value_heads * config.head_dim,
            intermediate: config.intermediate_size,
            lora_rank: lora.map_or(0, |l| l.lora_rank),
            heads: config.num_attention_heads,
        }
    }

    /// Widest input or output of a projection.
    pub fn widest(&self) -> usize {
        self.hidden.max(self.q).max(self.intermediate)
    }
}

/// Tells which parts of a layer's activations are valid: one flag for each part of [`LayerActivations`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    pub attention: bool,
    pub mlp: bool,
    pub rest: bool,
}

impl Parts {
    pub const NONE: Parts = Parts { attention: false, mlp: false, rest: false };

    pub fn all(self) -> bool {
        self.attention && self.mlp && self.rest
    }
}

/// The values that a layer's backward needs besides its input, in parts that are kept or computed again
/// independently.
pub struct LayerActivations<'a, D: Device> {
    pub attention: &'a mut AttentionPart<D>,
    pub mlp: &'a mut MlpPart<D>,
    pub rest: &'a mut RestPart<D>,
    pub key_value: &'a mut KeyValue<D>,
}

/// Attention's output `[T, q]` and log-sum-exp `[T, heads]`.
pub struct AttentionPart<D: Device> {
    pub out: Buffer<D, D::Act>,
    pub lse: Buffer<D, f32>,
}

/// Outputs of the large projections after attention.
pub struct MlpPart<D: Device> {
    /// The residual stream after attention `[T, hidden]`.
    pub h: Buffer<D, D::Act>,
    /// `[T, intermediate]`
    pub gate: Buffer<D, D::Act>,
    pub up: Buffer<D, D::Act>,
    /// A · dropout(x) of the output, gate, up and down projections, `[4][T, r]`.
    pub lora_u: [Buffer<D, D::Act>; 4],
}

/// Norms, the projections before attention, and act = silu(gate) · up: the values that are cheapest to compute again
/// for their size. Keys and values are kept with them, in buffers of their own.
pub struct RestPart<D: Device> {
    /// Normed input of attention `[T, hidden]`, its 1/rms `[T]`.
    pub norm1: Buffer<D, D::Act>,
    pub rstd1: Buffer<D, f32>,
    /// Rotated queries `[T, q]`.
    pub q: Buffer<D, D::Act>,
    pub norm2: Buffer<D, D::Act>,
    pub rstd2: Buffer<D, f32>,
    /// `[T, intermediate]`
    pub act: Buffer<D, D::Act>,
    /// A · dropout(x) of the projections before attention, `[3][T, r]`.
    pub lora_u: [Buffer<D, D::Act>; 3],
}

/// Rotated keys, and values: `[T, kv]`, or `[past + T, kv]` in generation.
pub struct KeyValue<D: Device> {
    pub k: Buffer<D, D::Act>,
    pub v: Buffer<D, D::Act>,
}

impl<D: Device> AttentionPart<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let out = arena.carve(&format!("{name}/out"), tokens * widths.q)?;
        Ok(Self { out, lse: arena.carve(&format!("{name}/lse"), tokens * widths.heads)? })
    }
}

impl<D: Device> MlpPart<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let mut carve = |part: &str, width: usize| arena.carve(&format!("{name}/{part}"), tokens * width);
        Ok(Self {
            h: carve("h", widths.hidden)?,
            gate: carve("gate", widths.intermediate)?,
            up: carve("up", widths.intermediate)?,
            lora_u: [
                carve("lora_u_o", widths.lora_rank)?,
                carve("lora_u_gate", widths.lora_rank)?,
                carve("lora_u_up", widths.lora_rank)?,
                carve("lora_u_down", widths.lora_rank)?,
            ],
        })
    }
}

impl<D: Device> RestPart<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let f = |part: &str| format!("{name}/{part}");
        let Widths { hidden, q, intermediate, lora_rank, .. } = *widths;
        Ok(Self {
            norm1: arena.carve(&f("norm1"), tokens * hidden)?,
            rstd1: arena.carve(&f("rstd1"), tokens)?,
            q: arena.carve(&f("q"), tokens * q)?,
            norm2: arena.carve(&f("norm2"), tokens * hidden)?,
            rstd2: arena.carve(&f("rstd2"), tokens)?,
            act: arena.carve(&f("act"), tokens * intermediate)?,
            lora_u: [
                arena.carve(&f("lora_u_q"), tokens * lora_rank)?,
                arena.carve(&f("lora_u_k"), tokens * lora_rank)?,
                arena.carve(&f("lora_u_v"), tokens * lora_rank)?,
            ],
        })
    }
}

impl<D: Device> KeyValue<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, widths: &Widths, tokens: usize) -> Result<Self> {
        let mut carve = |part: &str| arena.carve(&format!("{name}/{part}"), tokens * widths.kv);
        Ok(Self { k: carve("k")?, v: carve("v")? })
    }
}

/// Scratch memory that no two ops use at the same time.
pub struct Scratch<D: Device> {
    /// dropout(x), or d_u · A before its mask: `[T, widest]`.
    pub dropped: Buffer<D, D::Act>,
    /// `[T, r]`
    pub d_u: Buffer<D, D::Act>,
    /// Gradients: `[T, hidden]`, `[T, q]`, `[T, kv]`, `[T, intermediate]`.
    pub d_norm: Buffer<D, D::Act>,
    pub d_attention: Buffer<D, D::Act>,
    pub d_q: Buffer<D, D::Act>,
    pub d_k: Buffer<D, D::Act>,
    pub d_v: Buffer<D, D::Act>,
    /// Row sums of d_out · out in attention's backward, `[T, heads]`.
    pub delta: Buffer<D, f32>,
    pub d_act: Buffer<D, D::Act>,
    /// At least as wide as queries, because attention's backward uses these buffers after the MLP's.
    pub d_gate: Buffer<D, D::Act>,
    pub d_up: Buffer<D, D::Act>,
}

impl<D: Device> Scratch<D> {
    /// Without `backward` only the buffers that forward uses have a size.
    pub fn carve(arena: &mut Arena<D>, widths: &Widths, tokens: usize, backward: bool) -> Result<Self> {
        let back = if backward { tokens } else { 0 };
        let lora = if widths.lora_rank > 0 { tokens } else { 0 };
        Ok(Self {
            dropped: arena.carve("scratch/dropped", lora * widths.widest())?,
            d_u: arena.carve("scratch/d_u", back * widths.lora_rank)?,
            d_norm: arena.carve("scratch/d_norm", back * widths.hidden)?,
            d_attention: arena.carve("scratch/d_attention", back * widths.q)?,
            d_q: arena.carve("scratch/d_q", back * widths.q)?,
            d_k: arena.carve("scratch/d_k", back * widths.kv)?,
            d_v: arena.carve("scratch/d_v", back * widths.kv)?,
            delta: arena.carve("scratch/delta", back * widths.heads)?,
            d_act: arena.carve("scratch/d_act", back * widths.intermediate)?,
            d_gate: arena.carve("scratch/d_gate", back * widths.intermediate.max(widths.q))?,
            d_up: arena.carve("scratch/d_up", back * widths.intermediate.max(widths.q))?,
        })
    }
}

/// A micro-batch as the device sees it.
pub struct BatchBuffers<D: Device> {
    /// `[T, head_dim / 2]`
    pub cos: Buffer<D, f32>,
    pub sin: Buffer<D, f32>,
    /// Past tokens are those whose keys and values are there from earlier calls (generation).
    pub documents: Documents<D>,
    /// `[T]`
    pub sample_idx: Buffer<D, u64>,
    pub num_tokens: usize,
    /// Half of head_dim.
    half: usize,
}

impl<D: Device> BatchBuffers<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, config: &ModelConfig, tokens: usize) -> Result<Self> {
        let half = config.head_dim / 2;
        Ok(Self {
            cos: arena.carve(&format!("{name}/cos"), tokens * half)?,
            sin: arena.carve(&format!("{name}/sin"), tokens * half)?,
            documents: Documents::carve(arena, &format!("{name}/positions"), tokens)?,
            sample_idx: arena.carve(&format!("{name}/sample_idx"), tokens)?,
            num_tokens: 0,
            half,
        })
    }

    /// Uploads a micro-batch. In generation its first position is the number of past tokens.
    pub fn load(&mut self, device: &D, config: &ModelConfig, batch: &MicroBatch, num_past_tokens: usize) -> Result<()> {
        let tokens = batch.num_tokens();
        let (cos, sin) = config.rope.cos_sin(&batch.positions, &batch.documents);
        device.upload(self.cos.first_mut(tokens * self.half), &cos)?;
        device.upload(self.sin.first_mut(tokens * self.half), &sin)?;
        self.documents.put(device, &batch.documents, num_past_tokens)?;
        let mut sample_idx = Vec::with_capacity(tokens);
        for (document, &sample) in batch.documents.windows(2).zip(&batch.sample_idx) {
            sample_idx.resize(sample_idx.len() + (document[1] - document[0]) as usize, sample);
        }
        device.upload(self.sample_idx.first_mut(tokens), &sample_idx)?;
        self.num_tokens = tokens;
        Ok(())
    }
}

/// The head's running state of one micro-batch, for its N target tokens.
pub struct HeadState<D: Device> {
    /// Rows of the tokens that count, and the ids that they should predict, `[N]`.
    pub rows: RowIndices<D>,
    pub target_ids: Buffer<D, u32>,
    /// The factor of each token's −log p in the gradient, `[N]`.
    pub coefficients: Buffer<D, f32>,
    /// The last boundary's rows before and after the norm, `[N, hidden]`. After the finish, `normed` holds their
    /// gradient.
    pub x: Buffer<D, D::Act>,
    pub normed: Buffer<D, D::Act>,
    pub rstd: Buffer<D, f32>,
    /// Running maximum, sum of exponentials, logit of the target: `[N]`.
    pub max: Buffer<D, f32>,
    pub sum: Buffer<D, f32>,
    pub target_logit: Buffer<D, f32>,
    /// `Σ exp(logit − max) · W`, and `W[target]`: `[N, hidden]`, with backward only.
    pub acc: Buffer<D, f32>,
    pub target_rows: Buffer<D, D::Act>,
    pub num_targets: usize,
}

impl<D: Device> HeadState<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, hidden: usize, tokens: usize, backward: bool) -> Result<Self> {
        let f = |part: &str| format!("{name}/{part}");
        let back = if backward { tokens * hidden } else { 0 };
        Ok(Self {
            rows: RowIndices::carve(arena, &f("rows"), tokens)?,
            target_ids: arena.carve(&f("target_ids"), tokens)?,
            coefficients: arena.carve(&f("coefficients"), tokens)?,
            x: arena.carve(&f("x"), tokens * hidden)?,
            normed: arena.carve(&f("normed"), tokens * hidden)?,
            rstd: arena.carve(&f("rstd"), tokens)?,
            max: arena.carve(&f("max"), tokens)?,
            sum: arena.carve(&f("sum"), tokens)?,
            target_logit: arena.carve(&f("target_logit"), tokens)?,
            acc: arena.carve(&f("acc"), back)?,
            target_rows: arena.carve(&f("target_rows"), back)?,
            num_targets: 0,
        })
    }

    /// Uploads which tokens count. All have the same coefficient.
    pub fn load(&mut self, device: &D, batch: &MicroBatch, coefficient: f32) -> Result<()> {
        let rows: Vec<u32> =
            (0..batch.num_tokens() as u32).filter(|&t| batch.targets[t as usize] != NO_TARGET).collect();
        let target_ids: Vec<u32> = rows.iter().map(|&t| batch.targets[t as usize]).collect();
        self.num_targets = rows.len();
        self.rows.put(device, &rows, batch.num_tokens())?;
        device.upload(self.target_ids.first_mut(rows.len()), &target_ids)?;
        device.upload(self.coefficients.first_mut(rows.len()), &vec![coefficient; rows.len()])
    }
}
