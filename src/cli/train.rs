//! `train`

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::checkpoint::adapter::{self, Adapter, AdapterSettings};
use crate::checkpoint::atomic;
use crate::comm::Queue;
use crate::data::{self, DataOptions, Dataset, TextTokenizer};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::model::config::ModelConfig;
use crate::recipe::{self, EvalData, Job};
use crate::train::log::bytes;
use crate::train::metrics::{MetricsFile, peak_host_bytes};
use crate::train::run::{self, Run};

use super::start::{Setup, Start, Work, check_folder_of};

/// Files of a tokenizer, copied beside the adapter.
const TOKENIZER_FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"];

pub fn run(start: &Start, recipe: &Path, trace: Option<&Path>, overrides: &[String]) -> Result<()> {
    let job = recipe::load(recipe, overrides)?;
    trace.map_or(Ok(()), |path| check_folder_of("--trace", path))?;
    let opened = start.open(&job)?;
    let config = opened.config.clone();
    let adapter = start_adapter(&job, &config)?;
    if start.world.rank == 0 {
        adapter::check_room(&adapter, &job.output_dir).context("output_dir")?;
    }
    let (train, eval) = datasets(&job, &config, start)?;
    check_batch(&job, start.world.world_size)?;
    let (comm, placement, base) = start.base(opened, &job)?;
    let limits = limits(&job, start.world.world_size, &train, eval.as_ref());
    let work =
        Training { start, job: &job, config: &config, adapter: &adapter, train: &train, eval: eval.as_ref(), trace };
    let setup = Setup { comm, base, adapter: Some(&adapter), limits, job: &job.fsdp };
    start.with_engine(placement, setup, work)
}

/// A run from the first step to the saved adapter.
struct Training<'a> {
    start: &'a Start<'a>,
    job: &'a Job,
    config: &'a ModelConfig,
    adapter: &'a Adapter,
    train: &'a Dataset,
    eval: Option<&'a Dataset>,
    trace: Option<&'a Path>,
}

impl Work for Training<'_> {
    type Output = ();

    fn run<D: Ops, Q: Queue<D>>(self, mut engine: Engine<D, Q>) -> Result<()> {
        let Training { start, job, config, adapter, train, eval, trace } = self;
        let is_first = start.world.rank == 0;
        let metrics = if is_first { Some(MetricsFile::create(&job.output_dir)?) } else { None };
        let run = Run { engine: &mut engine, job: &job.training, train, eval, metrics, log: start.log, trace };
        start.log.line(format!(
            "{} steps of {} sequences, {} LoRA parameters",
            run.num_steps(),
            job.training.global_batch_size(start.world.world_size),
            adapter.layers.iter().map(Vec::len).sum::<usize>()
        ));
        let (warmup_steps, num_steps) = (job.training.warmup_steps, run.num_steps());
        if warmup_steps >= num_steps {
            start.log.line(format!(
                "training.warmup_steps is {warmup_steps}, the run has {num_steps} steps: training.learning_rate is never reached"
            ));
        }
        run.run()?;
        let adapter = run::adapter(&mut engine, &adapter.settings)?;
        if is_first {
            save(job, &adapter, config)?;
            start.log.line(format!("adapter: {}", job.output_dir.display()));
        }
        start.log.line(format!("peak host memory of rank 0: {}", bytes(peak_host_bytes())));
        // The other ranks end when the adapter is there: a launcher that sees them end may end the job.
        engine.queue.all_gather_f64("end", &[0.0])?;
        Ok(())
    }
}

fn start_adapter(job: &Job, config: &ModelConfig) -> Result<Adapter> {
    if let Some(dir) = &job.lora.adapter {
        let mut adapter = adapter::load(dir, config).context("lora.adapter")?;
        adapter.settings.dropout = job.lora.dropout;
        return Ok(adapter);
    }
    let settings = AdapterSettings {
        lora_rank: job.lora.r,
        alpha: job.lora.alpha,
        dropout: job.lora.dropout,
        use_rslora: job.lora.use_rslora,
        targets: job.lora.target_modules.clone(),
    };
    Ok(adapter::fresh(settings, config, job.training.seed))
}

fn datasets(job: &Job, config: &ModelConfig, start: &Start) -> Result<(Dataset, Option<Dataset>)> {
    let options = data_options(job);
    let tokenizer = match (TextTokenizer::load(&job.model, &jiff::Zoned::now()), job.data.format) {
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
    tell(start, "training data", &train, config);
    if let Some(eval) = &eval {
        tell(start, "evaluation data", eval, config);
    }
    start.log.line(format!(
        "first sample: {}",
        data::describe_sample(tokenizer, &train.documents[train.sequences[0][0]], 1000)
    ));
    Ok((train, eval))
}

/// Says what the rows have become, and what of it may surprise.
pub fn tell(start: &Start, name: &str, dataset: &Dataset, config: &ModelConfig) {
    start.log.line(format!("{name}: {}", dataset.counts));
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

fn check_batch(job: &Job, world_size: usize) -> Result<()> {
    let global = job.training.global_batch_size(world_size);
    ensure!(
        world_size <= global.div_ceil(job.training.per_device_train_batch_size),
        "{world_size} ranks cannot share a global batch of {global} sequences in micro-batches of {}: start fewer ranks or \
         raise training.global_batch_size",
        job.training.per_device_train_batch_size
    );
    Ok(())
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

fn save(job: &Job, adapter: &Adapter, config: &ModelConfig) -> Result<()> {
    let base = std::fs::canonicalize(&job.model).with_context(|| job.model.display().to_string())?;
    adapter::save(adapter, config, &base, &job.output_dir).context("saving the adapter")?;
    for name in TOKENIZER_FILES {
        let from = job.model.join(name);
        if from.exists() {
            let content = std::fs::read(&from).with_context(|| from.display().to_string())?;
            atomic::write(&job.output_dir.join(name), &content)?;
        }
    }
    Ok(())
}
