//! `generate`: continues prompts with a model, with or without adapters.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use serde_json::{Value, json};

use crate::checkpoint::adapter::Adapter;
use crate::comm::Queue;
use crate::comm::mpi::MpiComm;
use crate::data::TextTokenizer;
use crate::data::prompts::Prompts;
use crate::data::text_stream::TextStream;
use crate::device::Ops;
use crate::files::counted;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::progress;
use crate::recipe::{self, Command};
use crate::start::agree::agree_on_inputs;
use crate::start::engine::{Setup, Work};
use crate::start::{Facts, Start};
use crate::train::adapters::in_turn;
use crate::train::generate::{Continuation, Finish, Listener, Sampling, check_length, generate};
use crate::train::log::Log;

use super::usage;

#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["prompt", "prompts"])))]
pub struct GenerateArgs {
    /// Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION of the hub
    #[arg(long)]
    model: String,
    /// PEFT adapter, a folder or of the hub; several take turns over the loaded base
    #[arg(long, value_name = "ADAPTER", value_parser = recipe::read_path)]
    adapter: Vec<PathBuf>,
    /// A text to continue; a model with a chat template gets it as the user's message
    #[arg(long)]
    prompt: Vec<String>,
    /// File of prompts: its rows have prompt (a text or messages), messages, or text; the rows of .txt are its lines
    #[arg(long, value_name = "FILE", value_parser = recipe::read_path)]
    prompts: Option<PathBuf>,
    /// Give texts to the model as they are, without the chat template
    #[arg(long)]
    raw: bool,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    max_new_tokens: u32,
    /// Temperature of the random choice; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Choose among this number of the most likely tokens, for a temperature above 0
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Choose among the most likely tokens that have this probability together, for a temperature above 0
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the random choice, for a temperature above 0; 42 if it is not given
    #[arg(long)]
    seed: Option<u64>,
    /// Text before which the answer ends, besides the model's own end; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most prompts of a rank that go through the layers together
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 12))]
    batch_size: u32,
    /// Print a JSON object for the text of a single prompt too; several texts are always printed as objects
    #[arg(long)]
    json: bool,
}

impl GenerateArgs {
    /// Returns the rule by which tokens are chosen.
    fn sampling(&self) -> Result<Sampling> {
        let GenerateArgs { temperature, top_k, top_p, seed, .. } = *self;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(usage(&format!("--temperature: found {temperature}; allowed: 0 or more")));
        }
        if let Some(top_p) = top_p.filter(|top_p| !(*top_p > 0.0 && *top_p <= 1.0)) {
            return Err(usage(&format!("--top-p: found {top_p}; allowed: above 0, at most 1")));
        }
        if temperature == 0.0 && (top_k.is_some() || top_p.is_some() || seed.is_some()) {
            return Err(usage("--top-k, --top-p and --seed are for a --temperature above 0"));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(usage("--stop: found an empty text"));
        }
        let (top_k, max_new_tokens) = (top_k.map(|k| k as usize), self.max_new_tokens as usize);
        Ok(Sampling { temperature, top_k, top_p: top_p.unwrap_or(1.0), seed: self.seed(), max_new_tokens })
    }

    fn seed(&self) -> u64 {
        self.seed.unwrap_or(42)
    }

    /// Returns the tokens of all prompts: those of the command line, then those of the file.
    fn prompts(&self, log: Log, tokenizer: &TextTokenizer) -> Result<Vec<Vec<u32>>> {
        let prompts = Prompts { tokenizer, raw: self.raw };
        let of_texts = self.prompt.iter().map(|text| prompts.of_text(text)).collect::<Result<Vec<_>>>();
        let mut all = of_texts.context("--prompt")?;
        if let Some(file) = &self.prompts {
            let (of_file, note) = prompts.of_file(file)?;
            all.extend(of_file);
            note.iter().for_each(|note| log.line(note));
        }
        Ok(all)
    }
}

/// Continues all prompts with each adapter.
struct Generation<'a> {
    args: &'a GenerateArgs,
    log: Log,
    tokenizer: &'a TextTokenizer,
    prompts: &'a [Vec<u32>],
    adapters: &'a [Adapter],
    sampling: Sampling,
}

impl Work for Generation<'_> {
    type Output = ();

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<()> {
        in_turn(engine, self.adapters, |engine, adapter| self.with_adapter(engine, adapter)).map(drop)
    }
}

impl Generation<'_> {
    fn with_adapter<D: Ops, Q: Queue<D>>(&self, engine: &mut Engine<D, Q>, adapter: Option<usize>) -> Result<()> {
        let (begin, num_prompts) = (Instant::now(), self.prompts.len());
        let texts = self.prompts.iter().map(|_| TextStream::new(self.tokenizer, &self.args.stop)).collect();
        let mut printer =
            Printer { generation: self, adapter, texts, ended: vec![None; num_prompts], num_ended: 0, printed: 0 };
        let stop = self.tokenizer.eos_token_ids();
        let found = generate(engine, self.prompts, stop, &self.sampling, adapter.is_some(), &mut printer)?;
        let (tokens, seconds) = (found.iter().map(|text| text.tokens.len()).sum(), begin.elapsed().as_secs_f64());
        let num_prompt_tokens: usize = self.prompts.iter().map(Vec::len).sum();
        self.log.line(format!(
            "{} after {} of {}, in {seconds:.1} s: {:.1} tokens/s",
            counted(tokens, "new token"),
            counted(num_prompt_tokens, "token"),
            counted(num_prompts, "prompt"),
            tokens as f64 / seconds
        ));
        Ok(())
    }

    /// Tells whether there is one text for people, which is printed while it is written.
    fn is_single(&self) -> bool {
        self.prompts.len() == 1 && self.adapters.len() <= 1 && !self.args.json
    }
}

/// Prints the texts of one adapter in the order of their prompts, each as soon as it and those before it have ended.
struct Printer<'a> {
    generation: &'a Generation<'a>,
    adapter: Option<usize>,
    texts: Vec<TextStream<'a>>,
    /// Lines of texts that have ended.
    ended: Vec<Option<String>>,
    num_ended: usize,
    /// Number of lines that have been printed.
    printed: usize,
}

impl Listener for Printer<'_> {
    fn grows(&mut self, prompt: usize, tokens: &[u32]) -> Result<bool> {
        let ends = self.texts[prompt].grow(tokens)?;
        if self.generation.is_single() && self.generation.log.enabled {
            print!("{}", self.texts[prompt].take());
            std::io::stdout().flush().context("standard output")?;
        }
        Ok(ends)
    }

    fn ends(&mut self, prompt: usize, continuation: &Continuation) -> Result<()> {
        let Generation { args, log, .. } = self.generation;
        let (text, tokens) = (&self.texts[prompt], &continuation.tokens);
        let whole = text.finish(tokens)?;
        self.ended[prompt] = Some(if self.generation.is_single() {
            whole.get(text.taken()..).unwrap_or_default().to_string()
        } else {
            let line = json!({
                "adapter": self.adapter.map(|i| args.adapter[i].display().to_string()),
                "prompt": prompt,
                "text": whole,
                "num_tokens": tokens.len(),
                "finish_reason": if continuation.finish == Finish::Stop { "stop" } else { "length" }
            });
            line.to_string()
        });
        self.num_ended += 1;
        if !self.generation.is_single() {
            progress::bar("generating", self.num_ended, self.ended.len(), String::new);
        }
        while let Some(line) = self.ended.get_mut(self.printed).and_then(Option::take) {
            self.printed += 1;
            if log.enabled {
                progress::aside(|| println!("{line}"));
            }
        }
        Ok(())
    }
}

/// Prints what the model writes after each prompt.
pub fn run(start: &Start, mut comm: MpiComm, args: &GenerateArgs, overrides: &[String]) -> Result<()> {
    let sampling = args.sampling()?;
    let given: Vec<(&str, Value)> = vec![("model", args.model.clone().into()), ("training.seed", args.seed().into())];
    let job = recipe::from_options(Command::Generate, given, overrides)?.with_adapters(&args.adapter);
    let job = start.job(&mut comm, job)?;
    let opened = start.open(&mut comm, &job)?;
    let config = opened.spec.clone();
    let adapters = start.adapters_in_turn(&job, &config)?;
    let tokenizer = TextTokenizer::load(&job.model, &start.clock)?;
    let prompts = args.prompts(start.log, &tokenizer)?;
    let new = sampling.max_new_tokens;
    prompts.iter().try_for_each(|prompt| check_length(&config, prompt.len(), new))?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let together = prompts.len().div_ceil(start.world.world_size).min(args.batch_size as usize);
    let limits = Limits { max_context: longest + new, ..Limits::new(Mode::Generate, longest, together) };
    let mut inputs = Facts::default();
    inputs.add_adapters("--adapter", &adapters);
    inputs.add_tokenizer(Some(&tokenizer));
    inputs.add_prompts(&prompts);
    inputs.add_limits(&limits);
    let inputs = agree_on_inputs(&mut comm, inputs)?;
    let (placement, base) = start.base(&mut comm, opened, &job, &inputs)?;
    let work =
        Generation { args, log: start.log, tokenizer: &tokenizer, prompts: &prompts, adapters: &adapters, sampling };
    let setup = Setup { comm, base, adapter: adapters.first(), limits, job: &job };
    start.with_engine(placement, setup, work)
}
