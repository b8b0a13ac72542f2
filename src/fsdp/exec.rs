//! The executor: performs a schedule, one action after the other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytemuck::Zeroable;
use rayon::prelude::*;

use crate::comm::spans::{Lane, Span};
use crate::comm::watch;
use crate::comm::{Gather, Position, Queue, ShardSource, TrainableBuffers, Waits};
use crate::device::cpu::Cpu;
use crate::device::{Arena, Buffer, Dequantize, Ops, ViewMut};
use crate::model::activations::Parts;
use crate::model::batch::MicroBatch;
use crate::model::config::ModelConfig;
use crate::model::head;
use crate::model::layer::{self, LayerContext, LayerLora};
use crate::optim::adamw::Update;
use crate::quant::record::Encoding;

use super::check;
use super::layout::{TrainableLayout, UnitLayout};
use super::memory::{Limits, Memory, Plans};
use super::offload::Boundaries;
use super::schedule::{Action, Mode, build};
use super::unit::{HEAD_PIECE_ROWS, NumUnits, Unit};

/// The frozen base as one rank holds it.
pub struct Base {
    pub config: ModelConfig,
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

/// Number of tokens whose embedding rows one thread copies at a time.
const EMBED_TOKENS: usize = 16;

/// The arguments of one run of a schedule, besides its micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct RunArgs<'a> {
    pub mode: Mode,
    /// M, the largest of any rank: ranks that have fewer micro-batches run empty ones.
    pub num_micro_batches: usize,
    /// Weight of each target token's −log p in the gradient: 1 / all target tokens of the step.
    pub coefficient: f32,
    /// False computes with the base alone.
    pub adapter: bool,
    /// Seed and step of the dropout masks; `None` switches dropout off.
    pub dropout: Option<(u64, u32)>,
    /// The update that [`Action::Optimizer`] makes.
    pub update: Option<&'a Update>,
    /// Tokens whose keys and values are there from earlier calls (generation).
    pub num_past_tokens: usize,
}

/// The results of a run.
#[derive(Clone, Debug, Default)]
pub struct RunOutput {
    /// log p of each target token, by micro-batch.
    pub log_probabilities: Vec<Vec<f64>>,
    /// Global norm before clipping (training).
    pub grad_norm: f64,
    /// Whether the trainable values were updated: not where a loss or a gradient of any rank is not finite.
    pub updated: bool,
    /// Time for which the computation stood still.
    pub waits: Waits,
    pub elapsed: Duration,
    /// Bytes of frozen shards received from other ranks.
    pub gathered_bytes: usize,
}

/// State of a slot. A gathering slot's buffers are with the queue.
enum Slot<D: Ops, Q: Queue<D>> {
    Free(Buffer<D, u8>, Buffer<D, f32>),
    Gathering(Unit, Q::Pending<Buffer<D, u8>>, LoraPart<D, Q>),
    Unsharded(Unit, Buffer<D, u8>, Buffer<D, f32>),
    /// Between two states; seen only after an error.
    Moving,
}

/// The trainable values of a unit that is being gathered, or the buffer that a unit without trainable values leaves
/// unused.
enum LoraPart<D: Ops, Q: Queue<D>> {
    Gathering(Q::Pending<TrainableBuffers<D>>),
    Unused(Buffer<D, f32>),
}

/// The whole gradient of a layer.
pub(super) enum Grad<D: Ops, Q: Queue<D>> {
    Here(Buffer<D, f32>),
    Reducing(usize, Q::Pending<TrainableBuffers<D>>),
    Moving,
}

/// A rank: device, queue, base, adapter and all memory.
pub struct Engine<D: Ops, Q: Queue<D>> {
    pub(super) device: D,
    /// Computes on values that are offloaded.
    pub(super) host: Cpu,
    pub queue: Q,
    pub(super) base: Base,
    shards: Vec<Q::Shard>,
    pub(super) lora: Option<LayerLora>,
    pub(super) trainable: TrainableLayout,
    units: NumUnits,
    limits: Limits,
    pub(super) memory: Memory<D>,
    slots: Vec<Slot<D, Q>>,
    pub(super) grads: Vec<Grad<D, Q>>,
    boundaries: Boundaries<D, Q>,
    dense: Option<Unit>,
    embedding: Vec<D::Act>,
    plan: Plans,
    /// Spans of the last run, if they were recorded.
    spans: Option<Vec<Span>>,
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// Takes all memory that will ever be used. `host` computes on values that are offloaded.
    pub fn new(
        device: D,
        host: Cpu,
        mut queue: Q,
        mut base: Base,
        lora: Option<LayerLora>,
        limits: Limits,
    ) -> Result<Self> {
        let units = NumUnits::new(&base.config);
        let Position { num_shards, num_replicas, .. } = queue.position();
        ensure!(
            base.layouts.iter().all(|layout| layout.num_shards() == num_shards),
            "the base has other shards than the {num_shards} ranks that are to hold it"
        );
        let trainable = TrainableLayout { len: lora.as_ref().map_or(0, |l| l.layout.len), num_shards, num_replicas };
        let adapter = lora.as_ref().map(|lora| (lora, trainable));
        let plan = Memory::<D>::plan(&base.config, adapter, &base.layouts, &limits)?;
        let resident = limits.residency.of_units(units.count());
        let shards = queue.store(std::mem::take(&mut base.shards), &resident, limits.gather)?;
        let mut arena = Arena::allocate(&device, plan.device.clone())?;
        let mut on_host = match plan.host.total_bytes() {
            0 => Arena::measure(),
            _ => Arena::allocate_host(&device, plan.host.clone())?,
        };
        let mut memory = Memory::carve(&mut arena, &mut on_host, &base.config, adapter, &base.layouts, &limits)?;
        device.upload(memory.final_norm.view_mut(), &base.final_norm)?;
        let slots = memory.slots.drain(..).map(|(flat, lora)| Slot::Free(flat, lora)).collect();
        let grads = memory.grads.drain(..).map(Grad::Here).collect();
        let boundaries =
            Boundaries::new(std::mem::take(&mut memory.boundaries), std::mem::take(&mut memory.host_boundaries));
        let embedding = vec![D::Act::zeroed(); limits.max_tokens * base.config.hidden_size];
        let dense = None;
        Ok(Self {
            device,
            host,
            queue,
            base,
            shards,
            lora,
            trainable,
            units,
            limits,
            memory,
            slots,
            grads,
            boundaries,
            dense,
            embedding,
            plan,
            spans: None,
        })
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    pub fn config(&self) -> &ModelConfig {
        &self.base.config
    }

    /// The adapter, if there is one.
    pub fn lora(&self) -> Option<&LayerLora> {
        self.lora.as_ref()
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

    /// Builds the schedule, checks it, and performs it.
    pub fn run(&mut self, args: &RunArgs<'_>, batches: &[MicroBatch]) -> Result<RunOutput> {
        let inputs = self.limits.inputs(self.units, args.mode, args.num_micro_batches);
        let actions = build(&inputs);
        check::check(&actions, &inputs)?;
        self.perform(&actions, args, batches)
    }

    /// Switches the recording of spans on or off for the runs that follow.
    pub fn record_spans(&mut self, on: bool) {
        self.spans = on.then(Vec::new);
        self.queue.record_spans(on);
    }

    /// Spans of the last run; empty if they were not recorded.
    pub fn spans(&self) -> &[Span] {
        self.spans.as_deref().unwrap_or_default()
    }

    /// Performs any list of actions.
    pub fn perform(&mut self, actions: &[Action], args: &RunArgs<'_>, batches: &[MicroBatch]) -> Result<RunOutput> {
        let start = Instant::now();
        let empty = MicroBatch::new();
        let mut output =
            RunOutput { log_probabilities: vec![Vec::new(); args.num_micro_batches], ..Default::default() };
        let begin = self.device.mark()?;
        let mut marks = Vec::new();
        for action in actions {
            let batch = |micro: usize| batches.get(micro).unwrap_or(&empty);
            watch::at(format!("{action:?}"));
            // On a GPU, what takes long is waiting for the device.
            let _wait = (!D::IS_HOST).then(watch::wait_here);
            let before = if self.spans.is_some() { Some(self.device.mark()?) } else { None };
            self.act(action, args, batch, &mut output).with_context(|| format!("{action:?}"))?;
            if let Some(before) = before {
                marks.push((action, before, self.device.mark()?));
            }
        }
        {
            watch::at("the end of the queues");
            let _wait = watch::wait_here();
            self.device.synchronize()?;
        }
        if let Some(spans) = &mut self.spans {
            *spans = self.queue.take_spans(&begin)?;
            for (action, from, to) in marks {
                let seconds = |at| self.device.seconds_between(&begin, at);
                let (name, begin, end) = (format!("{action:?}"), seconds(&from)?, seconds(&to)?);
                spans.push(Span { lane: Lane::Compute, name, begin, end });
            }
        }
        output.elapsed = start.elapsed();
        output.waits = self.queue.take_waits()?;
        Ok(output)
    }

    fn act<'b>(
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
                self.gather(unit, slot, args.adapter)
            }
            Action::Wait { unit, slot } => self.wait_gather(unit, slot),
            Action::Dequantize { unit, slot } => self.dequantize(unit, slot, args.adapter),
            Action::Reshard { unit, slot } => self.reshard(unit, slot),
            Action::Embed { micro } => self.embed(micro, args, batch(micro)),
            Action::Forward { layer, micro } => self.forward(layer, micro, args, true),
            Action::Recompute { layer, micro } => self.forward(layer, micro, args, false),
            Action::HeadBegin { micro } => self.head_begin(micro, args, batch(micro)),
            Action::HeadPiece { piece, micro } => self.head_piece(piece, micro, args),
            Action::HeadFinish { micro } => {
                output.log_probabilities[micro] = self.head_finish(micro, args)?;
                Ok(())
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
                let update = args.update.context("no update was given")?;
                let sum = output.log_probabilities.iter().flatten().sum();
                (output.grad_norm, output.updated) = self.update(update, sum)?;
                Ok(())
            }
        }
    }

    fn gather(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Free(flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not free");
        };
        let shard = &self.shards[self.units.idx(unit)];
        let frozen = self.queue.gather_frozen(format!("gather of {unit}"), shard, flat)?;
        let lora = match unit {
            Unit::Layer(layer) if adapter && self.lora.is_some() => {
                let shard = self.memory.trainables[layer].master.take().context("the LoRA shard is being gathered")?;
                let buffers = TrainableBuffers { shard, full };
                LoraPart::Gathering(self.queue.gather_trainable(format!("gather of the LoRA of {unit}"), buffers)?)
            }
            _ => LoraPart::Unused(full),
        };
        self.slots[slot] = Slot::Gathering(unit, frozen, lora);
        Ok(())
    }

    fn wait_gather(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Gathering(gathering, frozen, lora) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not being gathered");
        };
        ensure!(gathering == unit, "slot {slot} gathers {gathering}");
        let flat = self.queue.wait(frozen)?;
        let full = match (lora, unit) {
            (LoraPart::Gathering(pending), Unit::Layer(layer)) => {
                let TrainableBuffers { shard, full } = self.queue.wait(pending)?;
                self.memory.trainables[layer].master = Some(shard);
                full
            }
            (LoraPart::Unused(full), _) => full,
            (LoraPart::Gathering(_), Unit::HeadPiece(_)) => bail!("a head piece has no LoRA"),
        };
        self.slots[slot] = Slot::Unsharded(unit, flat, full);
        Ok(())
    }

    fn dequantize(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Unsharded(held, flat, full) = &self.slots[slot] else {
            bail!("slot {slot} does not hold {unit}: its gather was not waited for");
        };
        ensure!(*held == unit, "slot {slot} holds {held}");
        let (device, layout) = (&self.device, &self.base.layouts[self.units.idx(unit)]);
        let weights = &mut self.memory.layer;
        self.dense = Some(unit);
        let Unit::Layer(_) = unit else {
            let len = layout.tensors()[0].elements.len();
            return act_tensor(device, layout, 0, flat, self.memory.head_piece.first_mut(len));
        };
        f32_tensor(device, layout, 0, flat, weights.input_norm.view_mut())?;
        f32_tensor(device, layout, 1, flat, weights.post_attention_norm.view_mut())?;
        let num_linears = weights.linears.len();
        let mut bias_idx = 2 + num_linears;
        for (i, linear) in weights.linears.iter_mut().enumerate() {
            act_tensor(device, layout, 2 + i, flat, linear.weight.view_mut())?;
            if let Some(bias) = &mut linear.bias {
                f32_tensor(device, layout, bias_idx, flat, bias.view_mut())?;
                bias_idx += 1;
            }
        }
        match &self.lora {
            Some(lora) if adapter => device.cast(weights.lora.view_mut(), full.first(lora.layout.len)),
            _ => Ok(()),
        }
    }

    fn reshard(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Unsharded(held, flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} holds nothing");
        };
        ensure!(held == unit, "slot {slot} holds {held}");
        self.dense = None;
        self.slots[slot] = Slot::Free(flat, full);
        Ok(())
    }

    /// Returns the place of a micro-batch among those that live at the same time.
    pub(super) fn live(&self, micro: usize) -> usize {
        micro % self.memory.batches.len()
    }

    /// Elements of a boundary of a micro-batch.
    fn boundary_len(&self, micro: usize) -> usize {
        self.memory.batches[self.live(micro)].num_tokens * self.base.config.hidden_size
    }

    fn embed(&mut self, micro: usize, args: &RunArgs<'_>, batch: &MicroBatch) -> Result<()> {
        let (tokens, m) = (batch.num_tokens(), self.live(micro));
        ensure!(tokens <= self.limits.max_tokens, "{tokens} tokens, planned for {}", self.limits.max_tokens);
        self.memory.batches[m].load(&self.device, &self.base.config, batch, args.num_past_tokens)?;
        let hidden = self.base.config.hidden_size;
        let (rows, embed) = (&mut self.embedding[..tokens * hidden], &self.base.embed);
        let parts = rows.par_chunks_mut(EMBED_TOKENS * hidden).zip(batch.input_ids.par_chunks(EMBED_TOKENS));
        parts.try_for_each_init(Vec::new, |values, (rows, ids)| {
            values.resize(rows.len(), 0.0);
            embed(ids, values)?;
            D::round(rows, values);
            anyhow::Ok(())
        })?;
        let mut boundary = self.boundaries.take_free()?;
        self.device.upload(boundary.first_mut(rows.len()), rows)?;
        self.boundaries.insert(0, m, boundary);
        Ok(())
    }

    fn forward(&mut self, layer_idx: usize, micro: usize, args: &RunArgs<'_>, whole: bool) -> Result<()> {
        ensure!(self.dense == Some(Unit::Layer(layer_idx)), "layer {layer_idx} is not dequantized");
        let m = self.live(micro);
        let (len, x) = (self.boundary_len(micro), self.boundaries.take(layer_idx, m)?);
        let kept = self.limits.keep.of(layer_idx, self.units.layers);
        let mut out = if whole { Some(self.boundaries.take_free()?) } else { None };
        let Memory { layer, activations, scratch, batches, .. } = &mut self.memory;
        let ctx = LayerContext {
            ops: &self.device,
            config: &self.base.config,
            weights: layer,
            batch: &batches[m],
            lora: self.lora.as_ref().filter(|_| args.adapter),
            layer_idx,
            dropout: args.dropout,
        };
        let there = if whole { Parts::NONE } else { kept };
        layer::forward(&ctx, out.as_mut(), activations.of(layer_idx, m), there, x.first(len), scratch)?;
        if let Some(out) = out {
            self.boundaries.insert(layer_idx + 1, m, out);
        }
        // Only backward needs it again.
        match args.mode {
            Mode::Train => self.boundaries.insert(layer_idx, m, x),
            Mode::Score | Mode::Generate => self.boundaries.release(x),
        }
        Ok(())
    }

    fn backward(
        &mut self,
        layer_idx: usize,
        micro: usize,
        args: &RunArgs<'_>,
        grad_slot: usize,
        first: bool,
    ) -> Result<()> {
        ensure!(self.dense == Some(Unit::Layer(layer_idx)), "layer {layer_idx} is not dequantized");
        let m = self.live(micro);
        let Grad::Here(grads) = &mut self.grads[grad_slot] else {
            bail!("gradient buffer {grad_slot} is being reduced: that was not waited for");
        };
        if first {
            self.device.fill_bytes(grads.view_mut(), 0)?;
        }
        let len = self.memory.batches[m].num_tokens * self.base.config.hidden_size;
        let (x, mut d) = (self.boundaries.take(layer_idx, m)?, self.boundaries.take(layer_idx + 1, m)?);
        let Memory { layer, activations, scratch, batches, .. } = &mut self.memory;
        let ctx = LayerContext {
            ops: &self.device,
            config: &self.base.config,
            weights: layer,
            batch: &batches[m],
            lora: self.lora.as_ref().filter(|_| args.adapter),
            layer_idx,
            dropout: args.dropout,
        };
        layer::backward(&ctx, &mut d, grads, activations.of(layer_idx, m), x.first(len), scratch)?;
        // The gradient takes the place of the boundary that backward has consumed. Nobody needs the gradient of the
        // first layer's input.
        self.boundaries.release(x);
        match layer_idx {
            0 => self.boundaries.release(d),
            _ => self.boundaries.insert(layer_idx, m, d),
        }
        Ok(())
    }

    fn head_begin(&mut self, micro: usize, args: &RunArgs<'_>, batch: &MicroBatch) -> Result<()> {
        let m = self.live(micro);
        let boundary = self.boundaries.get_mut(self.units.layers, m)?;
        let Memory { heads, final_norm, .. } = &mut self.memory;
        heads[m].load(&self.device, batch, args.coefficient)?;
        head::begin(&self.device, &self.base.config, &mut heads[m], boundary, final_norm)
    }

    fn head_piece(&mut self, piece: usize, micro: usize, args: &RunArgs<'_>) -> Result<()> {
        ensure!(self.dense == Some(Unit::HeadPiece(piece)), "head piece {piece} is not dequantized");
        let m = self.live(micro);
        let (first_id, hidden) = (piece * HEAD_PIECE_ROWS, self.base.config.hidden_size);
        let rows = super::unit::head_piece_rows(&self.base.config, piece).len();
        let Memory { heads, head_piece, logits, .. } = &mut self.memory;
        let weight = head_piece.first(rows * hidden);
        if args.mode == Mode::Generate {
            let logits = logits.view_mut().into_range(first_id..first_id + rows);
            return self.device.logits(logits, heads[m].normed.first(hidden), weight, hidden);
        }
        let backward = args.mode == Mode::Train;
        head::piece(&self.device, &self.base.config, &mut heads[m], logits, weight, first_id, backward)
    }

    fn head_finish(&mut self, micro: usize, args: &RunArgs<'_>) -> Result<Vec<f64>> {
        let (m, last) = (self.live(micro), self.units.layers);
        if args.mode != Mode::Train {
            let boundary = self.boundaries.take(last, m)?;
            self.boundaries.release(boundary);
        }
        if args.mode == Mode::Generate {
            return Ok(Vec::new());
        }
        let Memory { heads, final_norm, batches, .. } = &mut self.memory;
        let log_probabilities = head::log_probabilities(&self.device, &heads[m])?;
        if args.mode == Mode::Train {
            let (d, tokens) = (self.boundaries.get_mut(last, m)?, batches[m].num_tokens);
            head::finish(&self.device, &self.base.config, &mut heads[m], d, final_norm, tokens)?;
        }
        Ok(log_probabilities)
    }

    /// Logits of the last token after a run in [`Mode::Generate`], `[vocab_size]`.
    pub fn last_logits(&self) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; self.base.config.vocab_size];
        self.device.download(&mut logits, self.memory.logits.first(self.base.config.vocab_size))?;
        Ok(logits)
    }
}

fn act_tensor<D: Ops>(
    device: &D,
    layout: &UnitLayout,
    tensor_idx: usize,
    flat: &Buffer<D, u8>,
    mut weights: ViewMut<'_, D, D::Act>,
) -> Result<()> {
    let encoding: Encoding = layout.tensors()[tensor_idx].encoding;
    for segment in layout.segments(tensor_idx) {
        let (weights, records) = (weights.range_mut(segment.weights), flat.view().range(segment.bytes));
        device.dequantize(Dequantize { weights, records, encoding })?;
    }
    Ok(())
}

fn f32_tensor<D: Ops>(
    device: &D,
    layout: &UnitLayout,
    tensor_idx: usize,
    flat: &Buffer<D, u8>,
    mut weights: ViewMut<'_, D, f32>,
) -> Result<()> {
    let encoding: Encoding = layout.tensors()[tensor_idx].encoding;
    for segment in layout.segments(tensor_idx) {
        let (weights, records) = (weights.range_mut(segment.weights), flat.view().range(segment.bytes));
        device.dequantize_f32(Dequantize { weights, records, encoding })?;
    }
    Ok(())
}
