//! The executor: all that a rank holds, and how it performs an action.

use anyhow::{Context, Result, ensure};

use crate::comm::spans::Span;
use crate::comm::watch::{self, Phase};
use crate::comm::{Gather, Position, Queue, ShardSource, TrainableBuffers};
use crate::device::cpu::Cpu;
use crate::device::{Arena, Buffer, Ops};
use crate::model::batch::MicroBatch;
use crate::model::spec::ModelSpec;
use crate::model::trainable::Trainables;

use super::compute::Pass;
use super::layout::UnitLayout;
use super::memory::{Limits, Memory, Plans, ShardedTrainables};
use super::offload::Boundaries;
use super::run::{RunArgs, RunOutput};
use super::schedule::Action;
use super::slots::Slot;
use super::unit::{NumUnits, Unit};

/// The frozen base as one rank holds it.
pub struct Base {
    pub spec: ModelSpec,
    /// One layout a unit, in the order of [`NumUnits::all`].
    pub layouts: Vec<UnitLayout>,
    /// This rank's shard of each unit; the engine hands them to its queue.
    pub shards: Vec<ShardSource>,
    /// `[hidden_size]`; every rank has it.
    pub final_norm: Vec<f32>,
    pub embed: Box<Embed>,
}

/// Copies rows of the embedding table: `(ids, out [ids, hidden_size])`.
pub type Embed = dyn Fn(&[u32], &mut [f32]) -> Result<()> + Sync;

/// The whole gradient of a layer.
pub(super) enum Grad<D: Ops, Q: Queue<D>> {
    Here(Buffer<D, f32>),
    Reducing(usize, Q::Pending<TrainableBuffers<D>>),
    Moving,
}

/// A rank: device, queue, base, adapter and all memory.
pub struct Engine<D: Ops, Q: Queue<D>> {
    pub(super) device: D,
    /// The CPU device, which computes on values that are offloaded.
    pub(super) host: Cpu,
    pub queue: Q,
    pub(super) base: Base,
    pub(super) shards: Vec<Q::Shard>,
    pub(super) trainables: Option<Trainables>,
    pub(super) units: NumUnits,
    pub(super) limits: Limits,
    pub(super) memory: Memory<D>,
    pub(super) slots: Vec<Slot<D, Q>>,
    pub(super) grads: Vec<Grad<D, Q>>,
    pub(super) boundaries: Boundaries<D, Q>,
    /// The unit that is dequantized, and its slot.
    pub(super) dequantized: Option<(Unit, usize)>,
    plan: Plans,
    /// Spans of the last run, if they were recorded.
    pub(super) spans: Option<Vec<Span>>,
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// Takes all memory that will ever be used. `host` computes on values that are offloaded.
    pub fn new(
        device: D,
        host: Cpu,
        mut queue: Q,
        mut base: Base,
        trainables: Option<Trainables>,
        mut limits: Limits,
    ) -> Result<Self> {
        // All ranks plan a snapshot alike, but the first one writes the files.
        limits.snapshot &= queue.rank() == 0;
        let units = NumUnits::new(&base.spec);
        let Position { num_shards, num_replicas, .. } = queue.position();
        ensure!(
            base.layouts.iter().all(|layout| layout.num_shards() == num_shards),
            "the base has other shards than the {num_shards} ranks that are to hold it"
        );
        let sharded = trainables.as_ref().map(|trainables| ShardedTrainables { trainables, num_shards, num_replicas });
        let plan = Memory::<D>::plan(&base.spec, sharded, &base.layouts, &limits)?;
        let resident = limits.residency.of_units(units.count());
        watch::phase(Phase::Copy)?;
        let shards = queue.store(std::mem::take(&mut base.shards), &resident, limits.gather)?;
        for ((shard, layout), (unit, resident)) in shards.iter().zip(&base.layouts).zip(units.all().zip(resident)) {
            let planned = limits.has_whole::<D>(layout, resident);
            ensure!(queue.whole(shard).is_some() == planned, "{unit} is not where it was planned");
        }
        let mut arena = Arena::allocate(&device, plan.device.clone())?;
        let mut on_host = match plan.host.total_bytes() {
            0 => Arena::measure(),
            _ => Arena::allocate_host(&device, plan.host.clone())?,
        };
        let mut memory = Memory::carve(&mut arena, &mut on_host, &base.spec, sharded, &base.layouts, &limits)?;
        device.upload(memory.final_norm.view_mut(), &base.final_norm)?;
        let slots = memory.slots.drain(..).map(|(flat, lora)| Slot::Free(flat, lora)).collect();
        let grads = memory.grads.drain(..).map(Grad::Here).collect();
        let boundaries =
            Boundaries::new(std::mem::take(&mut memory.boundaries), std::mem::take(&mut memory.host_boundaries));
        let dequantized = None;
        Ok(Self {
            device,
            host,
            queue,
            base,
            shards,
            trainables,
            units,
            limits,
            memory,
            slots,
            grads,
            boundaries,
            dequantized,
            plan,
            spans: None,
        })
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.base.spec
    }

    /// The trainable values, if there are any.
    pub fn trainables(&self) -> Option<&Trainables> {
        self.trainables.as_ref()
    }

    pub(super) fn sharded(&self) -> Option<ShardedTrainables<'_>> {
        let Position { num_shards, num_replicas, .. } = self.queue.position();
        self.trainables.as_ref().map(|trainables| ShardedTrainables { trainables, num_shards, num_replicas })
    }

    /// Bytes of this rank's shards: those of all layers, and those of the head.
    pub fn shard_bytes(&self) -> (usize, usize) {
        let bytes = |layouts: &[UnitLayout]| layouts.iter().map(UnitLayout::shard_bytes).sum();
        let (layers, head) = self.base.layouts.split_at(self.units.layers);
        (bytes(layers), bytes(head))
    }

    /// Number of units: layers and head pieces.
    pub fn num_units(&self) -> usize {
        self.units.count()
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// All memory, by name.
    pub fn plan(&self) -> &Plans {
        &self.plan
    }

    pub(super) fn act<'b>(
        &mut self,
        action: &Action,
        args: &RunArgs<'_>,
        batch: impl Fn(usize) -> &'b MicroBatch,
        output: &mut RunOutput,
    ) -> Result<()> {
        match *action {
            Action::Gather { unit, slot } => {
                let layout = &self.base.layouts[self.units.idx(unit)];
                if self.limits.gather == Gather::Collective {
                    output.gathered_bytes += layout.shard_bytes() * (layout.num_shards() - 1);
                }
                self.gather(unit, slot, args.needs_adapter())
            }
            Action::Wait { unit, slot } => self.wait_gather(unit, slot),
            Action::Dequantize { unit, slot } => self.dequantize(unit, slot, args.needs_adapter()),
            Action::Reshard { unit, slot } => self.reshard(unit, slot),
            Action::Embed { micro } => self.embed(micro, batch(micro)),
            Action::Forward { layer, micro, saves } => self.forward(layer, micro, args, Pass::Whole { saves }),
            Action::Recompute { layer, micro } => self.forward(layer, micro, args, Pass::Recompute),
            Action::HeadBegin { micro } => self.head_begin(micro, batch(micro)),
            Action::HeadPiece { piece, micro } => self.head_piece(piece, micro, args),
            Action::HeadScore { micro } => {
                let scores = self.head_score(micro, args)?;
                output.num_most_likely += scores.num_most_likely;
                output.log_probabilities[micro] = scores.log_probabilities;
                Ok(())
            }
            Action::HeadBackward { micro } => {
                let objective = args.objective.context("no objective was given")?;
                let coefficients = objective.coefficients(micro, &output.log_probabilities);
                self.head_backward(micro, &coefficients)
            }
            Action::Backward { layer, micro, grad_slot, first } => self.backward(layer, micro, args, grad_slot, first),
            Action::Reduce { layer, grad_slot } => self.reduce(layer, grad_slot),
            Action::WaitReduce { layer, grad_slot } => self.wait_reduce(layer, grad_slot),
            Action::Put { layer, micro } => {
                let (m, len) = (self.live(micro), self.boundary_len(micro));
                self.boundaries.put(&mut self.queue, layer, m, len)
            }
            Action::WaitPut { layer, micro } => {
                let m = self.live(micro);
                self.boundaries.wait_put(&mut self.queue, layer, m)
            }
            Action::Fetch { layer, micro } => {
                let (m, len) = (self.live(micro), self.boundary_len(micro));
                self.boundaries.fetch(&mut self.queue, layer, m, len)
            }
            Action::WaitFetch { layer, micro } => {
                let m = self.live(micro);
                self.boundaries.wait_fetch(&mut self.queue, layer, m)
            }
            Action::Optimizer => {
                if let Some(next) = args.next {
                    self.embed_ahead(next)?;
                }
                let update = args.update.context("no update was given")?;
                let sum = output.log_probabilities.iter().flatten().sum();
                (output.grad_norm, output.updated) = self.update(update, sum)?;
                Ok(())
            }
        }
    }

    /// Returns the place of a micro-batch among those that live at the same time.
    pub(super) fn live(&self, micro: usize) -> usize {
        micro % self.memory.batches.len()
    }

    /// Elements of a boundary of a micro-batch.
    pub(super) fn boundary_len(&self, micro: usize) -> usize {
        self.memory.batches[self.live(micro)].num_tokens * self.base.spec.hidden_size
    }
}
