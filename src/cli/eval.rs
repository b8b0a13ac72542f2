//! `eval`

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::checkpoint::adapter;
use crate::comm::Queue;
use crate::data::{self, Dataset, TextTokenizer};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::model::batch::MicroBatch;
use crate::recipe;
use crate::train::eval::{self, Score};

use super::start::{Setup, Start, Work, check_file};

/// Micro-batches that go through each layer together.
const MICRO_BATCHES: usize = 4;

#[derive(Args)]
pub struct EvalArgs {
    /// Hugging Face directory
    #[arg(long)]
    model: PathBuf,
    /// PEFT adapter
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// JSONL file or folder
    #[arg(long)]
    dataset: PathBuf,
    /// Longer rows are handled as data.overlong says (--set)
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    max_length: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Scoring {
    batches: Vec<MicroBatch>,
    adapter: bool,
}

impl Work for Scoring {
    type Output = Score;
    fn run<D: Ops, Q: Queue<D>>(self, mut engine: Engine<D, Q>) -> Result<Score> {
        eval::score(&mut engine, &self.batches, self.adapter)
    }
}

pub fn run(start: &Start, args: &EvalArgs, overrides: &[String]) -> Result<()> {
    let job = recipe::for_model(&args.model, overrides)?;
    check_file("--dataset", &args.dataset)?;
    let opened = start.open(&job)?;
    let config = opened.config.clone();
    let adapter = args.adapter.as_ref().map(|dir| adapter::load(dir, &config)).transpose().context("--adapter")?;
    let options =
        data::DataOptions { max_length: args.max_length as usize, ..super::train::data_options(&job).for_evaluation() };
    let tokenizer = match (TextTokenizer::load(&job.model, &jiff::Zoned::now()), options.format) {
        (Err(_), data::Format::Tokenized) => None,
        (tokenizer, _) => Some(tokenizer?),
    };
    let paths = std::slice::from_ref(&args.dataset);
    let dataset = Dataset::load(paths, tokenizer.as_ref(), config.vocab_size, &options)?;
    super::train::tell(start, "data", &dataset, &config);
    let (comm, placement, base) = start.base(opened, &job)?;
    let max_tokens = dataset.sequence_lengths().max().unwrap_or(0);
    let limits = Limits::new(Mode::Score, max_tokens, MICRO_BATCHES);
    let batches = data::eval_micro_batches(&dataset, max_tokens, start.world.world_size, start.world.rank);
    let work = Scoring { batches, adapter: adapter.is_some() };
    let setup = Setup { comm, base, adapter: adapter.as_ref(), limits, job: &job.fsdp };
    let score = start.with_engine(placement, setup, work)?;
    if start.log.enabled {
        let (loss, perplexity, n) = (score.loss, score.loss.exp(), score.num_target_tokens);
        match args.json {
            true => println!("{}", json!({"loss": loss, "perplexity": perplexity, "num_target_tokens": n})),
            false => println!("loss {loss}  perplexity {perplexity:.4}  target tokens {n}"),
        }
    }
    Ok(())
}
