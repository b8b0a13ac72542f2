//! Keys that are missing, and keys that contradict each other.

use std::path::Path;

use super::command::Command;
use super::job::{OF_ADAPTER, ShardingStrategy, Strategy, is_set, when};
use super::keys;
use super::overrides::Written;
use super::places::is_model;
use super::scheduler;
use super::steps::{Warmup, When};
use crate::data::{Overlong, Packing};
use crate::files::gguf_advice;
use crate::hub::FORMS;
use crate::model::targets::Modules;
use crate::optim::lr::LrSchedulerType;

/// Notes the keys that a command needs and that are missing.
pub(super) fn check_required(written: &mut Written, command: Command) {
    match written.get(&keys::MODEL) {
        _ if !command.needs_model() => {}
        Some(None) => {
            written.errors.push("model: missing, it must be a Hugging Face directory or an id of the hub".into())
        }
        Some(Some(dir)) if !is_model(&dir) => {
            let name = command.name_of(keys::MODEL.path).unwrap_or(keys::MODEL.path);
            written.errors.push(format!("{name}: found {}, {}", dir.display(), not_a_folder(&dir)));
        }
        _ => {}
    }
    if matches!(command, Command::Train | Command::Data | Command::Plan) && written.get(&keys::TRAIN) == Some(None) {
        written
            .errors
            .push("data.train: missing, it must be a file, a directory, an id of the hub, or a list of them".into());
    }
}

/// Says about a model's path that is no folder what is there, and what to do.
fn not_a_folder(path: &Path) -> String {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return format!("a file in GGUF, which is not read; {}", gguf_advice(path));
    }
    if path.is_file() {
        return "which is a file; give the folder of the model".into();
    }
    format!("which is not a directory, and no model of the hub ({FORMS})")
}

/// Largest number of tokens of a micro-batch, because kernels count rows in 32 bits.
const MAX_TOKENS: usize = i32::MAX as usize;

/// Notes keys that contradict each other.
pub(super) fn check_conflicts(written: &mut Written, command: Command) {
    let mut conflicts = Vec::new();
    if is_set(written, &keys::GLOBAL_BATCH_SIZE) && written.has(keys::ACCUMULATION_STEPS.path) {
        let (global, steps) = (keys::GLOBAL_BATCH_SIZE.path, keys::ACCUMULATION_STEPS.path);
        conflicts.push(format!("{global}: {steps} follows from it and the number of ranks, remove one of the two"));
    }
    for (strategy, steps) in [(&keys::EVAL_STRATEGY, &keys::EVAL_STEPS), (&keys::SAVE_STRATEGY, &keys::SAVE_STEPS)] {
        if written.get(strategy) == Some(Strategy::Epoch) && written.has(steps.path) && is_set(written, steps) {
            conflicts.push(format!(
                "{}: found epoch, which contradicts {}, remove one of the two",
                strategy.path, steps.path
            ));
        }
    }
    let by_epoch = written.get(&keys::EVAL_STRATEGY) == Some(Strategy::Epoch);
    if (by_epoch || is_set(written, &keys::EVAL_STEPS)) && written.get(&keys::EVAL) == Some(None) {
        let key = if by_epoch { keys::EVAL_STRATEGY.path } else { keys::EVAL_STEPS.path };
        conflicts.push(format!("{key}: there is nothing to evaluate on, set data.eval or remove it"));
    }
    conflicts.extend(conflicts_of_evaluations(written));
    conflicts.extend(conflicts_of_learning_rates(written));
    conflicts.extend(conflicts_of_layers(written));
    if written.get(&keys::SHARDING_STRATEGY) == Some(ShardingStrategy::NoShard) && is_set(written, &keys::GATHER) {
        conflicts.push("fsdp.gather: with no_shard there is nothing to gather, remove it".into());
    }
    let packing = written.get(&keys::PACKING);
    if packing == Some(Packing::Wrapped)
        && written.has(keys::OVERLONG.path)
        && written.get(&keys::OVERLONG) == Some(Overlong::Truncate)
    {
        conflicts.push(
            "data.overlong: found truncate, which contradicts data.packing: wrapped, for wrapping goes on in the next sequence; \
             allowed: split | drop | error"
                .into(),
        );
    }
    let units = written.get(&keys::RESIDENT_UNITS).flatten();
    if let (Some(Some(offload)), Some(units)) = (written.get(&keys::OFFLOAD_PARAMS), units)
        && offload == (units > 0)
    {
        let (a, b) = (keys::OFFLOAD_PARAMS.path, keys::RESIDENT_UNITS.path);
        conflicts.push(format!("{a}: found {offload}, which contradicts {b}: {units}, remove one of the two"));
    }
    if is_set(written, &keys::ADAPTER) {
        for path in OF_ADAPTER.into_iter().filter(|path| written.has(path)) {
            conflicts.push(format!("{path}: it is given by the adapter of lora.adapter, remove one of the two"));
        }
    }
    if let (Some(length), Some(sequences)) = (written.get(&keys::MAX_LENGTH), written.get(&keys::BATCH_SIZE))
        && length * sequences > MAX_TOKENS
    {
        let name = |path| command.name_of(path).unwrap_or(path);
        let (a, b) = (name(keys::MAX_LENGTH.path), name(keys::BATCH_SIZE.path));
        conflicts.push(format!("{a} {length} times {b} {sequences} is more than {MAX_TOKENS} tokens of a micro-batch"));
    }
    written.errors.append(&mut conflicts);
}

/// Returns what PEFT refuses of the keys about layers.
fn conflicts_of_layers(written: &Written) -> Vec<String> {
    let (layers, pattern) = (keys::LAYERS_TO_TRANSFORM.path, keys::LAYERS_PATTERN.path);
    let mut conflicts = Vec::new();
    if is_set(written, &keys::LAYERS_PATTERN) && !is_set(written, &keys::LAYERS_TO_TRANSFORM) {
        conflicts.push(format!("{pattern}: without {layers} it means nothing, set that or remove it"));
    }
    if is_set(written, &keys::LAYERS_TO_TRANSFORM)
        && matches!(written.get(&keys::TARGET_MODULES), Some(Modules::Pattern(_)))
    {
        let targets = keys::TARGET_MODULES.path;
        conflicts
            .push(format!("{layers}: {targets} is an expression, which can name layers itself; allowed with it: null"));
    }
    conflicts
}

/// Returns what is wrong with the keys of the scheduler and of the warm-up.
fn conflicts_of_learning_rates(written: &Written) -> Vec<String> {
    let mut conflicts = scheduler::decide(written).and_then(Result::err).unwrap_or_default();
    let (steps, ratio) = (keys::WARMUP_STEPS.path, keys::WARMUP_RATIO.path);
    let has_steps = written.get(&keys::WARMUP_STEPS).flatten().is_some_and(|warmup| warmup != Warmup::Steps(0));
    let has_ratio = written.get(&keys::WARMUP_RATIO).flatten().is_some_and(|ratio| ratio > 0.0);
    if written.get(&keys::LR_SCHEDULER) == Some(LrSchedulerType::Constant) {
        for (_, key) in [(has_steps, steps), (has_ratio, ratio)].into_iter().filter(|(has, _)| *has) {
            conflicts.push(format!("{key}: constant has no warm-up, use constant_with_warmup or remove it"));
        }
    }
    if is_set(written, &keys::WARMUP_STEPS) && is_set(written, &keys::WARMUP_RATIO) {
        conflicts.push(format!("{ratio}: {steps} gives the warm-up already, remove one of the two"));
    }
    conflicts
}

/// Returns what the keys that go by evaluations lack.
fn conflicts_of_evaluations(written: &Written) -> Vec<String> {
    let times = |strategy, steps| Some(when(written.get(strategy)?, written.get(steps)?));
    let eval = times(&keys::EVAL_STRATEGY, &keys::EVAL_STEPS).filter(|_| is_set(written, &keys::EVAL));
    let save = times(&keys::SAVE_STRATEGY, &keys::SAVE_STEPS);
    let meet = match (eval, save) {
        (Some(When::Steps(eval)), Some(When::Steps(save))) => save.is_multiple_of(eval),
        (eval, save) => (eval, save) == (Some(When::Epochs), Some(When::Epochs)),
    };
    let mut conflicts = Vec::new();
    if written.get(&keys::LOAD_BEST_MODEL_AT_END) == Some(true) && !meet {
        let word = |when: Option<When>| match when {
            Some(When::Steps(steps)) => format!("every {steps} steps"),
            Some(When::Epochs) => "after each epoch".into(),
            Some(When::Never) | None => "never".into(),
        };
        conflicts.push(format!(
            "{}: each checkpoint needs an evaluation of its step: set {}, and {} to a multiple of {}, or {} and {} to epoch; found \
             evaluations {} and checkpoints {}",
            keys::LOAD_BEST_MODEL_AT_END.path,
            keys::EVAL.path,
            keys::SAVE_STEPS.path,
            keys::EVAL_STEPS.path,
            keys::EVAL_STRATEGY.path,
            keys::SAVE_STRATEGY.path,
            word(eval),
            word(save)
        ));
    }
    let (patience, threshold) = (keys::EARLY_STOPPING_PATIENCE.path, keys::EARLY_STOPPING_THRESHOLD.path);
    let is_patient = is_set(written, &keys::EARLY_STOPPING_PATIENCE);
    if is_patient && eval.is_none_or(|eval| eval == When::Never) {
        let (data, steps) = (keys::EVAL.path, keys::EVAL_STEPS.path);
        conflicts.push(format!("{patience}: it counts evaluations: set {data} and {steps}, or remove it"));
    }
    if !is_patient && written.get(&keys::EARLY_STOPPING_THRESHOLD).is_some_and(|threshold| threshold > 0.0) {
        conflicts.push(format!("{threshold}: without {patience} it means nothing, set that or remove it"));
    }
    conflicts
}
