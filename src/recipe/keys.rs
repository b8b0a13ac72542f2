//! Every key of a recipe, declared once: path, default, how it is read and checked, what is allowed, help.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::SignedDuration;
use serde_json::Value;

use super::command::Command;
use super::job::{
    Accumulation, ActivationCheckpointing, ComputeDtype, Gather, LrScheduler, ShardingStrategy, Strategy, WrittenEval,
};
use super::overrides::Written;
use super::paths;
use super::sources::WrittenSources;
use crate::checkpoint::output::Resume;
use crate::data::{ColumnNames, Format, LossOn, Overlong, Packing};
use crate::model::trainable::Targets;

/// A key with the type that its value is read as.
pub(super) struct Key<T> {
    pub path: &'static str,
    /// The default as it would be written in a recipe.
    pub default: &'static str,
    /// `None` if the value is not allowed.
    pub read: fn(&Value) -> Option<T>,
}

/// Description of a key without its type.
pub(super) struct KeyInfo {
    pub path: &'static str,
    pub default: &'static str,
    /// Commands that read it in a recipe or after `--set`.
    pub readers: &'static [Command],
    pub allowed: &'static [&'static str],
    pub help: &'static str,
    pub is_allowed: fn(&Value) -> bool,
    /// Returns the decided value in one spelling; `None` if the written value is not allowed.
    pub decided: fn(&Written) -> Option<Value>,
}

macro_rules! keys {
    ($(
        $name:ident: $type:ty = $path:literal, $default:literal, $readers:expr, $read:expr, $allowed:expr, $help:literal;
    )*) => {
        $(pub(super) const $name: Key<$type> = Key { path: $path, default: $default, read: $read };)*
        /// All keys in the order of the help page.
        pub(super) const ALL: &[KeyInfo] = &[$(KeyInfo {
            path: $path,
            default: $default,
            readers: $readers,
            allowed: $allowed,
            help: $help,
            is_allowed: |value| ($name.read)(value).is_some(),
            decided: |written| serde_json::to_value(written.get(&$name)?).ok(),
        }),*];
    };
}

use Command::{
    BenchKernels, BenchRun, BenchStep, Data, Eval, Generate, Plan, PlanShape, Quantize, QuantizeShape, Train,
};

/// Lists of commands that read a key. Other keys in the recipe of `plan` or `data` are for `train` and are checked as
/// `train` checks them.
const TRAINING: &[Command] = &[Train];
const TRAIN_PLAN: &[Command] = &[Train, Plan];
const SAVES: &[Command] = &[Train, BenchRun];
const STEPS: &[Command] = &[Train, Plan, PlanShape, BenchStep, BenchRun];
const TRAINING_ROWS: &[Command] = &[Train, Data];
const ROWS: &[Command] = &[Train, Data, Eval];
const ADAPTERS: &[Command] = &[Train, Plan, PlanShape, BenchStep, BenchRun, BenchKernels];
const BASES: &[Command] =
    &[Train, Plan, PlanShape, Eval, Generate, Quantize, QuantizeShape, BenchStep, BenchRun, BenchKernels];
const COMPUTES: &[Command] = &[Train, Plan, PlanShape, Eval, Generate, BenchStep, BenchRun, BenchKernels];
const ENGINES: &[Command] = &[Train, Plan, PlanShape, Eval, Generate, BenchStep, BenchRun];

keys! {
    MODEL: Option<PathBuf> = "model", "null", &[Train, Data, Plan], |v| nullable(v, path),
        &["a Hugging Face directory"], "the model to start from (required)";
    OUTPUT_DIR: PathBuf = "output_dir", "./out", TRAINING, path, &["a directory"], "where adapter and metrics go";
    SHARDS: Option<PathBuf> = "shards", "auto", &[Train, Eval, Generate], |v| auto_or(v, path),
        &["auto", "a directory"], "where quantized shards are kept; auto: the user's cache folder";

    TRAIN: Option<WrittenSources> = "data.train", "null", TRAINING_ROWS, |v| nullable(v, WrittenSources::read),
        WrittenSources::ALLOWED,
        "training data (required to train); weight: how often each row is in an epoch; split: the files of a folder that \
         have this word in their names";
    EVAL: Option<WrittenEval> = "data.eval", "null", TRAINING_ROWS, |v| nullable(v, eval_data),
        &["null", "a fraction of data.train above 0 and below 1", "whatever data.train may be"],
        "held-out data; null: none";
    FORMAT: Format = "data.format", "auto", ROWS, choice, Format::ALLOWED,
        "the columns of a row; text: a text; messages: a chat; prompt_completion: a prompt and what follows it; alpaca: \
         instruction, input and output; sharegpt: conversations; tokenized: input_ids; auto: those that the first row of \
         each file has";
    COLUMNS: Option<ColumnNames> = "data.columns", "null", ROWS, |v| nullable(v, ColumnNames::read),
        &["null (their own)", "{column: its name in the files}, e.g. {prompt: question, completion: answer}"],
        "names that the columns have in the files";
    MAX_LENGTH: usize = "data.max_length", "1024", &[Train, Data, Plan], |v| integer(v, 2..=1 << 24),
        &["an integer from 2 to 16777216"], "tokens in the longest sequence";
    PACKING: Packing = "data.packing", "true", ROWS, choice,
        Packing::ALLOWED,
        "true: a sequence holds as many whole documents as fit; wrapped: documents stand end to end and are cut where a \
         sequence is full; false: a sequence holds one document; documents never attend to each other";
    OVERLONG: Overlong = "data.overlong", "truncate", ROWS, choice,
        Overlong::ALLOWED,
        "what happens to rows over max_length; truncate: their end is left out; split: they become several documents; \
         drop: they are left out; error: the run is refused; data.packing wrapped has the default split, and refuses \
         truncate";
    LOSS_ON: LossOn = "data.loss_on", "auto", ROWS, choice,
        LossOn::ALLOWED,
        "the tokens that count in the loss; all: every token; completion: those after the prompt; assistant: those that \
         the chat template marks as generated; auto: completion where there is a prompt, else all";
    SHUFFLE: bool = "data.shuffle", "true", TRAINING, Value::as_bool,
        &["true", "false"],
        "true: each epoch has an order of its own, which follows from training.seed; false: the order of the rows";

    LOAD_IN_4BIT: bool = "quantization.load_in_4bit", "true", BASES, Value::as_bool,
        &["true", "false"],
        "true: the projections of the base are held in NF4; false: as they are in the checkpoint";
    QUANT_TYPE: &str = "quantization.bnb_4bit_quant_type", "nf4", BASES, |v| only(v, "nf4"), &["nf4"], "the 4-bit type";
    DOUBLE_QUANT: Option<bool> = "quantization.bnb_4bit_use_double_quant", "null", BASES,
        |v| nullable(v, Value::as_bool), &["true", "false", "null"],
        "true: the scales of NF4 are quantized too; false: they are float32; null: as in a 4-bit checkpoint, else true";
    COMPUTE_DTYPE: ComputeDtype = "quantization.bnb_4bit_compute_dtype", "auto", COMPUTES, choice,
        ComputeDtype::ALLOWED,
        "dtype of the arithmetic; a GPU has bfloat16 and float16, the CPU float32; auto: bfloat16 or float32";
    QUANT_STORAGE: &str = "quantization.bnb_4bit_quant_storage", "uint8", BASES, |v| only(v, "uint8"),
        &["uint8"], "dtype of the packed codes";

    LORA_R: usize = "lora.r", "16", ADAPTERS, |v| integer(v, 1..=1 << 16),
        &["an integer from 1 to 65536"], "rank of the adapter's matrices";
    LORA_ALPHA: f64 = "lora.lora_alpha", "16", ADAPTERS, positive,
        &["a number above 0"], "the adapter is scaled by alpha/r: see lora.use_rslora";
    LORA_DROPOUT: f64 = "lora.lora_dropout", "0.05", ADAPTERS, below_1,
        &["a number from 0 to below 1"], "dropout before A";
    TARGET_MODULES: Targets = "lora.target_modules", "all-linear", ADAPTERS, Targets::read,
        &["all-linear", "one or a list of the model's q_proj, k_proj, v_proj, qkv_proj, o_proj, gate_proj, up_proj, \
           gate_up_proj, down_proj"],
        "the modules that get an adapter; all-linear: all of them";
    USE_RSLORA: bool = "lora.use_rslora", "false", ADAPTERS, Value::as_bool,
        &["true", "false"], "true: the adapter is scaled by alpha/sqrt(r); false: by alpha/r";
    LORA_BIAS: &str = "lora.bias", "none", TRAINING, |v| only(v, "none"), &["none"], "which biases are trained";
    ADAPTER: Option<PathBuf> = "lora.adapter", "null", TRAIN_PLAN, |v| nullable(v, path),
        &["null", "a PEFT adapter directory"], "adapter to go on from, with its own r, alpha and targets; null: a new one";

    BATCH_SIZE: usize = "training.per_device_train_batch_size", "1", TRAIN_PLAN, |v| integer(v, 1..=1 << 16),
        &["an integer from 1 to 65536"], "sequences of a micro-batch";
    ACCUMULATION_STEPS: usize = "training.gradient_accumulation_steps", "8", TRAIN_PLAN,
        |v| integer(v, 1..=MAX_MICRO_BATCHES), &["an integer from 1 to 16384"], "micro-batches of a step, on each rank";
    GLOBAL_BATCH_SIZE: Option<usize> = "training.global_batch_size", "null", TRAIN_PLAN,
        |v| nullable(v, |v| integer(v, 1..=1 << 30)), &["null", "an integer from 1 to 1073741824"],
        "sequences of a step on all ranks; null: gradient_accumulation_steps decides";
    LEARNING_RATE: f64 = "training.learning_rate", "1.0e-4", TRAINING, positive,
        &["a number above 0, in f32"], "the highest learning rate";
    LR_SCHEDULER: LrScheduler = "training.lr_scheduler_type", "cosine", TRAINING, choice,
        LrScheduler::ALLOWED,
        "constant: without a warm-up; constant_with_warmup: constant after it; linear: falls to 0 on a line; cosine: \
         falls to 0 on half a cosine";
    ADAM_BETA1: f64 = "training.adam_beta1", "0.9", TRAINING, below_1,
        &["a number from 0 to below 1"], "AdamW's decay of the mean";
    ADAM_BETA2: f64 = "training.adam_beta2", "0.999", TRAINING, below_1,
        &["a number from 0 to below 1"], "AdamW's decay of the variance";
    ADAM_EPSILON: f64 = "training.adam_epsilon", "1.0e-8", TRAINING, positive,
        &["a number above 0"], "AdamW's epsilon";
    WARMUP_STEPS: Option<usize> = "training.warmup_steps", "null", TRAINING,
        |v| nullable(v, |v| integer(v, 0..=MAX_STEPS_OF_A_RUN)),
        &["null", "an integer of at least 0 and below the run's steps"],
        "steps in which the learning rate rises; null: a tenth of the steps, at most 10";
    NUM_TRAIN_EPOCHS: f64 = "training.num_train_epochs", "1", TRAINING, positive,
        &["a number above 0"], "how often the data is gone through; a part of an epoch is whole steps, rounded up";
    DROP_LAST: bool = "training.drop_last", "false", TRAINING, Value::as_bool,
        &["true", "false"],
        "false: the last step of an epoch has the sequences that are left; true: sequences that do not fill a step are \
         left out of the epoch";
    MAX_STEPS: Option<usize> = "training.max_steps", "null", TRAINING,
        |v| nullable(v, |v| integer(v, 1..=MAX_STEPS_OF_A_RUN)), &["null", "an integer from 1 to 1073741824"],
        "steps of the run; null: num_train_epochs decides";
    MAX_GRAD_NORM: Option<f64> = "training.max_grad_norm", "1.0", TRAINING, |v| nullable(v, positive),
        &["null (no clipping)", "a number above 0"], "gradients are clipped to this global norm";
    WEIGHT_DECAY: f64 = "training.weight_decay", "0.0", TRAINING, not_negative,
        &["a number of at least 0"], "AdamW's decoupled decay";
    SEED: u64 = "training.seed", "42", TRAINING, |v| integer(v, 0..=MAX_INTEGER).map(|n| n as u64),
        &["an integer from 0 to 9007199254740992"], "data order, dropout and new adapters follow from it";
    LOGGING_STEPS: usize = "training.logging_steps", "1", TRAINING, count,
        &["an integer of at least 1"], "a line every so many steps";
    SAVE_STRATEGY: Strategy = "training.save_strategy", "steps", TRAINING, choice,
        Strategy::ALLOWED, "steps: checkpoints as save_steps says; epoch: one at the end of each epoch";
    SAVE_STEPS: Option<usize> = "training.save_steps", "100", TRAINING, |v| nullable(v, count),
        &["null (no checkpoints but when the run is stopped)", "an integer of at least 1"],
        "a checkpoint every so many steps, in output_dir";
    SAVE_TOTAL_LIMIT: Option<usize> = "training.save_total_limit", "2", SAVES, |v| nullable(v, count),
        &["null (all are kept)", "an integer of at least 1"], "checkpoints that are kept; older ones are removed";
    MAX_SKIPPED_STEPS: usize = "training.max_skipped_steps", "5", TRAINING, |v| integer(v, 0..=MAX_INTEGER),
        &["an integer of at least 0"],
        "so many steps in a row whose loss or gradient is not finite end the run, they update nothing; 0: the first one \
         does";
    RESUME: Resume = "training.resume", "auto", SAVES, resume,
        &["auto", "never", "a checkpoint directory"],
        "auto: go on from the newest complete checkpoint of the same run in output_dir, if there is one; never: begin \
         with the first step; a directory: go on from this one";
    GRACE: f64 = "training.grace", "10s", SAVES, |v| seconds(v).filter(|s| *s >= 0.0),
        &["a duration of at least 0, e.g. 10s"],
        "after a signal, how long the step under way may still take; one that would end later is abandoned";
    MAX_TIME: Option<f64> = "training.max_time", "null", SAVES, |v| nullable(v, |v| seconds(v).filter(|s| *s > 0.0)),
        &["null", "a duration above 0, e.g. 3h50m"],
        "the run stops with a checkpoint before so much time has passed since its start; null: before \
         SLURM_JOB_END_TIME, if that is set";
    EVAL_STRATEGY: Strategy = "training.eval_strategy", "steps", TRAINING, choice,
        Strategy::ALLOWED,
        "steps: held-out loss as eval_steps says; epoch: at the end of each epoch; in both cases before and after \
         training too";
    EVAL_STEPS: Option<usize> = "training.eval_steps", "null", TRAINING, |v| nullable(v, count),
        &["null (before and after training only)", "an integer of at least 1"], "held-out loss every so many steps";
    LOAD_BEST_MODEL_AT_END: bool = "training.load_best_model_at_end", "false", TRAINING, Value::as_bool,
        &["true", "false"],
        "true: the result is the best adapter by metric_for_best_model, of the checkpoints and the last step; false: that \
         of the last step";
    METRIC_FOR_BEST_MODEL: &str = "training.metric_for_best_model", "eval_loss", TRAINING, metric,
        &["eval_loss", "loss"], "eval_loss: the held-out loss, of which less is better; loss: another name of it";
    EARLY_STOPPING_PATIENCE: Option<usize> = "training.early_stopping_patience", "null", TRAINING, |v| nullable(v, count),
        &["null (never)", "an integer of at least 1"],
        "the run ends after so many evaluations in a row that are no better than the best before";
    EARLY_STOPPING_THRESHOLD: f64 = "training.early_stopping_threshold", "0", TRAINING, not_negative,
        &["a number of at least 0"], "early stopping takes an evaluation for better if it gains more than this";

    SHARDING_STRATEGY: ShardingStrategy = "fsdp.sharding_strategy", "full_shard", ENGINES, choice,
        ShardingStrategy::ALLOWED,
        "full_shard: each rank keeps a part of the base; hybrid_shard: the ranks of a node keep a base together; \
         no_shard: each rank keeps all of it";
    ACCUMULATION: Accumulation = "fsdp.accumulation", "layer", STEPS, choice,
        Accumulation::ALLOWED,
        "layer: a pass gathers each layer once, for all micro-batches; micro_batch: each micro-batch gathers all layers";
    ACTIVATION_CHECKPOINTING: ActivationCheckpointing = "fsdp.activation_checkpointing", "auto", STEPS, choice,
        ActivationCheckpointing::ALLOWED,
        "what backward computes again; full: every layer; selective: all but what costs most; none: nothing is; auto: as \
         little as memory allows";
    OFFLOAD_PARAMS: Option<bool> = "fsdp.offload_params", "auto", ENGINES, auto_or_bool,
        &["auto", "true", "false"],
        "true: shards, adapter and its optimizer state wait in host memory; false: on the device; auto: there as far as \
         they fit";
    RESIDENT_UNITS: Option<usize> = "fsdp.resident_units", "auto", ENGINES,
        |v| auto_or(v, |v| integer(v, 0..=MAX_INTEGER)), &["auto", "an integer of at least 0"],
        "units (layers, and pieces of the head) whose shards stay on the device; auto: as many as fit";
    ACTIVATION_OFFLOAD: Option<bool> = "fsdp.activation_offload", "auto", STEPS, auto_or_bool,
        &["auto", "true", "false"],
        "true: the layers' inputs wait for backward in host memory; false: on the device; auto: there if they fit";
    GATHER: Option<Gather> = "fsdp.gather", "auto", ENGINES, |v| auto_or(v, choice),
        &["auto", "nccl", "host"],
        "how shards get to the other ranks of a node; nccl: by NCCL; host: each rank fetches all of them from shared host \
         memory; auto: the faster, measured";
    VRAM_BUDGET: Option<usize> = "fsdp.vram_budget", "auto", ENGINES, |v| auto_or(v, size),
        &["auto", "a size, e.g. 22GiB"],
        "device memory that a rank may take, driver and libraries included; auto: what is free";
    HOST_BUDGET: Option<usize> = "fsdp.host_budget", "auto", ENGINES, |v| auto_or(v, size),
        &["auto", "a size, e.g. 60GiB"], "host memory that a rank may pin; auto: what is available";
}

/// Largest number of micro-batches of a step on a rank, and of steps of a run.
pub(super) const MAX_MICRO_BATCHES: usize = 1 << 14;
pub(super) const MAX_STEPS_OF_A_RUN: usize = 1 << 30;

/// The longest duration: ten years.
const MAX_SECONDS: f64 = 10.0 * 365.0 * 86_400.0;

/// Returns whether this is the name of a section of keys, e.g. `lora`.
pub(super) fn is_section(path: &str) -> bool {
    ALL.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// Reads a string, or a boolean as the text that it would be: `true` is a choice of data.packing.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

fn nullable<T>(value: &Value, read: fn(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.is_null() { Some(None) } else { read(value).map(Some) }
}

fn choice<T: FromStr>(value: &Value) -> Option<T> {
    text(value)?.parse().ok()
}

/// Reads the only word that a key allows.
fn only(value: &Value, word: &'static str) -> Option<&'static str> {
    (value.as_str()? == word).then_some(word)
}

/// Reads a number, which may be quoted: some tools quote `1e-4`, which YAML 1.1 readers would take for a word.
fn number(value: &Value) -> Option<f64> {
    let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
    // The arithmetic is in f32.
    number.filter(|&x| (x as f32).is_finite())
}

/// Reads a number that is above 0, also in f32.
fn positive(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x as f32 > 0.0)
}

fn not_negative(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x >= 0.0)
}

/// Largest integer of keys without a smaller limit. f64 holds every integer up to it exactly, however it is written.
const MAX_INTEGER: usize = 1 << 53;

/// Reads an integer in a range, which may be written as `1e3` or `1000.0`.
fn integer(value: &Value, range: RangeInclusive<usize>) -> Option<usize> {
    let number = number(value).filter(|x| x.fract() == 0.0 && (0.0..=MAX_INTEGER as f64).contains(x))?;
    Some(number as usize).filter(|n| range.contains(n))
}

/// Reads an integer of at least 1.
fn count(value: &Value) -> Option<usize> {
    integer(value, 1..=MAX_INTEGER)
}

/// Reads a number from 0 to below 1, also in f32.
fn below_1(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x >= 0.0 && (x as f32) < 1.0)
}

fn auto_or<T>(value: &Value, read: fn(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.as_str() == Some("auto") { Some(None) } else { read(value).map(Some) }
}

fn auto_or_bool(value: &Value) -> Option<Option<bool>> {
    auto_or(value, Value::as_bool)
}

/// Reads a number of bytes: a number with a unit of 1024 (KiB, MiB, GiB, TiB) or of 1000 (KB, MB, GB, TB), or a plain
/// number of bytes.
fn size(value: &Value) -> Option<usize> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let bytes = match value.as_str() {
        None => number(value)?,
        Some(text) => {
            let (text, unit) = UNITS
                .iter()
                .find_map(|(name, unit)| Some((text.trim().strip_suffix(name)?, *unit)))
                .unwrap_or((text, 1.0));
            text.trim().parse::<f64>().ok()? * unit
        }
    };
    (1.0..9e15).contains(&bytes).then_some(bytes as usize)
}

/// Reads a duration: a number of seconds, or a text such as `3h50m`, `10s` or `03:50:00`.
fn seconds(value: &Value) -> Option<f64> {
    let seconds = match number(value) {
        Some(seconds) => seconds,
        None => value.as_str()?.trim().parse::<SignedDuration>().ok()?.as_secs_f64(),
    };
    (-MAX_SECONDS..=MAX_SECONDS).contains(&seconds).then_some(seconds)
}

fn path(value: &Value) -> Option<PathBuf> {
    paths::read(value.as_str()?).ok()
}

/// Says why a value is not a path; `None` if it is one.
pub(super) fn why_no_path(value: &Value) -> Option<String> {
    match value {
        Value::Array(list) => list.iter().find_map(why_no_path),
        Value::Object(keys) => why_no_path(keys.get("path")?),
        value => paths::read(value.as_str()?).err(),
    }
}

/// Reads a metric by either of the names that transformers has for it.
fn metric(value: &Value) -> Option<&'static str> {
    only(value, "eval_loss").or(only(value, "loss").map(|_| "eval_loss"))
}

fn resume(value: &Value) -> Option<Resume> {
    match value.as_str()? {
        "auto" => Some(Resume::Auto),
        "never" => Some(Resume::Never),
        _ => path(value).map(Resume::From),
    }
}

fn eval_data(value: &Value) -> Option<WrittenEval> {
    match number(value) {
        Some(fraction) => (0.0 < fraction && fraction < 1.0).then_some(WrittenEval::Fraction(fraction)),
        None => WrittenSources::read(value).map(WrittenEval::Sources),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_default_is_allowed() {
        for key in ALL {
            let default = serde_saphyr::from_str(key.default).unwrap();
            assert!((key.is_allowed)(&default), "{}: {}", key.path, key.default);
        }
    }

    /// A word that is one of several values is no help by itself; a value with a remark in brackets explains itself.
    #[test]
    fn the_help_of_a_key_explains_each_word_that_it_may_be() {
        for key in ALL.iter().filter(|key| key.allowed.len() > 1) {
            for word in key.allowed.iter().filter(|value| !value.contains(' ')) {
                let explained = key.help.split(|c: char| !c.is_alphanumeric() && !"_-".contains(c));
                assert!(explained.into_iter().any(|found| found == *word), "{}: {word} in {:?}", key.path, key.help);
            }
        }
    }

    #[test]
    fn sections_are_not_keys() {
        assert!(is_section("lora") && !is_section("lora.r") && !is_section("model") && !is_section("lo"));
    }

    #[test]
    fn numbers_are_read_in_every_spelling() {
        assert_eq!(number(&json!("1e-4")), Some(1e-4));
        assert_eq!(number(&json!(3)), Some(3.0));
        assert_eq!([json!("inf"), json!("NaN"), json!("x"), json!(true), json!(null)].map(|v| number(&v)), [None; 5]);
        assert_eq!(integer(&json!("1e3"), 1..=1000), Some(1000));
        assert_eq!([json!(1.5), json!(-1), json!(0), json!(1e300)].map(|v| integer(&v, 1..=9)), [None; 4]);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size(&json!("22GiB")), Some(22 << 30));
        assert_eq!([json!("1.5 MB"), json!("512B"), json!(7)].map(|v| size(&v)), [Some(1_500_000), Some(512), Some(7)]);
        assert_eq!([json!("GiB"), json!("-1GiB"), json!("22 G"), json!(0), json!(true)].map(|v| size(&v)), [None; 5]);
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(
            [json!("3h50m"), json!("10s"), json!("1h 30m"), json!(7), json!("0.5")].map(|v| seconds(&v)),
            [Some(13_800.0), Some(10.0), Some(5_400.0), Some(7.0), Some(0.5)]
        );
        assert_eq!(seconds(&json!("03:50:00")), Some(13_800.0));
        assert_eq!(
            [json!("soon"), json!("3x"), json!(true), json!("1e300"), json!("99999999h")].map(|v| seconds(&v)),
            [None; 5]
        );
    }

    #[test]
    fn eval_is_a_file_or_a_fraction() {
        assert_eq!(eval_data(&json!(0.1)), Some(WrittenEval::Fraction(0.1)));
        assert!(matches!(eval_data(&json!("e.jsonl")), Some(WrittenEval::Sources(_))));
        assert_eq!([json!(0), json!(1), json!(-0.5), json!("")].map(|v| eval_data(&v)), [const { None }; 4]);
    }
}
