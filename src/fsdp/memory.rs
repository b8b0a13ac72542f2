//! Every buffer of the executor, carved by name in one place.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::comm::Gather;
use crate::comm::guarded::Guarded;
use crate::device::cpu::Cpu;
use crate::device::{Arena, Buffer, Device, HostBuffer, MemoryPlan, Ops, Place};
use crate::model::batch::BatchBuffers;
use crate::model::head::HeadState;
use crate::model::layer::LayerSaves;
use crate::model::linear::LoraInputs;
use crate::model::spec::{ModelSpec, ModuleId, TensorId};
use crate::model::stage::attention::{AttentionSaves, Inputs, KeyValue, Output, Scores};
use crate::model::stage::mlp::{MlpSaves, Products, Rest};
use crate::model::stage::{Scratch, Widths};
use crate::model::trainable::Trainables;
use crate::model::weights::WeightBuffers;
use crate::quant::record::Dtype;

use super::embedding::Rows;
use super::layout::{TrainableLayout, UnitLayout};
use super::schedule::{self, Accumulation, Descriptor, Keep, Mode};
use super::snapshot::Snapshot;
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
    /// Tokens of a micro-batch whose keys and values are kept in generation.
    pub max_context: usize,
    pub accumulation: Accumulation,
    pub keep: Keep,
    pub gather: Gather,
    /// Number of layers, from the first one, whose dense weights stay on the device once they are made.
    pub dense_layers: usize,
    pub num_slots: usize,
    /// The choice between device and host for everything that may stream.
    pub residency: Residency,
    /// True if rank 0 has room in host memory for a snapshot of all that training changes, for checkpoints.
    pub snapshot: bool,
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
    /// Makes limits for layer-major order with two slots, everything on the device, and everything recomputed that
    /// can be.
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
            dense_layers: 0,
            num_slots: 2,
            residency: Residency::ALL,
            snapshot: false,
        }
    }

    /// Makes the schedule's inputs for a step of M micro-batches.
    pub fn inputs(&self, units: NumUnits, mode: Mode, micro_batches: &[Descriptor]) -> schedule::Inputs {
        let Limits { accumulation, keep, num_slots, residency, .. } = *self;
        let mut inputs = schedule::Inputs {
            units,
            mode,
            micro_batches: micro_batches.to_vec(),
            accumulation,
            keep,
            num_slots,
            num_boundary_buffers: residency.boundary_buffers,
        };
        // Buffers are sized for the largest training step; a smaller step keeps more of its boundaries on the device.
        let micro_batches = vec![Descriptor::of(self.mode); self.max_micro_batches];
        let planned = schedule::Inputs { mode: self.mode, micro_batches, ..inputs.clone() };
        let (least, most) = (planned.min_boundary_buffers(), planned.max_boundary_buffers());
        inputs.num_boundary_buffers = residency.boundary_buffers.clamp(least, most);
        inputs
    }

    /// Returns whether a rank has the whole of a unit on its device, so that it is not gathered. Where the host is the
    /// device, shards stay in their files, and even a whole unit is copied from there.
    pub fn has_whole<D: Ops>(&self, layout: &UnitLayout, is_resident: bool) -> bool {
        is_resident && !D::IS_HOST && (self.gather == Gather::Host || layout.num_shards() == 1)
    }

    /// Makes the schedule's inputs for the largest step.
    pub fn largest(&self, units: NumUnits) -> schedule::Inputs {
        self.inputs(units, self.mode, &vec![Descriptor::of(self.mode); self.max_micro_batches])
    }
}

/// A rank's trainable values of one layer with their gradients and moments. A buffer is `None` while a collective has
/// it.
pub struct TrainableState<D: Ops> {
    pub master: Option<Guarded<Place<D, f32>>>,
    pub grad: Option<Guarded<Place<D, f32>>>,
    pub exp_avg: Place<D, f32>,
    pub exp_avg_sq: Place<D, f32>,
}

/// Buffers for a gathered unit: frozen bytes and trainable values. A buffer into which nothing is ever gathered is empty.
pub type Slot<D> = (Buffer<D, u8>, Buffer<D, f32>);

/// All device memory of a run.
pub struct Memory<D: Ops> {
    pub slots: Vec<Slot<D>>,
    /// Buffers that layers share: for the dense weights of layers that do not keep them, and for norms, biases and trainable values.
    pub layer: WeightBuffers<D>,
    /// The first layers, whose dense weights stay.
    pub dense: Vec<DenseLayer<D>>,
    pub head_piece: Buffer<D, D::Act>,
    pub final_norm: Buffer<D, f32>,
    pub trainables: Vec<TrainableState<D>>,
    /// Whole gradients of a layer, by gradient slot.
    pub grads: Vec<Buffer<D, f32>>,
    /// Device buffers for boundaries, and host buffers for those that wait there.
    pub boundaries: Vec<Buffer<D, D::Act>>,
    pub host_boundaries: Vec<HostBuffer<D::Act>>,
    /// Host buffer for embedded rows.
    pub(super) rows: Rows<D>,
    /// `None` where none is planned, or where another has it.
    pub snapshot: Option<Snapshot>,
    pub activations: Activations<D>,
    pub scratch: Scratch<D>,
    pub batches: Vec<BatchBuffers<D>>,
    pub heads: Vec<HeadState<D>>,
    /// `[max_tokens, piece rows]`, or `[live micro-batches, vocab]` in generation.
    pub logits: Buffer<D, f32>,
}

/// The trainable values of a model over the ranks that hold them.
#[derive(Clone, Copy, Debug)]
pub struct ShardedTrainables<'a> {
    pub trainables: &'a Trainables,
    pub num_shards: usize,
    pub num_replicas: usize,
}

impl ShardedTrainables<'_> {
    pub fn layout(&self, layer: usize) -> TrainableLayout {
        let len = self.trainables.layers[layer].len();
        TrainableLayout { len, num_shards: self.num_shards, num_replicas: self.num_replicas }
    }

    /// The layout of each layer's values.
    pub fn layouts(&self) -> impl Iterator<Item = TrainableLayout> {
        (0..self.trainables.layers.len()).map(|layer| self.layout(layer))
    }

    /// Returns whether a rank has all trainable values on its device, so that none are gathered.
    pub fn are_whole(&self, residency: &Residency) -> bool {
        residency.trainables && self.num_shards == 1
    }

    /// Number of values of the layer that has most, padding included.
    pub fn padded_len(&self) -> usize {
        self.layouts().map(|layout| layout.padded_len()).max().unwrap_or(0)
    }
}

/// The memory of a rank, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plans {
    pub device: MemoryPlan,
    /// Pinned host memory that the device copies from and to.
    pub host: MemoryPlan,
}

impl<D: Ops> Memory<D> {
    /// Computes what [`Memory::carve`] takes, without taking it.
    pub fn plan(
        spec: &ModelSpec,
        sharded: Option<ShardedTrainables<'_>>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Plans> {
        let (mut device, mut host) = (Arena::measure(), Arena::measure());
        Self::carve(&mut device, &mut host, spec, sharded, layouts, limits)?;
        Ok(Plans { device: device.into_plan(), host: host.into_plan() })
    }

    /// See [`Memory::slots`].
    fn carve_slots(
        arena: &mut Arena<D>,
        sharded: Option<ShardedTrainables<'_>>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Vec<Slot<D>>> {
        let resident = limits.residency.of_units(layouts.len());
        let gathered =
            layouts.iter().zip(resident).filter(|(layout, resident)| !limits.has_whole::<D>(layout, *resident));
        let flat_bytes = gathered.map(|(layout, _)| layout.gathered_bytes()).max().unwrap_or(0);
        let gathered_len = sharded.map_or(0, |s| if s.are_whole(&limits.residency) { 0 } else { s.padded_len() });
        (0..limits.num_slots)
            .map(|i| {
                Ok((
                    arena.carve(&format!("slots/{i}/flat"), flat_bytes)?,
                    arena.carve(&format!("slots/{i}/lora"), gathered_len)?,
                ))
            })
            .collect()
    }

    /// The first call runs on measuring arenas and gives the plan; the second takes the memory.
    pub fn carve(
        arena: &mut Arena<D>,
        host: &mut Arena<Cpu>,
        spec: &ModelSpec,
        sharded: Option<ShardedTrainables<'_>>,
        layouts: &[UnitLayout],
        limits: &Limits,
    ) -> Result<Memory<D>> {
        let train = limits.mode == Mode::Train;
        let units = NumUnits::new(spec);
        let inputs = limits.largest(units);
        let live = inputs.num_live_micro_batches();
        let (tokens, hidden) = (limits.max_tokens, spec.hidden_size);
        let widths = Widths::new(spec, sharded.map(|sharded| sharded.trainables));
        let padded_len = sharded.map_or(0, |sharded| sharded.padded_len());
        let slots = Self::carve_slots(arena, sharded, layouts, limits)?;
        let dense_layers = limits.dense_layers.min(units.layers);
        let mut shared = shared_tensors(layouts, dense_layers, D::ACT);
        let head_piece_len = shared.remove(&TensorId::Rows).unwrap_or(0);
        let layer = WeightBuffers::carve(arena, &shared, sharded.map(|sharded| sharded.trainables))?;
        let dense_layouts = layouts[..dense_layers].iter().enumerate();
        let dense = dense_layouts.map(|(i, layout)| DenseLayer::carve(arena, i, layout)).collect::<Result<_>>()?;
        let head_piece = arena.carve("weights/head_piece", head_piece_len)?;
        let final_norm = arena.carve("weights/final_norm", hidden)?;
        let on_device = limits.residency.trainables;
        let layouts_of_layers = sharded.iter().flat_map(ShardedTrainables::layouts).enumerate();
        let trainables = layouts_of_layers
            .map(|(layer, layout)| TrainableState::carve(arena, host, layer, layout.shard_len(), train, on_device))
            .collect::<Result<_>>()?;
        let grads = (0..inputs.num_grad_slots())
            .map(|i| arena.carve(&format!("gradients/{i}"), padded_len))
            .collect::<Result<_>>()?;
        let boundaries = (0..inputs.num_boundary_buffers)
            .map(|i| arena.carve(&format!("boundaries/{i}"), tokens * hidden))
            .collect::<Result<_>>()?;
        let host_boundaries = (0..inputs.num_offloaded_boundaries())
            .map(|i| host.carve(&format!("boundaries/{i}"), tokens * hidden))
            .collect::<Result<_>>()?;
        let rows = Rows::carve(host, tokens, hidden)?;
        let snapshot = sharded.filter(|_| limits.snapshot);
        let snapshot = snapshot.map(|sharded| Snapshot::carve(host, sharded.layouts())).transpose()?;
        let activations = Activations::carve(arena, units.layers, live, &widths, limits)?;
        let scratch = Scratch::carve(arena, &widths, tokens, train)?;
        let batches = (0..live)
            .map(|m| BatchBuffers::carve(arena, &format!("batches/{m}"), spec, tokens))
            .collect::<Result<_>>()?;
        let head_tokens = if limits.mode == Mode::Generate { 1 } else { tokens };
        let heads = (0..live)
            .map(|m| HeadState::carve(arena, &format!("head/{m}"), hidden, head_tokens, train))
            .collect::<Result<_>>()?;
        let piece_rows = HEAD_PIECE_ROWS.min(spec.vocab_size);
        let num_logits = if limits.mode == Mode::Generate { live * spec.vocab_size } else { tokens * piece_rows };
        let logits = arena.carve("head/logits", num_logits)?;
        Ok(Memory {
            slots,
            layer,
            dense,
            head_piece,
            final_norm,
            trainables,
            grads,
            boundaries,
            host_boundaries,
            rows,
            snapshot,
            activations,
            scratch,
            batches,
            heads,
            logits,
        })
    }
}

/// The dense weights of a layer that keeps them.
pub struct DenseLayer<D: Device> {
    /// Weights of linear modules that do not lie in the gathered unit, `[out_features, in_features]`.
    pub linears: Vec<(ModuleId, Buffer<D, D::Act>)>,
    /// False until they are made for the first time.
    pub is_made: bool,
}

impl<D: Device> DenseLayer<D> {
    fn carve(arena: &mut Arena<D>, layer: usize, layout: &UnitLayout) -> Result<Self> {
        let mut linears = Vec::new();
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let TensorId::Weight(module) = tensor.id else { continue };
            if layout.in_place(idx, D::ACT).is_none() {
                linears.push((module, arena.carve(&format!("dense/{layer}/{module}"), tensor.elements.len())?));
            }
        }
        Ok(Self { linears, is_made: false })
    }
}

/// Returns the tensors that are made in buffers which units share, each with the number of its elements in the unit where it is largest.
/// The first layers keep weights of linear modules for themselves.
fn shared_tensors(layouts: &[UnitLayout], dense_layers: usize, act: Dtype) -> BTreeMap<TensorId, usize> {
    let mut largest = BTreeMap::new();
    for (unit, layout) in layouts.iter().enumerate() {
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let is_kept = unit < dense_layers && matches!(tensor.id, TensorId::Weight(_));
            if !is_kept && layout.in_place(idx, act).is_none() {
                let most: &mut usize = largest.entry(tensor.id).or_default();
                *most = tensor.elements.len().max(*most);
            }
        }
    }
    largest
}

/// Saved values of all layers and live micro-batches.
pub struct Activations<D: Ops> {
    scores: Kept<Scores<D>>,
    inputs: Kept<Inputs<D>>,
    /// In generation every layer has keys and values of its own for each micro-batch.
    key_values: Kept<KeyValue<D>>,
    output: Kept<Output<D>>,
    products: Kept<Products<D>>,
    rest: Kept<Rest<D>>,
    attention_u: Kept<LoraInputs<D>>,
    mlp_u: Kept<LoraInputs<D>>,
}

/// One group of a stage's saved values.
struct Kept<T> {
    /// Buffer shared by all layers that keep none.
    shared: Option<T>,
    /// Buffers of layer `first_layer` and the layers after it, by layer and live micro-batch.
    kept: Vec<T>,
    first_layer: usize,
    live: usize,
}

impl<T> Kept<T> {
    /// Makes the buffers of a group that the last `num_kept` of `layers` layers keep.
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

impl<D: Ops> Activations<D> {
    fn carve(arena: &mut Arena<D>, layers: usize, live: usize, widths: &Widths, limits: &Limits) -> Result<Self> {
        let (tokens, mode) = (limits.max_tokens, limits.mode);
        let keep = if mode == Mode::Train { limits.keep.clamped(layers) } else { Keep::NOTHING };
        let Widths { attention_modules, mlp_modules, .. } = widths;
        let name = |part: &str, i: usize| format!("activations/{part}{i}");
        Ok(Activations {
            scores: Kept::new(layers, keep.attention, live, |i| {
                Scores::carve(arena, &name("attention", i), widths, tokens)
            })?,
            output: Kept::new(layers, keep.mlp, live, |i| Output::carve(arena, &name("mlp", i), widths, tokens))?,
            products: Kept::new(layers, keep.mlp, live, |i| Products::carve(arena, &name("mlp", i), widths, tokens))?,
            inputs: Kept::new(layers, keep.rest, live, |i| Inputs::carve(arena, &name("rest", i), widths, tokens))?,
            rest: Kept::new(layers, keep.rest, live, |i| Rest::carve(arena, &name("rest", i), widths, tokens))?,
            attention_u: Kept::new(layers, keep.lora, live, |i| {
                LoraInputs::carve(arena, &name("lora", i), attention_modules, tokens)
            })?,
            mlp_u: Kept::new(layers, keep.lora, live, |i| {
                LoraInputs::carve(arena, &name("lora", i), mlp_modules, tokens)
            })?,
            key_values: match mode {
                Mode::Generate => Kept::new(layers, layers, live, |i| {
                    KeyValue::carve(arena, &format!("key_values/{i}"), widths, limits.max_context)
                })?,
                Mode::Train | Mode::Score => Kept::new(layers, keep.rest, live, |i| {
                    KeyValue::carve(arena, &name("key_value", i), widths, tokens)
                })?,
            },
        })
    }

    /// Returns the buffers of a layer and live micro-batch.
    pub fn of(&mut self, layer: usize, micro: usize) -> LayerSaves<'_, D> {
        LayerSaves {
            attention: AttentionSaves {
                scores: self.scores.of(layer, micro),
                inputs: self.inputs.of(layer, micro),
                key_value: self.key_values.of(layer, micro),
                output: self.output.of(layer, micro),
                u: self.attention_u.of(layer, micro),
            },
            mlp: MlpSaves {
                products: self.products.of(layer, micro),
                rest: self.rest.of(layer, micro),
                u: self.mlp_u.of(layer, micro),
            },
        }
    }
}

impl<D: Ops> TrainableState<D> {
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
        Ok(TrainableState {
            master: Some(Guarded::new(carve("master", len)?)),
            grad: Some(Guarded::new(carve("grad", state_len)?)),
            exp_avg: carve("exp_avg", state_len)?,
            exp_avg_sq: carve("exp_avg_sq", state_len)?,
        })
    }
}
