//! `bench`: measures this machine.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::train::{TrainOptions, train_on};
use super::{check_trace, shape};
use crate::bench::{collectives, kernels, run as bench_run, step};
use crate::checkpoint::made_up::MadeUp;
use crate::comm::mpi::MpiComm;
use crate::comm::watch;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::start::agree::agree_on;
use crate::start::data::TrainingData;
use crate::train::run::Outcome;
use crate::train::stop;

#[derive(Subcommand)]
pub enum Bench {
    /// Time training steps on made-up weights of a shape, and print one JSON object
    Step(StepArgs),
    /// Time each op at the sizes of a layer, and print one JSON object a line
    Kernels(KernelArgs),
    /// Measure the bus bandwidth between the ranks, and print one JSON object a line
    Collectives(CollectiveArgs),
}

#[derive(Args)]
pub struct StepArgs {
    #[arg(long, help = shape::help(), required_unless_present = "shards")]
    shape: Option<String>,
    /// Number of layers, if fewer than the shape has
    #[arg(long, conflicts_with = "shards")]
    layers: Option<u32>,
    /// Sequences of a micro-batch
    #[arg(long, default_value_t = 1)]
    micro_batch: u32,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 1024)]
    seq: u32,
    /// Micro-batches of a step on each rank
    #[arg(long, default_value_t = 1)]
    accum: u32,
    /// Timed steps, after two that warm up
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    steps: u32,
    /// Write a trace of the last step, which is not timed, for <https://ui.perfetto.dev>
    #[arg(long, value_parser = recipe::read_path)]
    trace: Option<PathBuf>,
    /// In the place of --shape: a folder of `quantize --shape`. The steps are a run of `train`, which loads, saves, is
    /// stopped by signals and goes on as there; --trace gets its second step
    #[arg(long, conflicts_with = "shape", requires = "output")]
    shards: Option<String>,
    /// With --shards: folder of the checkpoints, the metrics and the adapter
    #[arg(long, requires = "shards", conflicts_with = "shape")]
    output: Option<String>,
    /// With --shards: a checkpoint every so many steps
    #[arg(long, requires = "shards", conflicts_with = "shape", value_parser = clap::value_parser!(u32).range(1..))]
    save_steps: Option<u32>,
}

#[derive(Args)]
pub struct KernelArgs {
    #[arg(long, help = shape::help())]
    shape: String,
    /// Tokens of one sequence
    #[arg(long, default_value_t = 4096)]
    seq: u32,
}

#[derive(Args)]
pub struct CollectiveArgs {
    /// Bytes of a rank's shard of the largest all-gather, in MiB; smaller ones come first
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_mib: u32,
}

/// Measures, and prints what was measured on rank 0; `overrides` are those of `--set`.
pub fn run(start: &Start, mut comm: MpiComm, bench: &Bench, overrides: &[String]) -> Result<Outcome> {
    let print = |line: Value| println!("{line}");
    match bench {
        Bench::Step(args) => {
            check_trace(args.trace.as_deref())?;
            let keys = shape::keys([args.seq, args.micro_batch, args.accum]);
            let Some(shape) = &args.shape else { return run_of_train(start, comm, args, keys, overrides) };
            let job = agree_on(&mut comm, recipe::from_options(Command::BenchStep, keys, overrides)?)?;
            let spec = shape::spec(shape, args.layers)?;
            let (steps, trace) = (args.steps, args.trace.as_deref());
            step::run(start, comm, &job, step::StepBench { shape, spec, steps, trace })?.map(print);
        }
        Bench::Kernels(args) => {
            let keys = vec![("data.max_length", args.seq.into())];
            let job = agree_on(&mut comm, recipe::from_options(Command::BenchKernels, keys, overrides)?)?;
            kernels::run(start, comm, &job, &shape::spec(&args.shape, None)?, &print)?;
        }
        Bench::Collectives(args) => {
            agree_on(&mut comm, recipe::from_options(Command::BenchCollectives, Vec::new(), overrides)?)?;
            collectives::run(start, comm, args.max_mib as usize, &print)?;
        }
    }
    Ok(Outcome::Finished)
}

/// Trains on made-up shards as `train` does on a model, and prints how long each part of it took.
fn run_of_train(
    start: &Start,
    mut comm: MpiComm,
    args: &StepArgs,
    mut keys: Vec<(&'static str, Value)>,
    overrides: &[String],
) -> Result<Outcome> {
    let started = Instant::now();
    stop::listen(start.world)?;
    watch::keep_steps();
    keys.extend([
        ("model", json!(args.shards)),
        ("shards", json!(args.shards)),
        ("output_dir", json!(args.output)),
        ("training.max_steps", json!(bench_run::num_steps(args.steps as usize))),
        ("training.save_steps", json!(args.save_steps)),
    ]);
    let job = agree_on(&mut comm, recipe::from_options(Command::BenchRun, keys, overrides)?)?;
    let dir = shape::folder(&job, "--shards")?;
    let num_shards = start.num_shards(&job.fsdp)?;
    let opened = start.open_made_up(&mut comm, &job, MadeUp::load(&dir)?, &dir, num_shards)?;
    let (measured, num_layers) = ((*job).clone(), opened.spec.num_layers());
    let trace = args.trace.as_deref();
    let options = TrainOptions { started, overwrite: false, trace, read_rows: TrainingData::made_up };
    let outcome = train_on(start, comm, job, opened, options)?;
    if start.log.enabled {
        let shape = dir.display().to_string();
        println!("{}", bench_run::report(&shape, num_layers, start.world.world_size, &measured, &watch::begun()));
    }
    Ok(outcome)
}
