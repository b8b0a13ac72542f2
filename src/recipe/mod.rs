//! From the recipe, what was written, to the [`Job`], what was decided.
//!
//! A recipe is YAML. Each key is declared once, in `keys.rs`; `overrides.rs` gathers what was written, in the
//! file and with `--set`; `job.rs` decides. What cannot be honoured is refused, all of it at once.

mod job;
mod keys;
mod overrides;

use std::fmt;
use std::fs;
use std::path::Path;

use job::Use;
pub use job::{
    Accumulation, ActivationCheckpointing, BatchSize, ComputeDtype, DataJob, EvalData, FsdpJob, Gather, Job, LoraJob,
    LrScheduler, QuantizationJob, ShardingStrategy, TrainingJob,
};
use overrides::Written;

/// Everything that is wrong about a recipe. It ends the program with status 2.
#[derive(Debug)]
pub struct RecipeError {
    /// The file, or what stands for it.
    source: String,
    errors: Vec<String>,
}

/// One error a line: key, what was found, what is allowed.
impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {} error(s)", self.source, self.errors.len())?;
        self.errors.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for RecipeError {}

/// The job of a recipe file, for training. `overrides` are the `key=value` of `--set`, the value in YAML.
/// Relative paths in it are relative to the current directory.
pub fn load(path: &Path, overrides: &[String]) -> Result<Job, RecipeError> {
    let fail = |errors| RecipeError { source: path.display().to_string(), errors };
    let text = fs::read_to_string(path).map_err(|error| fail(vec![format!("cannot be read: {error}")]))?;
    let written = Written::new(&text, overrides);
    // What is not there would be told as missing.
    if !written.is_read {
        return Err(fail(written.errors));
    }
    job::decide(written, Use::Train).map_err(fail)
}

/// The job of a command without a recipe file: `model` from the command line, no training data needed. Keys that
/// only training looks at are refused.
pub fn for_model(model: &Path, overrides: &[String]) -> Result<Job, RecipeError> {
    with_model(model, overrides, Use::Model)
}

fn with_model(model: &Path, overrides: &[String], usage: Use) -> Result<Job, RecipeError> {
    let fail = |errors| RecipeError { source: "command line".into(), errors };
    let mut written = Written::new("", overrides);
    if written.has(&keys::MODEL) {
        written.errors.push("model: given by --model already, remove it from --set".into());
    }
    written.set(&keys::MODEL, model.to_string_lossy().into());
    job::decide(written, usage).map_err(fail)
}

/// As [`for_model`], for a command that only quantizes.
pub fn for_quantize(model: &Path, overrides: &[String]) -> Result<Job, RecipeError> {
    with_model(model, overrides, Use::Quantize)
}

/// What a benchmark on made-up weights takes from `--set`.
pub fn for_bench(overrides: &[String]) -> Result<Job, RecipeError> {
    without_model(overrides, Use::Bench)
}

/// What a benchmark of single ops or collectives takes from `--set`.
pub fn for_device_bench(overrides: &[String]) -> Result<Job, RecipeError> {
    without_model(overrides, Use::DeviceBench)
}

fn without_model(overrides: &[String], usage: Use) -> Result<Job, RecipeError> {
    let mut written = Written::new("", overrides);
    written.set(&keys::MODEL, ".".into());
    job::decide(written, usage).map_err(|errors| RecipeError { source: "command line".into(), errors })
}

/// All keys: default, what is allowed, what it does.
pub fn help() -> String {
    let width = keys::ALL.iter().map(|key| key.path.len()).max().unwrap_or_default();
    let line = |key: &keys::KeyInfo| {
        let keys::KeyInfo { path, default, allowed, help, .. } = key;
        format!("{path:width$}  {help}\n{:width$}  default {default}; allowed: {}\n", "", allowed.join(", "))
    };
    keys::ALL.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::names::Projection;
    use tempfile::TempDir;

    fn recipe(yaml: &str, overrides: &[&str]) -> Result<Job, RecipeError> {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("recipe.yaml");
        fs::write(&path, yaml.replace("MODEL", &dir.path().display().to_string())).unwrap();
        load(&path, &overrides.iter().map(|text| text.to_string()).collect::<Vec<_>>())
    }

    fn errors(yaml: &str, overrides: &[&str]) -> Vec<String> {
        recipe(yaml, overrides).expect_err("must be refused").errors
    }

    /// The errors of a recipe that is good but for `more` keys.
    fn errors_of(more: &str) -> Vec<String> {
        errors(&format!("{GOOD}{more}\n"), &[])
    }

    const GOOD: &str = "model: MODEL\ndata.train: t.jsonl\n";

    #[test]
    fn defaults_are_those_of_the_design() {
        let job = recipe(GOOD, &[]).unwrap();
        assert_eq!(job.data.train, [Path::new("t.jsonl")]);
        assert_eq!((job.data.max_length, job.data.eval, job.shards), (1024, None, None));
        assert_eq!((job.output_dir.as_path(), job.lora.r, job.lora.alpha), (Path::new("./out"), 16, 16.0));
        assert_eq!((job.lora.dropout, job.lora.target_modules.len(), job.lora.use_rslora), (0.05, 7, false));
        let compute_dtype = ComputeDtype::Auto;
        assert_eq!(job.quantization, QuantizationJob { load_in_4bit: true, double_quant: None, compute_dtype });
        let training = job.training;
        assert_eq!((training.batch, training.learning_rate), (BatchSize::AccumulationSteps(8), 1e-4));
        assert_eq!((training.lr_scheduler, training.warmup_steps), (LrScheduler::Cosine, 10));
        assert_eq!((training.adam_beta1, training.adam_beta2, training.adam_epsilon), (0.9, 0.999, 1e-8));
        assert_eq!((training.num_train_epochs, training.max_steps, training.max_grad_norm), (1.0, None, Some(1.0)));
        assert_eq!((training.seed, training.logging_steps, training.eval_steps), (42, 1, None));
        assert_eq!(
            job.fsdp,
            FsdpJob {
                sharding_strategy: ShardingStrategy::FullShard,
                accumulation: Accumulation::Layer,
                activation_checkpointing: ActivationCheckpointing::Auto,
                offload_params: None,
                resident_units: None,
                activation_offload: None,
                gather: None,
                vram_budget: None,
                host_budget: None,
            }
        );
    }

    #[test]
    fn written_values_and_overrides_hold() {
        let yaml = "
model: MODEL
data: {train: [a.jsonl, b], eval: 0.1, packing: wrapped}
quantization: {load_in_4bit: false, bnb_4bit_use_double_quant: false}
lora: {r: 8, target_modules: [v_proj, q_proj], adapter: null}
training:
  learning_rate: '1e-4'
  max_grad_norm: null
  num_train_epochs: 0.5
  lr_scheduler_type: constant
fsdp:
";
        let set = ["lora.r=4", "lora.r=32", "lora={lora_alpha: 64}", "training.max_steps=1e2", "data.eval=e.jsonl"];
        let job = recipe(yaml, &set).unwrap();
        assert_eq!((job.lora.r, job.lora.alpha, job.training.max_steps), (32, 64.0, Some(100)));
        assert_eq!(job.lora.target_modules, [Projection::Q, Projection::V]);
        assert_eq!((job.data.train.len(), job.data.eval), (2, Some(EvalData::File("e.jsonl".into()))));
        let compute_dtype = ComputeDtype::Auto;
        let quantization = QuantizationJob { load_in_4bit: false, double_quant: Some(false), compute_dtype };
        assert_eq!(job.quantization, quantization);
        assert_eq!((job.training.learning_rate, job.training.max_grad_norm), (1e-4, None));
        assert_eq!((job.training.num_train_epochs, job.training.warmup_steps), (0.5, 0));
    }

    #[test]
    fn all_errors_come_at_once() {
        let yaml = "
model: meta-llama/Llama-3.1-8B
lora: {r: 0, bias: all, lora_droput: 0.1}
training: {learning_rate: fast, seed: -1, save_steps: 10}
fsdp: 5
max_steps: 3
";
        let found = recipe(yaml, &["x", "lora.r: 3=[", "fsdp.sharding_strategy=zero3"]).unwrap_err().to_string();
        for expected in [
            "recipe.yaml: 13 error(s)",
            "model: found meta-llama/Llama-3.1-8B, which is not a directory; to use a model of the hub, `hf download",
            "lora.r: found 0, allowed: an integer of at least 1",
            "lora.bias: found \"all\", allowed: none",
            "lora.lora_droput: unknown key, the nearest known one is lora.lora_dropout",
            "training.learning_rate: found \"fast\", allowed: a number of at least 0",
            "training.seed: found -1",
            "training.save_steps: not supported yet",
            "fsdp: found 5, this is a mapping of keys",
            "max_steps: unknown key, the nearest known one is training.max_steps",
            "--set x: expected key=value",
            "fsdp.sharding_strategy: found \"zero3\", allowed: full_shard, hybrid_shard, no_shard",
            "data.train: missing",
        ] {
            assert!(found.contains(expected), "{expected} is not in {found}");
        }
        assert_eq!(found.lines().count(), 1 + 13, "{found}");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (more, expected) in [
            (
                "quantization: {bnb_4bit_quant_type: fp4}",
                "quantization.bnb_4bit_quant_type: found \"fp4\", allowed: nf4",
            ),
            ("quantization: {bnb_4bit_quant_storage: bfloat16}", "allowed: uint8"),
            ("quantization: {bnb_4bit_compute_dtype: bf16}", "allowed: auto, bfloat16, float16, float32"),
            ("data: {format: sharegpt}", "(not supported yet), allowed: "),
            ("fsdp: {vram_budget: 22 gigs}", "a size, e.g. 22GiB"),
            ("fsdp: {gather: mpi}", "fsdp.gather: found \"mpi\", allowed: auto, nccl, host"),
            ("fsdp: {sharding_strategy: no_shard, gather: host}", "nothing to gather"),
            ("lora: {target_modules: lm_head}", "lora.target_modules: found \"lm_head\""),
            ("lora: {lora_dropout: 1}", "from 0 to below 1"),
            ("training: {max_grad_norm: 0}", "null (no clipping)"),
            ("training: {lr_scheduler_type: polynomial}", "constant, constant_with_warmup, linear, cosine"),
            ("data: {eval: 1.5}", "data.eval: found 1.5"),
            ("data: {train: []}", "data.train: is there twice"),
            ("lora: {r: null}", "lora.r: found null"),
        ] {
            let found = errors_of(more);
            assert!(found.iter().any(|error| error.contains(expected)), "{expected} is not in {found:?}");
        }
        assert!(errors("[1]", &[])[0].contains("found [1], a recipe is a mapping"));
        assert!(errors("a: b: c", &[])[0].contains("not valid YAML"));
        assert!(errors("lora: {r: 1}\nlora: {r: 2}", &[])[0].contains("duplicate mapping key"));
        assert!(load(Path::new("/nowhere.yaml"), &[]).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn contradictions_are_refused() {
        let batch = errors_of("training: {global_batch_size: 16, gradient_accumulation_steps: 8}");
        assert!(batch[0].starts_with("training.global_batch_size: training.gradient_accumulation_steps follows"));
        recipe(&format!("{GOOD}training: {{global_batch_size: null, gradient_accumulation_steps: 8}}"), &[]).unwrap();
        assert!(errors_of("training.eval_steps: 5")[0].contains("nothing to evaluate on"));
        assert!(errors_of("training: {lr_scheduler_type: constant, warmup_steps: 5}")[0].contains("no warm-up"));
        assert!(errors_of("fsdp: {offload_params: true, resident_units: 3}")[0].contains("contradicts"));
        assert_eq!(errors_of("lora: {adapter: a, r: 8, use_rslora: true}").len(), 2);
    }

    #[test]
    fn the_size_of_a_step_follows_from_either_key() {
        let yaml = format!("{GOOD}training: {{per_device_train_batch_size: 2, global_batch_size: 9}}");
        let training = recipe(&yaml, &[]).unwrap().training;
        assert_eq!((training.global_batch_size(3), training.accumulation_steps(3)), (9, 2));
        let training = recipe(GOOD, &[]).unwrap().training;
        assert_eq!((training.global_batch_size(3), training.accumulation_steps(3)), (24, 8));
    }

    #[test]
    fn other_commands_need_only_a_model() {
        let dir = TempDir::new().unwrap();
        let set = |text: &str| for_model(dir.path(), &[text.to_owned()]);
        let job = set("quantization.load_in_4bit=false").unwrap();
        assert_eq!((job.model.as_path(), job.quantization.load_in_4bit), (dir.path(), false));
        set("fsdp.sharding_strategy=no_shard").unwrap();
        assert!(set("training.learning_rate=1").unwrap_err().errors[0].contains("this command does not use it"));
        assert!(set("model=x").unwrap_err().errors[0].contains("given by --model already"));
        assert!(for_model(Path::new("/nowhere"), &[]).unwrap_err().errors[0].contains("not a directory"));
    }

    #[test]
    fn benchmarks_refuse_keys_that_they_do_not_use() {
        let set = ["fsdp.accumulation=micro_batch".to_string()];
        assert_eq!(for_bench(&set).unwrap().fsdp.accumulation, Accumulation::MicroBatch);
        assert!(for_device_bench(&set).unwrap_err().errors[0].starts_with("fsdp.accumulation: this command"));
        let set = ["quantization.bnb_4bit_compute_dtype=float16".to_string()];
        assert_eq!(for_device_bench(&set).unwrap().quantization.compute_dtype, ComputeDtype::Float16);
    }

    #[test]
    fn the_recipes_that_ship_are_good() {
        let dir = TempDir::new().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/recipes");
        let recipes: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!recipes.is_empty());
        for path in recipes {
            let model = format!("model={}", dir.path().display());
            load(&path, &[model]).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn help_has_every_key() {
        assert_eq!(help().lines().count(), 2 * keys::ALL.len());
        assert!(help().contains("default 1.0e-4; allowed: a number of at least 0"));
    }
}
