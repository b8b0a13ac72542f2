//! `bench`: measures this machine.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::Value;

use super::{check_trace, shape};
use crate::bench::{collectives, kernels, step};
use crate::comm::mpi::MpiComm;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::start::agree::agree_on;

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
    #[arg(long, help = shape::help())]
    shape: String,
    /// Number of layers, if fewer than the shape has
    #[arg(long)]
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
pub fn run(start: &Start, mut comm: MpiComm, bench: &Bench, overrides: &[String]) -> Result<()> {
    let print = |line: Value| println!("{line}");
    match bench {
        Bench::Step(args) => {
            let keys = shape::keys([args.seq, args.micro_batch, args.accum]);
            let job = agree_on(&mut comm, recipe::from_options(Command::BenchStep, keys, overrides)?)?;
            check_trace(args.trace.as_deref())?;
            let spec = shape::spec(&args.shape, args.layers)?;
            let (shape, steps, trace) = (&args.shape[..], args.steps, args.trace.as_deref());
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
    Ok(())
}
