//! Each op at the sizes of a model's first layer, with the adapter and the base that a job describes.

use anyhow::Result;
use serde_json::Value;

use crate::comm::mpi::MpiComm;
use crate::device::*;
use crate::fsdp::unit::HEAD_PIECE_ROWS;
use crate::model::spec::{LayerSpec, ModelSpec, Module};
use crate::model::trainable::{LayerTrainables, LoraConfig, LoraModule};
use crate::quant::record::{Dtype, Encoding};
use crate::recipe::Job;
use crate::start::Start;
use crate::start::adapter::planned_settings;
use crate::start::agree::Agreed;
use crate::start::options::nf4_double_quant;
use crate::start::placement::Placement;

use super::timer::{Amount, Timer, random, random_act};

/// Gemma's width of a head, which has tiles of its own.
const WIDE: usize = 256;

/// The kind of an attention.
#[derive(Clone, Copy)]
struct Scores {
    head_dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
}

/// Times each op, and gives `tell` one object for each, on rank 0. The job says how many tokens there are, and of which
/// kind adapter and base are. Collective.
pub fn run(start: &Start, mut comm: MpiComm, job: &Agreed<Job>, spec: &ModelSpec, tell: &dyn Fn(Value)) -> Result<()> {
    let lora = planned_settings(&job.lora, spec)?.lora_config();
    let placement = start.place_for(&mut comm, job, spec)?;
    if !start.log.enabled {
        return Ok(());
    }
    match placement {
        Placement::Cpu(cpu) => Kernels::new(&cpu, job, spec, &lora, tell)?.time(),
        Placement::Bf16(cuda, _) => Kernels::new(&cuda, job, spec, &lora, tell)?.time(),
        Placement::Fp16(cuda, _) => Kernels::new(&cuda, job, spec, &lora, tell)?.time(),
    }
}

/// The ops of a layer on a device, and their sizes.
pub(super) struct Kernels<'a, D: Ops> {
    pub device: &'a D,
    pub timer: Timer<'a, D>,
    pub tokens: usize,
    pub lora: &'a LoraConfig,
    spec: &'a ModelSpec,
    pub layer: &'a LayerSpec,
    /// The form in which projections are stored.
    encoding: Encoding,
}

impl<'a, D: Ops> Kernels<'a, D> {
    fn new(
        device: &'a D,
        job: &Job,
        spec: &'a ModelSpec,
        lora: &'a LoraConfig,
        tell: &'a dyn Fn(Value),
    ) -> Result<Self> {
        let encoding = match nf4_double_quant(job) {
            Some(double_quant) => Encoding::Nf4 { double_quant },
            None => Encoding::Plain(Dtype::Bf16),
        };
        let (timer, tokens, layer) = (Timer::new(device, tell)?, job.data.max_length, &spec.layers[0]);
        Ok(Kernels { device, timer, tokens, lora, spec, layer, encoding })
    }

    fn time(&self) -> Result<()> {
        self.products()?;
        self.dequantize()?;
        self.rows()?;
        self.mlp()?;
        self.attentions()?;
        self.head()?;
        self.optimizer()
    }

    pub fn act(&self, len: usize) -> Result<Buffer<D, D::Act>> {
        random_act(self.device, len)
    }

    pub fn f32s(&self, len: usize) -> Result<Buffer<D, f32>> {
        random(self.device, len)
    }

    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<D, T>> {
        super::buffer(self.device, len)
    }

    /// The base's products of the first module of each group that shares an input, and LoRA's of the first that is a
    /// target.
    fn products(&self) -> Result<()> {
        let (attention, mlp) = (&self.layer.attention, &self.layer.mlp);
        let groups: [Vec<&Module>; 4] = [
            attention.inputs().collect(),
            attention.outputs().collect(),
            mlp.inputs().collect(),
            mlp.outputs().collect(),
        ];
        for modules in groups {
            if let Some(first) = modules.first() {
                self.base(first)?;
            }
            // Modules that share a kernel have one rank.
            let targets = |module: &&Module| self.modules().iter().find(|lora| lora.id == module.id).copied();
            let all: Vec<LoraModule> = modules.iter().filter_map(targets).collect();
            if let Some((module, lora)) = modules.iter().find_map(|module| Some((module, targets(module)?))) {
                self.lora(module, lora, all.iter().filter(|other| other.lora_rank == lora.lora_rank).count())?;
            }
        }
        Ok(())
    }

    /// The modules of the first layer that have LoRA.
    pub(super) fn modules(&self) -> &[LoraModule] {
        self.lora.layers.first().map_or(&[], Vec::as_slice)
    }

    fn base(&self, module: &Module) -> Result<()> {
        use Transpose::{No, Yes};
        let (d, tokens) = (self.device, self.tokens);
        let Module { id, out_features: n, in_features: k, .. } = *module;
        let (x, mut y, w) = (self.act(tokens * k)?, self.act(tokens * n)?, self.act(n * k)?);
        let flops = Amount::Flops(2.0 * (tokens * k * n) as f64);
        self.timer.time(&format!("{id} x·Wᵀ"), flops, || {
            product(d, y.view_mut(), x.view(), (w.view(), Yes), [tokens, n, k], 1.0, 0.0)
        })?;
        let mut d_x = self.act(tokens * k)?;
        self.timer.time(&format!("{id} d_y·W"), flops, || {
            product(d, d_x.view_mut(), y.view(), (w.view(), No), [tokens, k, n], 1.0, 0.0)
        })
    }

    fn dequantize(&self) -> Result<()> {
        let Some(module) = self.layer.mlp.inputs().next() else { return Ok(()) };
        let (len, encoding) = (module.out_features * module.in_features, self.encoding);
        let (records, mut weights) = (self.zeros::<u8>(encoding.tensor_bytes(len))?, self.zeros::<D::Act>(len)?);
        let bytes = (records.len() + len * size_of::<D::Act>()) as f64;
        self.timer.time(&format!("dequantize {}, {}", module.id, encoding.name()), Amount::Bytes(bytes), || {
            self.device.dequantize(vec![Dequantize { weights: weights.view_mut(), records: records.view(), encoding }])
        })
    }

    /// Ops on `[tokens, hidden]`.
    fn rows(&self) -> Result<()> {
        let (d, tokens, hidden) = (self.device, self.tokens, self.spec.hidden_size);
        let len = tokens * hidden;
        let moved = |times: f64| Amount::Bytes(times * (len * size_of::<D::Act>()) as f64);
        let (x, mut y, weight, mut rstd) = (self.act(len)?, self.act(len)?, self.f32s(hidden)?, self.f32s(tokens)?);
        self.timer.time("rms_norm forward", moved(2.0), || {
            let (y, rstd, x, weight) = (y.view_mut(), rstd.view_mut(), Normed::Plain(x.view()), weight.view());
            d.rms_norm_forward(RmsNormForward { y, rstd, x, weight, eps: 1e-5 })
        })?;
        let mut d_x = self.act(len)?;
        self.timer.time("rms_norm backward", moved(4.0), || {
            let (d_x, d_y, x) = (d_x.view_mut(), y.view(), x.view());
            d.rms_norm_backward(RmsNormBackward { d_x, d_y, x, rstd: rstd.view(), weight: weight.view() })
        })?;
        self.timer.time("add", moved(3.0), || d.add(y.view_mut(), x.view()))?;
        let (head_dim, num_heads) = (self.layer.attention.head_dim, self.layer.attention.num_heads);
        let (cos, sin) = (self.f32s(tokens * head_dim / 2)?, self.f32s(tokens * head_dim / 2)?);
        let mut q = self.act(tokens * num_heads * head_dim)?;
        self.timer.time("rope", Amount::Bytes((2 * q.len() * size_of::<D::Act>()) as f64), || {
            let rotation = Rotation { cos: cos.view(), sin: sin.view(), num_heads, head_dim, rotary_dim: head_dim };
            d.rope(Rope { x: q.view_mut(), rotation, inverse: false })
        })
    }

    fn mlp(&self) -> Result<()> {
        let (d, len) = (self.device, self.tokens * self.layer.mlp.intermediate_size);
        let moved = |times: f64| Amount::Bytes(times * (len * size_of::<D::Act>()) as f64);
        let (mut gate, mut up, mut y) = (self.act(len)?, self.act(len)?, self.act(len)?);
        let (activation, rows) = (self.layer.mlp.activation, &self.layer.mlp.gate);
        let module = self.layer.mlp.inputs().find(|module| module.id == rows.module);
        let lora = self.modules().iter().find(|lora| lora.id == rows.module);
        if let (Some(module), Some(lora)) = (module, lora) {
            // One module may give both.
            self.gated_forward(&Module { out_features: rows.rows.len(), ..module.clone() }, *lora, activation)?;
        }
        self.timer.time("gated forward", moved(3.0), || {
            d.gated_forward(GatedForward { y: y.view_mut(), gate: gate.view(), up: up.view(), activation })
        })?;
        self.timer.time("gated backward", moved(5.0), || {
            d.gated_backward(GatedBackward { gate: gate.view_mut(), up: up.view_mut(), d_y: y.view(), activation })
        })?;
        self.gated_backward()
    }

    /// The attention of the model, and those of other families over the same q, k and v: with capped scores, in a
    /// window, with heads of 256.
    fn attentions(&self) -> Result<()> {
        let (stage, tokens) = (&self.layer.attention, self.tokens);
        let plain = Scores { head_dim: stage.head_dim, window: None, softcap: None };
        let window = Some(1024).filter(|window| *window < tokens);
        self.attention("attention", plain)?;
        self.attention("attention, capped", Scores { softcap: Some(50.0), ..plain })?;
        if window.is_some() {
            self.attention("attention, window 1024", Scores { window, ..plain })?;
        }
        let [q, kv] = [stage.q_width(), stage.kv_width()];
        if stage.head_dim != WIDE && q.is_multiple_of(WIDE) && kv.is_multiple_of(WIDE) {
            let wide = Scores { head_dim: WIDE, ..plain };
            self.attention("attention, head_dim 256", wide)?;
        }
        Ok(())
    }

    /// Attention over one document. The model's q, k and v are divided into heads of the width that `scores` says.
    fn attention(&self, name: &str, scores: Scores) -> Result<()> {
        let Scores { head_dim, window, softcap } = scores;
        let (d, stage, tokens) = (self.device, &self.layer.attention, self.tokens);
        let (heads, kv_heads) = (stage.q_width() / head_dim, stage.kv_width() / head_dim);
        let (q_len, kv_len) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
        let (q, k, v) = (self.act(q_len)?, self.act(kv_len)?, self.act(kv_len)?);
        let (mut out, mut lse) = (self.act(q_len)?, self.f32s(tokens * heads)?);
        let mut documents = Arena::carved(d, |arena| Documents::carve(arena, "documents", tokens))?;
        documents.put(d, &[0, tokens as u32], 0)?;
        let shape = AttentionShape {
            num_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap,
            window,
            documents: &documents,
        };
        // Causal: half of the scores, without those outside of the window. Two products forward, five backward.
        let hidden = tokens - window.unwrap_or(tokens);
        let product = ((tokens * tokens - hidden * hidden) * heads * head_dim) as f64;
        self.timer.time(&format!("{name} forward"), Amount::Flops(2.0 * product), || {
            let (out, lse, q, k, v) = (out.view_mut(), lse.view_mut(), q.view(), k.view(), v.view());
            d.attention_forward(AttentionForward { out, lse, q, k, v, shape })
        })?;
        let (mut d_q, mut d_k, mut d_v) = (self.act(q_len)?, self.act(kv_len)?, self.act(kv_len)?);
        let (d_out, mut delta) = (self.act(q_len)?, self.f32s(tokens * heads)?);
        let (mut head_d_k, mut head_d_v) = (self.act(q_len)?, self.act(q_len)?);
        self.timer.time(&format!("{name} backward"), Amount::Flops(5.0 * product), || {
            d.attention_backward(AttentionBackward {
                d_q: d_q.view_mut(),
                d_k: d_k.view_mut(),
                d_v: d_v.view_mut(),
                delta: delta.view_mut(),
                head_d_k: head_d_k.view_mut(),
                head_d_v: head_d_v.view_mut(),
                d_out: d_out.view(),
                out: out.view(),
                lse: lse.view(),
                q: q.view(),
                k: k.view(),
                v: v.view(),
                shape,
            })
        })
    }

    fn head(&self) -> Result<()> {
        let (d, tokens, hidden) = (self.device, self.tokens, self.spec.hidden_size);
        let rows = HEAD_PIECE_ROWS.min(self.spec.vocab_size);
        let (x, weight, target_ids) =
            (self.act(tokens * hidden)?, self.act(rows * hidden)?, self.zeros::<u32>(tokens)?);
        let (mut max, mut sum, mut target_logit) = (self.f32s(tokens)?, self.f32s(tokens)?, self.f32s(tokens)?);
        let (mut acc, mut logits) = (self.f32s(tokens * hidden)?, self.f32s(tokens * rows)?);
        // Two products: the logits, and their part of the gradient.
        self.timer.time("cross_entropy piece", Amount::Flops(4.0 * (tokens * rows * hidden) as f64), || {
            d.cross_entropy_piece(CrossEntropyPiece {
                max: max.view_mut(),
                sum: sum.view_mut(),
                target_logit: target_logit.view_mut(),
                acc: Some(acc.view_mut()),
                logits: logits.view_mut(),
                x: x.view(),
                weight: weight.view(),
                target_ids: target_ids.view(),
                first_id: 0,
                softcap: self.spec.head.softcap,
            })
        })
    }

    /// AdamW on the adapter of the layer.
    fn optimizer(&self) -> Result<()> {
        let (d, len) = (self.device, LayerTrainables::new(self.layer, self.modules()).len());
        let mut state = [self.f32s(len)?, self.f32s(len)?, self.f32s(len)?];
        let grad = self.f32s(len)?;
        self.timer.time("adamw of the layer's adapter", Amount::Bytes((7 * 4 * len) as f64), || {
            let [param, exp_avg, exp_avg_sq] = &mut state;
            d.adamw(AdamW {
                param: param.view_mut(),
                exp_avg: exp_avg.view_mut(),
                exp_avg_sq: exp_avg_sq.view_mut(),
                grad: grad.view(),
                grad_scale: 1.0,
                learning_rate: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                step: 1,
            })
        })
    }
}
