//! Every buffer of the executor, carved by name in one place.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::comm::Gather;
use crate::comm::guarded::Guarded;
use crate::device::cpu::Cpu;
use crate::device::{Arena, Buffer, Device, HostBuffer, MemoryPlan, Place};
use crate::model::activations::{
    AttentionPart, BatchBuffers, HeadState, KeyValue, LayerActivations, MlpPart, RestPart, Scratch, Widths,
};
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;
use crate::model::weights::LayerWeights;

use super::layout::{TrainableLayout, UnitLayout};
use super::schedule::{Accumulation, Inputs, Keep, Mode};
use super::unit::{HEAD_PIECE_ROWS, NumUnits};

/// The sizes that the memory must hold, decided once, before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// [`Mode::Train`] has room for scoring too.
    pub mode: Mode,
    /// Tokens of the largest micro-batch, and of the longest sequence in it.
    pub max_tokens: usize,
    pub max_length: usize,
    /// M of the largest step.
    pub max_micro_batches: usize,
    /// Tokens whose keys and values are kept in generation.
    pub max_context: usize,
    pub accumulation: Accumulation,
    pub keep: Keep,
    pub gather: Gather,
    pub num_slots: usize,
    /// The choice between device and host for everything that may stream.
    pub residency: Residency,
}

/// Selects what stays on the device. The rest waits in host memory until it is needed. No choice changes a bit of the
/// result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residency {
    /// Number of units whose shards are on the device.
    pub units: usize,
    /// True if LoRA values, gradients and AdamW moments are on the device and updated there.
    pub trainables: bool,
    /// Number of device buffers for boundaries.
    pub boundary_buffers: usize,
}

impl Residency {
    /// Keeps everything on the device.
    pub const ALL: Residency = Residency { units: usize::MAX, trainables: true, boundary_buffers: usize::MAX };

    /// Returns which of `num_units` units are resident. They are spread evenly, so that a fetch always has
    /// computation to hide behind.
    pub fn of_units(&self, num_units: usize) -> Vec<bool> {
        let resident = self.units.min(num_units);
        (0..num_units).map(|i| (i + 1) * resident / num_units > i * resident / num_units).collect()
    }
}

impl Limits {
    /// Layer-major with two slots, everything on the device, and everything recomputed that can be.
    pub fn new(mode: Mode, max_tokens: usize, max_micro_batches: usize) -> Limits {
        Limits {
            mode,
            max_tokens,
            max_length: max_tokens,
            max_micro_batches,
            max_context: 0,
            accumulation: Accumulation::Layer,
            keep: Keep::NOTHING,
            gather: Gather::Collective,
            num_slots: 2,
            residency: Residency::ALL,
        }
    }

    /// The schedule's inputs for a step of M micro-batches.
    pub fn inputs(&self, units: NumUnits, mode: Mode, num_micro_batches: usize) -> Inputs {
        let Limits { accumulation, keep, num_slots, residency, .. } = *self;
        let mut inputs = Inputs {
            units,
            mode,
            num_micro_batches,
            accumulation,
            keep,
            num_slots,
            num_boundary_buffers: residency.boundary_buffers,
        };
        // Buffers are sized for the largest training step; a smaller step keeps more of its boundaries on the device.
        let planned = Inputs { mode: self.mode, num_micro_batches: self.max_micro_batches, ..inputs };
        let (least, most) = (planned.min_boundary_buffers(), planned.max_boundary_buffers());
        inputs.num_boundary_buffers = residency.boundary_buffers.clamp(least, most);
        inputs
    }
}

/// A rank's trainable values of one layer with their gradients and moments. A buffer is `None` while a collective has
/// it.
pub struct Trainable<D: Device> {
    pub master: Option<Guarded<Place<D, f32>>>,
    pub grad: Option<Guarded<Place<D, f32>>>,
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
    /// Device buffers for boundaries, and host buffers for those that wait there.
    pub boundaries: Vec<Buffer<D, D::Act>>,
    pub host_boundaries: Vec<HostBuffer<D::Act>>,
    pub activations: Activations<D>,
    pub scratch: Scratch<D>,
    pub batches: Vec<BatchBuffers<D>>,
    pub heads: Vec<HeadState<D>>,
    /// `[max_tokens, piece rows]`, or the logits of one token `[vocab]` in generation.
    pub logits: Buffer<D, f32>,
}

/// The memory of a rank, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plans {
    pub device: MemoryPlan,
    /// Host memory that the device copies from and to.
    pub host: MemoryPlan,
}

impl<D: Device> Memory<D> {
    /// Computes what [`Memory::carve`] takes, without taking it.
    pub fn plan(
        config: &ModelConfig,
        lora: Option<(&LayerLora, TrainableLayout)>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Plans> {
        let (mut device, mut host) = (Arena::measure(), Arena::measure());
        Self::carve(&mut device, &mut host, config, lora, layouts, limits)?;
        Ok(Plans { device: device.into_plan(), host: host.into_plan() })
    }

    /// The first call runs on measuring arenas and gives the plan; the second takes the memory.
    pub fn carve(
        arena: &mut Arena<D>,
        host: &mut Arena<Cpu>,
        config: &ModelConfig,
        lora: Option<(&LayerLora, TrainableLayout)>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Memory<D>> {
        let train = limits.mode == Mode::Train;
        let units = NumUnits::new(config);
        let inputs = limits.inputs(units, limits.mode, limits.max_micro_batches);
        let live = inputs.num_live_micro_batches();
        let (tokens, hidden) = (limits.max_tokens, config.hidden_size);
        let widths = Widths::new(config, lora.map(|(l, ..)| &l.config));
        let padded_len = lora.map_or(0, |(_, layout)| layout.padded_len());
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
            Some((_, layout)) => {
                let (len, on_device) = (layout.shard_len(), limits.residency.trainables);
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
        let activations = Activations::carve(arena, units.layers, live, &widths, limits)?;
        let scratch = Scratch::carve(arena, &widths, tokens, train)?;
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
            scratch,
            batches,
            heads,
            logits,
        })
    }
}

/// Activations of all layers and live micro-batches.
pub struct Activations<D: Device> {
    attention: Kept<AttentionPart<D>>,
    mlp: Kept<MlpPart<D>>,
    rest: Kept<RestPart<D>>,
    /// In generation every layer has keys and values of its own.
    key_values: Kept<KeyValue<D>>,
}

/// One part of the activations.
struct Kept<T> {
    /// Buffer shared by all layers that keep none.
    shared: Option<T>,
    /// Buffers of layer `first_layer` and the layers after it, by layer and live micro-batch.
    kept: Vec<T>,
    first_layer: usize,
    live: usize,
}

impl<T> Kept<T> {
    /// Makes the buffers of a part that the last `num_kept` of `layers` layers keep.
    fn new(layers: usize, num_kept: usize, live: usize, mut carve: impl FnMut(usize) -> Result<T>) -> Result<Self> {
        let first_layer = layers.saturating_sub(num_kept);
        let shared = if first_layer > 0 { Some(carve(0)?) } else { None };
        let kept = (1..=(layers - first_layer) * live).map(carve).collect::<Result<_>>()?;
        Ok(Kept { shared, kept, first_layer, live })
    }

    fn of(&mut self, layer: usize, micro: usize) -> &mut T {
        match &mut self.shared {
            Some(shared) if layer < self.first_layer => shared,
            _ => &mut self.kept[(layer - self.first_layer) * self.live + micro],
        }
    }
}

impl<D: Device> Activations<D> {
    fn carve(arena: &mut Arena<D>, layers: usize, live: usize, widths: &Widths, limits: &Limits) -> Result<Self> {
        let (tokens, mode) = (limits.max_tokens, limits.mode);
        let keep = if mode == Mode::Train { limits.keep } else { Keep::NOTHING };
        let name = |part: &str, i: usize| format!("activations/{part}{i}");
        Ok(Activations {
            attention: Kept::new(layers, keep.attention, live, |i| {
                AttentionPart::carve(arena, &name("attention", i), widths, tokens)
            })?,
            mlp: Kept::new(layers, keep.mlp, live, |i| MlpPart::carve(arena, &name("mlp", i), widths, tokens))?,
            rest: Kept::new(layers, keep.rest, live, |i| RestPart::carve(arena, &name("rest", i), widths, tokens))?,
            key_values: match mode {
                Mode::Generate => Kept::new(layers, layers, 1, |i| {
                    KeyValue::carve(arena, &format!("key_values/{i}"), widths, limits.max_context)
                })?,
                Mode::Train | Mode::Score => Kept::new(layers, keep.rest, live, |i| {
                    KeyValue::carve(arena, &name("key_value", i), widths, tokens)
                })?,
            },
        })
    }

    /// Returns the buffers of a layer and live micro-batch.
    pub fn of(&mut self, layer: usize, micro: usize) -> LayerActivations<'_, D> {
        LayerActivations {
            attention: self.attention.of(layer, micro),
            mlp: self.mlp.of(layer, micro),
            rest: self.rest.of(layer, micro),
            key_value: self.key_values.of(layer, micro),
        }
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
            master: Some(Guarded::new(carve("master", len)?)),
            grad: Some(Guarded::new(carve("grad", state_len)?)),
            exp_avg: carve("exp_avg", state_len)?,
            exp_avg_sq: carve("exp_avg_sq", state_len)?,
        })
    }
}
