//! `plan`: predicts what a run would use, without a GPU. Only rank 0 works if there are several ranks.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::files;
use crate::plan::calibrate::{self, MeasuredRun, Ratios};
use crate::plan::decide::DoesNotFit;
use crate::plan::hardware::{Hardware, Reached};
use crate::plan::report::Report;
use crate::plan::trace;
use crate::recipe::{self, Command, ComputeDtype, Job};
use crate::start::Start;
use crate::start::planned::{Machine, Planned};
use crate::train::log::bytes;

use super::{shape, usage};

#[derive(Args)]
pub struct PlanArgs {
    /// The recipe; --shape may stand in its place
    #[arg(short, long, conflicts_with = "shape", value_parser = recipe::read_path)]
    config: Option<PathBuf>,
    #[arg(long, help = shape::help(), required_unless_present_any = ["config", "compare"])]
    shape: Option<String>,
    /// With --shape: number of layers, if fewer than the shape has
    #[arg(long, conflicts_with = "config")]
    layers: Option<u32>,
    /// With --shape: sequences of a micro-batch
    #[arg(long, conflicts_with = "config", default_value_t = 1)]
    micro_batch: u32,
    /// With --shape: tokens of a sequence
    #[arg(long, conflicts_with = "config", default_value_t = 1024)]
    seq: u32,
    /// With --shape: micro-batches of a step on each rank
    #[arg(long, conflicts_with = "config", default_value_t = 8)]
    accum: u32,
    /// rtx3060, rtx3090, rtx4090, rtx5090, a100, h100 or h200
    #[arg(long, required_unless_present = "sweep")]
    gpu: Option<String>,
    /// Print for each of these cards how many of them in one node the run needs
    #[arg(long, conflicts_with_all = ["gpu", "calibrate", "world_size", "nodes", "network", "trace", "json"])]
    sweep: bool,
    /// Fit the shares of the card's rates that steps reach to measured runs: a file of lines that `bench step`
    /// printed
    #[arg(long, value_name = "FILE", requires = "gpu", value_parser = recipe::read_path)]
    calibrate: Option<PathBuf>,
    /// Compare predictions with measured runs: a file of lines that `bench step` printed
    #[arg(long, value_name = "FILE", requires = "gpu", value_parser = recipe::read_path, conflicts_with_all = [
        "config", "shape", "layers", "micro_batch", "seq", "accum", "world_size", "nodes", "network", "host_gib", "trace", "json",
    ])]
    compare: Option<PathBuf>,
    /// Number of ranks on all nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=super::MAX_RANKS))]
    world_size: u32,
    /// Number of nodes, which have as many ranks each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=super::MAX_RANKS))]
    nodes: u32,
    /// GB a second between nodes
    #[arg(long, default_value_t = 1.25, requires = "nodes")]
    network: f64,
    /// Host memory of a node in GiB; any amount if it is not given
    #[arg(long)]
    host_gib: Option<f64>,
    /// Write the predicted step as a trace for <https://ui.perfetto.dev>
    #[arg(long, value_parser = recipe::read_path)]
    trace: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl PlanArgs {
    pub fn compares(&self) -> bool {
        self.compare.is_some()
    }

    /// Says whether there is one machine to plan for, as in neither a comparison nor a sweep.
    pub fn is_one_plan(&self) -> bool {
        !self.sweep && !self.compares()
    }

    fn machine<'a>(&self, hardware: &'a Hardware, world_size: usize, ranks_per_gpu: usize) -> Machine<'a> {
        Machine {
            hardware,
            nodes: self.nodes as usize,
            world_size,
            ranks_per_gpu,
            network_bytes_per_s: self.network * 1e9,
            host_gib: self.host_gib,
        }
    }
}

/// Decides and predicts; `overrides` are those of `--set`.
pub fn run(args: &PlanArgs, ranks_per_gpu: usize, overrides: &[String]) -> Result<()> {
    for (option, value) in [("--network", Some(args.network)), ("--host-gib", args.host_gib)] {
        if let Some(value) = value.filter(|value| !(*value > 0.0 && value.is_finite())) {
            return Err(usage(&format!("{option}: found {value}, allowed: a number above 0")));
        }
    }
    let Some(gpu) = &args.gpu else { return sweep(args, overrides) };
    let mut hardware = Hardware::named(gpu).map_err(|error| usage(&error.to_string()))?;
    if let Some(path) = &args.calibrate {
        hardware = calibrate::fit(&hardware, &measured(path)?).with_context(|| path.display().to_string())?;
        let Reached { products, memory, kernel_seconds, .. } = hardware.reached;
        tracing::info!(
            "calibrated: products reach {products:.3} of the card's rate, memory {memory:.3}; a kernel takes at least {:.1} us",
            kernel_seconds * 1e6
        );
    }
    if let Some(path) = &args.compare {
        return compare(&hardware, &measured(path)?).with_context(|| path.display().to_string());
    }
    let machine = args.machine(&hardware, args.world_size as usize, ranks_per_gpu);
    if !machine.world_size.is_multiple_of(machine.nodes) {
        return Err(usage(&format!("--nodes: {} ranks do not divide by {}", machine.world_size, machine.nodes)));
    }
    let report = report(args, &machine, &job(args, overrides)?)?;
    if let Some(path) = &args.trace {
        trace::write(path, &report.timeline.spans)?;
    }
    match args.json {
        true => println!("{}", report.json()),
        false => println!("{report}"),
    }
    Ok(())
}

/// Returns the job of a recipe or a shape.
fn job(args: &PlanArgs, overrides: &[String]) -> Result<Job> {
    match &args.config {
        Some(path) => Start::job_of_one(recipe::load(path, Command::Plan, overrides)?),
        None => {
            let keys = shape::keys([args.seq, args.micro_batch, args.accum]);
            Ok(recipe::from_options(Command::PlanShape, keys, overrides)?)
        }
    }
}

/// Plans a job for a machine.
fn report(args: &PlanArgs, machine: &Machine, job: &Job) -> Result<Report> {
    let planned = match &args.shape {
        None => Planned::of_model(job, machine)?,
        Some(name) => Planned::of_shape(name, shape::spec(name, args.layers)?, job, machine)?,
    };
    if job.quantization.compute_dtype == ComputeDtype::Float32 {
        return Err(usage("quantization.bnb_4bit_compute_dtype: found float32; a GPU computes in bfloat16 or float16"));
    }
    planned.report(job, machine)
}

/// Prints for each kind of card the fewest that can do it.
fn sweep(args: &PlanArgs, overrides: &[String]) -> Result<()> {
    let job = job(args, overrides)?;
    println!("{:8} {:>5} {:>12} {:>12} {:>10}", "card", "cards", "GPU memory", "host memory", "tokens/s");
    for gpu in Hardware::names() {
        let hardware = Hardware::named(gpu)?;
        let plan = |world_size| report(args, &args.machine(&hardware, world_size, 1), &job);
        let mut result = plan(1);
        for world_size in [2, 4, 8] {
            if result.as_ref().is_err_and(|error| error.is::<DoesNotFit>()) {
                result = plan(world_size);
            }
        }
        match result {
            Ok(report) => println!(
                "{gpu:8} {:5} {:>12} {:>12} {:>10.0}",
                report.world_size,
                bytes(report.device_bytes()),
                bytes(report.host_bytes()),
                report.tokens_per_second()
            ),
            Err(error) if error.is::<DoesNotFit>() => println!("{gpu:8} does not fit on 8: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Largest file of measured runs.
const MAX_RUNS_BYTES: u64 = 64 << 20;

fn measured(path: &Path) -> Result<Vec<MeasuredRun>> {
    let text = files::read_text(path, MAX_RUNS_BYTES)?;
    let runs = MeasuredRun::read(&text).with_context(|| path.display().to_string())?;
    ensure!(!runs.is_empty(), "{}: no run of `bench step` in it", path.display());
    Ok(runs)
}

/// Prints for each run what was predicted over what was measured.
fn compare(hardware: &Hardware, runs: &[MeasuredRun]) -> Result<()> {
    println!("predicted/measured: {:>5} {:>6} {:>5}", "time", "device", "host");
    for run in runs {
        let Ratios { time, device, host } = run.compare(hardware)?;
        let of = |ratio: Option<f64>| ratio.map_or("-".to_string(), |ratio| format!("{ratio:.3}"));
        println!("{:>25.3} {:>6} {:>5}  {}", time, of(device), of(host), run.name());
    }
    Ok(())
}
