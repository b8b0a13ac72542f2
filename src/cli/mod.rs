//! The command line: one file per subcommand, no logic.
#![expect(clippy::print_stdout, reason = "results go to standard output")]

mod bench;
mod cache;
mod data;
mod eval;
mod export;
mod generate;
mod merge;
mod merge_scores;
mod plan;
mod quantize;
mod shape;
mod train;

use std::path::Path;

use anyhow::{Result, ensure};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::comm::mpi::{MpiComm, World};
use crate::comm::watch::{self, Phase};
use crate::logging::LogFormat;
use crate::progress;
use crate::recipe;
use crate::start::agree::{agree, clock_of_rank_0};
use crate::start::placement::DeviceKind;
use crate::start::{Facts, Start};
use crate::train::log::Log;
use crate::train::run::Outcome;

const AFTER_HELP: &str = "Without a subcommand: train -c ./fsdp-qlora.yaml

Exit status: 0 the command is done, or was finished before; 2 the command line or the recipe is wrong, or the ranks \
were not started alike; 75 the run was stopped early, with a checkpoint where a step was whole, and the same command goes on; \
1 anything else, and also an adapter that had to be saved elsewhere than in output_dir (the last line names the place)";

/// Most ranks, or shards, that the command line takes: a larger number is a slip of the pen, and the work of planning
/// grows with it.
const MAX_RANKS: i64 = 1 << 14;

/// QLoRA fine-tuning of language models, sharded over ranks: `mpirun -np 2 fsdp-qlora`.
#[derive(Parser)]
#[command(name = "fsdp-qlora", version, about, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    common: Common,
}

/// Options of every subcommand.
#[derive(Args, Clone)]
struct Common {
    /// The device to compute on
    #[arg(long, global = true, value_enum, default_value_t = DeviceKind::Auto)]
    device: DeviceKind,
    /// Number of ranks that share a GPU and its memory; more than 1 is for trying things out
    #[arg(long, global = true, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_RANKS))]
    ranks_per_gpu: u32,
    /// Tell only warnings and errors, and show no progress
    #[arg(short, long, global = true)]
    quiet: bool,
    /// The form of what is told on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Override a key of the recipe, e.g. --set quantization.load_in_4bit=false; `train --help-recipe` says which
    /// commands read which keys
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Fine-tune as a recipe says, and write a PEFT adapter
    Train(train::TrainArgs),
    /// Print the rows of a recipe as they will be trained: tokens, what counts in the loss, and what was left out
    Data(data::DataArgs),
    /// Write the shard files of a model ahead of time
    Quantize(quantize::QuantizeArgs),
    /// Print loss, perplexity and token accuracy of adapters over data sets
    Eval(eval::EvalArgs),
    /// Continue prompts
    Generate(generate::GenerateArgs),
    /// Add an adapter to its base and write a model that transformers loads
    Merge(merge::MergeArgs),
    /// Write an adapter in the format of another program
    Export(export::ExportArgs),
    /// Decide where memory goes and predict how long steps take, for GPUs that need not be there
    Plan(plan::PlanArgs),
    /// List or remove shard files in the user's cache folder
    #[command(subcommand)]
    Cache(cache::Cache),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::Bench),
}

impl Cli {
    /// Returns the form of what this command tells, and whether it is to be quiet.
    pub fn log(&self) -> (LogFormat, bool) {
        (self.common.log_format, self.common.quiet)
    }

    /// Returns whether this command trains: signals stop it, and it can go on.
    pub fn trains(&self) -> bool {
        match &self.command {
            None => true,
            Some(Command::Train(args)) => !args.help_recipe,
            Some(_) => false,
        }
    }

    /// Runs the subcommand on this rank.
    pub fn run(self, world: &World) -> Result<Outcome> {
        let outcome = self.run_command(world);
        progress::end();
        outcome
    }

    fn run_command(self, world: &World) -> Result<Outcome> {
        let Common { device, ranks_per_gpu, quiet, log_format, overrides } = self.common;
        if device == DeviceKind::Cpu && ranks_per_gpu != 1 {
            return Err(usage("--ranks-per-gpu is not for --device cpu"));
        }
        watch::phase(Phase::Agree)?;
        let mut comm = MpiComm::new(world)?;
        if world.world_size > 1 {
            agree(&mut comm, &invocation()?)?;
        }
        let clock = clock_of_rank_0(&mut comm)?;
        let log = Log { enabled: world.rank == 0 };
        if log.enabled && !quiet && log_format == LogFormat::Text {
            progress::show();
        }
        let start = Start { world, log, clock, device, ranks_per_gpu: ranks_per_gpu as usize };
        let no_device = |why: &str| match device != DeviceKind::Auto || ranks_per_gpu != 1 {
            true => Err(usage(&format!("{why}: --device and --ranks-per-gpu are not for it"))),
            false => Ok(()),
        };
        match self.command.unwrap_or(Command::Train(train::TrainArgs::default())) {
            Command::Train(args) if args.help_recipe => {
                if world.rank == 0 {
                    print!("{}", recipe::help());
                }
            }
            Command::Train(args) => return train::run(&start, comm, &args, &overrides),
            Command::Data(args) => {
                no_device("data computes nothing")?;
                if world.rank == 0 {
                    data::run(&start, &args, &overrides)?;
                }
            }
            Command::Quantize(args) => no_device("quantize computes on the CPU")
                .and_then(|()| quantize::run(&start, comm, &args, &overrides))?,
            Command::Eval(args) => eval::run(&start, comm, &args, &overrides)?,
            Command::Generate(args) => generate::run(&start, comm, &args, &overrides)?,
            Command::Merge(args) => {
                if !args.scores() {
                    no_device("merge computes on the CPU")?;
                }
                merge::run(&start, comm, &args, &overrides)?
            }
            Command::Export(args) => {
                no_device("export computes nothing")?;
                if world.rank == 0 {
                    export::run(&start, &args, &overrides)?;
                }
            }
            Command::Plan(args) => {
                if device != DeviceKind::Auto {
                    return Err(usage("plan computes nothing: --device is not for it; --gpu is"));
                }
                if ranks_per_gpu != 1 && !args.is_one_plan() || !overrides.is_empty() && args.compares() {
                    return Err(usage("--ranks-per-gpu is not for --compare and --sweep, nor --set for --compare"));
                }
                if world.rank == 0 {
                    plan::run(&args, ranks_per_gpu as usize, &overrides)?;
                }
            }
            Command::Cache(command) => {
                if device != DeviceKind::Auto || ranks_per_gpu != 1 || !overrides.is_empty() {
                    return Err(usage("cache loads no model: --device, --ranks-per-gpu and --set are not for it"));
                }
                if world.rank == 0 {
                    cache::run(&command)?;
                }
            }
            Command::Bench(bench) => return bench::run(&start, comm, &bench, &overrides),
        }
        Ok(Outcome::Finished)
    }
}

/// Options that ranks need not have in common: those that say where something lies, whose content is compared where
/// it matters, and `--set`, of which the decided job is compared.
const NOT_COMPARED: [&str; 13] = [
    "config",
    "gguf",
    "trace",
    "model",
    "shards",
    "output",
    "adapter",
    "dataset",
    "per_token",
    "prompts",
    "calibrate",
    "compare",
    "overrides",
];

/// Returns what this rank was started with: program, environment, subcommand and its options, as given or by default.
fn invocation() -> Result<Facts> {
    let (mut command, mut facts) = (Cli::command(), Facts::of_process());
    command.build();
    let matches = command.clone().try_get_matches()?;
    let (mut command, mut matches, mut name) = (&command, &matches, String::new());
    while let Some((subcommand, of_subcommand)) = matches.subcommand() {
        command = command.find_subcommand(subcommand).unwrap_or(command);
        (matches, name) = (of_subcommand, format!("{name} {subcommand}"));
    }
    facts.add("subcommand", if name.is_empty() { "train" } else { name.trim() });
    for id in command.get_arguments().map(|argument| argument.get_id().as_str()) {
        let Ok(Some(values)) = matches.try_get_raw(id) else { continue };
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        // A flag that is not given is false; without a subcommand there are no flags.
        if !NOT_COMPARED.contains(&id) && values != ["false"] {
            facts.add(format!("--{}", id.replace('_', "-")), values.join(" "));
        }
    }
    Ok(facts)
}

/// Returns the error of a command line that cannot be meant.
fn usage(text: &str) -> anyhow::Error {
    Cli::command().error(ErrorKind::ValueValidation, text).into()
}

/// Fails when the file that `--trace` names cannot be made, as its folder is not there.
fn check_trace(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(folder.is_none_or(Path::is_dir), "--trace: the folder of {} is not there", path.display());
    Ok(())
}
