//! `eval`: prints the mean loss of a model, with or without an adapter, over a data set.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::data;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::model::batch::MicroBatch;
use crate::recipe::{self, Command};
use crate::start::agree::{agree_on, agree_on_inputs};
use crate::start::data::to_score;
use crate::start::engine::{Setup, Work};
use crate::start::{Facts, Start};
use crate::train::eval::{self, Score};
use crate::train::per_token::{self, LossFile};

/// Number of micro-batches that go through each layer together.
const MICRO_BATCHES: usize = 4;

#[derive(Args)]
pub struct EvalArgs {
    /// Hugging Face directory
    #[arg(long)]
    model: String,
    /// PEFT adapter
    #[arg(long)]
    adapter: Option<String>,
    /// File or folder of rows
    #[arg(long)]
    dataset: String,
    /// Longer rows are handled as data.overlong says (--set)
    #[arg(long, default_value_t = 1024)]
    max_length: u64,
    /// Write the loss of each target token as JSON lines: row, position, token, loss
    #[arg(long, value_name = "FILE", value_parser = recipe::read_path)]
    per_token: Option<PathBuf>,
    /// Replace the file of --per-token
    #[arg(long, requires = "per_token")]
    overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Scoring {
    batches: Vec<MicroBatch>,
    adapter: bool,
    per_token: bool,
}

impl Work for Scoring {
    /// The score and, with `per_token`, the losses that each rank has computed.
    type Output = (Score, Option<Vec<Vec<f32>>>);

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Self::Output> {
        if !self.per_token {
            return Ok((eval::score(engine, &self.batches, self.adapter)?, None));
        }
        let mut losses = Vec::new();
        let score = eval::score_each(engine, &self.batches, self.adapter, |log_probabilities| {
            // A loss is subtracted from 0, so that 0 is not written as -0.
            losses.extend(log_probabilities.iter().map(|&log_p| (0.0 - log_p) as f32));
        })?;
        Ok((score, Some(per_token::gather(&mut engine.queue, &losses)?)))
    }
}

/// Prints the mean loss over a data set.
pub fn run(start: &Start, mut comm: MpiComm, args: &EvalArgs, overrides: &[String]) -> Result<()> {
    let mut given: Vec<(&str, Value)> = vec![
        ("model", args.model.clone().into()),
        ("data.train", args.dataset.clone().into()),
        ("data.max_length", args.max_length.into()),
    ];
    given.extend(args.adapter.clone().map(|dir| ("lora.adapter", dir.into())));
    let job = agree_on(&mut comm, recipe::from_options(Command::Eval, given, overrides)?)?;
    let path = &job.data.train[0].path;
    ensure!(path.exists(), "--dataset: {} is not there", path.display());
    let writes = args.per_token.as_deref().filter(|_| start.world.rank == 0);
    let file = writes.map(|path| LossFile::create(path, args.overwrite)).transpose().context("--per-token")?;
    let opened = start.open(&mut comm, &job)?;
    let config = opened.spec.clone();
    let adapter = start.named_adapter(&job, &config)?;
    let mut inputs = Facts::default();
    inputs.add_adapter("--adapter", adapter.as_ref());
    let dataset = to_score(start, &job, &config, &mut inputs)?;
    let max_tokens = dataset.sequence_lengths().max().unwrap_or(0);
    let limits = Limits::new(Mode::Score, max_tokens, MICRO_BATCHES);
    inputs.add_limits(&limits);
    inputs.add("--per-token", args.per_token.is_some());
    file.as_ref().map_or(Ok(()), |file| file.check_room(&dataset)).context("--per-token")?;
    let inputs = agree_on_inputs(&mut comm, inputs)?;
    let (placement, base) = start.base(&mut comm, opened, &job, &inputs)?;
    let batches = data::eval_micro_batches(&dataset, max_tokens, start.world.world_size, start.world.rank);
    let work = Scoring { batches, adapter: adapter.is_some(), per_token: args.per_token.is_some() };
    let setup = Setup { comm, base, adapter: adapter.as_ref(), limits, job: &job };
    let (score, losses) = start.with_engine(placement, setup, work)?;
    if let (Some(file), Some(losses)) = (file, losses) {
        file.write(&dataset, max_tokens, &losses).context("--per-token")?;
    }
    if start.log.enabled {
        let (loss, perplexity, n) = (score.loss, score.loss.exp(), score.num_target_tokens);
        match args.json {
            true => println!("{}", json!({"loss": loss, "perplexity": perplexity, "num_target_tokens": n})),
            false => println!("loss {loss}  perplexity {perplexity:.4}  target tokens {n}"),
        }
    }
    Ok(())
}
