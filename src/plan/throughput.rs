//! The time of a step: the schedule that the executor will run gets a duration for each action, on the same queues.

use std::collections::HashMap;

use crate::comm::Gather;
use crate::comm::spans::{Lane, Span};
use crate::device::cuda::DEQUANTIZED_TOGETHER;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::{Action, build};
use crate::fsdp::unit::{NumUnits, Unit, head_piece_rows};
use crate::model::spec::TensorId;
use crate::model::stage::Saved;
use crate::model::stage::cost::{Circumstances, Cost};
use crate::quant::record::Dtype;

use super::hardware::Hardware;
use super::memory::Sizes;

/// Rate of AdamW on the host, in bytes of values, gradients and moments.
const HOST_UPDATE_BYTES_PER_S: f64 = 20e9;
/// Bytes of an activation.
const ACT: f64 = 2.0;

/// The work that is predicted: training of a model on some GPUs.
#[derive(Clone, Copy)]
pub struct Workload<'a> {
    pub sizes: Sizes<'a>,
    /// The type of activations.
    pub act: Dtype,
    pub hardware: &'a Hardware,
    pub links: Links,
}

/// Bytes a second that a rank receives: between the ranks that hold a base together, and between those that hold the
/// same shard.
#[derive(Clone, Copy, Debug)]
pub struct Links {
    pub shards_bytes_per_s: f64,
    pub replicas_bytes_per_s: f64,
}

impl Links {
    /// Returns the links of ranks. `base_in_a_node` says whether the ranks that hold a base together share a node,
    /// and `one_node` whether all ranks do.
    pub fn new(hardware: &Hardware, base_in_a_node: bool, one_node: bool, network_bytes_per_s: f64) -> Links {
        let link = |in_a_node| if in_a_node { hardware.peer_bytes_per_s } else { network_bytes_per_s };
        Links { shards_bytes_per_s: link(base_in_a_node), replicas_bytes_per_s: link(one_node) }
    }
}

/// A predicted step.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    pub spans: Vec<Span>,
    pub seconds: f64,
    /// Time that the computation waits for gathers and reduces. `copy_wait` is the time that it waits for copies.
    pub gather_wait: f64,
    pub copy_wait: f64,
    /// Bytes that a rank copies from the host, copies to the host, and receives from other ranks.
    pub fetched_bytes: f64,
    pub put_bytes: f64,
    pub received_bytes: f64,
}

impl Timeline {
    /// Names the queue that the step spends most of its time on.
    pub fn bound_by(&self) -> &'static str {
        let busy = |lane| -> f64 { self.spans.iter().filter(|s| s.lane == lane).map(|s| s.end - s.begin).sum() };
        if self.gather_wait + self.copy_wait < 0.1 * self.seconds {
            return "computation";
        }
        if busy(Lane::Communication) > busy(Lane::Fetch).max(busy(Lane::Put)) {
            "the link between ranks"
        } else {
            "PCIe"
        }
    }
}

impl Workload<'_> {
    /// Goes through the schedule of a training step and adds up durations; nothing is computed.
    pub fn predict(&self, limits: &Limits) -> Timeline {
        let inputs = limits.largest(NumUnits::new(self.sizes.spec));
        let (at, done, timeline) = (HashMap::new(), HashMap::new(), Timeline::default());
        let resident = limits.residency.of_units(self.sizes.layouts.len());
        let mut run = Run { work: self, limits, resident, at, done, timeline };
        build(&inputs).iter().for_each(|action| run.act(action));
        run.timeline.seconds = run.at.values().copied().fold(0.0, f64::max);
        run.timeline
    }

    /// Returns true if attention takes longer for each byte that it saves for backward than the projections after it
    /// do.
    pub fn attention_is_dearer(&self, limits: &Limits) -> bool {
        let reached = self.hardware.reached;
        let attention = limits.max_length as f64 / reached.attention_forward;
        attention >= self.sizes.spec.hidden_size as f64 / reached.products
    }

    /// Number of features of the residual stream.
    fn hidden(&self) -> f64 {
        self.sizes.spec.hidden_size as f64
    }

    fn circumstances(&self, limits: &Limits) -> Circumstances {
        Circumstances {
            hidden_size: self.sizes.spec.hidden_size,
            max_length: limits.max_length,
            has_dropout: self.sizes.trainables.is_some_and(|trainables| trainables.lora.dropout > 0.0),
        }
    }

    /// Seconds for all tokens of a micro-batch.
    fn seconds(&self, cost: Cost, limits: &Limits) -> f64 {
        let (hw, reached, tokens) = (self.hardware, self.hardware.reached, limits.max_tokens as f64);
        let products = 2.0 * cost.weights / (hw.matrix_flops * reached.products);
        let forward_scores = cost.forward_scores / (hw.matrix_flops * reached.attention_forward);
        let backward_scores = cost.backward_scores / (hw.matrix_flops * reached.attention_backward);
        let moved = cost.elements * ACT / (hw.memory_bytes_per_s * reached.memory);
        tokens * (products + forward_scores + backward_scores + moved) + cost.launches * reached.kernel_seconds
    }

    fn compute_seconds(&self, action: &Action, limits: &Limits) -> f64 {
        let (hw, reached, tokens) = (self.hardware, self.hardware.reached, limits.max_tokens as f64);
        let (spec, at, h) = (self.sizes.spec, self.circumstances(limits), self.hidden());
        let moved = |elements: f64| Cost { elements, ..Cost::default() };
        match *action {
            Action::Dequantize { unit, .. } => self.dequantize_seconds(unit, limits),
            Action::Embed { .. } => tokens * h * ACT / hw.host_bytes_per_s,
            Action::Forward { layer, .. } => {
                self.seconds(spec.layers[layer].forward_cost(&at, Saved::EVERYTHING, true), limits)
            }
            Action::Recompute { layer, .. } => {
                let computed = limits.keep.of(layer, spec.num_layers()).missing();
                self.seconds(spec.layers[layer].forward_cost(&at, computed, false), limits)
            }
            Action::Backward { layer, .. } => self.seconds(spec.layers[layer].backward_cost(&at), limits),
            Action::HeadPiece { piece, .. } => {
                let rows = head_piece_rows(spec, piece).len() as f64;
                self.seconds(Cost { weights: 2.0 * rows * h, ..moved(4.0 * rows) }, limits)
            }
            Action::HeadBegin { .. } | Action::HeadBackward { .. } => self.seconds(moved(6.0 * h), limits),
            Action::Optimizer => {
                let values: usize = self.sizes.sharded().iter().flat_map(|s| s.layouts()).map(|l| l.shard_len()).sum();
                let bytes = 28.0 * values as f64;
                match limits.residency.trainables {
                    true => bytes / (hw.memory_bytes_per_s * reached.memory),
                    false => bytes / HOST_UPDATE_BYTES_PER_S,
                }
            }
            _ => 0.0,
        }
    }

    fn dequantize_seconds(&self, unit: Unit, limits: &Limits) -> f64 {
        let keeps_dense = matches!(unit, Unit::Layer(layer) if layer < limits.dense_layers);
        let layout = &self.sizes.layouts[NumUnits::new(self.sizes.spec).idx(unit)];
        let (mut bytes, mut num_weights, mut num_vectors) = (0.0, 0, 0);
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let is_kept = keeps_dense && matches!(tensor.id, TensorId::Weight(_));
            if is_kept || layout.in_place(idx, self.act).is_some() {
                continue;
            }
            let elements = tensor.elements.len();
            bytes += tensor.encoding.tensor_bytes(elements) as f64 + elements as f64 * ACT;
            match tensor.id {
                TensorId::Norm(_) | TensorId::Bias(_) => num_vectors += layout.num_shards(),
                TensorId::Weight(_) | TensorId::Rows => num_weights += layout.num_shards(),
            }
        }
        // One kernel takes several parts of weights, a part for each shard; each part of a vector and the cast of LoRA
        // values have one of their own.
        let launches = (num_weights.div_ceil(DEQUANTIZED_TOGETHER) + num_vectors + 1) as f64;
        let rate = self.hardware.memory_bytes_per_s * self.hardware.reached.memory;
        bytes / rate + launches * self.hardware.reached.kernel_seconds
    }

    /// Trainable values that this rank keeps of a layer.
    fn trainable_shard(&self, layer: usize) -> f64 {
        self.sizes.sharded().map_or(0.0, |sharded| sharded.layout(layer).shard_len() as f64)
    }
}

/// A step under way: when each queue is free, and when each action that is waited for has ended.
struct Run<'a> {
    work: &'a Workload<'a>,
    limits: &'a Limits,
    /// For each unit, true if its shard is on the device.
    resident: Vec<bool>,
    at: HashMap<Lane, f64>,
    done: HashMap<String, f64>,
    timeline: Timeline,
}

impl Run<'_> {
    fn now(&self, lane: Lane) -> f64 {
        self.at.get(&lane).copied().unwrap_or(0.0)
    }

    /// Puts an action on a queue, not before `earliest`; returns its end.
    fn push(&mut self, lane: Lane, name: &str, earliest: f64, seconds: f64) -> f64 {
        let begin = self.now(lane).max(earliest);
        let end = begin + seconds;
        self.at.insert(lane, end);
        if seconds > 0.0 {
            self.timeline.spans.push(Span { lane, name: name.to_string(), begin, end });
        }
        end
    }

    /// Makes the computation wait for the action that was started under this name; returns how long it waits.
    fn wait(&mut self, key: &str) -> f64 {
        let (now, done) = (self.now(Lane::Compute), self.done.get(key).copied().unwrap_or(0.0));
        self.at.insert(Lane::Compute, now.max(done));
        (done - now).max(0.0)
    }

    fn fetch(&mut self, name: &str, earliest: f64, bytes: f64) -> f64 {
        self.timeline.fetched_bytes += bytes;
        self.push(Lane::Fetch, name, earliest, bytes / self.work.hardware.host_bytes_per_s)
    }

    fn put(&mut self, name: &str, earliest: f64, bytes: f64) -> f64 {
        self.timeline.put_bytes += bytes;
        self.push(Lane::Put, name, earliest, bytes / self.work.hardware.host_bytes_per_s)
    }

    fn receive(&mut self, name: &str, earliest: f64, bytes: f64, bytes_per_s: f64) -> f64 {
        self.timeline.received_bytes += bytes;
        self.push(Lane::Communication, name, earliest, bytes / bytes_per_s)
    }

    fn act(&mut self, action: &Action) {
        let (work, now) = (self.work, self.now(Lane::Compute));
        let boundary = self.limits.max_tokens as f64 * work.hidden() * ACT;
        match *action {
            Action::Gather { unit, .. } => {
                let end = self.gather(unit, now);
                self.done.insert(format!("gather {unit}"), end);
            }
            Action::Wait { unit, .. } => self.timeline.gather_wait += self.wait(&format!("gather {unit}")),
            Action::Reduce { layer, .. } => {
                let end = self.reduce(layer, now);
                self.done.insert(format!("reduce {layer}"), end);
            }
            Action::WaitReduce { layer, .. } => self.timeline.gather_wait += self.wait(&format!("reduce {layer}")),
            Action::Put { layer, micro } => {
                let end = self.put(&format!("put boundary {layer}.{micro}"), now, boundary);
                self.done.insert(format!("put {layer}.{micro}"), end);
            }
            Action::WaitPut { layer, micro } => self.timeline.copy_wait += self.wait(&format!("put {layer}.{micro}")),
            Action::Fetch { layer, micro } => {
                let end = self.fetch(&format!("fetch boundary {layer}.{micro}"), now, boundary);
                self.done.insert(format!("fetch {layer}.{micro}"), end);
            }
            Action::WaitFetch { layer, micro } => {
                self.timeline.copy_wait += self.wait(&format!("fetch {layer}.{micro}"));
            }
            ref other => {
                let seconds = work.compute_seconds(other, self.limits);
                self.push(Lane::Compute, &format!("{other:?}"), now, seconds);
            }
        }
    }

    fn gather(&mut self, unit: Unit, now: f64) -> f64 {
        let (work, limits) = (self.work, self.limits);
        let idx = NumUnits::new(work.sizes.spec).idx(unit);
        let (layout, name) = (&work.sizes.layouts[idx], format!("gather {unit}"));
        let lora = if let Unit::Layer(layer) = unit { 4.0 * work.trainable_shard(layer) } else { 0.0 };
        let others = layout.num_shards() as f64 - 1.0;
        let (fetched, received) = match limits.gather {
            Gather::Collective => (layout.shard_bytes() as f64, others * layout.shard_bytes() as f64),
            Gather::Host => (layout.gathered_bytes() as f64, 0.0),
        };
        let fetched = if self.resident[idx] { 0.0 } else { fetched };
        let fetched = fetched + if limits.residency.trainables { 0.0 } else { lora };
        let mut end = now;
        if fetched > 0.0 {
            end = self.fetch(&name, now, fetched);
        }
        let received = received + others * lora;
        if received > 0.0 {
            end = self.receive(&name, end, received, work.links.shards_bytes_per_s);
        }
        end
    }

    fn reduce(&mut self, layer: usize, now: f64) -> f64 {
        let (work, name) = (self.work, format!("reduce layer {layer}"));
        let (shards, replicas) = (work.sizes.num_shards() as f64, work.sizes.num_replicas() as f64);
        let shard_bytes = 4.0 * work.trainable_shard(layer);
        let mut end = now;
        if shards > 1.0 {
            end = self.receive(&name, end, shard_bytes * (shards - 1.0), work.links.shards_bytes_per_s);
        }
        if replicas > 1.0 {
            // This rank receives the parts that it sums, and then the sums of the other ranks.
            let bytes = 2.0 * shard_bytes * (replicas - 1.0) / replicas;
            end = self.receive(&name, end, bytes, work.links.replicas_bytes_per_s);
        }
        match self.limits.residency.trainables {
            true => end,
            false => self.put(&name, end, shard_bytes),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::checkpoint::synthetic;
    use crate::fsdp::schedule::{Accumulation, Keep, Mode};
    use crate::model::shapes;
    use crate::model::targets::{LoraKeys, Modules};
    use crate::model::trainable::{LoraConfig, Trainables};

    /// A shape with the adapter of `bench step` over some ranks, which hold one base, on these cards.
    pub fn with_workload<T>(
        (shape, layers): (&str, Option<usize>),
        world_size: usize,
        (gpu, link_bytes_per_s): (&str, f64),
        f: impl FnOnce(&Workload<'_>) -> T,
    ) -> T {
        let spec = shapes::named(shape, layers).unwrap();
        let layouts = synthetic::layouts(&spec, Some(true), world_size).unwrap();
        let layers = LoraKeys::uniform(16, 16.0, Modules::AllLinear).modules(&spec).unwrap();
        let trainables = Trainables::new(&spec, LoraConfig { dropout: 0.05, layers });
        let sizes = Sizes { spec: &spec, layouts: &layouts, trainables: Some(&trainables), world_size };
        let links = Links { shards_bytes_per_s: link_bytes_per_s, replicas_bytes_per_s: link_bytes_per_s };
        f(&Workload { sizes, act: Dtype::Bf16, hardware: &Hardware::named(gpu).unwrap(), links })
    }

    #[test]
    fn a_slow_link_is_what_bounds_a_step() {
        let run = |accumulation, gather, link| {
            let limits = Limits { accumulation, gather, ..Limits::new(Mode::Train, 512, 8) };
            with_workload(("llama-3.1-8b", Some(4)), 2, ("h100", link), |workload| workload.predict(&limits))
        };
        let slow = run(Accumulation::Layer, Gather::Collective, 0.85e9);
        assert_eq!(slow.bound_by(), "the link between ranks");
        assert_eq!(run(Accumulation::Layer, Gather::Collective, 300e9).bound_by(), "computation");
        let often = run(Accumulation::MicroBatch, Gather::Collective, 0.85e9);
        let ratio = often.received_bytes / slow.received_bytes;
        assert!((6.0..8.0).contains(&ratio) && often.seconds > 5.0 * slow.seconds, "{ratio}");
        assert!(slow.spans.windows(2).all(|s| s[0].lane != s[1].lane || s[0].end <= s[1].begin + 1e-12));
        let host = run(Accumulation::Layer, Gather::Host, 0.85e9);
        assert!(host.received_bytes < 0.1 * slow.received_bytes && host.seconds < 0.7 * slow.seconds);
    }

    #[test]
    fn what_is_kept_is_not_paid_for_twice() {
        with_workload(("llama-3.1-8b", None), 1, ("h100", 300e9), |workload| {
            let seconds = |keep| workload.predict(&Limits { keep, ..Limits::new(Mode::Train, 2048, 1) }).seconds;
            let some = Keep { lora: 16, ..Keep::NOTHING };
            let more = Keep { attention: 16, mlp: 16, ..Keep::LORA };
            let all = [Keep::NOTHING, some, Keep::LORA, more, Keep::DEAREST, Keep::EVERYTHING].map(seconds);
            assert!(all.is_sorted_by(|a, b| a > b), "{all:?}");
        });
    }
}
