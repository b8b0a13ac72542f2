//! `plan`: what a run would use, without a GPU and without MPI.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use half::bf16;
use serde_json::json;

use crate::checkpoint::adapter::{self, AdapterSettings};
use crate::checkpoint::{load, synthetic};
use crate::device::cuda::Cuda;
use crate::files;
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Keep;
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;
use crate::model::lora::LoraConfig;
use crate::plan::calibrate::{self, MeasuredRun, Ratios};
use crate::plan::decide::{Budget, DoesNotFit, Wishes};
use crate::plan::hardware::{Hardware, Reached};
use crate::plan::limits;
use crate::plan::memory::{Cost, Sizes};
use crate::plan::throughput::{Links, Timeline, Workload};
use crate::plan::trace;
use crate::recipe::{self, Command, ComputeDtype, FsdpJob, Job, ShardingStrategy};
use crate::start::options::{adapter_settings, load_options, nf4_double_quant, possible_gather, step_limits, wishes};
use crate::train::log::bytes;

use super::usage;

#[derive(Args)]
pub struct PlanArgs {
    /// The recipe; or --shape
    #[arg(short, long, conflicts_with = "shape", value_parser = recipe::read_path)]
    config: Option<PathBuf>,
    /// llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, or a folder with a config.json
    #[arg(long, required_unless_present_any = ["config", "compare"])]
    shape: Option<String>,
    /// With --shape: fewer layers than it has
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
    /// For each of these cards, the fewest of them in one node that can do it
    #[arg(long, conflicts_with_all = ["gpu", "world_size", "nodes", "trace", "json"])]
    sweep: bool,
    /// Fits the shares of the card's rates that steps reach to these runs, lines of `bench step`
    #[arg(long, value_name = "FILE", requires = "gpu", value_parser = recipe::read_path)]
    calibrate: Option<PathBuf>,
    /// Compares predictions with these runs, lines of `bench step`
    #[arg(long, value_name = "FILE", requires = "gpu", value_parser = recipe::read_path, conflicts_with_all = [
        "config", "shape", "layers", "micro_batch", "seq", "accum", "world_size", "nodes", "network", "host_gib", "trace", "json",
    ])]
    compare: Option<PathBuf>,
    /// Ranks: GPUs of all nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=super::MAX_RANKS))]
    world_size: u32,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=super::MAX_RANKS))]
    nodes: u32,
    /// GB a second between nodes
    #[arg(long, default_value_t = 1.25, requires = "nodes")]
    network: f64,
    /// Host memory of a node in GiB
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

    /// Not a comparison, not a sweep.
    pub fn is_one_plan(&self) -> bool {
        !self.sweep && !self.compares()
    }
}

/// What is trained, from a recipe or a shape.
struct Planned {
    name: String,
    config: ModelConfig,
    layouts: Vec<UnitLayout>,
    lora: LoraConfig,
    limits: Limits,
    job: Job,
    /// Of an embedding table that is not in a file.
    embedding_bytes: usize,
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
    let world_size = args.world_size as usize;
    if let Some(path) = &args.calibrate {
        hardware = calibrate::fit(&hardware, &measured(path)?).with_context(|| path.display().to_string())?;
        let Reached { products, memory, kernel_seconds, .. } = hardware.reached;
        eprintln!(
            "calibrated: products reach {products:.3} of the card's rate, memory {memory:.3}; a kernel takes at least {:.1} us",
            kernel_seconds * 1e6
        );
    }
    if let Some(path) = &args.compare {
        return compare(&hardware, &measured(path)?).with_context(|| path.display().to_string());
    }
    if !args.world_size.is_multiple_of(args.nodes) {
        return Err(usage(&format!("--nodes: {world_size} ranks do not divide by {}", args.nodes)));
    }
    let report = Report::new(args, &hardware, (world_size, ranks_per_gpu), overrides)?;
    if let Some(path) = &args.trace {
        trace::write(path, &report.timeline.spans)?;
    }
    if args.json {
        report.json()
    } else {
        report.text()
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

/// One line for each run: what was predicted over what was measured.
fn compare(hardware: &Hardware, runs: &[MeasuredRun]) -> Result<()> {
    println!("predicted/measured: {:>5} {:>6} {:>5}", "time", "device", "host");
    for run in runs {
        let Ratios { time, device, host } = run.compare(hardware)?;
        let of = |ratio: Option<f64>| ratio.map_or("-".to_string(), |ratio| format!("{ratio:.3}"));
        println!("{:>25.3} {:>6} {:>5}  {}", time, of(device), of(host), run.name());
    }
    Ok(())
}

/// One line for each kind of card.
fn sweep(args: &PlanArgs, overrides: &[String]) -> Result<()> {
    println!("{:8} {:>5} {:>12} {:>12} {:>10}", "card", "cards", "GPU memory", "host memory", "tokens/s");
    for gpu in Hardware::names() {
        let hardware = Hardware::named(gpu)?;
        let mut why = None;
        let mut fitting = None;
        for world_size in [1, 2, 4, 8] {
            match Report::new(args, &hardware, (world_size, 1), overrides) {
                Ok(report) => fitting = Some(report),
                Err(error) if error.is::<DoesNotFit>() => {
                    why = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            }
            break;
        }
        match (fitting, why) {
            (Some(report), _) => println!(
                "{gpu:8} {:5} {:>12} {:>12} {:>10.0}",
                report.world_size,
                bytes(report.cost.device_bytes() + report.libraries),
                bytes((report.cost.host_bytes() + report.process) * report.world_size),
                report.tokens_per_second()
            ),
            (None, why) => println!("{gpu:8} does not fit on 8: {:#}", why.expect("a world size was tried")),
        }
    }
    Ok(())
}

fn budget(
    args: &PlanArgs,
    job: &Planned,
    hardware: &Hardware,
    (world_size, ranks_per_gpu): (usize, usize),
    (libraries, process): (usize, usize),
) -> Budget {
    let vram = job.job.fsdp.vram_budget.unwrap_or(usize::MAX).min(hardware.usable_bytes() / ranks_per_gpu);
    let ranks_of_a_node = (world_size / args.nodes as usize) as f64;
    let of_node = |gib: f64| ((gib * f64::from(1 << 30) / ranks_of_a_node) as usize).saturating_sub(process);
    let host = args.host_gib.map_or(usize::MAX, of_node);
    Budget { device: vram.saturating_sub(libraries), host: job.job.fsdp.host_budget.unwrap_or(usize::MAX).min(host) }
}

/// How many ranks hold a base together.
fn num_shards(args: &PlanArgs, fsdp: &FsdpJob, world_size: usize) -> usize {
    match fsdp.sharding_strategy {
        ShardingStrategy::FullShard => world_size,
        ShardingStrategy::HybridShard => world_size / args.nodes as usize,
        ShardingStrategy::NoShard => 1,
    }
}

/// Micro-batches are taken to be full.
fn from_recipe(args: &PlanArgs, path: &Path, overrides: &[String], world_size: usize) -> Result<Planned> {
    let job = recipe::load(path, Command::Plan, overrides)?;
    job.training.check_batch(world_size)?;
    let options = load_options(&job, num_shards(args, &job.fsdp, world_size));
    let (config, layouts) = load::planned(&job.model, &options)?;
    let lora = match &job.lora.adapter {
        Some(dir) => {
            let settings = adapter::load(dir, &config).context("lora.adapter")?.settings;
            AdapterSettings { dropout: job.lora.dropout, ..settings }
        }
        None => adapter_settings(&job.lora),
    };
    Ok(Planned {
        name: job.model.display().to_string(),
        limits: step_limits(&job, world_size),
        config,
        layouts,
        lora: lora.lora_config(),
        job,
        embedding_bytes: 0,
    })
}

fn from_shape(args: &PlanArgs, shape: &str, overrides: &[String], world_size: usize) -> Result<Planned> {
    let given = super::bench::given([args.seq, args.micro_batch, args.accum]);
    let job = recipe::from_options(Command::PlanShape, given, overrides)?;
    let config = super::bench::shape(shape, args.layers)?;
    let num_shards = num_shards(args, &job.fsdp, world_size);
    Ok(Planned {
        name: shape.to_string(),
        layouts: synthetic::layouts(&config, nf4_double_quant(&job), num_shards)?,
        embedding_bytes: synthetic::embedding_bytes(&config),
        config,
        lora: adapter_settings(&job.lora).lora_config(),
        limits: step_limits(&job, world_size),
        job,
    })
}

struct Report<'a> {
    args: &'a PlanArgs,
    gpu: &'a str,
    world_size: usize,
    job: Planned,
    limits: Limits,
    cost: Cost,
    libraries: usize,
    /// Host memory of the process that is not pinned.
    process: usize,
    timeline: Timeline,
}

impl<'a> Report<'a> {
    fn new(
        args: &'a PlanArgs,
        hardware: &'a Hardware,
        (world_size, ranks_per_gpu): (usize, usize),
        overrides: &[String],
    ) -> Result<Self> {
        let job = match (&args.config, &args.shape) {
            (Some(recipe), _) => from_recipe(args, recipe, overrides, world_size)?,
            (None, Some(shape)) => from_shape(args, shape, overrides, world_size)?,
            (None, None) => unreachable!("clap asks for one of them"),
        };
        let dtype = job.job.quantization.compute_dtype;
        if dtype == ComputeDtype::Float32 {
            return Err(usage(
                "quantization.bnb_4bit_compute_dtype: found float32; a GPU computes in bfloat16 or float16",
            ));
        }
        limits::check_gpu(&job.config)?;
        let lora = LayerLora::new(&job.config, job.lora.clone());
        let (config, layouts, num_shards) = (&job.config, &job.layouts[..], job.layouts[0].num_shards());
        let sizes = Sizes { config, layouts, lora: Some(&lora), world_size };
        let libraries = hardware.library_bytes(sizes.num_communicators(), ranks_per_gpu);
        let process = sizes.process_bytes(job.limits.max_tokens, ranks_per_gpu, job.embedding_bytes);
        let budget = budget(args, &job, hardware, (world_size, ranks_per_gpu), (libraries, process));
        let shared = hardware.shared_by(ranks_per_gpu);
        let in_a_node = num_shards <= world_size / args.nodes as usize;
        let links = Links::new(&shared, in_a_node, args.nodes == 1, args.network * 1e9);
        let workload = Workload { sizes, hardware: &shared, links };
        let wishes =
            Wishes { gather: possible_gather(&job.job.fsdp, num_shards, in_a_node)?, ..wishes(&job.job, world_size) };
        let limits = workload.decide::<Cuda<bf16>>(job.limits, &wishes, budget)?;
        let cost = sizes.cost::<Cuda<bf16>>(&limits)?;
        let timeline = workload.predict(&limits);
        Ok(Report { args, gpu: &hardware.name, world_size, job, limits, cost, libraries, process, timeline })
    }

    fn tokens_per_second(&self) -> f64 {
        let micro_batches = self.limits.max_micro_batches * self.world_size;
        (self.limits.max_tokens * micro_batches) as f64 / self.timeline.seconds
    }

    fn resident_units(&self) -> usize {
        self.limits.residency.units.min(self.job.layouts.len())
    }

    fn json(&self) {
        let Report { args, gpu, world_size, job, limits, cost, libraries, timeline, .. } = self;
        let owners = |plan: &crate::device::MemoryPlan| -> serde_json::Map<String, serde_json::Value> {
            plan.by_owner().into_iter().map(|(name, bytes)| (name, bytes.into())).collect()
        };
        println!(
            "{}",
            json!({
                "model": job.name, "gpu": gpu, "world_size": world_size, "nodes": args.nodes,
                "tokens_of_a_micro_batch": limits.max_tokens, "micro_batches": limits.max_micro_batches,
                "keep": limits.keep.clamped(job.config.num_hidden_layers), "gather": limits.gather.word(),
                "resident_units": self.resident_units(), "units": job.layouts.len(),
                "trainables_on_device": limits.residency.trainables,
                "libraries_bytes": libraries + cost.table_bytes, "device": owners(&cost.device), "host": owners(&cost.host),
                "device_bytes": cost.device_bytes() + libraries, "pinned_bytes": cost.host_bytes(),
                "process_bytes": self.process,
                "step_s": timeline.seconds, "tokens_per_second": self.tokens_per_second(),
                "gather_wait_s": timeline.gather_wait, "copy_wait_s": timeline.copy_wait,
                "fetched_bytes": timeline.fetched_bytes, "put_bytes": timeline.put_bytes,
                "received_bytes": timeline.received_bytes, "bound_by": timeline.bound_by(),
            })
        );
    }

    fn text(&self) {
        let Report { args, gpu, world_size, job, limits, cost, libraries, timeline, .. } = self;
        println!(
            "{} on {} x {}, {} node(s): {} micro-batches of {} tokens a rank and step",
            job.name, world_size, gpu, args.nodes, limits.max_micro_batches, limits.max_tokens
        );
        println!("\nGPU memory of a rank: {}", bytes(cost.device_bytes() + libraries));
        println!("  {:24} {:>10}", "driver and libraries", bytes(libraries + cost.table_bytes));
        for (name, n) in cost.device.by_owner() {
            println!("  {name:24} {:>10}", bytes(n));
        }
        println!(
            "\npinned host memory of a rank, besides {} of its process: {}",
            bytes(self.process),
            bytes(cost.host_bytes())
        );
        for (name, n) in cost.host.by_owner() {
            println!("  {name:24} {:>10}", bytes(n));
        }
        let (resident, all) = (self.resident_units(), job.layouts.len());
        let layers = job.config.num_hidden_layers;
        let Keep { attention, mlp, rest } = limits.keep.clamped(layers);
        println!("\n{resident} of {all} units are resident; gathers by {}", limits.gather.word());
        println!(
            "of {layers} layers, attention is kept in {attention}, large projections in {mlp}, the rest in {rest}"
        );
        println!(
            "a step: {:.2} s, {:.0} tokens/s, bound by {}; waits {:.2} s for other ranks, {:.2} s for copies",
            timeline.seconds,
            self.tokens_per_second(),
            timeline.bound_by(),
            timeline.gather_wait,
            timeline.copy_wait
        );
        println!(
            "moved by a rank and step: {} from the host, {} to the host, {} from other ranks",
            bytes(timeline.fetched_bytes as usize),
            bytes(timeline.put_bytes as usize),
            bytes(timeline.received_bytes as usize)
        );
    }
}
