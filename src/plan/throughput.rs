//! Time: the schedule that the executor will run, with a duration for each action, on the queues that it will run on.

use std::collections::HashMap;

use crate::comm::spans::{Lane, Span};
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::{Action, build};
use crate::fsdp::unit::{NumUnits, Unit, head_piece_rows};
use crate::model::config::ModelConfig;
use crate::model::names::Projection;

use super::hardware::Hardware;

/// Shares of the card's rates that a step reaches: products and attention measured with `bench kernels` on an H100 (2026-11-25),
/// memory fitted to the steps of benches/results.md.
const PRODUCTS: f64 = 0.95;
const MEMORY: f64 = 0.56;
const ATTENTION_FORWARD: f64 = 0.19;
const ATTENTION_BACKWARD: f64 = 0.126;
/// AdamW on the host: bytes of values, gradient and moments a second.
const HOST_UPDATE_BYTES_PER_S: f64 = 20e9;
/// From pageable memory, rows of the embedding.
const PAGEABLE_BYTES_PER_S: f64 = 6e9;
/// Starting a kernel, and how many forward and backward of a layer start.
const LAUNCH_SECONDS: f64 = 4e-6;
const FORWARD_LAUNCHES: f64 = 35.0;
const BACKWARD_LAUNCHES: f64 = 57.0;
/// Bytes of an activation.
const ACT: f64 = 2.0;

/// What is predicted.
#[derive(Clone, Copy)]
pub struct Workload<'a> {
    pub config: &'a ModelConfig,
    pub layouts: &'a [UnitLayout],
    pub limits: &'a Limits,
    pub world_size: usize,
    /// LoRA values of a layer.
    pub lora_values: usize,
    pub dropout: bool,
    /// Tokens of a sequence; a micro-batch is full of them.
    pub seq: usize,
    /// Bytes a second from rank to rank.
    pub link_bytes_per_s: f64,
}

/// A predicted step.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    pub spans: Vec<Span>,
    pub seconds: f64,
    /// Time that the computation waits for gathers and reduces, and for copies.
    pub gather_wait: f64,
    pub copy_wait: f64,
    /// Over PCIe, each way, and from other ranks.
    pub fetched_bytes: f64,
    pub put_bytes: f64,
    pub received_bytes: f64,
}

impl Timeline {
    /// What the step spends most of its time on.
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
    /// Runs the schedule of a training step in thought.
    pub fn predict(&self, hardware: &Hardware) -> Timeline {
        let inputs = self.limits.inputs(NumUnits::new(self.config), self.limits.mode, self.limits.max_micro_batches);
        let mut run =
            Run { work: self, hardware, at: HashMap::new(), done: HashMap::new(), timeline: Timeline::default() };
        build(&inputs).iter().for_each(|action| run.act(action));
        run.timeline.seconds = run.at.values().copied().fold(0.0, f64::max);
        run.timeline
    }

    fn tokens(&self) -> f64 {
        self.limits.max_tokens as f64
    }

    fn weights(&self, projection: Projection) -> f64 {
        projection.shape(self.config).iter().product::<usize>() as f64
    }

    fn layer_weights(&self) -> f64 {
        Projection::ALL.into_iter().map(|p| self.weights(p)).sum()
    }

    /// Widths: hidden, queries, keys, inner; sums of the projections' inputs and outputs.
    fn widths(&self) -> [f64; 6] {
        let c = self.config;
        let (q, kv) = ((c.num_attention_heads * c.head_dim) as f64, (c.num_key_value_heads * c.head_dim) as f64);
        let sum = |i: usize| Projection::ALL.into_iter().map(|p| p.shape(c)[i] as f64).sum();
        [c.hidden_size as f64, q, kv, c.intermediate_size as f64, sum(1), sum(0)]
    }

    /// Elements that a layer's forward moves for a token, besides its matrix products.
    fn forward_elements(&self) -> f64 {
        let [h, q, kv, i, inputs, outputs] = self.widths();
        let dropout = if self.dropout { 2.0 * inputs } else { 0.0 };
        9.0 * h + 4.0 * q + 2.0 * kv + 3.0 * i + inputs + 2.0 * outputs + dropout
    }

    fn backward_elements(&self) -> f64 {
        let [h, q, kv, i, inputs, outputs] = self.widths();
        let dropout = if self.dropout { 6.0 * inputs } else { 0.0 };
        8.0 * h + 8.0 * q + 6.0 * kv + 5.0 * i + inputs + 2.0 * outputs + dropout
    }

    fn compute_seconds(&self, action: &Action, hw: &Hardware) -> f64 {
        let (tokens, layer) = (self.tokens(), self.layer_weights());
        let matrix = hw.matrix_flops * PRODUCTS;
        let moved = |elements: f64| tokens * elements * ACT / (hw.memory_bytes_per_s * MEMORY);
        // Causal: half of T² scores for each head.
        let attention = tokens * self.seq as f64 * self.widths()[1];
        let forward = |weights: f64| {
            2.0 * tokens * weights / matrix
                + 2.0 * attention / (hw.matrix_flops * ATTENTION_FORWARD)
                + moved(self.forward_elements())
                + FORWARD_LAUNCHES * LAUNCH_SECONDS
        };
        match *action {
            Action::Dequantize { unit, .. } => self.dequantize_seconds(unit, hw),
            Action::Embed { .. } => tokens * self.widths()[0] * ACT / PAGEABLE_BYTES_PER_S,
            Action::Forward { .. } => forward(layer),
            Action::Recompute { .. } => forward(layer - self.weights(Projection::Down)),
            Action::Backward { .. } => {
                2.0 * tokens * layer / matrix
                    + 5.0 * attention / (hw.matrix_flops * ATTENTION_BACKWARD)
                    + moved(self.backward_elements())
                    + BACKWARD_LAUNCHES * LAUNCH_SECONDS
            }
            Action::HeadPiece { piece, .. } => {
                let rows = head_piece_rows(self.config, piece).len() as f64;
                4.0 * tokens * rows * self.widths()[0] / matrix + moved(4.0 * rows)
            }
            Action::HeadBegin { .. } | Action::HeadFinish { .. } => moved(6.0 * self.widths()[0]),
            Action::Optimizer => {
                let bytes = 28.0 * self.trainable_shard() * self.config.num_hidden_layers as f64;
                match self.limits.residency.trainables {
                    true => bytes / (hw.memory_bytes_per_s * MEMORY),
                    false => bytes / HOST_UPDATE_BYTES_PER_S,
                }
            }
            _ => 0.0,
        }
    }

    fn dequantize_seconds(&self, unit: Unit, hw: &Hardware) -> f64 {
        let layout = &self.layouts[NumUnits::new(self.config).idx(unit)];
        let dense: usize = layout.tensors().iter().map(|t| t.elements.len()).sum();
        (layout.gathered_bytes() as f64 + dense as f64 * ACT) / (hw.memory_bytes_per_s * MEMORY)
    }

    /// Trainable values that this rank keeps of a layer.
    fn trainable_shard(&self) -> f64 {
        self.lora_values as f64 / self.layouts[0].num_shards() as f64
    }
}

/// A step under way: when each queue is free, and when each action that is waited for has ended.
struct Run<'a> {
    work: &'a Workload<'a>,
    hardware: &'a Hardware,
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

    /// The computation waits for what was started under this name.
    fn wait(&mut self, key: &str) -> f64 {
        let (now, done) = (self.now(Lane::Compute), self.done.get(key).copied().unwrap_or(0.0));
        self.at.insert(Lane::Compute, now.max(done));
        (done - now).max(0.0)
    }

    fn fetch(&mut self, name: &str, earliest: f64, bytes: f64) -> f64 {
        self.timeline.fetched_bytes += bytes;
        self.push(Lane::Fetch, name, earliest, bytes / self.hardware.host_bytes_per_s)
    }

    fn put(&mut self, name: &str, earliest: f64, bytes: f64) -> f64 {
        self.timeline.put_bytes += bytes;
        self.push(Lane::Put, name, earliest, bytes / self.hardware.host_bytes_per_s)
    }

    fn receive(&mut self, name: &str, earliest: f64, bytes: f64) -> f64 {
        self.timeline.received_bytes += bytes;
        self.push(Lane::Communication, name, earliest, bytes / self.work.link_bytes_per_s)
    }

    fn act(&mut self, action: &Action) {
        let (work, now) = (self.work, self.now(Lane::Compute));
        let boundary = work.tokens() * work.widths()[0] * ACT;
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
                let seconds = work.compute_seconds(other, self.hardware);
                self.push(Lane::Compute, &format!("{other:?}"), now, seconds);
            }
        }
    }

    fn gather(&mut self, unit: Unit, now: f64) -> f64 {
        let (work, residency) = (self.work, &self.work.limits.residency);
        let idx = NumUnits::new(work.config).idx(unit);
        let (layout, name) = (&work.layouts[idx], format!("gather {unit}"));
        let lora = if matches!(unit, Unit::Layer(_)) { 4.0 * work.trainable_shard() } else { 0.0 };
        let streamed = if residency.of_units(work.layouts.len())[idx] { 0.0 } else { layout.shard_bytes() as f64 };
        let fetched = streamed + if residency.trainables { 0.0 } else { lora };
        let mut end = now;
        if fetched > 0.0 {
            end = self.fetch(&name, now, fetched);
        }
        let others = layout.num_shards() as f64 - 1.0;
        if others > 0.0 {
            end = self.receive(&name, end, others * (layout.shard_bytes() as f64 + lora));
        }
        end
    }

    fn reduce(&mut self, layer: usize, now: f64) -> f64 {
        let (work, name) = (self.work, format!("reduce layer {layer}"));
        let ranks = work.world_size as f64;
        let mut end = now;
        if ranks > 1.0 {
            end = self.receive(&name, now, 4.0 * work.lora_values as f64 * (ranks - 1.0) / ranks);
        }
        match work.limits.residency.trainables {
            true => end,
            false => self.put(&name, end, 4.0 * work.trainable_shard()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::synthetic;
    use crate::device::cuda::{CONTEXT_BYTES, Cuda, LIBRARY_BYTES, NCCL_BYTES};
    use crate::fsdp::memory::Residency;
    use crate::fsdp::schedule::{Accumulation, Mode, Recompute};
    use crate::model::layer::LayerLora;
    use crate::model::lora::{LoraConfig, LoraLayout};
    use crate::model::shapes;
    use crate::plan::memory::{Budget, Sizes, Wishes};

    /// Shape, ranks, sequences and their length, micro-batches, what is wished, budget in MiB; measured on H100s with `bench step`:
    /// milliseconds, and MiB of GPU memory (NVML) where they were sampled.
    type Measured = (&'static str, usize, usize, usize, usize, Wishes, usize, f64, Option<f64>);

    const ANYTHING: Wishes = Wishes { recompute: None, units: None, trainables: None, offload_boundaries: None };
    const RECOMPUTE: Wishes = Wishes { recompute: Some(Recompute::All), ..ANYTHING };
    const KEEP: Wishes = Wishes { recompute: Some(Recompute::Nothing), ..ANYTHING };
    const OFFLOAD: Wishes = Wishes { units: Some(0), trainables: Some(false), ..RECOMPUTE };
    const ALL_MIB: usize = 78 << 10;

    const MEASURED: [Measured; 7] = [
        ("llama-3.1-8b", 1, 4, 2048, 1, KEEP, ALL_MIB, 778.7, None),
        ("llama-3.1-8b", 1, 4, 2048, 1, RECOMPUTE, ALL_MIB, 997.0, None),
        ("llama-3.1-8b", 1, 1, 1024, 1, RECOMPUTE, ALL_MIB, 167.6, None),
        ("llama-3.1-8b", 2, 4, 2048, 1, RECOMPUTE, ALL_MIB, 991.7, None),
        ("llama-3.1-70b", 1, 1, 1024, 8, RECOMPUTE, ALL_MIB, 6818.5, Some(53_667.0)),
        ("llama-3.1-70b", 1, 1, 1024, 8, RECOMPUTE, 7680, 6904.2, Some(7335.0)),
        ("llama-3.1-70b", 2, 1, 1024, 8, OFFLOAD, 24 << 10, 7054.8, Some(16_133.0)),
    ];

    #[test]
    fn predictions_are_what_was_measured() {
        for (shape, world_size, micro_batch, seq, accum, wishes, budget_mib, ms, nvml_mib) in MEASURED {
            let config = shapes::named(shape, None).unwrap();
            let layouts = synthetic::layouts(&config, world_size).unwrap();
            let lora = LoraConfig { lora_rank: 16, scale: 1.0, dropout: 0.05, targets: Projection::ALL.to_vec() };
            let lora = LayerLora { layout: LoraLayout::new(&config, &lora), config: lora };
            let sizes = Sizes { config: &config, layouts: &layouts, lora: Some(&lora), world_size, pins_shards: true };
            let limits = Limits {
                mode: Mode::Train,
                max_tokens: micro_batch * seq,
                max_micro_batches: accum,
                max_context: 0,
                accumulation: Accumulation::Layer,
                recompute: Recompute::All,
                num_slots: 2,
                residency: Residency::ALL,
            };
            let libraries = CONTEXT_BYTES + LIBRARY_BYTES + if world_size > 1 { NCCL_BYTES } else { 0 };
            let budget = Budget { device: (budget_mib << 20) - libraries, host: 1 << 40 };
            type Gpu = Cuda<half::bf16>;
            let limits = sizes.decide::<Gpu>(limits, &wishes, budget).unwrap();
            let cost = sizes.cost::<Gpu>(&limits).unwrap();
            let hardware = Hardware::named("h100").unwrap();
            let workload = Workload {
                config: &config,
                layouts: &layouts,
                limits: &limits,
                world_size,
                lora_values: lora.layout.len,
                dropout: true,
                seq,
                link_bytes_per_s: hardware.peer_bytes_per_s,
            };
            let predicted = workload.predict(&hardware).seconds * 1e3;
            let what = format!("{shape}, {world_size} ranks, {micro_batch} x {seq}, M = {accum}");
            println!("{what}: {predicted:.0} ms predicted, {ms:.0} measured");
            assert!((predicted / ms - 1.0).abs() < 0.15, "{what}: {predicted} ms for {ms}");
            if let Some(nvml_mib) = nvml_mib {
                let mib = ((cost.device.total_bytes() + libraries) >> 20) as f64;
                println!("{what}: {mib:.0} MiB predicted, {nvml_mib:.0} measured");
                assert!((mib / nvml_mib - 1.0).abs() < 0.03, "{what}: {mib} MiB for {nvml_mib}");
            }
        }
    }

    #[test]
    fn a_slow_link_is_what_bounds_a_step() {
        let config = shapes::named("llama-3.1-8b", Some(4)).unwrap();
        let layouts = synthetic::layouts(&config, 2).unwrap();
        let limits = Limits {
            mode: Mode::Train,
            max_tokens: 512,
            max_micro_batches: 8,
            max_context: 0,
            accumulation: Accumulation::Layer,
            recompute: Recompute::All,
            num_slots: 2,
            residency: Residency::ALL,
        };
        let received = |accumulation, link_bytes_per_s| {
            let limits = Limits { accumulation, ..limits };
            let (lora_values, dropout, seq, world_size) = (1 << 20, true, 512, 2);
            let (config, layouts, limits) = (&config, &layouts[..], &limits);
            let workload =
                Workload { config, layouts, limits, world_size, lora_values, dropout, seq, link_bytes_per_s };
            workload.predict(&Hardware::named("h100").unwrap())
        };
        let slow = received(Accumulation::Layer, 0.85e9);
        assert_eq!(slow.bound_by(), "the link between ranks");
        assert_eq!(received(Accumulation::Layer, 300e9).bound_by(), "computation");
        let often = received(Accumulation::MicroBatch, 0.85e9);
        let ratio = often.received_bytes / slow.received_bytes;
        assert!((6.0..8.0).contains(&ratio) && often.seconds > 5.0 * slow.seconds, "{ratio}");
        assert!(slow.spans.windows(2).all(|s| s[0].lane != s[1].lane || s[0].end <= s[1].begin + 1e-12));
    }
}
