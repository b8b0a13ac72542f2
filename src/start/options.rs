//! What a job asks of the base, the adapter and the memory.

use anyhow::{Result, ensure};

use super::host_memory;
use crate::checkpoint::adapter::AdapterSettings;
use crate::checkpoint::load::LoadOptions;
use crate::comm::Gather;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::{Keep, Mode};
use crate::model::config::ModelConfig;
use crate::plan::decide::{Levers, Wishes};
use crate::recipe::{ActivationCheckpointing, BatchSize, FsdpJob, Job, LoraJob};
use crate::train::log::bytes;

/// How a job holds its base.
pub fn load_options(job: &Job, num_shards: usize) -> LoadOptions {
    LoadOptions {
        load_in_4bit: job.quantization.load_in_4bit,
        double_quant: job.quantization.double_quant,
        shards: job.shards.clone(),
        num_shards,
    }
}

/// How the projections of a made-up base are held: see [`crate::checkpoint::synthetic::layouts`].
pub fn nf4_double_quant(job: &Job) -> Option<bool> {
    job.quantization.load_in_4bit.then_some(job.quantization.double_quant.unwrap_or(true))
}

/// What the largest step of a job must hold, its micro-batches full; what of it is kept where is decided later.
pub fn step_limits(job: &Job, world_size: usize) -> Limits {
    let (max_length, sequences) = (job.data.max_length, job.training.per_device_train_batch_size);
    let micro_batches = job.training.accumulation_steps(world_size);
    Limits {
        max_length,
        accumulation: job.fsdp.accumulation,
        ..Limits::new(Mode::Train, max_length * sequences, micro_batches)
    }
}

/// What the keys of a recipe ask of the memory.
pub fn wishes(job: &Job, world_size: usize) -> Wishes {
    let levers = levers(job, world_size);
    let job = &job.fsdp;
    let keep = match job.activation_checkpointing {
        ActivationCheckpointing::Auto => None,
        ActivationCheckpointing::Full => Some(Keep::NOTHING),
        ActivationCheckpointing::Selective => Some(Keep::DEAREST),
        ActivationCheckpointing::None => Some(Keep::EVERYTHING),
    };
    let units = job.resident_units.or(job.offload_params.map(|offload| if offload { 0 } else { usize::MAX }));
    let trainables = job.offload_params.map(|offload| !offload);
    Wishes { keep, units, trainables, offload_boundaries: job.activation_offload, gather: job.gather, levers }
}

/// What a user of a job's command can turn to make it fit.
fn levers(job: &Job, world_size: usize) -> Levers {
    let name = |path| job.command.name_of(path);
    let (batch, batch_factor) = match job.training.batch {
        BatchSize::AccumulationSteps(_) => ("training.gradient_accumulation_steps", 1),
        BatchSize::Global(_) => ("training.global_batch_size", world_size * job.training.per_device_train_batch_size),
    };
    Levers {
        accumulation: name("fsdp.accumulation"),
        micro_batches: name(batch).map(|name| (name, batch_factor)),
        batch_size: name("training.per_device_train_batch_size"),
        max_length: name("data.max_length"),
        placement: [
            "fsdp.offload_params",
            "fsdp.resident_units",
            "fsdp.activation_offload",
            "fsdp.activation_checkpointing",
        ]
        .into_iter()
        .filter_map(name)
        .collect(),
    }
}

/// What a new adapter is, as a job has it.
pub fn adapter_settings(lora: &LoraJob) -> AdapterSettings {
    AdapterSettings {
        lora_rank: lora.r,
        alpha: lora.alpha,
        dropout: lora.dropout,
        use_rslora: lora.use_rslora,
        targets: lora.target_modules.clone(),
        init_lora_weights: true.into(),
    }
}

/// Returns the gather method that a job forces, or `None` if both are possible. `in_a_node` says whether the ranks that hold a base
/// together share a node.
pub fn possible_gather(job: &FsdpJob, num_shards: usize, in_a_node: bool) -> Result<Option<Gather>> {
    ensure!(
        in_a_node || job.gather != Some(Gather::Host),
        "fsdp.gather: host needs the whole base in the memory of each node: one node, or fsdp.sharding_strategy: hybrid_shard"
    );
    Ok(job.gather.or((num_shards == 1 || !in_a_node).then_some(Gather::Collective)))
}

/// Fails where a new adapter is larger than the memory that is available: it is made before the plan knows of it.
pub fn check_adapter_bytes(settings: &AdapterSettings, config: &ModelConfig) -> Result<()> {
    let (r, layers) = (settings.lora_rank as f64, config.num_hidden_layers as f64);
    let widths = settings.targets.iter().map(|p| p.shape(config).iter().map(|&n| n as f64).sum::<f64>());
    let (needed, there) = (widths.sum::<f64>() * r * layers * size_of::<f32>() as f64, host_memory::available_bytes());
    ensure!(
        needed < there as f64,
        "lora.r: {} makes an adapter of {}, and {} of host memory are available: lower lora.r, or lora.target_modules to fewer",
        settings.lora_rank,
        bytes(needed as usize),
        bytes(there)
    );
    Ok(())
}
