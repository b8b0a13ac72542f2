//! Every buffer of the executor, carved by name in one place.

use anyhow::Result;

use crate::device::cpu::Cpu;
use crate::device::{Arena, Buffer, Device, HostBuffer, MemoryPlan, Place};
use crate::model::activations::{BatchBuffers, HeadState, KeyValue, LayerActivations, Scratch, Widths};
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;
use crate::model::weights::LayerWeights;

use super::layout::{TrainableLayout, UnitLayout};
use super::schedule::{Accumulation, Inputs, Mode, Recompute};
use super::unit::{HEAD_PIECE_ROWS, NumUnits};

/// What the memory must hold; decided once, before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// [`Mode::Train`] has room for scoring too.
    pub mode: Mode,
    /// Tokens of the largest micro-batch.
    pub max_tokens: usize,
    /// M of the largest step.
    pub max_micro_batches: usize,
    /// Tokens whose keys and values are kept in generation.
    pub max_context: usize,
    pub accumulation: Accumulation,
    pub recompute: Recompute,
    pub num_slots: usize,
    /// What is kept on the device and what streams from the host.
    pub residency: Residency,
}

/// What is kept on the device; the rest waits in host memory until it is needed. No choice changes a bit of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Units whose shards are on the device.
    pub units: usize,
    /// LoRA values, gradients and AdamW moments are on the device, and updated there.
    pub trainables: bool,
    /// Device buffers for boundaries.
    pub boundary_buffers: usize,
}

impl Residency {
    /// Everything on the device.
    pub const ALL: Residency = Residency { units: usize::MAX, trainables: true, boundary_buffers: usize::MAX };

    /// Which of `num_units` units are resident: spread evenly, so that a fetch always has computation to hide behind.
    pub fn of_units(&self, num_units: usize) -> Vec<bool> {
        let resident = self.units.min(num_units);
        (0..num_units).map(|i| (i + 1) * resident / num_units > i * resident / num_units).collect()
    }
}

impl Limits {
    /// The schedule's inputs for a step of M micro-batches.
    pub fn inputs(&self, units: NumUnits, mode: Mode, num_micro_batches: usize) -> Inputs {
        let Limits { accumulation, recompute, num_slots, residency, .. } = *self;
        let mut inputs = Inputs {
            units,
            mode,
            num_micro_batches,
            accumulation,
            recompute,
            num_slots,
            num_boundary_buffers: residency.boundary_buffers,
        };
        // The buffers are those of the largest step that trains; a smaller one keeps more of its boundaries.
        let planned = Inputs { mode: self.mode, num_micro_batches: self.max_micro_batches, ..inputs };
        let (least, most) = (planned.min_boundary_buffers(), planned.max_boundary_buffers());
        inputs.num_boundary_buffers = residency.boundary_buffers.clamp(least, most);
        inputs
    }
}

/// A rank's trainable values of one layer and what belongs to them. The buffers are away while a collective has them.
pub struct Trainable<D: Device> {
    pub master: Option<Place<D, f32>>,
    pub grad: Option<Place<D, f32>>,
    pub exp_avg: Place<D, f32>,
    pub exp_avg_sq: Place<D, f32>,
}

/// All device memory of a run.
pub struct Memory<D: Device> {
    /// Gathered units: frozen bytes and trainable values.
    pub slots: Vec<(Buffer<D, u8>, Buffer<D, f32>)>,
    pub layer: LayerWeights<D>,
    pub head_piece: Buffer<D, D::Act>,
    pub final_norm: Buffer<D, f32>,
    pub trainables: Vec<Trainable<D>>,
    /// Whole gradients of a layer, by gradient slot.
    pub grads: Vec<Buffer<D, f32>>,
    /// Device buffers for boundaries, and the host's for those that wait there.
    pub boundaries: Vec<Buffer<D, D::Act>>,
    pub host_boundaries: Vec<HostBuffer<D::Act>>,
    /// One, or, when everything is kept, `[layers · live micro-batches]`.
    pub activations: Vec<LayerActivations<D>>,
    /// As `activations`; in generation one for each layer.
    pub key_values: Vec<KeyValue<D>>,
    pub scratch: Scratch<D>,
    pub batches: Vec<BatchBuffers<D>>,
    pub heads: Vec<HeadState<D>>,
    /// `[max_tokens, piece rows]`, or the logits of one token `[vocab]` in generation.
    pub logits: Buffer<D, f32>,
}

/// What a rank takes, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plans {
    pub device: MemoryPlan,
    /// Host memory that the device copies from and to.
    pub host: MemoryPlan,
}

impl<D: Device> Memory<D> {
    /// What [`Memory::carve`] takes.
    pub fn plan(
        config: &ModelConfig,
        lora: Option<(&LayerLora, TrainableLayout, bool)>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Plans> {
        let (mut device, mut host) = (Arena::measure(), Arena::measure());
        Self::carve(&mut device, &mut host, config, lora, layouts, limits)?;
        Ok(Plans { device: device.into_plan(), host: host.into_plan() })
    }

    /// The first call, on measuring arenas, is the plan; the second takes the memory.
    pub fn carve(
        arena: &mut Arena<D>,
        host: &mut Arena<Cpu>,
        config: &ModelConfig,
        lora: Option<(&LayerLora, TrainableLayout, bool)>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Memory<D>> {
        let train = limits.mode == Mode::Train;
        let units = NumUnits::new(config);
        let inputs = limits.inputs(units, limits.mode, limits.max_micro_batches);
        let live = inputs.num_live_micro_batches();
        let (tokens, hidden) = (limits.max_tokens, config.hidden_size);
        let widths = Widths::new(config, lora.map(|(l, ..)| &l.config));
        let padded_len = lora.map_or(0, |(_, layout, _)| layout.padded_len());
        let flat_bytes = layouts.iter().map(UnitLayout::gathered_bytes).max().unwrap_or(0);
        let slots = (0..limits.num_slots)
            .map(|i| {
                Ok((
                    arena.carve(&format!("slots/{i}/flat"), flat_bytes)?,
                    arena.carve(&format!("slots/{i}/lora"), padded_len)?,
                ))
            })
            .collect::<Result<_>>()?;
        let layer = LayerWeights::carve(arena, config, lora.map(|(l, ..)| &l.layout))?;
        let piece_rows = HEAD_PIECE_ROWS.min(config.vocab_size);
        let head_piece = arena.carve("weights/head_piece", piece_rows * hidden)?;
        let final_norm = arena.carve("weights/final_norm", hidden)?;
        let trainables = match lora {
            None => Vec::new(),
            Some((_, layout, sharded)) => {
                let len = if sharded { layout.part_len() } else { layout.padded_len() };
                let on_device = limits.residency.trainables;
                (0..units.layers)
                    .map(|layer| Trainable::carve(arena, host, layer, len, train, on_device))
                    .collect::<Result<_>>()?
            }
        };
        let grads = (0..inputs.num_grad_slots())
            .map(|i| arena.carve(&format!("gradients/{i}"), padded_len))
            .collect::<Result<_>>()?;
        let boundaries = (0..inputs.num_boundary_buffers)
            .map(|i| arena.carve(&format!("boundaries/{i}"), tokens * hidden))
            .collect::<Result<_>>()?;
        let host_boundaries = (0..inputs.num_offloaded_boundaries())
            .map(|i| host.carve(&format!("boundaries/{i}"), tokens * hidden))
            .collect::<Result<_>>()?;
        let kept = if train && limits.recompute == Recompute::Nothing { units.layers * live } else { 1 };
        let heads = config.num_attention_heads;
        let activations = (0..kept)
            .map(|i| LayerActivations::carve(arena, &format!("activations/{i}"), &widths, heads, tokens))
            .collect::<Result<_>>()?;
        let (num_kv, kv_tokens) =
            if limits.mode == Mode::Generate { (units.layers, limits.max_context) } else { (kept, tokens) };
        let key_values = (0..num_kv)
            .map(|i| KeyValue::carve(arena, &format!("key_values/{i}"), &widths, kv_tokens))
            .collect::<Result<_>>()?;
        let scratch = Scratch::carve(arena, &widths, heads, tokens, train)?;
        let batches = (0..live)
            .map(|m| BatchBuffers::carve(arena, &format!("batches/{m}"), config, tokens))
            .collect::<Result<_>>()?;
        let head_tokens = if limits.mode == Mode::Generate { 1 } else { tokens };
        let heads = (0..live)
            .map(|m| HeadState::carve(arena, &format!("head/{m}"), hidden, head_tokens, train))
            .collect::<Result<_>>()?;
        let num_logits = if limits.mode == Mode::Generate { config.vocab_size } else { tokens * piece_rows };
        let logits = arena.carve("head/logits", num_logits)?;
        Ok(Memory {
            slots,
            layer,
            head_piece,
            final_norm,
            trainables,
            grads,
            boundaries,
            host_boundaries,
            activations,
            key_values,
            scratch,
            batches,
            heads,
            logits,
        })
    }
}

impl<D: Device> Trainable<D> {
    fn carve(
        arena: &mut Arena<D>,
        host: &mut Arena<Cpu>,
        layer: usize,
        len: usize,
        train: bool,
        on_device: bool,
    ) -> Result<Self> {
        let state_len = if train { len } else { 0 };
        let mut carve = |part: &str, len: usize| -> Result<Place<D, f32>> {
            let name = format!("trainable/{layer}/{part}");
            Ok(if on_device { Place::Device(arena.carve(&name, len)?) } else { Place::Host(host.carve(&name, len)?) })
        };
        Ok(Trainable {
            master: Some(carve("master", len)?),
            grad: Some(carve("grad", state_len)?),
            exp_avg: carve("exp_avg", state_len)?,
            exp_avg_sq: carve("exp_avg_sq", state_len)?,
        })
    }
}
