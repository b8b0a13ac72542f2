//! The rows that a job trains and evaluates on: read, told to the user, and added to what ranks must have in common.

use anyhow::{Context, Result};

use crate::data::preview::Preview;
use crate::data::tokens::Making;
use crate::data::{self, Dataset, Format, Source, TextTokenizer};
use crate::files::counted;
use crate::fsdp::memory::Limits;
use crate::fsdp::schedule::Mode;
use crate::model::spec::ModelSpec;
use crate::recipe::{EvalData, Job};
use crate::train::log::bytes;

use super::options::data_options;
use super::tokens::tokens;
use super::{Facts, Start};

/// Steps of one rank in an epoch of made-up rows. Many numbers of ranks divide it, so that no step of theirs is short.
const MADE_UP_STEPS: usize = 240;

/// The rows of a job that trains.
pub struct TrainingData {
    pub train: Dataset,
    pub eval: Option<Dataset>,
    /// Digest of the tokenizer and its chat template; `None` where rows are tokenized already and the model has no
    /// tokenizer.
    pub tokenizer: Option<String>,
}

impl TrainingData {
    /// Reads the rows, tells what they have become, and adds to `inputs` what ranks must have in common of them.
    pub fn load(start: &Start, job: &Job, config: &ModelSpec, inputs: &mut Facts) -> Result<TrainingData> {
        let tokenizer = tokenizer(start, job)?;
        let tokenizer = tokenizer.as_ref();
        let (train, eval) = datasets(start, job, tokenizer, config.vocab_size)?;
        inputs.add_tokenizer(tokenizer);
        inputs.add_data("data.train", &train);
        eval.iter().for_each(|eval| inputs.add_data("data.eval", eval));
        tell(start, "training data", &train, config);
        if let Some(eval) = &eval {
            tell(start, "evaluation data", eval, config);
        }
        let first = train.sequences.get(0).next().context("the first sequence is empty")?;
        start.log.line(format!("first sample: {}", data::describe_sample(tokenizer, &train.document(first), 1000)));
        Ok(TrainingData { tokenizer: tokenizer.map(TextTokenizer::identity), train, eval })
    }

    /// Makes rows up, whatever the number of ranks is.
    pub fn made_up(start: &Start, job: &Job, config: &ModelSpec, inputs: &mut Facts) -> Result<TrainingData> {
        let num_sequences = job.training.global_batch_size(1).saturating_mul(MADE_UP_STEPS);
        let train = Dataset::made_up(num_sequences, job.data.max_length, config.vocab_size);
        inputs.add_data("made-up rows", &train);
        tell(start, "made-up rows", &train, config);
        Ok(TrainingData { tokenizer: None, train, eval: None })
    }

    /// Returns the sizes of the largest step on these rows. It is decided later what is kept where.
    pub fn limits(&self, job: &Job, world_size: usize) -> Limits {
        let longest = |dataset: &Dataset| dataset.sequence_lengths().max().unwrap_or(0);
        let max_length = longest(&self.train).max(self.eval.as_ref().map_or(0, longest));
        let max_tokens = (longest(&self.train) * job.training.per_device_train_batch_size).max(max_length);
        Limits {
            max_length,
            accumulation: job.fsdp.accumulation,
            snapshot: true,
            ..Limits::new(Mode::Train, max_tokens, job.training.accumulation_steps(world_size))
        }
    }
}

/// Reads the rows that a job trains on, and those that it evaluates on.
fn datasets(
    start: &Start,
    job: &Job,
    tokenizer: Option<&TextTokenizer>,
    vocab_size: usize,
) -> Result<(Dataset, Option<Dataset>)> {
    let (options, sources) = (data_options(job), &job.data.train);
    let making = Making { tokenizer, vocab_size, loss_on: options.loss_on, held_out: 0.0 };
    let tokens = |sources: &[Source], making: &Making, key: &str| tokens(start, &job.model, sources, making, key);
    Ok(match &job.data.eval {
        None => {
            let train = tokens(sources, &making, "data.train").context("data.train")?;
            (Dataset::of(train, &options)?, None)
        }
        Some(EvalData::Sources(held_out)) => {
            let eval = tokens(held_out, &making, "data.eval");
            let eval = eval.and_then(|eval| Dataset::of(eval, &options.for_evaluation())).context("data.eval")?;
            let train = tokens(sources, &making, "data.train");
            (train.and_then(|train| Dataset::of(train, &options)).context("data.train")?, Some(eval))
        }
        Some(EvalData::Fraction(fraction)) => {
            let making = Making { held_out: *fraction, ..making };
            let all = tokens(sources, &making, "data.train").context("data.train")?;
            let (train, eval) = Dataset::parts(all, &options, *fraction)?;
            (train, Some(eval))
        }
    })
}

/// Reads the rows of a job that trains, and describes them and the first `num_rows` of each part.
pub fn previews(start: &Start, job: &Job, config: &ModelSpec, num_rows: usize) -> Result<(Preview, Option<Preview>)> {
    let tokenizer = tokenizer(start, job)?;
    let tokenizer = tokenizer.as_ref();
    let (train, eval) = datasets(start, job, tokenizer, config.vocab_size)?;
    let preview = |dataset: &Dataset| Preview::new(dataset, tokenizer, num_rows);
    Ok((preview(&train), eval.as_ref().map(preview)))
}

/// Reads the data sets of a job that only scores them, tells what they have become, and adds to `inputs` what ranks must
/// have in common of them.
pub fn to_score(start: &Start, job: &Job, config: &ModelSpec, inputs: &mut Facts) -> Result<Vec<Dataset>> {
    let options = data_options(job).for_evaluation();
    let tokenizer = tokenizer(start, job)?;
    inputs.add_tokenizer(tokenizer.as_ref());
    let (tokenizer, vocab_size) = (tokenizer.as_ref(), config.vocab_size);
    let making = Making { tokenizer, vocab_size, loss_on: options.loss_on, held_out: 0.0 };
    let key = job.command.name_of("data.train").unwrap_or_default();
    let mut datasets = Vec::new();
    for source in &job.data.train {
        let tokens = tokens(start, &job.model, std::slice::from_ref(source), &making, key)?;
        let dataset = Dataset::of(tokens, &options).with_context(|| source.path.display().to_string())?;
        tell(start, &source.path.display().to_string(), &dataset, config);
        inputs.add_data(key, &dataset);
        datasets.push(dataset);
    }
    Ok(datasets)
}

/// Loads the tokenizer of a job's model, which rows that are tokenized already can do without.
fn tokenizer(start: &Start, job: &Job) -> Result<Option<TextTokenizer>> {
    let held_out = match &job.data.eval {
        Some(EvalData::Sources(held_out)) => &held_out[..],
        Some(EvalData::Fraction(_)) | None => &[],
    };
    let is_tokenized = |source: &Source| source.format == Format::Tokenized;
    match TextTokenizer::load(&job.model, &start.clock) {
        Err(_) if job.data.train.iter().chain(held_out).all(is_tokenized) => Ok(None),
        tokenizer => tokenizer.map(Some),
    }
}

/// Says what the rows have become, and what of it may surprise.
fn tell(start: &Start, name: &str, dataset: &Dataset, config: &ModelSpec) {
    let (host, mapped) = (bytes(dataset.host_bytes()), bytes(dataset.mapped_bytes()));
    start.log.line(format!("{name}: {}, {host} of host memory beside {mapped} in a mapped file", dataset.counts));
    for note in &dataset.notes {
        start.log.warn(format!("{name}: {note}"));
    }
    let (longest, limit) = (dataset.longest_document(), config.max_position_embeddings);
    if longest > limit {
        let longer = (0..dataset.num_documents()).filter(|&d| dataset.document_length(d) > limit).count();
        start.log.warn(format!(
            "{name}: {} with more tokens than the {limit} that the model was made for (config.json: max_position_embeddings); \
             the longest has {longest}, and data.max_length can cut them",
            counted(longer, "document")
        ));
    }
}
