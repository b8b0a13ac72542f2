//! A plan as the user reads it: memory by name, what is kept where, and how long a step takes.

use std::fmt::{self, Display};

use serde_json::{Map, Value, json};

use crate::device::MemoryPlan;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Keep;
use crate::model::trainable::LoraConfig;

use super::memory::{Cost, text};
use super::throughput::Timeline;

/// The decisions and predictions for a run on some GPUs.
#[derive(Debug)]
pub struct Report {
    pub model: String,
    pub gpu: String,
    pub world_size: usize,
    pub nodes: usize,
    pub num_layers: usize,
    pub num_units: usize,
    pub lora: LoraConfig,
    /// Values of the adapter.
    pub num_trainable: usize,
    pub limits: Limits,
    pub cost: Cost,
    /// Memory of a rank's GPU that driver and libraries take.
    pub library_bytes: usize,
    /// Host memory of a rank's process that is not pinned.
    pub process_bytes: usize,
    pub timeline: Timeline,
}

impl Report {
    /// Returns all memory that a rank takes of its GPU.
    pub fn device_bytes(&self) -> usize {
        self.cost.device_bytes() + self.library_bytes
    }

    /// Returns the host memory of all ranks.
    pub fn host_bytes(&self) -> usize {
        (self.cost.host_bytes() + self.process_bytes) * self.world_size
    }

    pub fn tokens_per_second(&self) -> f64 {
        let micro_batches = self.limits.max_micro_batches * self.world_size;
        (self.limits.max_tokens * micro_batches) as f64 / self.timeline.seconds
    }

    fn resident_units(&self) -> usize {
        self.limits.residency.units.min(self.num_units)
    }

    /// Returns the plan as one object.
    pub fn json(&self) -> Value {
        let Report { lora, limits, cost, timeline, .. } = self;
        let owners = |plan: &MemoryPlan| -> Map<String, Value> {
            plan.by_owner().into_iter().map(|(name, bytes)| (name, bytes.into())).collect()
        };
        let [smallest_r, largest_r] = lora.extremes(|module| module.lora_rank);
        let [smallest_scale, largest_scale] = lora.extremes(|module| module.scale);
        json!({
            "model": self.model, "gpu": self.gpu, "world_size": self.world_size, "nodes": self.nodes,
            "lora": {"r": largest_r, "smallest_r": smallest_r, "scale": largest_scale, "smallest_scale": smallest_scale,
                "dropout": lora.dropout, "targets": lora.targets(), "values": self.num_trainable},
            "tokens_of_a_micro_batch": limits.max_tokens, "micro_batches": limits.max_micro_batches,
            "keep": limits.keep.clamped(self.num_layers), "gather": limits.gather.word(),
            "resident_units": self.resident_units(), "units": self.num_units,
            "dense_layers": limits.dense_layers.min(self.num_layers),
            "trainables_on_device": limits.residency.trainables,
            "libraries_bytes": self.library_bytes + cost.table_bytes,
            "device": owners(&cost.device), "host": owners(&cost.host),
            "device_bytes": self.device_bytes(), "pinned_bytes": cost.host_bytes(),
            "process_bytes": self.process_bytes,
            "step_s": timeline.seconds, "tokens_per_second": self.tokens_per_second(),
            "gather_wait_s": timeline.gather_wait, "copy_wait_s": timeline.copy_wait,
            "fetched_bytes": timeline.fetched_bytes, "put_bytes": timeline.put_bytes,
            "received_bytes": timeline.received_bytes, "bound_by": timeline.bound_by(),
        })
    }
}

/// Returns a number, or two that are the smallest and the largest.
fn between<T: PartialEq + Display>([smallest, largest]: [T; 2]) -> String {
    if smallest == largest { smallest.to_string() } else { format!("{smallest} to {largest}") }
}

/// The plan as lines for people.
impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Report { model, gpu, world_size, nodes, num_layers, num_units, limits, cost, timeline, .. } = self;
        let (micro_batches, tokens) = (limits.max_micro_batches, limits.max_tokens);
        writeln!(
            f,
            "{model} on {world_size} x {gpu}, {nodes} node(s): {micro_batches} micro-batches of {tokens} tokens a rank and step"
        )?;
        let lora = &self.lora;
        let targets = lora.targets().iter().map(|id| id.name()).collect::<Vec<_>>().join(", ");
        let (dropout, values) = (lora.dropout, self.num_trainable as f64 * 1e-6);
        let r = between(lora.extremes(|module| module.lora_rank));
        let scale = between(lora.extremes(|module| module.scale));
        writeln!(f, "adapter: r {r}, scale {scale}, dropout {dropout}, on {targets}; {values:.1} million values")?;
        let owner = |f: &mut fmt::Formatter, name: &str, bytes| writeln!(f, "  {name:24} {:>10}", text(bytes));
        writeln!(f, "\nGPU memory of a rank: {}", text(self.device_bytes()))?;
        owner(f, "driver and libraries", self.library_bytes + cost.table_bytes)?;
        cost.device.by_owner().into_iter().try_for_each(|(name, bytes)| owner(f, &name, bytes))?;
        writeln!(
            f,
            "\npinned host memory of a rank, besides {} of its process: {}",
            text(self.process_bytes),
            text(cost.host_bytes())
        )?;
        cost.host.by_owner().into_iter().try_for_each(|(name, bytes)| owner(f, &name, bytes))?;
        let (resident, gather) = (self.resident_units(), limits.gather.word());
        let Keep { lora, attention, mlp, rest } = limits.keep.clamped(*num_layers);
        let dense = limits.dense_layers.min(*num_layers);
        writeln!(f, "\n{resident} of {num_units} units are resident; gathers by {gather}")?;
        writeln!(
            f,
            "of {num_layers} layers, LoRA's u is kept in {lora}, attention in {attention}, large projections in {mlp}, the rest in {rest}, \
             dequantized weights in {dense}"
        )?;
        writeln!(
            f,
            "a step: {:.2} s, {:.0} tokens/s, bound by {}; waits {:.2} s for other ranks, {:.2} s for copies",
            timeline.seconds,
            self.tokens_per_second(),
            timeline.bound_by(),
            timeline.gather_wait,
            timeline.copy_wait
        )?;
        write!(
            f,
            "moved by a rank and step: {} from the host, {} to the host, {} from other ranks",
            text(timeline.fetched_bytes as usize),
            text(timeline.put_bytes as usize),
            text(timeline.received_bytes as usize)
        )
    }
}
