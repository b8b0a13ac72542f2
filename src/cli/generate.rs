//! `generate`

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::checkpoint::adapter;
use crate::comm::Queue;
use crate::data::TextTokenizer;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::recipe;
use crate::train::generate::{Sampling, generate};

use super::start::{Setup, Start, Work};

#[derive(Args)]
pub struct GenerateArgs {
    /// Hugging Face directory
    #[arg(long)]
    model: PathBuf,
    /// PEFT adapter
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// What to continue; a model with a chat template gets it as the user's message
    #[arg(long)]
    prompt: String,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    raw: bool,
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// 0: always the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Of the random choice, with a temperature above 0
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

struct Generation<'a> {
    prompt: &'a [u32],
    stop: &'a [u32],
    sampling: Sampling,
    adapter: bool,
}

impl Work for Generation<'_> {
    type Output = Vec<u32>;
    fn run<D: Ops, Q: Queue<D>>(self, mut engine: Engine<D, Q>) -> Result<Vec<u32>> {
        generate(&mut engine, self.prompt, self.stop, &self.sampling, self.adapter)
    }
}

pub fn run(start: &Start, args: &GenerateArgs, overrides: &[String]) -> Result<()> {
    ensure!(
        args.temperature >= 0.0 && args.temperature.is_finite(),
        "--temperature: found {}; allowed: 0 or more",
        args.temperature
    );
    let job = recipe::for_model(&args.model, overrides)?;
    let opened = start.open(&job)?;
    let config = opened.config.clone();
    let adapter = args.adapter.as_ref().map(|dir| adapter::load(dir, &config)).transpose().context("--adapter")?;
    let tokenizer = TextTokenizer::load(&job.model, &jiff::Zoned::now())?;
    let prompt = match tokenizer.has_chat_template() && !args.raw {
        true => {
            let message = json!({"role": "user", "content": args.prompt});
            tokenizer.encode(&tokenizer.render(&[message], true)?.text, false)
        }
        false => tokenizer.encode(&args.prompt, true),
    }?;
    let (comm, placement, base) = start.base(opened, &job)?;
    let max_context = prompt.len() + args.max_new_tokens;
    let limits = Limits { max_context, ..Limits::new(Mode::Generate, prompt.len(), 1) };
    let sampling = Sampling { temperature: args.temperature, seed: args.seed, max_new_tokens: args.max_new_tokens };
    let work = Generation { prompt: &prompt, stop: tokenizer.eos_token_ids(), sampling, adapter: adapter.is_some() };
    let setup = Setup { comm, base, adapter: adapter.as_ref(), limits, job: &job.fsdp };
    let tokens = start.with_engine(placement, setup, work)?;
    if start.log.enabled {
        println!("{}", tokenizer.decode(&tokens, true)?);
    }
    Ok(())
}
