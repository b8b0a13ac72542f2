//! Every key of a recipe, declared once: path, default, how it is read and checked, what is allowed, help.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::command::Command;
use super::job::{
    Accumulation, ActivationCheckpointing, ComputeDtype, Gather, LrSchedulerType, ShardingStrategy, Strategy,
    WrittenEval,
};
use super::overrides::Written;
use super::sources::WrittenSources;
use super::steps::Warmup;
use super::values::{
    MAX_INTEGER, auto_or, auto_or_bool, below_1, choice, count, eval_data, excluded, integer, mapping, metric,
    not_negative, nullable, only, path, positive, rank, resume, seconds, size, targets, warmup,
};
use crate::checkpoint::output::Resume;
use crate::data::{ColumnNames, Format, LossOn, Overlong, Packing};
use crate::model::targets::{Layers, LayersPattern, Modules, Patterns};

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
    BenchKernels, BenchRun, BenchStep, Data, Eval, Generate, Merge, MergeScored, Plan, PlanShape, Quantize,
    QuantizeShape, Train,
};

/// Lists of commands that read a key. Other keys in the recipe of `plan` or `data` are for `train` and are checked as
/// `train` checks them.
const TRAINING: &[Command] = &[Train];
const TRAIN_PLAN: &[Command] = &[Train, Plan];
const SAVES: &[Command] = &[Train, BenchRun];
const STEPS: &[Command] = &[Train, Plan, PlanShape, BenchStep, BenchRun];
const TRAINING_ROWS: &[Command] = &[Train, Data];
const ROWS: &[Command] = &[Train, Data, Eval, MergeScored];
const ADAPTERS: &[Command] = &[Train, Plan, PlanShape, BenchStep, BenchRun, BenchKernels];
#[rustfmt::skip]
const BASES: &[Command] = &[
    Train, Plan, PlanShape, Eval, Generate, Merge, MergeScored, Quantize, QuantizeShape, BenchStep, BenchRun, BenchKernels,
];
const COMPUTES: &[Command] = &[Train, Plan, PlanShape, Eval, Generate, MergeScored, BenchStep, BenchRun, BenchKernels];
const BUDGETS: &[Command] = &[Train, Plan, PlanShape, Eval, Generate, MergeScored, BenchStep, BenchRun];
const ENGINES: &[Command] = &[Train, Plan, PlanShape, Eval, Generate, BenchStep, BenchRun];

keys! {
    MODEL: Option<PathBuf> = "model", "null", &[Train, Data, Plan], |v| nullable(v, path),
        &["a Hugging Face directory", "ORG/NAME or ORG/NAME@REVISION of the hub"], "the model to start from (required)";
    OUTPUT_DIR: PathBuf = "output_dir", "./out", TRAINING, path, &["a directory"], "where adapter and metrics go";
    SHARDS: Option<PathBuf> = "shards", "auto", &[Train, Eval, Generate, MergeScored], |v| auto_or(v, path),
        &["auto", "a directory"], "where quantized shards are kept; auto: the user's cache folder";

    TRAIN: Option<WrittenSources> = "data.train", "null", TRAINING_ROWS, |v| nullable(v, WrittenSources::read),
        WrittenSources::ALLOWED,
        "training data (required to train); weight: how often each row is in an epoch; split: the files of a folder that \
         have this word in their names, or the split of a data set of the hub";
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

    LORA_R: usize = "lora.r", "16", ADAPTERS, rank,
        &["an integer from 1 to 65536"], "rank of the adapter's matrices";
    LORA_ALPHA: f64 = "lora.lora_alpha", "16", ADAPTERS, positive,
        &["a number above 0"], "the adapter is scaled by alpha/r: see lora.use_rslora";
    LORA_DROPOUT: f64 = "lora.lora_dropout", "0.05", ADAPTERS, below_1,
        &["a number from 0 to below 1"], "dropout before A";
    TARGET_MODULES: Modules = "lora.target_modules", "all-linear", ADAPTERS, targets,
        &["all-linear", "a list of modules' names or ends of names, e.g. [q_proj, mlp.up_proj]", "a regular expression of \
           whole names, e.g. .*\\.(q|v)_proj"],
        "the modules that get an adapter; all-linear: every projection of the layers";
    EXCLUDE_MODULES: Option<Modules> = "lora.exclude_modules", "null", ADAPTERS, |v| nullable(v, excluded),
        &["null (none)", "a list of modules' names or ends of names", "a regular expression of whole names"],
        "modules of target_modules that get no adapter";
    LAYERS_TO_TRANSFORM: Option<Vec<usize>> = "lora.layers_to_transform", "null", ADAPTERS,
        |v| nullable(v, Layers::read_indices),
        &["null (all)", "the number of a layer, from 0, or a list of numbers"],
        "the layers whose modules get an adapter; not where target_modules is an expression or has whole names";
    LAYERS_PATTERN: Option<Vec<LayersPattern>> = "lora.layers_pattern", "null", ADAPTERS,
        |v| nullable(v, Layers::read_patterns),
        &["null (any)", "a name or a list of them, e.g. layers"],
        "the list in the names of modules that layers_to_transform counts in, as an expression";
    RANK_PATTERN: Patterns<usize> = "lora.rank_pattern", "{}", ADAPTERS, |v| Patterns::read(v, rank),
        &["null", "a mapping of expressions to integers from 1 to 65536, e.g. {q_proj: 8, 'layers\\.0\\.mlp\\..*': 32}"],
        "r of the modules whose names, or ends of names after a dot, an expression matches, the first that does; null: none";
    ALPHA_PATTERN: Patterns<f64> = "lora.alpha_pattern", "{}", ADAPTERS, |v| Patterns::read(v, positive),
        &["null", "a mapping of expressions to numbers above 0"],
        "lora_alpha of modules, as rank_pattern gives r; null: none";
    USE_RSLORA: bool = "lora.use_rslora", "false", ADAPTERS, Value::as_bool,
        &["true", "false"], "true: the adapter is scaled by alpha/sqrt(r); false: by alpha/r";
    LORA_BIAS: &str = "lora.bias", "none", TRAINING, |v| only(v, "none"), &["none"], "which biases are trained";
    ADAPTER: Option<PathBuf> = "lora.adapter", "null", TRAIN_PLAN, |v| nullable(v, path),
        &["null", "a PEFT adapter directory", "ORG/NAME or ORG/NAME@REVISION of the hub"], "adapter to go on from, with its own r, alpha and targets, and the recipe's lora_dropout; null: a new one";

    BATCH_SIZE: usize = "training.per_device_train_batch_size", "1", TRAIN_PLAN, |v| integer(v, 1..=1 << 16),
        &["an integer from 1 to 65536"], "sequences of a micro-batch";
    ACCUMULATION_STEPS: usize = "training.gradient_accumulation_steps", "8", TRAIN_PLAN,
        |v| integer(v, 1..=MAX_MICRO_BATCHES), &["an integer from 1 to 16384"], "micro-batches of a step, on each rank";
    GLOBAL_BATCH_SIZE: Option<usize> = "training.global_batch_size", "null", TRAIN_PLAN,
        |v| nullable(v, |v| integer(v, 1..=1 << 30)), &["null", "an integer from 1 to 1073741824"],
        "sequences of a step on all ranks; null: gradient_accumulation_steps decides";
    LEARNING_RATE: f64 = "training.learning_rate", "1.0e-4", TRAINING, positive,
        &["a number above 0, in f32"], "the highest learning rate";
    LR_SCHEDULER: LrSchedulerType = "training.lr_scheduler_type", "cosine", TRAINING, choice,
        LrSchedulerType::ALLOWED,
        "constant: without a warm-up; constant_with_warmup: constant after it; linear: falls to 0 on a line; cosine: \
         falls to 0 on half a cosine; cosine_with_restarts: on one after the other; polynomial: falls to lr_end with a \
         power of the steps left; cosine_with_min_lr, cosine_warmup_with_min_lr: fall to min_lr on half a cosine, the \
         latter from a warm-up that begins above 0; inverse_sqrt: falls with the root of the steps; \
         warmup_stable_decay: constant, and falls in the last num_decay_steps";
    LR_SCHEDULER_KWARGS: Map<String, Value> = "training.lr_scheduler_kwargs", "{}", TRAINING, mapping,
        &["null", "arguments of the scheduler by transformers' names, e.g. {num_cycles: 2} or {min_lr_rate: 0.1}"],
        "numbers of the scheduler; null: its defaults";
    ADAM_BETA1: f64 = "training.adam_beta1", "0.9", TRAINING, below_1,
        &["a number from 0 to below 1"], "AdamW's decay of the mean";
    ADAM_BETA2: f64 = "training.adam_beta2", "0.999", TRAINING, below_1,
        &["a number from 0 to below 1"], "AdamW's decay of the variance";
    ADAM_EPSILON: f64 = "training.adam_epsilon", "1.0e-8", TRAINING, positive,
        &["a number above 0"], "AdamW's epsilon";
    WARMUP_STEPS: Option<Warmup> = "training.warmup_steps", "null", TRAINING, |v| nullable(v, warmup),
        &["null", "an integer of at least 0 and below the run's steps", "a fraction of these steps above 0 and below 1"],
        "steps in which the learning rate rises; a fraction of them is rounded up; null: a tenth of the steps, at most 10";
    WARMUP_RATIO: Option<f64> = "training.warmup_ratio", "null", TRAINING, |v| nullable(v, below_1),
        &["null (warmup_steps decides)", "a number from 0 to below 1"],
        "the fraction of the steps in which the learning rate rises, rounded up to whole steps";
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
    LORAPLUS_LR_RATIO: Option<f64> = "training.loraplus_lr_ratio", "null", TRAINING, |v| nullable(v, positive),
        &["null (1)", "a number above 0"], "LoRA+: the learning rate of the matrices B is this many times that of A";
    SEED: u64 = "training.seed", "42", TRAINING, |v| integer(v, 0..=MAX_INTEGER).map(|n| n as u64),
        &["an integer from 0 to 9007199254740992"], "data order, dropout and new adapters follow from it";
    LOGGING_STEPS: usize = "training.logging_steps", "1", TRAINING, count,
        &["an integer of at least 1"], "number of steps from one line of the log to the next";
    SAVE_STRATEGY: Strategy = "training.save_strategy", "steps", TRAINING, choice,
        Strategy::ALLOWED, "steps: checkpoints as save_steps says; epoch: one at the end of each epoch";
    SAVE_STEPS: Option<usize> = "training.save_steps", "100", TRAINING, |v| nullable(v, count),
        &["null (no checkpoints but when the run is stopped)", "an integer of at least 1"],
        "number of steps from one checkpoint in output_dir to the next";
    SAVE_TOTAL_LIMIT: Option<usize> = "training.save_total_limit", "2", SAVES, |v| nullable(v, count),
        &["null (all are kept)", "an integer of at least 1"], "checkpoints that are kept; older ones are removed";
    MAX_SKIPPED_STEPS: usize = "training.max_skipped_steps", "5", TRAINING, |v| integer(v, 0..=MAX_INTEGER),
        &["an integer of at least 0"],
        "this many steps in a row whose loss or gradient is not finite end the run; such a step updates nothing; 0: the \
         first one ends the run";
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
        &["null (before and after training only)", "an integer of at least 1"], "number of steps from one held-out loss to the next";
    LOAD_BEST_MODEL_AT_END: bool = "training.load_best_model_at_end", "false", TRAINING, Value::as_bool,
        &["true", "false"],
        "true: the result is the best adapter by metric_for_best_model, of the checkpoints and the last step; false: that \
         of the last step";
    METRIC_FOR_BEST_MODEL: &str = "training.metric_for_best_model", "eval_loss", TRAINING, metric,
        &["eval_loss", "loss"], "eval_loss: the held-out loss, of which less is better; loss: another name of it";
    EARLY_STOPPING_PATIENCE: Option<usize> = "training.early_stopping_patience", "null", TRAINING, |v| nullable(v, count),
        &["null (never)", "an integer of at least 1"],
        "the run ends after this many evaluations in a row that are no better than the best before";
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
        "what backward computes again; full: all but LoRA's u, which is kept as far as memory allows; selective: all but \
         what costs most; none: nothing is; auto: as little as memory allows";
    OFFLOAD_PARAMS: Option<bool> = "fsdp.offload_params", "auto", ENGINES, auto_or_bool,
        &["auto", "true", "false"],
        "true: shards, adapter and its optimizer state wait in host memory; false: on the device; auto: there as far as \
         they fit";
    RESIDENT_UNITS: Option<usize> = "fsdp.resident_units", "auto", ENGINES,
        |v| auto_or(v, |v| integer(v, 0..=MAX_INTEGER)), &["auto", "an integer of at least 0"],
        "units (layers, and pieces of the head) whose shards stay on the device; auto: as many as fit";
    DENSE_LAYERS: Option<usize> = "fsdp.dense_layers", "auto", ENGINES,
        |v| auto_or(v, |v| integer(v, 0..=MAX_INTEGER)), &["auto", "an integer of at least 0"],
        "layers whose dequantized weights stay on the device, 2 bytes a weight; auto: as many as fit where a GPU holds the whole base, \
         and none with activation_checkpointing: full";
    ACTIVATION_OFFLOAD: Option<bool> = "fsdp.activation_offload", "auto", STEPS, auto_or_bool,
        &["auto", "true", "false"],
        "true: the layers' inputs wait for backward in host memory; false: on the device; auto: there if they fit";
    GATHER: Option<Gather> = "fsdp.gather", "auto", ENGINES, |v| auto_or(v, choice),
        &["auto", "nccl", "host"],
        "how shards get to the other ranks of a node; nccl: by NCCL; host: each rank fetches all of them from shared host \
         memory; auto: the faster, measured";
    VRAM_BUDGET: Option<usize> = "fsdp.vram_budget", "auto", BUDGETS, |v| auto_or(v, size),
        &["auto", "a size, e.g. 22GiB"],
        "device memory that a rank may take, driver and libraries included; auto: what is free";
    HOST_BUDGET: Option<usize> = "fsdp.host_budget", "auto", ENGINES, |v| auto_or(v, size),
        &["auto", "a size, e.g. 60GiB"], "host memory that a rank may pin; auto: what is available";
}

/// Largest number of micro-batches of a step on a rank, and of steps of a run.
pub(super) const MAX_MICRO_BATCHES: usize = 1 << 14;
pub(super) const MAX_STEPS_OF_A_RUN: usize = 1 << 30;

/// Returns whether this is the name of a section of keys, e.g. `lora`.
pub(super) fn is_section(path: &str) -> bool {
    ALL.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
