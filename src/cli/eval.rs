//! `eval`: prints loss, perplexity and token accuracy of a model, with or without adapters, by data set.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::checkpoint::adapter::Adapter;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::data::{self, Dataset};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::recipe::{self, Command, Job};
use crate::start::agree::{Agreed, agree_on_inputs};
use crate::start::data::to_score;
use crate::start::engine::{Setup, Work};
use crate::start::{Facts, Start};
use crate::train::adapters::in_turn;
use crate::train::eval::{self, Score};
use crate::train::per_token::{self, LossFile};

use super::usage;

/// Number of micro-batches that go through each layer together.
const MICRO_BATCHES: usize = 4;

#[derive(Args)]
pub struct EvalArgs {
    /// Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION of the hub
    #[arg(long)]
    model: String,
    /// PEFT adapter, a folder or of the hub; several take turns over the loaded base
    #[arg(long, value_name = "ADAPTER", value_parser = recipe::read_path)]
    adapter: Vec<PathBuf>,
    /// File or folder of rows, or a data set of the hub; several are scored one after the other
    #[arg(long, value_name = "DATASET", required = true)]
    dataset: Vec<String>,
    /// Longer rows are handled as data.overlong says (--set)
    #[arg(long, default_value_t = 1024)]
    max_length: u64,
    /// Write the loss of each target token of the only data set as JSON lines: row, position, token, loss
    #[arg(long, value_name = "FILE", value_parser = recipe::read_path)]
    per_token: Option<PathBuf>,
    /// Replace the file of --per-token
    #[arg(long, requires = "per_token")]
    overwrite: bool,
    /// Print one JSON object for each adapter and data set
    #[arg(long)]
    json: bool,
}

/// The score of a data set and, with --per-token, the losses that each rank has computed.
type Scored = (Score, Option<Vec<Vec<f32>>>);

struct Scoring<'a> {
    adapters: &'a [Adapter],
    datasets: &'a [Dataset],
    per_token: bool,
}

impl Work for Scoring<'_> {
    /// By adapter and by data set.
    type Output = Vec<Vec<Scored>>;

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Self::Output> {
        in_turn(engine, self.adapters, |engine, adapter| {
            self.datasets.iter().map(|dataset| self.score(engine, dataset, adapter.is_some())).collect()
        })
    }
}

impl Scoring<'_> {
    fn score<D: Ops, Q: Queue<D>>(
        &self,
        engine: &mut Engine<D, Q>,
        dataset: &Dataset,
        adapter: bool,
    ) -> Result<Scored> {
        let (world_size, rank) = (engine.queue.world_size(), engine.queue.rank());
        let batches = data::eval_micro_batches(dataset, engine.limits().max_tokens, world_size, rank);
        let mut losses = Vec::new();
        let score = eval::score_each(engine, batches, adapter, |log_probabilities| {
            if self.per_token {
                // A loss is subtracted from 0, so that 0 is not written as -0.
                losses.extend(log_probabilities.iter().map(|&log_p| (0.0 - log_p) as f32));
            }
        })?;
        let losses = self.per_token.then(|| per_token::gather(&mut engine.queue, &losses)).transpose()?;
        Ok((score, losses))
    }
}

/// Prints the scores of each adapter over each data set.
pub fn run(start: &Start, mut comm: MpiComm, args: &EvalArgs, overrides: &[String]) -> Result<()> {
    if args.per_token.is_some() && (args.dataset.len() > 1 || args.adapter.len() > 1) {
        return Err(usage("--per-token is for one --dataset and at most one --adapter"));
    }
    let given: Vec<(&str, Value)> = vec![
        ("model", args.model.clone().into()),
        ("data.train", args.dataset.clone().into()),
        ("data.max_length", args.max_length.into()),
    ];
    let job = recipe::from_options(Command::Eval, given, overrides)?.with_adapters(&args.adapter);
    let job = start.job(&mut comm, job)?;
    let writes = args.per_token.as_deref().filter(|_| start.world.rank == 0);
    let file = writes.map(|path| LossFile::create(path, args.overwrite, &job.data.train)).transpose();
    let file = file.context("--per-token")?;
    let scores = scores(start, comm, &job, args.per_token.as_ref().map(|_| file))?;
    if start.log.enabled {
        for (i, of_adapter) in scores.iter().enumerate() {
            for (dataset, score) in args.dataset.iter().zip(of_adapter) {
                print(args, args.adapter.get(i), dataset, score);
            }
        }
    }
    Ok(())
}

/// Scores the data sets of a job with each of its adapters, or without one where there is none: by adapter and by data set.
/// `per_token` is `Some` where the losses of single tokens are wanted, with the file on the rank that writes it.
/// Collective.
pub(super) fn scores(
    start: &Start,
    mut comm: MpiComm,
    job: &Agreed<Job>,
    per_token: Option<Option<LossFile>>,
) -> Result<Vec<Vec<Score>>> {
    for source in &job.data.train {
        ensure!(source.path.exists(), "--dataset: {} is not there", source.path.display());
    }
    let (per_token, file) = (per_token.is_some(), per_token.flatten());
    let opened = start.open(&mut comm, job)?;
    let config = opened.spec.clone();
    let adapters = start.adapters_in_turn(job, &config)?;
    let mut inputs = Facts::default();
    inputs.add_adapters("--adapter", &adapters);
    let datasets = to_score(start, job, &config, &mut inputs)?;
    let max_tokens = datasets.iter().flat_map(|dataset| dataset.sequence_lengths()).max().unwrap_or(0);
    let limits = Limits::new(Mode::Score, max_tokens, MICRO_BATCHES);
    inputs.add_limits(&limits);
    inputs.add("--per-token", per_token);
    file.as_ref().map_or(Ok(()), |file| file.check_room(&datasets[0])).context("--per-token")?;
    let inputs = agree_on_inputs(&mut comm, inputs)?;
    let (placement, base) = start.base(&mut comm, opened, job, &inputs)?;
    let work = Scoring { adapters: &adapters, datasets: &datasets, per_token };
    let setup = Setup { comm, base, adapter: adapters.first(), limits, job };
    let mut scored = start.with_engine(placement, setup, work)?;
    if let (Some(file), Some(losses)) = (file, scored[0][0].1.take()) {
        file.write(&datasets[0], max_tokens, &losses).context("--per-token")?;
    }
    Ok(scored.into_iter().map(|of_adapter| of_adapter.into_iter().map(|(score, _)| score).collect()).collect())
}

/// Prints a line about a data set. The names of adapter and data set stand before it where there are several.
fn print(args: &EvalArgs, adapter: Option<&PathBuf>, dataset: &str, score: &Score) {
    let Score { loss, num_target_tokens, token_accuracy } = *score;
    let (perplexity, adapter) = (loss.exp(), adapter.map(|dir: &PathBuf| Path::display(dir).to_string()));
    if args.json {
        let line = json!({
            "adapter": adapter,
            "dataset": dataset,
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": token_accuracy,
            "num_target_tokens": num_target_tokens
        });
        println!("{line}");
        return;
    }
    let adapter = adapter.filter(|_| args.adapter.len() > 1).map_or(String::new(), |dir| format!("{dir}  "));
    let dataset = if args.dataset.len() > 1 { format!("{dataset}  ") } else { String::new() };
    println!(
        "{adapter}{dataset}loss {loss}  perplexity {perplexity:.4}  token accuracy {token_accuracy:.4}  target tokens \
         {num_target_tokens}"
    );
}
