//! Turns a recipe, which a user writes, into a [`Job`], which holds the decisions.
//!
//! A recipe is YAML. Each key is declared once, in `keys.rs`; `overrides.rs` gathers what was written, in the
//! file and with `--set`; `job.rs` decides. What cannot be honoured is refused, all of it at once.

mod command;
mod conflicts;
mod job;
mod keys;
mod overrides;
mod paths;
mod places;
mod scheduler;
mod sources;
mod steps;
mod values;

use std::path::Path;

use crate::files::{self, listed};
pub use command::Command;
pub use job::{
    ActivationCheckpointing, BatchSize, ComputeDtype, EvalData, FsdpJob, Job, LoraJob, ShardingStrategy, TrainingJob,
};
use overrides::Written;
pub use paths::read as read_path;
pub use places::Located;
use serde_json::Value;
pub use steps::{Steps, When};
pub use values::read_size;

/// All errors of a recipe, or of options that replace its keys. The program ends with status 2.
#[derive(Debug, thiserror::Error)]
#[error("{source_name}: {} error(s){}", errors.len(), listed(errors))]
pub struct RecipeError {
    /// Name of the file, or of the options that replace it.
    source_name: String,
    /// One line for each error: key, what was found, what is allowed.
    errors: Vec<String>,
}

impl RecipeError {
    /// Makes a single error of a recipe that has been read.
    fn one(error: String) -> RecipeError {
        RecipeError { source_name: "recipe".into(), errors: vec![error] }
    }
}

/// Returns the job of a recipe file, for `train` or `plan`. `overrides` are the `key=value` of `--set`, with the
/// value in YAML. Relative paths in it are relative to the current directory.
pub fn load(path: &Path, command: Command, overrides: &[String]) -> Result<Job, RecipeError> {
    let fail = |errors| RecipeError { source_name: files::shown_path(path), errors };
    if !path.exists() {
        return Err(fail(vec![format!("is not there; help: write one, e.g.\n\n{EXAMPLE}")]));
    }
    let text = files::read_text(path, MAX_BYTES).map_err(|error| fail(vec![format!("cannot be read: {error:#}")]))?;
    let written = Written::new(&text, overrides);
    // In a text that is not YAML every required key would be reported as missing.
    if !written.is_read {
        return Err(fail(written.errors));
    }
    job::decide(written, command).map_err(fail)
}

/// Largest recipe, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A minimal recipe to begin with.
const EXAMPLE: &str = "\
    # fsdp-qlora.yaml
    model: ./SmolLM2-135M-Instruct    # a Hugging Face directory, or an id of the hub
    output_dir: ./out                 # the adapter goes there
    data:
      train: train.jsonl              # rows of {text}, {messages}, {prompt, completion}, …; `fsdp-qlora data` shows them

  `fsdp-qlora train -c FILE` takes another file, `fsdp-qlora train --help-recipe` tells all keys";

/// Returns the job of a command without a recipe. `given` are the keys that options of the command line set.
pub fn from_options(
    command: Command,
    given: Vec<(&'static str, Value)>,
    overrides: &[String],
) -> Result<Job, RecipeError> {
    let mut written = Written::new("", overrides);
    given.into_iter().for_each(|(path, value)| written.give(command, path, value));
    job::decide(written, command).map_err(|errors| RecipeError { source_name: "command line".into(), errors })
}

/// Returns the help page of all keys: their effect, default, allowed values and the commands that read them.
pub fn help() -> String {
    let width = keys::ALL.iter().map(|key| key.path.len()).max().unwrap_or_default();
    let line = |key: &keys::KeyInfo| {
        let keys::KeyInfo { path, default, allowed, help, readers, .. } = key;
        let (allowed, readers) = (allowed.join(", "), readers.iter().map(|c| c.name()).collect::<Vec<_>>().join(", "));
        format!(
            "{path:width$}  {help}\n{0:width$}  default {default}; allowed: {allowed}\n{0:width$}  read by {readers}\n",
            ""
        )
    };
    keys::ALL.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::job::{Accumulation, QuantizationJob};
    use super::*;
    use crate::data::{Overlong, Source};
    use crate::model::spec::ModuleId;
    use crate::model::targets::Modules;
    use crate::optim::lr::LrScheduler;
    use tempfile::TempDir;

    fn recipe(yaml: &str, overrides: &[&str]) -> Result<Job, RecipeError> {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("recipe.yaml");
        fs::write(&path, yaml.replace("MODEL", &dir.path().display().to_string())).unwrap();
        load(&path, Command::Train, &overrides.iter().map(|text| text.to_string()).collect::<Vec<_>>())
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
        assert_eq!(job.data.train, [Source::new("t.jsonl")]);
        assert_eq!((job.data.max_length, job.data.eval, job.shards), (1024, None, None));
        assert_eq!((job.output_dir.as_path(), job.lora.keys.r, job.lora.keys.alpha), (Path::new("./out"), 16, 16.0));
        assert_eq!((job.lora.dropout, job.lora.keys.use_rslora), (0.05, false));
        assert_eq!(job.lora.keys.targets, Modules::AllLinear);
        let compute_dtype = ComputeDtype::Auto;
        assert_eq!(job.quantization, QuantizationJob { load_in_4bit: true, double_quant: None, compute_dtype });
        let training = job.training;
        assert_eq!((training.batch, training.learning_rate), (BatchSize::AccumulationSteps(8), 1e-4));
        assert_eq!(training.lr_scheduler, LrScheduler::Cosine { num_cycles: 0.5 });
        assert_eq!((training.warmup_steps, training.warmup_ratio), (None, None));
        assert_eq!((training.adam_beta1, training.adam_beta2, training.adam_epsilon), (0.9, 0.999, 1e-8));
        assert_eq!((training.num_train_epochs, training.max_steps, training.max_grad_norm), (1.0, None, Some(1.0)));
        assert_eq!((training.seed, training.logging_steps, training.drop_last), (42, 1, false));
        assert_eq!((training.save, training.eval, job.data.shuffle), (When::Steps(100), When::Never, true));
        assert_eq!(
            job.fsdp,
            FsdpJob {
                sharding_strategy: ShardingStrategy::FullShard,
                accumulation: Accumulation::Layer,
                activation_checkpointing: ActivationCheckpointing::Auto,
                offload_params: None,
                resident_units: None,
                dense_layers: None,
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
        assert_eq!((job.lora.keys.r, job.lora.keys.alpha, job.training.max_steps), (32, 64.0, Some(100)));
        assert_eq!(job.lora.keys.targets, Modules::with_ids(&[ModuleId::Q, ModuleId::V]));
        assert_eq!((job.data.train.len(), job.data.eval), (2, Some(EvalData::Sources(vec![Source::new("e.jsonl")]))));
        let compute_dtype = ComputeDtype::Auto;
        let quantization = QuantizationJob { load_in_4bit: false, double_quant: Some(false), compute_dtype };
        assert_eq!(job.quantization, quantization);
        assert_eq!((job.training.learning_rate, job.training.max_grad_norm), (1e-4, None));
        assert_eq!((job.training.num_train_epochs, job.training.warmup_steps), (0.5, Some(steps::Warmup::Steps(0))));
    }

    #[test]
    fn all_errors_come_at_once() {
        let yaml = "
model: ./Llama-3.1-8B
lora: {r: 0, bias: all, lora_droput: 0.1}
training: {learning_rate: fast, seed: -1, max_time: soon}
fsdp: 5
max_steps: 3
optim: adamw
";
        let found = recipe(yaml, &["x", "lora.r: 3=[", "fsdp.sharding_strategy=zero3"]).unwrap_err().to_string();
        for expected in [
            "recipe.yaml: 14 error(s)",
            "model: found ./Llama-3.1-8B, which is not a directory, and no model of the hub (ORG/NAME, ORG/NAME@REVISION)",
            "lora.r: found 0, allowed: an integer from 1 to 65536",
            "lora.bias: found \"all\", allowed: none",
            "lora.lora_droput: unknown key, the nearest known one is lora.lora_dropout",
            "training.learning_rate: found \"fast\", allowed: a number above 0",
            "training.seed: found -1",
            "training.max_time: found \"soon\", allowed: null, a duration above 0",
            "fsdp: found 5, this is a mapping of keys",
            "max_steps: unknown key, the nearest known one is training.max_steps",
            "optim: unknown key, `fsdp-qlora train --help-recipe` lists all keys",
            "--set x: expected key=value",
            "fsdp.sharding_strategy: found \"zero3\", allowed: full_shard, hybrid_shard, no_shard",
            "data.train: missing",
        ] {
            assert!(found.contains(expected), "{expected} is not in {found}");
        }
        assert_eq!(found.lines().count(), 1 + 14, "{found}");
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
            ("data: {format: sharegtp}", "data.format: found \"sharegtp\", allowed: auto, text, messages"),
            (
                "data: {columns: {prompts: question}}",
                "data.columns: found {\"prompts\":\"question\"}, allowed: null (their own), {column: its name",
            ),
            ("data: {eval: {path: e.jsonl, weight: 0}}", "data.eval: found {\"path\""),
            ("data: {eval: {path: $HOME/e.jsonl}}", "variables are not expanded here"),
            ("fsdp: {vram_budget: 22 gigs}", "a size, e.g. 22GiB"),
            ("fsdp: {gather: mpi}", "fsdp.gather: found \"mpi\", allowed: auto, nccl, host"),
            ("fsdp: {sharding_strategy: no_shard, gather: host}", "nothing to gather"),
            ("lora: {target_modules: (q_proj}", "lora.target_modules: found \"(q_proj\""),
            (
                "lora: {target_modules: []}",
                "lora.target_modules: found [], allowed: all-linear, a list of modules' names",
            ),
            ("lora: {exclude_modules: []}", "lora.exclude_modules: found []"),
            ("lora: {layers_to_transform: [-1]}", "lora.layers_to_transform: found [-1]"),
            ("lora: {layers_pattern: layers}", "without lora.layers_to_transform it means nothing"),
            (
                "lora: {layers_to_transform: 0, target_modules: .*q_proj}",
                "is an expression, which can name layers itself",
            ),
            ("lora: {rank_pattern: {q_proj: 0}}", "lora.rank_pattern: found {\"q_proj\":0}"),
            ("lora: {alpha_pattern: {'(': 1}}", "lora.alpha_pattern: found {\"(\":1}"),
            ("lora: {lora_dropout: 1}", "from 0 to below 1"),
            ("lora: {lora_dropout: 0.99999999999}", "from 0 to below 1"),
            ("lora: {lora_alpha: 1e300}", "lora.lora_alpha: found 1e+300"),
            ("lora: {r: 1000000000}", "an integer from 1 to 65536"),
            ("training: {learning_rate: 0}", "training.learning_rate: found 0, allowed: a number above 0, in f32"),
            ("training: {learning_rate: 1e-60}", "allowed: a number above 0"),
            ("training: {num_train_epochs: 1e300}", "training.num_train_epochs: found 1e+300"),
            ("training: {gradient_accumulation_steps: 1000000000000}", "an integer from 1 to 16384"),
            ("training: {global_batch_size: 1000000000000}", "an integer from 1 to 1073741824"),
            ("training: {max_steps: 1e18}", "training.max_steps: found 1e+18"),
            ("training: {seed: 18446744073709551615}", "an integer from 0 to 9007199254740992"),
            ("fsdp: {vram_budget: 1e308GiB}", "a size, e.g. 22GiB"),
            ("data: {max_length: 4294967295}", "an integer from 2 to 16777216"),
            ("output_dir: ${HOME}/out", "output_dir: found \"${HOME}/out\" (variables are not expanded here"),
            ("shards: $HOME/out", "variables are not expanded here"),
            ("data: {eval: $HOME/e.jsonl}", "variables are not expanded here"),
            ("lora: {adapter: ~you/out}", "not the home folder of another user"),
            ("training: {max_grad_norm: 0}", "null (no clipping)"),
            ("training: {lr_scheduler_type: poly}", "constant, constant_with_warmup, linear, cosine"),
            ("training: {lr_scheduler_type: reduce_lr_on_plateau}", "(reduce_lr_on_plateau follows the losses"),
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
        assert!(
            load(Path::new("/nowhere.yaml"), Command::Train, &[])
                .unwrap_err()
                .to_string()
                .contains("data:\n      train:")
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let batch = errors_of("training: {global_batch_size: 16, gradient_accumulation_steps: 8}");
        assert!(batch[0].starts_with("training.global_batch_size: training.gradient_accumulation_steps follows"));
        recipe(&format!("{GOOD}training: {{global_batch_size: null, gradient_accumulation_steps: 8}}"), &[]).unwrap();
        assert!(errors_of("training.eval_steps: 5")[0].contains("eval_steps: there is nothing to evaluate on"));
        assert!(
            errors_of("training.eval_strategy: epoch")[0].contains("eval_strategy: there is nothing to evaluate on")
        );
        let saves = errors_of("training: {save_strategy: epoch, save_steps: 5}");
        assert_eq!(
            saves,
            ["training.save_strategy: found epoch, which contradicts training.save_steps, remove one of the two"]
        );
        for (more, words) in [
            ("training: {load_best_model_at_end: true}", "found evaluations never and checkpoints every 100 steps"),
            (
                "data.eval: e.jsonl\ntraining: {load_best_model_at_end: true, eval_steps: 10, save_steps: 15}",
                "found evaluations every 10 steps and checkpoints every 15 steps",
            ),
            ("data.eval: e.jsonl\ntraining: {load_best_model_at_end: true, eval_steps: 5, save_steps: null}", "never"),
            (
                "data.eval: e.jsonl\ntraining: {load_best_model_at_end: true, eval_steps: 5, save_strategy: epoch}",
                "found evaluations every 5 steps and checkpoints after each epoch",
            ),
            ("data.eval: e.jsonl\ntraining: {early_stopping_patience: 2}", "it counts evaluations"),
            ("training: {early_stopping_threshold: 0.1}", "without training.early_stopping_patience it means nothing"),
        ] {
            let errors = errors_of(more);
            assert!(errors.len() == 1 && errors[0].contains(words), "{more}: {errors:?}");
        }
        let epochs = "training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: epoch}";
        recipe(&format!("{GOOD}data.eval: e.jsonl\n{epochs}\n"), &[]).unwrap();
        let best = "data.eval: e.jsonl\ntraining: {load_best_model_at_end: true, eval_steps: 5, save_steps: 20, metric_for_best_model: loss}";
        assert_eq!(
            recipe(&format!("{GOOD}{best}\n"), &[]).unwrap().values()["training.metric_for_best_model"],
            "eval_loss"
        );
        assert!(errors_of("training: {lr_scheduler_type: constant, warmup_steps: 5}")[0].contains("no warm-up"));
        assert!(errors_of("fsdp: {offload_params: true, resident_units: 3}")[0].contains("contradicts"));
        let tokens = errors_of("data: {max_length: 16777216}\ntraining: {per_device_train_batch_size: 65536}");
        assert!(tokens[0].contains("data.max_length 16777216 times training.per_device_train_batch_size 65536"));
        assert_eq!(errors_of("lora: {adapter: a, r: 8, use_rslora: true}").len(), 2);
        assert!(errors_of("data: {packing: wrapped, overlong: truncate}")[0].contains("allowed: split | drop | error"));
    }

    #[test]
    fn wrapping_does_not_truncate() {
        let overlong = |sets: &[&str]| recipe(GOOD, sets).unwrap().data.overlong;
        assert_eq!(overlong(&[]), Overlong::Truncate);
        assert_eq!(overlong(&["data.packing=wrapped"]), Overlong::Split);
        assert_eq!(overlong(&["data.packing=wrapped", "data.overlong=drop"]), Overlong::Drop);
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
    fn decided_values_are_of_every_key_and_one_spelling() {
        let job =
            recipe(GOOD, &["training.learning_rate='1e-4'", "lora.target_modules=q_proj", "fsdp.vram_budget=1KiB"]);
        let values = job.unwrap().values();
        assert_eq!(values.len(), keys::ALL.len());
        let of = |path: &str| values[path].to_string();
        for (path, value) in [
            ("training.seed", "42"),
            ("training.learning_rate", "0.0001"),
            ("lora.target_modules", "[\"q_proj\"]"),
            ("data.packing", "\"true\""),
            ("data.eval", "null"),
            ("fsdp.resident_units", "\"auto\""),
            ("fsdp.dense_layers", "\"auto\""),
            ("fsdp.vram_budget", "1024"),
            ("quantization.bnb_4bit_quant_type", "\"nf4\""),
            ("quantization.bnb_4bit_use_double_quant", "null"),
        ] {
            assert_eq!(of(path), value, "{path}");
        }
        // Written out, they are the same job; the model's folder was a temporary one.
        let written = |(path, value): (&String, &Value)| format!("{path}={value}");
        let set: Vec<String> = values.iter().map(written).chain(["model=.".into()]).collect();
        let mut again = recipe("", &set.iter().map(|set| &set[..]).collect::<Vec<_>>()).unwrap().values();
        again.insert("model".into(), values["model"].clone());
        assert_eq!(again, values);
    }

    #[test]
    fn what_another_key_decides_is_null() {
        let of = |set: &[&str], path: &str| recipe(GOOD, set).unwrap().values()[path].to_string();
        assert_eq!(of(&["training.max_steps=5"], "training.num_train_epochs"), "null");
        assert_eq!(of(&["training.global_batch_size=5"], "training.gradient_accumulation_steps"), "null");
        assert_eq!(of(&["training.lr_scheduler_type=constant"], "training.warmup_steps"), "null");
        assert_eq!(of(&["lora.adapter=."], "lora.r"), "null");
        assert_eq!(of(&["training.save_strategy=epoch"], "training.save_steps"), "null");
        assert_eq!(of(&["data.packing=wrapped"], "data.overlong"), "\"split\"");
    }

    fn eval(dir: &Path, set: &[&str]) -> Result<Job, RecipeError> {
        let given = vec![("model", dir.to_string_lossy().into()), ("data.max_length", 64.into())];
        from_options(Command::Eval, given, &set.iter().map(|text| text.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn other_commands_read_their_keys_and_refuse_the_rest() {
        let dir = TempDir::new().unwrap();
        let job = eval(dir.path(), &["quantization.load_in_4bit=false"]).unwrap();
        assert_eq!((job.model.as_path(), job.quantization.load_in_4bit), (dir.path(), false));
        assert_eq!((job.data.max_length, &job.values()["data.max_length"]), (64, &64.into()));
        assert!(!job.values().contains_key("training.seed"), "eval has none");
        for (set, expected) in [
            ("training.seed=1", "training.seed: eval does not read it, remove it"),
            ("lora.adapter=out", "lora.adapter: eval takes it from --adapter, not from --set"),
            ("data.max_length=5", "data.max_length: eval takes it from --max-length, not from --set"),
            ("model=x", "model: eval takes it from --model, not from --set"),
        ] {
            assert_eq!(eval(dir.path(), &[set]).unwrap_err().errors, [expected]);
        }
        let error = eval(Path::new("/nowhere"), &[]).unwrap_err();
        assert!(error.errors[0].contains("not a directory"), "{error}");
        let error = from_options(Command::BenchStep, vec![("data.max_length", 1.into())], &[]).unwrap_err();
        assert_eq!(error.errors, ["--seq: found 1, allowed: an integer from 2 to 16777216"]);
    }

    /// Every key is read somewhere, and no command reads a key in two ways.
    #[test]
    fn readers_and_options_do_not_overlap() {
        for key in keys::ALL {
            assert!(!key.readers.is_empty(), "{}", key.path);
            for command in Command::ALL {
                let option = command.options().iter().any(|(path, _)| *path == key.path);
                assert!(!(option && key.readers.contains(&command)), "{} {command:?}", key.path);
                let name = command.name_of(key.path);
                assert_eq!(name.is_some(), option || key.readers.contains(&command), "{}", key.path);
            }
        }
        let is_known = |(path, _): &(&str, &str)| keys::ALL.iter().any(|key| key.path == *path);
        assert!(Command::ALL.iter().all(|command| command.options().iter().all(is_known)));
    }

    #[test]
    fn plan_takes_the_recipe_of_train_and_its_own_overrides() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("recipe.yaml");
        let yaml = format!("{GOOD}training: {{seed: 1, max_steps: 5}}\n");
        fs::write(&path, yaml.replace("MODEL", &dir.path().display().to_string())).unwrap();
        let plan = |set: &str| load(&path, Command::Plan, &[set.to_string()]);
        assert_eq!(plan("lora.r=8").unwrap().lora.keys.r, 8);
        assert_eq!(plan("training.seed=2").unwrap_err().errors, ["training.seed: plan does not read it, remove it"]);
    }

    #[test]
    fn the_recipes_that_ship_are_good() {
        let dir = TempDir::new().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/recipes");
        let recipes: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!recipes.is_empty());
        for path in recipes {
            let model = format!("model={}", dir.path().display());
            load(&path, Command::Train, &[model]).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn help_has_every_key() {
        assert_eq!(help().lines().count(), 3 * keys::ALL.len());
        assert!(help().contains("default 1.0e-4; allowed: a number above 0"));
    }
}
