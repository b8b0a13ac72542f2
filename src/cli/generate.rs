//! `generate`: continues a prompt with a model, with or without an adapter.

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::data::TextTokenizer;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::recipe::{self, Command};
use crate::start::agree::{agree_on, agree_on_inputs};
use crate::start::engine::{Setup, Work};
use crate::start::{Facts, Start};
use crate::train::generate::{Sampling, check_length, generate};

use super::usage;

#[derive(Args)]
pub struct GenerateArgs {
    /// Hugging Face directory
    #[arg(long)]
    model: String,
    /// PEFT adapter
    #[arg(long)]
    adapter: Option<String>,
    /// The text to continue; a model with a chat template gets it as the user's message
    #[arg(long)]
    prompt: String,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_new_tokens: u32,
    /// Temperature of the random choice; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Seed of the random choice, for a temperature above 0
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
    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<Vec<u32>> {
        generate(engine, self.prompt, self.stop, &self.sampling, self.adapter)
    }
}

/// Prints what the model writes after a prompt.
pub fn run(start: &Start, mut comm: MpiComm, args: &GenerateArgs, overrides: &[String]) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(usage(&format!("--temperature: found {}; allowed: 0 or more", args.temperature)));
    }
    let mut given: Vec<(&str, Value)> = vec![("model", args.model.clone().into()), ("training.seed", args.seed.into())];
    given.extend(args.adapter.clone().map(|dir| ("lora.adapter", dir.into())));
    let job = agree_on(&mut comm, recipe::from_options(Command::Generate, given, overrides)?)?;
    let opened = start.open(&mut comm, &job)?;
    let config = opened.spec.clone();
    let adapter = start.named_adapter(&job, &config)?;
    let tokenizer = TextTokenizer::load(&job.model, &start.clock)?;
    let prompt = match tokenizer.has_chat_template() && !args.raw {
        true => {
            let message = json!({"role": "user", "content": args.prompt});
            tokenizer.encode(&tokenizer.render(&[message], true)?.text, false)
        }
        false => tokenizer.encode(&args.prompt, true),
    }?;
    let max_new_tokens = args.max_new_tokens as usize;
    check_length(&config, prompt.len(), max_new_tokens)?;
    let max_context = prompt.len() + max_new_tokens;
    let limits = Limits { max_context, ..Limits::new(Mode::Generate, prompt.len(), 1) };
    let mut inputs = Facts::default();
    inputs.add_adapter("--adapter", adapter.as_ref());
    inputs.add_tokenizer(Some(&tokenizer));
    inputs.add_limits(&limits);
    let inputs = agree_on_inputs(&mut comm, inputs)?;
    let (placement, base) = start.base(&mut comm, opened, &job, &inputs)?;
    let sampling = Sampling { temperature: args.temperature, seed: job.training.seed, max_new_tokens };
    let work = Generation { prompt: &prompt, stop: tokenizer.eos_token_ids(), sampling, adapter: adapter.is_some() };
    let setup = Setup { comm, base, adapter: adapter.as_ref(), limits, job: &job };
    let tokens = start.with_engine(placement, setup, work)?;
    if start.log.enabled {
        println!("{}", tokenizer.decode(&tokens, true)?);
    }
    Ok(())
}
