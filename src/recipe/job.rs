//! The job: the decisions made from a recipe. Once it exists, no code reads the recipe.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use super::command::Command;
use super::conflicts::{check_conflicts, check_required};
use super::keys::{self, Key};
use super::overrides::Written;
use super::scheduler;
use super::sources::WrittenSources;
use super::steps::{Warmup, When};
use crate::checkpoint::output::Resume;
use crate::choices::choices;
pub use crate::comm::Gather;
use crate::data::{LossOn, Overlong, Packing, Source};
pub use crate::fsdp::schedule::Accumulation;
use crate::model::targets::{Layers, LoraKeys};
use crate::optim::lr::LrScheduler;
pub use crate::optim::lr::LrSchedulerType;

choices! {
    /// Part of the base that each rank keeps.
    #[expect(clippy::enum_variant_names, reason = "these are the words of PyTorch")]
    ShardingStrategy {
        /// Each rank keeps a shard of it.
        FullShard = "full_shard",
        /// The ranks of a node hold a base together; between nodes only gradients go.
        HybridShard = "hybrid_shard",
        /// Each rank keeps all of it.
        NoShard = "no_shard",
    }
}

choices! {
    /// The choice of activations that backward recomputes.
    ActivationCheckpointing {
        /// Keep as much as fits.
        Auto = "auto",
        /// Recompute all but LoRA's u, which is kept in as many layers as there is room for.
        Full = "full",
        /// Keep the activations that cost most to recompute, LoRA's u among them.
        Selective = "selective",
        /// Keep everything.
        None = "none",
    }
}

choices! {
    /// Number format of the arithmetic; sums are f32 everywhere.
    ComputeDtype {
        /// bfloat16 on a GPU, float32 on the CPU.
        Auto = "auto",
        Bfloat16 = "bfloat16",
        Float16 = "float16",
        Float32 = "float32",
    }
}

choices! {
    /// Units of what is counted between two checkpoints, or two evaluations.
    Strategy {
        Steps = "steps",
        Epoch = "epoch",
    }
}

/// All decisions of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub command: Command,
    /// A directory; empty if a shape replaces the model. This path and those of data and adapter may name a repository of
    /// the hub until `start` has located it.
    pub model: PathBuf,
    pub output_dir: PathBuf,
    /// Folder of the shard files; `None` means the user's cache folder.
    pub shards: Option<PathBuf>,
    pub data: DataJob,
    pub quantization: QuantizationJob,
    pub lora: LoraJob,
    /// Adapters of a command that uses them in turn and trains none.
    pub adapters: Vec<PathBuf>,
    pub training: TrainingJob,
    pub fsdp: FsdpJob,
    values: Map<String, Value>,
}

impl Job {
    /// The decided value of every key that the command reads, by its path (`"training.seed"`), in one spelling: equal
    /// jobs have equal values. `null` where another key decides in its place; `"auto"`, and `null` for warm-up, where
    /// the run decides once it knows more.
    pub fn values(&self) -> Map<String, Value> {
        self.values.clone()
    }

    /// Changes the decided value of a key that the command reads.
    pub(super) fn set_value(&mut self, path: &str, change: impl FnOnce(&mut Value)) {
        self.values.entry(path).and_modify(change);
    }

    /// Returns this job with adapters to use in turn.
    pub fn with_adapters(self, adapters: &[PathBuf]) -> Job {
        Job { adapters: adapters.to_vec(), ..self }
    }

    /// Returns this job with steps of this many sequences on all ranks, whatever was written.
    pub fn with_global_batch(&self, sequences: usize) -> Job {
        let training = TrainingJob { batch: BatchSize::Global(sequences), ..self.training.clone() };
        Job { training, ..self.clone() }
    }

    /// Returns this job for another model, which is held as it is and has no adapter, with its shards in this folder.
    pub fn on_merged(&self, model: PathBuf, shards: PathBuf) -> Job {
        let quantization = QuantizationJob { load_in_4bit: false, double_quant: None, ..self.quantization.clone() };
        let lora = LoraJob { adapter: None, ..self.lora.clone() };
        Job { model, shards: Some(shards), quantization, lora, adapters: Vec::new(), ..self.clone() }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct DataJob {
    /// Files and directories; empty if the command does not train.
    pub train: Vec<Source>,
    pub eval: Option<EvalData>,
    pub max_length: usize,
    pub packing: Packing,
    pub overlong: Overlong,
    pub loss_on: LossOn,
    /// True if each epoch has an order of its own.
    pub shuffle: bool,
}

/// Source of the held-out rows.
#[derive(Clone, Debug, PartialEq)]
pub enum EvalData {
    Sources(Vec<Source>),
    /// Fraction of the training rows, above 0 and below 1.
    Fraction(f64),
}

/// [`EvalData`] as it is written.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum WrittenEval {
    Sources(WrittenSources),
    Fraction(f64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationJob {
    pub load_in_4bit: bool,
    /// `None` follows a checkpoint that is in 4 bit already, and means true for any other.
    pub double_quant: Option<bool>,
    pub compute_dtype: ComputeDtype,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LoraJob {
    pub keys: LoraKeys,
    pub dropout: f32,
    /// PEFT adapter that training continues. If it is set, the keys are its own and the recipe must not give them.
    pub adapter: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TrainingJob {
    /// Sequences of a micro-batch.
    pub per_device_train_batch_size: usize,
    pub batch: BatchSize,
    pub learning_rate: f64,
    pub lr_scheduler: LrScheduler,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// Without this and a ratio, the warm-up is the default of [`TrainingJob::steps`].
    pub warmup_steps: Option<Warmup>,
    /// Fraction of the steps, from 0 to below 1.
    pub warmup_ratio: Option<f64>,
    pub num_train_epochs: f64,
    /// True if sequences that do not fill a step are left out of each epoch.
    pub drop_last: bool,
    /// If it is set, it replaces the number of epochs.
    pub max_steps: Option<usize>,
    /// `None` means no clipping.
    pub max_grad_norm: Option<f64>,
    pub weight_decay: f64,
    /// The learning rate of lora_B over that of lora_A; `None` means 1.
    pub loraplus_lr_ratio: Option<f64>,
    pub seed: u64,
    pub logging_steps: usize,
    /// Times of checkpoints; there is one too when the run is stopped.
    pub save: When,
    /// `None` keeps all checkpoints.
    pub save_total_limit: Option<usize>,
    /// Number of steps in a row without a finite loss and gradient that end the run; 0 and 1 mean the first one.
    pub max_skipped_steps: usize,
    pub resume: Resume,
    /// Time that a step may still take after a signal.
    pub grace: Duration,
    /// Time from the start of the program within which the run stops and saves.
    pub max_time: Option<Duration>,
    /// Times of evaluations, besides those before and after training.
    pub eval: When,
    /// True if the result is the best of the checkpoints and the last adapter, by held-out loss.
    pub load_best_model_at_end: bool,
    /// Number of evaluations in a row that are no better, after which the run ends; `None` means never.
    pub early_stopping_patience: Option<usize>,
    /// Difference of held-out losses that an evaluation must exceed to be better, in early stopping.
    pub early_stopping_threshold: f64,
}

/// The key that fixes the size of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// Number of micro-batches of each rank: `gradient_accumulation_steps`.
    AccumulationSteps(usize),
    /// Number of sequences of all ranks: `global_batch_size`.
    Global(usize),
}

impl TrainingJob {
    /// Returns the number of sequences of one step on all ranks.
    pub fn global_batch_size(&self, world_size: usize) -> usize {
        match self.batch {
            BatchSize::AccumulationSteps(steps) => steps * self.per_device_train_batch_size * world_size,
            BatchSize::Global(sequences) => sequences,
        }
    }

    /// Returns the number of micro-batches of one step on each rank. In an uneven split some are empty or not full.
    pub fn accumulation_steps(&self, world_size: usize) -> usize {
        self.global_batch_size(world_size).div_ceil(self.per_device_train_batch_size * world_size)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsdpJob {
    pub sharding_strategy: ShardingStrategy,
    pub accumulation: Accumulation,
    pub activation_checkpointing: ActivationCheckpointing,
    /// In this key and the next ones, `None` chooses by what fits.
    pub offload_params: Option<bool>,
    pub resident_units: Option<usize>,
    pub dense_layers: Option<usize>,
    pub activation_offload: Option<bool>,
    pub gather: Option<Gather>,
    /// Bytes for each rank.
    pub vram_budget: Option<usize>,
    pub host_budget: Option<usize>,
}

/// Checks all that was written and decides. Fails with all errors at once.
pub(super) fn decide(mut written: Written, command: Command) -> Result<Job, Vec<String>> {
    written.check(command);
    check_required(&mut written, command);
    check_conflicts(&mut written, command);
    // A value that cannot be read has been reported, so nothing comes without an error.
    let job = values(&written, command).and_then(|values| build(&written, command, values));
    match job {
        Some(job) if written.errors.is_empty() => Ok(job),
        _ => Err(written.errors),
    }
}

/// Returns the values of the keys that a command reads; `null` stands for a key that another key decides.
fn values(written: &Written, command: Command) -> Option<Map<String, Value>> {
    let mut values = Map::new();
    for key in keys::ALL.iter().filter(|key| command.name_of(key.path).is_some()) {
        let value = match (key.decided)(written)? {
            // A key that does not allow null calls its `None` auto.
            Value::Null if !(key.is_allowed)(&Value::Null) => "auto".into(),
            value => value,
        };
        values.insert(key.path.into(), value);
    }
    values
        .entry(keys::OVERLONG.path)
        .and_modify(|value| *value = overlong(written).map_or(Value::Null, |o| o.word().into()));
    if let Some(kwargs) = values.get_mut(keys::LR_SCHEDULER_KWARGS.path) {
        *kwargs = scheduler::decide(written)?.map_or(Value::Null, |scheduler| scheduler::kwargs(&scheduler));
    }
    let is_constant = written.get(&keys::LR_SCHEDULER)? == LrSchedulerType::Constant;
    let decided_by_another = [
        (keys::ACCUMULATION_STEPS.path, is_set(written, &keys::GLOBAL_BATCH_SIZE)),
        (keys::NUM_TRAIN_EPOCHS.path, is_set(written, &keys::MAX_STEPS)),
        (keys::WARMUP_STEPS.path, is_constant || is_set(written, &keys::WARMUP_RATIO)),
        (keys::WARMUP_RATIO.path, is_constant),
        (keys::SAVE_STEPS.path, written.get(&keys::SAVE_STRATEGY)? == Strategy::Epoch),
    ];
    let of_adapter = is_set(written, &keys::ADAPTER);
    let decided_by_another = decided_by_another.into_iter().chain(OF_ADAPTER.map(|path| (path, of_adapter)));
    for (path, _) in decided_by_another.filter(|(_, is_decided)| *is_decided) {
        values.entry(path).and_modify(|value| *value = Value::Null);
    }
    Some(values)
}

/// Decides what happens to long documents. Wrapped packing truncates nothing unless the recipe asks for it.
fn overlong(written: &Written) -> Option<Overlong> {
    match (written.get(&keys::PACKING)?, written.has(keys::OVERLONG.path)) {
        (Packing::Wrapped, false) => Some(Overlong::Split),
        _ => written.get(&keys::OVERLONG),
    }
}

/// Keys that are decided by the adapter that training continues.
pub(super) const OF_ADAPTER: [&str; 9] = [
    keys::LORA_R.path,
    keys::LORA_ALPHA.path,
    keys::TARGET_MODULES.path,
    keys::EXCLUDE_MODULES.path,
    keys::LAYERS_TO_TRANSFORM.path,
    keys::LAYERS_PATTERN.path,
    keys::RANK_PATTERN.path,
    keys::ALPHA_PATTERN.path,
    keys::USE_RSLORA.path,
];

/// Returns whether a key that may be null has another value.
pub(super) fn is_set<T>(written: &Written, key: &Key<Option<T>>) -> bool {
    matches!(written.get(key), Some(Some(_)))
}

fn build(written: &Written, command: Command, values: Map<String, Value>) -> Option<Job> {
    Some(Job {
        command,
        model: written.get(&keys::MODEL)?.unwrap_or_default(),
        output_dir: written.get(&keys::OUTPUT_DIR)?,
        shards: written.get(&keys::SHARDS)?,
        data: build_data(written)?,
        quantization: QuantizationJob {
            load_in_4bit: written.get(&keys::LOAD_IN_4BIT)?,
            double_quant: written.get(&keys::DOUBLE_QUANT)?,
            compute_dtype: written.get(&keys::COMPUTE_DTYPE)?,
        },
        lora: LoraJob {
            keys: build_lora(written)?,
            dropout: written.get(&keys::LORA_DROPOUT)? as f32,
            adapter: written.get(&keys::ADAPTER)?,
        },
        adapters: Vec::new(),
        training: build_training(written)?,
        fsdp: FsdpJob {
            sharding_strategy: written.get(&keys::SHARDING_STRATEGY)?,
            accumulation: written.get(&keys::ACCUMULATION)?,
            activation_checkpointing: written.get(&keys::ACTIVATION_CHECKPOINTING)?,
            offload_params: written.get(&keys::OFFLOAD_PARAMS)?,
            resident_units: written.get(&keys::RESIDENT_UNITS)?,
            dense_layers: written.get(&keys::DENSE_LAYERS)?,
            activation_offload: written.get(&keys::ACTIVATION_OFFLOAD)?,
            gather: written.get(&keys::GATHER)?,
            vram_budget: written.get(&keys::VRAM_BUDGET)?,
            host_budget: written.get(&keys::HOST_BUDGET)?,
        },
        values,
    })
}

fn build_lora(written: &Written) -> Option<LoraKeys> {
    Some(LoraKeys {
        r: written.get(&keys::LORA_R)?,
        alpha: written.get(&keys::LORA_ALPHA)?,
        use_rslora: written.get(&keys::USE_RSLORA)?,
        targets: written.get(&keys::TARGET_MODULES)?,
        excluded: written.get(&keys::EXCLUDE_MODULES)?,
        layers: Layers {
            indices: written.get(&keys::LAYERS_TO_TRANSFORM)?,
            patterns: written.get(&keys::LAYERS_PATTERN)?.unwrap_or_default(),
        },
        rank_pattern: written.get(&keys::RANK_PATTERN)?,
        alpha_pattern: written.get(&keys::ALPHA_PATTERN)?,
    })
}

fn build_data(written: &Written) -> Option<DataJob> {
    let (format, columns) = (written.get(&keys::FORMAT)?, written.get(&keys::COLUMNS)?.unwrap_or_default());
    let decided = |sources: WrittenSources| sources.decided(format, &columns);
    Some(DataJob {
        train: written.get(&keys::TRAIN)?.map(decided).unwrap_or_default(),
        eval: written.get(&keys::EVAL)?.map(|eval| match eval {
            WrittenEval::Sources(sources) => EvalData::Sources(decided(sources)),
            WrittenEval::Fraction(fraction) => EvalData::Fraction(fraction),
        }),
        max_length: written.get(&keys::MAX_LENGTH)?,
        packing: written.get(&keys::PACKING)?,
        overlong: overlong(written)?,
        loss_on: written.get(&keys::LOSS_ON)?,
        shuffle: written.get(&keys::SHUFFLE)?,
    })
}

fn build_training(written: &Written) -> Option<TrainingJob> {
    let lr_scheduler = scheduler::decide(written)?.ok()?;
    let (warmup_steps, warmup_ratio) = match lr_scheduler {
        LrScheduler::Constant => (Some(Warmup::Steps(0)), None),
        _ => (written.get(&keys::WARMUP_STEPS)?, written.get(&keys::WARMUP_RATIO)?),
    };
    Some(TrainingJob {
        per_device_train_batch_size: written.get(&keys::BATCH_SIZE)?,
        batch: match written.get(&keys::GLOBAL_BATCH_SIZE)? {
            Some(sequences) => BatchSize::Global(sequences),
            None => BatchSize::AccumulationSteps(written.get(&keys::ACCUMULATION_STEPS)?),
        },
        learning_rate: written.get(&keys::LEARNING_RATE)?,
        lr_scheduler,
        adam_beta1: written.get(&keys::ADAM_BETA1)?,
        adam_beta2: written.get(&keys::ADAM_BETA2)?,
        adam_epsilon: written.get(&keys::ADAM_EPSILON)?,
        warmup_steps,
        warmup_ratio,
        num_train_epochs: written.get(&keys::NUM_TRAIN_EPOCHS)?,
        drop_last: written.get(&keys::DROP_LAST)?,
        max_steps: written.get(&keys::MAX_STEPS)?,
        max_grad_norm: written.get(&keys::MAX_GRAD_NORM)?,
        weight_decay: written.get(&keys::WEIGHT_DECAY)?,
        loraplus_lr_ratio: written.get(&keys::LORAPLUS_LR_RATIO)?,
        seed: written.get(&keys::SEED)?,
        logging_steps: written.get(&keys::LOGGING_STEPS)?,
        save: when(written.get(&keys::SAVE_STRATEGY)?, written.get(&keys::SAVE_STEPS)?),
        save_total_limit: written.get(&keys::SAVE_TOTAL_LIMIT)?,
        max_skipped_steps: written.get(&keys::MAX_SKIPPED_STEPS)?,
        resume: written.get(&keys::RESUME)?,
        grace: Duration::from_secs_f64(written.get(&keys::GRACE)?),
        max_time: written.get(&keys::MAX_TIME)?.map(Duration::from_secs_f64),
        eval: when(written.get(&keys::EVAL_STRATEGY)?, written.get(&keys::EVAL_STEPS)?),
        load_best_model_at_end: written.get(&keys::LOAD_BEST_MODEL_AT_END)?,
        early_stopping_patience: written.get(&keys::EARLY_STOPPING_PATIENCE)?,
        early_stopping_threshold: written.get(&keys::EARLY_STOPPING_THRESHOLD)?,
    })
}

pub(super) fn when(strategy: Strategy, steps: Option<usize>) -> When {
    match (strategy, steps) {
        (Strategy::Epoch, _) => When::Epochs,
        (Strategy::Steps, Some(steps)) => When::Steps(steps),
        (Strategy::Steps, None) => When::Never,
    }
}
