//! A job's keys, translated into what loading, data and planning take.

use anyhow::{Context, Result, ensure};

use crate::checkpoint::load::LoadOptions;
use crate::comm::Gather;
use crate::data::DataOptions;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::{Keep, Mode};
use crate::plan::wishes::{KeepRange, Levers, Wishes};
use crate::recipe::{ActivationCheckpointing, BatchSize, Command, FsdpJob, Job, ShardingStrategy};

/// Returns how many of `world_size` ranks hold a base together. `node_size` is the number of ranks of each node, or
/// `None` where nodes differ or ranks do not follow each other.
pub fn num_shards(job: &FsdpJob, world_size: usize, node_size: Option<usize>) -> Result<usize> {
    match job.sharding_strategy {
        ShardingStrategy::FullShard => Ok(world_size),
        ShardingStrategy::NoShard => Ok(1),
        ShardingStrategy::HybridShard => node_size.context(
            "fsdp.sharding_strategy: hybrid_shard needs as many ranks on every node, one node after the other: mpirun --map-by \
             slot, or srun --distribution=block with --ntasks-per-node",
        ),
    }
}

/// Returns how a job holds its base.
pub fn load_options(job: &Job, num_shards: usize) -> LoadOptions {
    LoadOptions {
        load_in_4bit: job.quantization.load_in_4bit,
        double_quant: job.quantization.double_quant,
        shards: job.shards.clone(),
        num_shards,
    }
}

/// Returns how the projections of a made-up base are held: see [`crate::checkpoint::synthetic::layouts`].
pub fn nf4_double_quant(job: &Job) -> Option<bool> {
    job.quantization.load_in_4bit.then_some(job.quantization.double_quant.unwrap_or(true))
}

/// Returns how a job's rows become documents and sequences.
pub fn data_options(job: &Job) -> DataOptions {
    let data = &job.data;
    DataOptions { max_length: data.max_length, packing: data.packing, overlong: data.overlong, loss_on: data.loss_on }
}

/// Returns the sizes of a job's step whose sequences all have the longest length that it allows. It is decided later
/// what is kept where. Benchmarks save nothing.
pub fn step_limits(job: &Job, world_size: usize) -> Limits {
    let (max_length, sequences) = (job.data.max_length, job.training.per_device_train_batch_size);
    let micro_batches = job.training.accumulation_steps(world_size);
    Limits {
        max_length,
        accumulation: job.fsdp.accumulation,
        snapshot: job.command != Command::BenchStep,
        ..Limits::new(Mode::Train, max_length * sequences, micro_batches)
    }
}

/// Returns what a job's keys fix of the decision what is kept where.
pub fn wishes(job: &Job, world_size: usize) -> Wishes {
    let levers = levers(job, world_size);
    let job = &job.fsdp;
    let keep = match job.activation_checkpointing {
        ActivationCheckpointing::Auto => KeepRange::ANY,
        ActivationCheckpointing::Full => KeepRange::AT_MOST_LORA,
        ActivationCheckpointing::Selective => KeepRange::only(Keep::DEAREST),
        ActivationCheckpointing::None => KeepRange::only(Keep::EVERYTHING),
    };
    let units = job.resident_units.or(job.offload_params.map(|offload| if offload { 0 } else { usize::MAX }));
    let trainables = job.offload_params.map(|offload| !offload);
    let recomputes_all = job.activation_checkpointing == ActivationCheckpointing::Full;
    let dense_layers = job.dense_layers.or(recomputes_all.then_some(0));
    let (offload_boundaries, gather) = (job.activation_offload, job.gather);
    Wishes { keep, units, dense_layers, trainables, offload_boundaries, gather, levers }
}

/// Returns what a user of a job's command can turn to make it fit.
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
            "fsdp.dense_layers",
            "fsdp.activation_offload",
            "fsdp.activation_checkpointing",
        ]
        .into_iter()
        .filter_map(name)
        .collect(),
    }
}

/// Returns the gather method that a job forces, or `None` if both are possible. `in_a_node` says whether the ranks
/// that hold a base together share a node.
pub fn possible_gather(job: &FsdpJob, num_shards: usize, in_a_node: bool) -> Result<Option<Gather>> {
    ensure!(
        in_a_node || job.gather != Some(Gather::Host),
        "fsdp.gather: host needs the whole base in the memory of each node: one node, or fsdp.sharding_strategy: hybrid_shard"
    );
    Ok(job.gather.or((num_shards == 1 || !in_a_node).then_some(Gather::Collective)))
}
