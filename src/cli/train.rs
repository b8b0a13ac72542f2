//! `train`

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::identity::BaseStamps;
use crate::checkpoint::output::record::RunIdentity;
use crate::checkpoint::output::{METRICS_FILE, Output, Place, RunResult, TOKENIZER_FILES};
use crate::checkpoint::room::Want;
use crate::comm::mpi::MpiComm;
use crate::comm::watch::{self, Phase};
use crate::comm::{Queue, anywhere};
use crate::data::{self, DataOptions, Dataset, TextTokenizer};
use crate::device::{Device, Ops};
use crate::files;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::model::config::ModelConfig;
use crate::recipe::{self, Command, EvalData, Job, Steps};
use crate::start::agree::Facts;
use crate::start::engine::{Setup, Start, Work, check_folder_of};
use crate::start::options::{adapter_settings, check_adapter_bytes};
use crate::train::check::{self, IsZero};
use crate::train::log::bytes;
use crate::train::metrics::{MetricsFile, peak_host_bytes};
use crate::train::run::{self, Run};

/// More than a line of metrics.jsonl takes.
const METRICS_LINE_BYTES: usize = 1000;
/// Most room that is looked for before training for metrics.jsonl: `max_steps` may be a number that nobody waits for.
const MAX_METRICS_BYTES: usize = 1 << 28;

#[derive(Args)]
pub struct TrainArgs {
    /// The recipe
    #[arg(short, long, default_value = "fsdp-qlora.yaml", value_parser = recipe::read_path)]
    config: PathBuf,
    /// Write a trace of the second step for <https://ui.perfetto.dev>
    #[arg(long, value_parser = recipe::read_path)]
    trace: Option<PathBuf>,
    /// Replace what output_dir holds, once the new result is complete
    #[arg(long)]
    overwrite: bool,
    /// Print all keys of the recipe, and stop
    #[arg(long)]
    pub help_recipe: bool,
}

impl Default for TrainArgs {
    fn default() -> TrainArgs {
        TrainArgs { config: "fsdp-qlora.yaml".into(), trace: None, overwrite: false, help_recipe: false }
    }
}

/// Trains. Exit status 0: the adapter is in output_dir. If it had to be saved elsewhere, that is an error, and its message, the last line,
/// names the place.
pub fn run(start: &Start, args: &TrainArgs, overrides: &[String]) -> Result<()> {
    let mut output = None;
    let result = train(start, args, overrides, &mut output);
    if let (Err(error), Some(output)) = (&result, &output) {
        output.fail(&format!("{error:#}"));
    }
    result
}

/// The same. `output` is set on rank 0 as soon as its folder is locked.
fn train(start: &Start, args: &TrainArgs, overrides: &[String], output: &mut Option<Output>) -> Result<()> {
    let job = start.agree_on(recipe::load(&args.config, Command::Train, overrides)?)?;
    let trace = args.trace.as_deref();
    trace.map_or(Ok(()), |path| check_folder_of("--trace", path))?;
    let mut opened = start.open(&job)?;
    let config = opened.config.clone();
    job.training.check_batch(start.world.world_size)?;
    let adapter = start_adapter(start, &job, &config)?;
    let kept = Kept::read(&job)?;
    let is_first = start.world.rank == 0;
    if is_first {
        let num_steps = job.training.max_steps.unwrap_or_default();
        let lines = num_steps.saturating_mul(METRICS_LINE_BYTES).min(MAX_METRICS_BYTES);
        let room = adapter.bytes() + kept.bytes() + lines;
        let held = Output::open(&job.output_dir, args.overwrite, room, &mut |line| start.log.line(line));
        *output = Some(held.context("output_dir")?);
        opened.kept_free.push(Want { dir: job.output_dir.clone(), bytes: room });
    }
    let mut inputs = Facts::default();
    inputs.add_adapter("lora.adapter", Some(&adapter));
    let (train, eval, tokenizer) = datasets(&job, &config, start, &mut inputs)?;
    let limits = limits(&job, start.world.world_size, &train, eval.as_ref());
    inputs.add_limits(&limits);
    let inputs = start.agree_on_inputs(inputs)?;
    let steps = job.training.steps(train.sequences.len(), start.world.world_size)?;
    steps.remarks.iter().for_each(|remark| start.log.line(remark.clone()));
    let identity = RunIdentity {
        world_size: start.world.world_size,
        base: opened.identity(),
        tokenizer,
        adapter: hex(adapter.digest()),
        data: hex(train.digest()),
        eval_data: eval.as_ref().map(|eval| hex(eval.digest())),
        recipe: decided_values(&job, &steps),
    };
    let begun = output.as_mut().map_or(Ok(true), |output| output.begin(identity)).context("output_dir")?;
    if anywhere(&mut MpiComm::new(start.world)?, !begun)? {
        start.log.line(format!("already finished: the adapter of this very run is in {}", job.output_dir.display()));
        return Ok(());
    }
    let (base, stamps) = (opened.model.clone(), opened.stamps());
    let (comm, placement, loaded) = start.base(opened, &job, &inputs)?;
    let work = Training {
        start,
        job: &job,
        steps: &steps,
        config: &config,
        adapter: &adapter,
        train: &train,
        eval: eval.as_ref(),
        trace,
        kept: &kept,
        output: output.as_mut(),
        stamps: &stamps,
        is_zero: &|weight| base.is_zero(weight),
    };
    let setup = Setup { comm, base: loaded, adapter: Some(&adapter), limits, job: &job };
    start.with_engine(placement, setup, work)
}

fn hex(digest: u64) -> String {
    format!("{digest:016x}")
}

/// What was decided for every key.
fn decided_values(job: &Job, steps: &Steps) -> serde_json::Map<String, serde_json::Value> {
    let mut values = job.values();
    values.insert("training.warmup_steps".into(), steps.warmup_steps.into());
    values
}

/// What the end needs of the model's folder, which may be gone by then.
struct Kept {
    /// Absolute path of the base, for `adapter_config.json`.
    base: PathBuf,
    tokenizer_files: Vec<(&'static str, Vec<u8>)>,
}

impl Kept {
    fn read(job: &Job) -> Result<Kept> {
        let base = std::fs::canonicalize(&job.model).with_context(|| job.model.display().to_string())?;
        let present = TOKENIZER_FILES
            .into_iter()
            .map(|name| (name, job.model.join(name)))
            .filter(|(_, path)| files::is_there(path));
        let read = |(name, path): (_, PathBuf)| Ok((name, files::read(&path, files::MAX_TOKENIZER_BYTES)?));
        Ok(Kept { base, tokenizer_files: present.map(read).collect::<Result<_>>()? })
    }

    fn bytes(&self) -> usize {
        self.tokenizer_files.iter().map(|(_, content)| content.len()).sum()
    }
}

/// A run from the first step to the saved adapter.
struct Training<'a> {
    start: &'a Start<'a>,
    job: &'a Job,
    steps: &'a Steps,
    config: &'a ModelConfig,
    adapter: &'a Adapter,
    train: &'a Dataset,
    eval: Option<&'a Dataset>,
    trace: Option<&'a Path>,
    kept: &'a Kept,
    /// `None` on all ranks but the first.
    output: Option<&'a mut Output>,
    stamps: &'a BaseStamps,
    is_zero: IsZero<'a>,
}

impl Work for Training<'_> {
    type Output = ();

    fn run<D: Ops, Q: Queue<D>>(self, engine: &mut Engine<D, Q>) -> Result<()> {
        let Training { start, job, steps, config, adapter, train, eval, trace, kept, output, stamps, is_zero } = self;
        let live = output.as_ref().map(|output| (output.live(), output.keeps_a_result()));
        if let Some((live, true)) = &live {
            start.log.line(format!(
                "output_dir: what is there stays until the run is complete, which writes to {}",
                live.display()
            ));
        }
        let mut metrics = live.map(|(live, _)| MetricsFile::create(&live, start.log)).transpose()?;
        let run = Run {
            engine: &mut *engine,
            job: &job.training,
            steps,
            train,
            eval,
            metrics: metrics.as_mut(),
            log: start.log,
            trace,
            is_zero,
        };
        start.log.line(format!(
            "{} steps of {} sequences, {} LoRA parameters",
            steps.num_steps,
            job.training.global_batch_size(start.world.world_size),
            adapter.layers.iter().map(Vec::len).sum::<usize>()
        ));
        run.run()?;
        watch::phase(Phase::Save)?;
        let learned = run::adapter(engine, &adapter.settings)?;
        check::result_is_sound(adapter, &learned)?;
        let doubt = doubt(&mut engine.queue, start, stamps)?;
        if let (Some(output), Some(metrics)) = (output, metrics) {
            start.log.line(format!("peak host memory of rank 0: {}", bytes(peak_host_bytes())));
            let wait = watch::wait("saving the adapter");
            save(output, &learned, config, kept, metrics.lines(), doubt)?;
            drop(wait);
            start.log.line(format!("adapter: {}", job.output_dir.display()));
        }
        // The other ranks end when the adapter is there: a launcher that sees them end may end the job.
        engine.queue.all_gather_f64("end", &[0.0])?;
        Ok(())
    }
}

/// Says which file of the base changed during the run. Collective; the first rank of each node looks.
fn doubt<D: Device, Q: Queue<D>>(queue: &mut Q, start: &Start, stamps: &BaseStamps) -> Result<Option<String>> {
    let looks = start.world.local_rank == 0;
    watch::at("comparing the base with what it was at the start");
    let own = looks.then(|| stamps.check_unchanged().err()).flatten().map(|error| format!("{error:#}"));
    let changed = queue.all_gather_f64("stamps of the base", &[f64::from(own.is_some())])?;
    let other = changed.iter().position(|changed| changed[0] > 0.0);
    Ok(own.or(other.map(|rank| format!("the base on the machine of rank {rank} has changed during the run"))))
}

/// Brings the adapter to rest, with the tokenizer and the metrics. Fails, naming the place, if that is not output_dir or if there is a
/// doubt about the result.
fn save(
    output: &mut Output,
    adapter: &Adapter,
    config: &ModelConfig,
    kept: &Kept,
    metrics: &[u8],
    doubt: Option<String>,
) -> Result<()> {
    let mut others = kept.tokenizer_files.clone();
    others.push((METRICS_FILE, metrics.to_vec()));
    let write = |dir: &Path| adapter::save(adapter, config, &kept.base, dir);
    let result = RunResult { adapter: &write, others, doubt: doubt.clone() };
    let place = output.finish(&result).context("saving the adapter")?;
    if let Some(doubt) = doubt {
        let dir = match &place {
            Place::OutputDir => "output_dir",
            Place::Elsewhere { dir, .. } => &dir.display().to_string(),
        };
        bail!("{doubt}; the adapter was saved in {dir}, but cannot be trusted");
    }
    match place {
        Place::OutputDir => Ok(()),
        Place::Elsewhere { dir, why } => {
            bail!("output_dir takes no result ({why}); the adapter is complete and was saved in {}", dir.display())
        }
    }
}

fn start_adapter(start: &Start, job: &Job, config: &ModelConfig) -> Result<Adapter> {
    if let Some(mut adapter) = start.adapter(job, config)? {
        adapter.settings.dropout = job.lora.dropout;
        return Ok(adapter);
    }
    let settings = adapter_settings(&job.lora);
    check_adapter_bytes(&settings, config)?;
    Ok(adapter::fresh(settings, config, job.training.seed))
}

/// The rows to train and to evaluate on, and the tokenizer's identity; `inputs` gets what ranks must have in common of them.
fn datasets(
    job: &Job,
    config: &ModelConfig,
    start: &Start,
    inputs: &mut Facts,
) -> Result<(Dataset, Option<Dataset>, Option<String>)> {
    let options = data_options(job);
    let tokenizer = match (TextTokenizer::load(&job.model, &start.clock), job.data.format) {
        (Err(_), data::Format::Tokenized) => None,
        (tokenizer, _) => Some(tokenizer?),
    };
    let (tokenizer, vocab_size, paths) = (tokenizer.as_ref(), config.vocab_size, &job.data.train);
    let (train, eval) = match &job.data.eval {
        None => (Dataset::load(paths, tokenizer, vocab_size, &options)?, None),
        Some(EvalData::File(file)) => {
            let eval = Dataset::load(std::slice::from_ref(file), tokenizer, vocab_size, &options.for_evaluation())
                .context("data.eval")?;
            (Dataset::load(paths, tokenizer, vocab_size, &options).context("data.train")?, Some(eval))
        }
        Some(EvalData::Fraction(fraction)) => {
            let (train, eval) = Dataset::load_with_held_out(paths, tokenizer, vocab_size, &options, *fraction)?;
            (train, Some(eval))
        }
    };
    inputs.add_tokenizer(tokenizer);
    inputs.add_data("data.train", &train);
    eval.iter().for_each(|eval| inputs.add_data("data.eval", eval));
    tell(start, "training data", &train, config);
    if let Some(eval) = &eval {
        tell(start, "evaluation data", eval, config);
    }
    start.log.line(format!(
        "first sample: {}",
        data::describe_sample(tokenizer, &train.documents[train.sequences[0][0]], 1000)
    ));
    Ok((train, eval, tokenizer.map(TextTokenizer::identity)))
}

/// Says what the rows have become, and what of it may surprise.
pub fn tell(start: &Start, name: &str, dataset: &Dataset, config: &ModelConfig) {
    start.log.line(format!("{name}: {}, {} of host memory", dataset.counts, bytes(dataset.host_bytes())));
    for note in &dataset.notes {
        start.log.line(format!("{name}: {note}"));
    }
    let (longest, limit) = (dataset.longest_document(), config.rope.max_position_embeddings);
    if longest > limit {
        let rows = dataset.documents.iter().filter(|d| d.input_ids.len() > limit).count();
        start.log.line(format!(
            "{name}: {rows} documents are longer than the {limit} tokens that the model was made for (config.json: \
             max_position_embeddings), the longest has {longest}; data.max_length can cut them"
        ));
    }
}

/// The keys of a recipe's data section that say how rows become documents.
pub fn data_options(job: &Job) -> DataOptions {
    let data = &job.data;
    DataOptions {
        format: data.format,
        max_length: data.max_length,
        packing: data.packing,
        overlong: data.overlong,
        loss_on: data.loss_on,
    }
}

/// What each step must hold; what of it is kept where is decided later.
fn limits(job: &Job, world_size: usize, train: &Dataset, eval: Option<&Dataset>) -> Limits {
    let longest = |dataset: &Dataset| dataset.sequence_lengths().max().unwrap_or(0);
    let max_length = longest(train).max(eval.map_or(0, longest));
    let max_tokens = (longest(train) * job.training.per_device_train_batch_size).max(max_length);
    Limits {
        max_length,
        accumulation: job.fsdp.accumulation,
        ..Limits::new(Mode::Train, max_tokens, job.training.accumulation_steps(world_size))
    }
}
