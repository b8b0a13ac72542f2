//! Every family against transformers and PEFT: logits, loss and LoRA gradients of tiny random models (scripts/golden/families.py).
#![allow(clippy::print_stdout, reason = "scripts/families reads the errors")]

mod common;

#[path = "families/adapters.rs"]
mod adapters;
#[path = "families/four_bit.rs"]
mod four_bit;
#[path = "families/generated.rs"]
mod generated;
#[path = "families/gguf.rs"]
mod gguf;
#[path = "families/merged.rs"]
mod merged;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use common::{CpuEngine, EngineOptions, golden, on_all_ranks, relative_error};
use fsdp_qlora::testing::{
    Adapter, Cuda, Descriptor, Engine, Keep, MicroBatch, Mode, ModelSpec, NO_TARGET, Ops, Queue, RunArgs, StepArgs,
    Trainable, Trainables, Update, Values, adapter, local, step,
};
use safetensors::SafeTensors;
use serde::Deserialize;
use tempfile::TempDir;

/// Values of `model_type` that the program reads. All others must be refused, so a family that is added has to be added here.
const SUPPORTED: &[&str] = &[
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "seed_oss",
    "mistral",
    "ministral",
    "ministral3",
    "mistral3",
    "olmo2",
    "olmo3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3",
    "granite",
];

/// Largest difference of a logit.
const LOGITS: f32 = 1e-4;

/// Largest relative error of a gradient (norm of the difference of one matrix) and of a loss.
const GRADIENTS: f64 = 1e-5;

/// families.json.
#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    /// Lengths of the prefixes of the last row whose logits are kept.
    lengths: Vec<usize>,
    models: BTreeMap<String, Model>,
}

#[derive(Deserialize)]
struct Model {
    family: String,
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    loss: f64,
    num_target_tokens: u64,
    /// Only of models whose heads GPUs take.
    bfloat16: Option<Bfloat16>,
}

/// Relative errors of transformers' bf16.
#[derive(Deserialize)]
struct Bfloat16 {
    logits: f64,
    /// One for each matrix of the adapter, by its name.
    gradients: BTreeMap<String, f64>,
}

fn families() -> Golden {
    serde_json::from_slice(&fs::read(golden("families/families.json")).unwrap()).unwrap()
}

/// The folder of a model whose config.json is one of the golden ones.
fn model_with(config: &Path, weights: &Path) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    fs::copy(config, place.path().join("config.json")).unwrap();
    fs::copy(weights, place.path().join("model.safetensors")).unwrap();
    place
}

/// The gradients, which have the names of an adapter's matrices, by layer.
fn golden_grads(model: &Path, case: &Path, spec: &ModelSpec) -> Adapter {
    let place = tempfile::tempdir().unwrap();
    fs::copy(model.join("adapter/adapter_config.json"), place.path().join("adapter_config.json")).unwrap();
    fs::copy(case.join("grads.safetensors"), place.path().join("adapter_model.safetensors")).unwrap();
    adapter::load(place.path(), spec).unwrap()
}

fn micro_batch(rows: &[Vec<u32>], first: usize) -> MicroBatch {
    let mut batch = MicroBatch::new();
    for (i, row) in rows.iter().enumerate() {
        batch.push((first + i) as u64, row, &vec![true; row.len()]);
    }
    batch
}

/// The last logits of each prefix of the last row, one after the other.
fn last_logits<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, golden: &Golden, adapter: bool) -> Vec<f32> {
    let mut logits = Vec::new();
    for &length in &golden.lengths {
        let micro_batches = [Descriptor::scored(adapter)];
        let args = RunArgs::forward(Mode::Generate, &micro_batches);
        // Logits are computed at targets alone: the last token gets one.
        let mut batch = micro_batch(&[golden.rows.last().unwrap()[..length].to_vec()], 0);
        batch.targets.fill(NO_TARGET);
        batch.targets[length - 1] = 0;
        engine.run(&args, &[batch]).unwrap();
        logits.extend(engine.last_logits(0).unwrap());
    }
    logits
}

/// The golden logits of all prefixes, with ("adapter") or without ("base") the adapter.
fn golden_logits(path: &Path, name: &str) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// Compares the last logits of each prefix of the last row, with and without the adapter.
fn check_logits(what: &str, options: &EngineOptions, expected: &Path, golden: &Golden) {
    let options = EngineOptions { mode: Mode::Generate, ..options.clone() };
    let shards = tempfile::tempdir().unwrap();
    on_all_ranks(1, |groups| {
        let mut engine = options.engine(groups, shards.path());
        for (name, adapter) in [("base", false), ("adapter", true)] {
            let theirs = golden_logits(expected, name);
            let ours = last_logits(&mut engine, golden, adapter);
            assert_eq!(ours.len(), theirs.len(), "{what}");
            let error = ours.iter().zip(theirs).map(|(o, t)| (o - t).abs()).fold(0.0, f32::max);
            assert!(error <= LOGITS, "{what}: {name}: logits differ by {error:e}");
            report(what, "logits", f64::from(error));
        }
    });
}

/// Prints an error for scripts/families, which makes a table of the largest of each model.
fn report(what: &str, quantity: &str, error: f64) {
    println!("parity {} {quantity} {error:e}", what.split('/').next().unwrap_or_default());
}

/// The relative error of a matrix's gradient.
struct GradientError {
    layer: usize,
    /// Its end in names of an adapter: `q_proj.lora_A.weight`.
    name: String,
    error: f64,
}

/// Makes a step over all rows, divided into micro-batches; returns the relative errors of the loss and of each gradient.
fn step_errors<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    batches: &[MicroBatch],
    case: &Case,
    grads: &Adapter,
) -> (f64, Vec<GradientError>) {
    let update = Update {
        learning_rate: 1e-3,
        lr_ratio: 1.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: None,
        loss_scale: 1.0,
        step: 1,
    };
    let args = StepArgs { step: 1, num_micro_batches: batches.len(), update: &update, seed: 42, next: None };
    let record = step(engine, batches, &args).unwrap();
    assert_eq!(record.num_target_tokens, case.num_target_tokens);
    let trainables = Trainables::new(engine.spec(), grads.settings.lora_config());
    let mut errors = Vec::new();
    for (layer, theirs) in grads.layers.iter().enumerate() {
        let ours = engine.gather_trainable_to_host(layer, Values::Grad).unwrap();
        for Trainable { module, kind, range, .. } in trainables.layers[layer].list() {
            let error = relative_error(&ours[range.clone()], &theirs[range.clone()]);
            errors.push(GradientError { layer, name: format!("{module}.lora_{}.weight", kind.letter()), error });
        }
    }
    ((record.loss - case.loss).abs() / case.loss, errors)
}

/// Compares loss and gradients of a step over all rows, divided into micro-batches.
fn check_step(what: &str, options: &EngineOptions, batches: &[MicroBatch], case: &Case, grads: &Adapter) {
    let options = EngineOptions { max_micro_batches: batches.len(), ..options.clone() };
    let shards = tempfile::tempdir().unwrap();
    on_all_ranks(1, |groups| {
        let mut engine: CpuEngine = options.engine(groups, shards.path());
        let (loss, gradients) = step_errors(&mut engine, batches, case, grads);
        assert!(loss <= GRADIENTS, "{what}: the loss is off by {loss:e}");
        for GradientError { layer, name, error } in gradients {
            assert!(error <= GRADIENTS, "{what}: the gradient of {name} in layer {layer} is off by {error:e}");
            report(what, "gradients", error);
        }
    });
}

/// Compares a case on a GPU in bf16; returns what is further from f32 than transformers' bf16 allows.
fn failures_on_gpu(what: &str, folder: &Path, case: &Case, theirs: &Bfloat16, golden: &Golden) -> Vec<String> {
    let files = folder.join("default");
    let place = model_with(&files.join("config.v5.json"), &folder.join("model.safetensors"));
    let spec = ModelSpec::load(place.path()).unwrap();
    let apart: Vec<MicroBatch> =
        golden.rows.iter().enumerate().map(|(i, row)| micro_batch(std::slice::from_ref(row), i)).collect();
    let options = EngineOptions {
        model: place.path().into(),
        adapter: Some(adapter::load(&folder.join("adapter"), &spec).unwrap()),
        load_in_4bit: false,
        max_tokens: 80,
        max_micro_batches: apart.len(),
        ..EngineOptions::new("", Mode::Train)
    };
    let cuda = || Cuda::new(0, &std::env::temp_dir().join("fsdp-qlora-test-kernels")).unwrap();
    let shards = tempfile::tempdir().unwrap();
    let (logits, (_, gradients)) = on_all_ranks(1, |groups| {
        let mut engine = options.engine_on_gpu(cuda(), groups, shards.path());
        let errors = step_errors(&mut engine, &apart, case, &golden_grads(folder, &files, &spec));
        drop(engine);
        let scoring = EngineOptions { mode: Mode::Generate, max_micro_batches: 1, ..options.clone() };
        let mut engine = scoring.engine_on_gpu(cuda(), local::groups(1, 1).remove(0), shards.path());
        let ours = last_logits(&mut engine, golden, true);
        (relative_error(&ours, &golden_logits(&files.join("logits.safetensors"), "adapter")), errors)
    })
    .remove(0);
    let mut failures = Vec::new();
    let mut compare = |quantity: &str, name: &str, ours: f64, theirs: f64, allowed: f64| {
        report(what, quantity, ours / theirs);
        let is_near = ours <= allowed * theirs;
        if !is_near {
            failures.push(format!("{what}: {name}: the error is {ours:.2e}, that of transformers {theirs:.2e}"));
        }
    };
    compare("bf16-logits", "logits", logits, theirs.logits, 2.0);
    assert_eq!(gradients.len(), theirs.gradients.len(), "{what}");
    for GradientError { layer, name, error } in gradients {
        let is_same = |key: &str| key.contains(&format!(".layers.{layer}.")) && key.ends_with(&format!(".{name}"));
        let (key, &expected) = theirs.gradients.iter().find(|(key, _)| is_same(key)).expect(&name);
        compare("bf16-gradients", key, error, expected, 3.0);
    }
    failures
}

#[test]
#[ignore = "needs a GPU"]
fn bf16_on_a_gpu_is_as_near_to_f32_as_transformers_bf16() {
    let golden_files = families();
    let mut tested = BTreeSet::new();
    let mut failures = Vec::new();
    for (name, model) in &golden_files.models {
        for case in model.cases.values() {
            let Some(theirs) = &case.bfloat16 else { continue };
            let folder = golden(&format!("families/{name}"));
            failures.extend(failures_on_gpu(name, &folder, case, theirs, &golden_files));
            tested.insert(model.family.as_str());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(tested, SUPPORTED.iter().copied().collect(), "a family has no case for GPUs");
}

/// Compares one spelling of a case's config.json.
fn check_case(what: &str, folder: &Path, case_name: &str, config: &Path, case: &Case, golden: &Golden) {
    let place = model_with(config, &folder.join("model.safetensors"));
    let spec = ModelSpec::load(place.path()).unwrap_or_else(|error| panic!("{what}: {error:#}"));
    let options = EngineOptions {
        model: place.path().into(),
        adapter: Some(adapter::load(&folder.join("adapter"), &spec).unwrap_or_else(|e| panic!("{what}: {e:#}"))),
        load_in_4bit: false,
        max_tokens: 80,
        ..EngineOptions::new("", Mode::Train)
    };
    check_logits(what, &options, &folder.join(case_name).join("logits.safetensors"), golden);
    let grads = golden_grads(folder, &folder.join(case_name), &spec);
    let apart: Vec<MicroBatch> =
        golden.rows.iter().enumerate().map(|(i, row)| micro_batch(std::slice::from_ref(row), i)).collect();
    // Whatever is kept for backward and whatever is computed again.
    let only = |[attention, mlp, rest]: [usize; 3]| Keep { lora: 0, attention, mlp, rest };
    let groups = [only([0, 9, 0]), only([9, 0, 0]), only([0, 0, 9])];
    for keep in [Keep::NOTHING, Keep::LORA, Keep::DEAREST, Keep::EVERYTHING].into_iter().chain(groups) {
        let options = EngineOptions { keep, ..options.clone() };
        check_step(&format!("{what}, {keep:?}"), &options, &apart, case, &grads);
    }
    check_step(&format!("{what}, packed"), &options, &[micro_batch(&golden.rows, 0)], case, &grads);
}

fn spellings(folder: &Path) -> Vec<PathBuf> {
    ["config.v4.json", "config.v5.json"]
        .map(|name| folder.join(name))
        .into_iter()
        .filter(|path| path.exists())
        .collect()
}

/// Compares every case of a family, or checks that every one is refused for what it is.
fn check_family(family: &str) {
    let golden_files = families();
    let mut num_cases = 0;
    for (name, model) in golden_files.models.iter().filter(|(_, model)| model.family == family) {
        let folder = golden(&format!("families/{name}"));
        for (case_name, case) in &model.cases {
            let configs = spellings(&folder.join(case_name));
            assert!(!configs.is_empty(), "{name}/{case_name} has no config");
            for config in configs {
                let what = format!("{name}/{case_name}/{}", config.file_name().unwrap().display());
                if SUPPORTED.contains(&family) {
                    check_case(&what, &folder, case_name, &config, case, &golden_files);
                } else {
                    let place = model_with(&config, &folder.join("model.safetensors"));
                    let error = ModelSpec::load(place.path()).expect_err(&what).to_string();
                    assert!(error.contains(&format!("model_type: found \"{family}\", allowed: ")), "{what}: {error}");
                }
            }
            num_cases += 1;
        }
    }
    assert!(num_cases > 0, "no case of {family}");
}

/// A test for each family, and one that none is missing.
macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(
            #[test]
            fn $family() {
                check_family(stringify!($family));
            }
        )*

        #[test]
        fn every_family_has_its_test() {
            let tested = BTreeSet::from([$(stringify!($family)),*]);
            let golden = families();
            assert_eq!(golden.models.values().map(|model| model.family.as_str()).collect::<BTreeSet<_>>(), tested);
            assert!(SUPPORTED.iter().all(|family| tested.contains(family)), "{SUPPORTED:?}");
        }
    };
}

families! {
    llama, qwen2, qwen3, mistral, ministral, ministral3, mistral3, smollm3, granite, seed_oss, olmo2, olmo3, phi3, gemma2, gemma3_text, gemma3,
}
