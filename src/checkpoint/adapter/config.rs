//! Reads `adapter_config.json` by an allow-list. Each key that PEFT 0.21 knows is read, harmless or refused by name; unknown keys are
//! refused.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use crate::checkpoint::folder;
use crate::files::{self, MAX_SETTINGS_BYTES, listed, shown, shown_path};
use crate::model::spec::ModelSpec;
use crate::model::targets::{Layers, LoraKeys, MAX_RANK, Modules, Patterns};

/// Keys that do not change what is computed: bookkeeping, and settings of features that other keys would switch on.
const HARMLESS: [&str; 15] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Keys that would change what is computed, with the one value besides `null` that does not.
fn neutral_values() -> [(&'static str, Value); 17] {
    [
        ("alora_invocation_tokens", json!([])),
        ("arrow_config", json!({})),
        ("bias", json!("none")),
        ("enable_lora", json!([])),
        ("fan_in_fan_out", json!(false)),
        ("kasa_config", json!(null)),
        ("layer_replication", json!([])),
        ("lora_bias", json!(false)),
        ("megatron_config", json!({})),
        ("modules_to_save", json!([])),
        ("monteclora_config", json!(null)),
        ("target_parameters", json!([])),
        ("trainable_token_indices", json!([])),
        ("use_bdlora", json!(null)),
        ("use_dora", json!(false)),
        ("use_qalora", json!(false)),
        ("velora_config", json!(null)),
    ]
}

/// Initializations of an adapter that change neither the base model nor the training.
const INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The content of `adapter_config.json`.
pub(super) struct PeftConfig {
    pub keys: LoraKeys,
    pub dropout: f32,
    pub init_lora_weights: Value,
}

/// The keys that have not been read yet; those left at the end were not understood.
struct Keys {
    map: Map<String, Value>,
    problems: Vec<String>,
}

impl Keys {
    /// Takes the value of a key; `null` counts as absent.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    fn refuse(&mut self, key: &str, found: &Value, allowed: &str) {
        let (key, found) = (shown(key), shown(&found.to_string()));
        self.problems.push(format!("{key}: found {found}, allowed: {allowed}"));
    }

    /// Reads a key, which must be present if it has no default. Returns `None` after noting a problem.
    fn read<T>(
        &mut self,
        key: &str,
        default: Option<T>,
        allowed: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let Some(value) = self.take(key) else {
            if default.is_none() {
                self.problems.push(format!("{key}: missing, it must be {allowed}"));
            }
            return default;
        };
        let found = read(&value);
        if found.is_none() {
            self.refuse(key, &value, allowed);
        }
        found
    }

    /// Reads the keys about layers, which PEFT allows beside a list of names alone.
    fn read_layers(&mut self, targets: Option<&Modules>) -> Option<Layers> {
        let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty) || value.as_str() == Some("");
        for key in ["layers_to_transform", "layers_pattern"] {
            // PEFT treats an empty list as absent.
            self.map.retain(|name, value| name != key || !is_empty(value));
            let found = self.map.get(key).filter(|value| !value.is_null()).cloned();
            let is_list = targets.is_none_or(|targets| matches!(targets, Modules::Names(_)));
            if let Some(found) = found.filter(|_| !is_list) {
                self.refuse(key, &found, "null, as target_modules is no list of names");
            }
        }
        let allowed = "the number of a layer, or a list of numbers";
        let indices = self.read("layers_to_transform", Some(None), allowed, |v| Layers::read_indices(v).map(Some))?;
        let allowed = "the name of a list of layers, or several";
        let patterns = self.read("layers_pattern", Some(Vec::new()), allowed, Layers::read_patterns)?;
        if indices.is_none() && !patterns.is_empty() {
            self.problems.push("layers_pattern: without layers_to_transform it means nothing".into());
        }
        Some(Layers { indices, patterns })
    }

    /// Refuses the keys that were not taken.
    fn check_rest(&mut self) {
        for (key, neutral) in neutral_values() {
            match self.take(key) {
                Some(found) if found != neutral => {
                    self.refuse(key, &found, &format!("{neutral}; other values are not implemented"))
                }
                _ => {}
            }
        }
        for (key, value) in std::mem::take(&mut self.map) {
            if !value.is_null() && !HARMLESS.contains(&key.as_str()) {
                self.refuse(&key, &value, "keys of PEFT's LoraConfig; remove it if it does not change the adapter");
            }
        }
    }
}

impl PeftConfig {
    /// Reads the file of a folder, an adapter of this model. The error names every key that cannot be honoured.
    pub fn load(dir: &Path, spec: &ModelSpec) -> Result<PeftConfig> {
        let path = dir.join(CONFIG_FILE);
        let mut keys = Keys { map: read_map(&path)?, problems: Vec::new() };
        let config = Self::read(&mut keys, spec);
        keys.check_rest();
        match config {
            Some(config) if keys.problems.is_empty() => Ok(config),
            _ => bail!("{}: this adapter cannot be used:{}", shown_path(&path), listed(&keys.problems)),
        }
    }

    fn read(keys: &mut Keys, spec: &ModelSpec) -> Option<PeftConfig> {
        // All keys are read before an error is returned, so that it can name all that are wrong.
        let number = |value: &Value| value.as_f64().filter(|&x| (x as f32).is_finite());
        let peft_type = keys.read("peft_type", None, "LORA", |v| (v == "LORA").then_some(()));
        let is_rank = |v: &Value| Some(v.as_u64()? as usize).filter(|r| (1..=MAX_RANK).contains(r));
        let is_alpha = |v: &Value| v.as_f64().filter(|&x| (x as f32).is_finite() && x as f32 > 0.0);
        let rank = keys.read("r", None, "an integer from 1 to 65536", is_rank);
        let alpha = keys.read("lora_alpha", None, "a number above 0", is_alpha);
        let dropout = keys.read("lora_dropout", Some(0.0), "a number from 0 to below 1", |v| {
            number(v).map(|x| x as f32).filter(|x| (0.0..1.0).contains(x))
        });
        let use_rslora = keys.read("use_rslora", Some(false), "true or false", Value::as_bool);
        let allowed = "true, false, gaussian, eva or orthogonal; pissa, olora, corda, loftq and lora_ga change the base model that the \
                       adapter belongs to, and mica its training: convert the adapter with PEFT first (save_pretrained with \
                       path_initial_model_for_weight_conversion)";
        let init_lora_weights = keys.read("init_lora_weights", Some(json!(true)), allowed, |v| {
            (v.is_boolean() || v.as_str().is_some_and(|word| INITS.contains(&word))).then(|| v.clone())
        });
        let allowed = "a list of names, a regular expression, or all-linear";
        let default = spec.default_targets();
        let default = (!default.is_empty()).then(|| Modules::with_ids(default));
        let of_targets = match default {
            Some(_) => allowed.into(),
            None => format!("{allowed}; PEFT has no default for {}", spec.family),
        };
        let targets = keys.read("target_modules", default, &of_targets, Modules::read);
        let excluded =
            keys.read("exclude_modules", Some(None), allowed, |v| no_names(v).or(Modules::read_excluded(v).map(Some)));
        let layers = keys.read_layers(targets.as_ref());
        let allowed = "a mapping of expressions, for ends of names, to integers from 1 to 65536";
        let rank_pattern =
            keys.read("rank_pattern", Some(Patterns::default()), allowed, |v| Patterns::read(v, is_rank));
        let allowed = "a mapping of expressions, for ends of names, to numbers above 0";
        let alpha_pattern =
            keys.read("alpha_pattern", Some(Patterns::default()), allowed, |v| Patterns::read(v, is_alpha));
        peft_type?;
        let keys = LoraKeys {
            r: rank?,
            alpha: alpha?,
            use_rslora: use_rslora?,
            targets: targets?,
            excluded: excluded?,
            layers: layers?,
            rank_pattern: rank_pattern?,
            alpha_pattern: alpha_pattern?,
        };
        Some(PeftConfig { keys, dropout: dropout?, init_lora_weights: init_lora_weights? })
    }
}

/// Reads an empty list, with which nothing is excluded.
fn no_names(value: &Value) -> Option<Option<Modules>> {
    value.as_array().filter(|list| list.is_empty()).map(|_| None)
}

pub(super) fn read_map(path: &Path) -> Result<Map<String, Value>> {
    files::read_json(path, MAX_SETTINGS_BYTES)
}

/// Returns remarks on an adapter for the user: that it was made for another task, or for a model of another name.
pub fn remarks(dir: &Path, model: &Path) -> Result<Vec<String>> {
    let map = read_map(&dir.join(CONFIG_FILE))?;
    let text = |key: &str| map.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let mut remarks = Vec::new();
    if let Some(task) = text("task_type").filter(|&task| task != "CAUSAL_LM") {
        remarks.push(format!("{CONFIG_FILE} has task_type {:?}; it is used for CAUSAL_LM", shown(task)));
    }
    let model = std::fs::canonicalize(model).unwrap_or_else(|_| model.into());
    if let (Some(base), Some(name)) = (text("base_model_name_or_path"), model_name(&model))
        && model_name(Path::new(base)).is_some_and(|base| !base.eq_ignore_ascii_case(&name))
    {
        remarks.push(format!(
            "{CONFIG_FILE} says that it was made for {:?}; it is used with {}",
            shown(base),
            shown_path(&model)
        ));
    }
    let commit = folder::id_and_commit(&model).map(|(_, commit)| commit);
    if let Some(revision) = text("revision").filter(|&text| text != "main" && Some(text) != commit.as_deref()) {
        remarks.push(format!(
            "{CONFIG_FILE} says that it was made for revision {:?} of its base, which is not compared",
            shown(revision)
        ));
    }
    Ok(remarks)
}

/// Returns the last part of a model's name, given as `org/name`, a folder or a path in the hub's cache
/// (`models--org--name/snapshots/…`).
fn model_name(path: &Path) -> Option<String> {
    let parts = || path.components().filter_map(|part| part.as_os_str().to_str());
    let cached = parts().find_map(|part| part.strip_prefix("models--")?.rsplit("--").next());
    cached.or_else(|| parts().next_back()).map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;
    use crate::model::trainable::LoraModule;

    /// tests/golden/lora/modules.json has what PEFT makes of keys: module, r, lora_alpha and scaling.
    #[test]
    fn modules_ranks_and_scales_are_those_of_peft() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let spec = ModelSpec::load(&golden.join("tiny")).unwrap();
        let cases: Value = serde_json::from_slice(&std::fs::read(golden.join("lora/modules.json")).unwrap()).unwrap();
        let mut refused = 0;
        for case in cases.as_array().unwrap() {
            let peft = load_as(&spec, case["config"].clone());
            let new = peft.as_ref().map_err(|_| ()).and_then(|peft| peft.keys.new_modules(&spec).map_err(|_| ()));
            let (is_refused, is_warned) = (case["refused"] == true, case["warned"] == true);
            assert_eq!(new.is_err(), is_refused || is_warned, "{case}");
            refused += usize::from(is_refused);
            let (Ok(peft), false) = (peft, is_refused) else { continue };
            let (mut ours, keys) = (Map::new(), &peft.keys);
            for (layer, modules) in spec.layers.iter().zip(keys.modules(&spec).unwrap()) {
                for LoraModule { id, lora_rank, scale } in modules {
                    ours.insert(layer.module(id).unwrap().name.clone(), json!([lora_rank, scale]));
                }
            }
            let theirs = case["modules"].as_object().unwrap().iter();
            let theirs =
                theirs.map(|(name, numbers)| (name.clone(), json!([numbers[0], numbers[2].as_f64().unwrap() as f32])));
            assert_eq!(ours, theirs.collect::<Map<_, _>>(), "{case}");
        }
        assert!(refused >= 8, "{refused} are refused");
    }

    fn load_for(model: &str, change: Value) -> Result<PeftConfig> {
        load_as(&shapes::named(model, Some(1)).unwrap(), change)
    }

    fn load_as(spec: &ModelSpec, change: Value) -> Result<PeftConfig> {
        let mut config =
            json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]});
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
        PeftConfig::load(dir.path(), spec)
    }

    fn load(change: Value) -> Result<PeftConfig> {
        load_for("llama-3.1-8b", change)
    }

    fn error(change: Value) -> String {
        load(change.clone()).map(|_| panic!("{change} must be refused")).unwrap_err().to_string()
    }

    #[test]
    fn what_changes_the_adapter_is_refused_by_name() {
        for (key, value) in [
            ("init_lora_weights", json!("pissa")),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("corda")),
            ("init_lora_weights", json!("loftq")),
            ("init_lora_weights", json!("lora_ga")),
            ("init_lora_weights", json!("mica")),
            ("r", json!(4.7)),
            ("r", json!(0)),
            ("r", json!(-1)),
            ("r", json!(1e30)),
            ("r", json!("4")),
            ("lora_alpha", json!("8")),
            ("lora_alpha", json!(0)),
            ("lora_alpha", json!(1e300)),
            ("lora_dropout", json!(1)),
            ("lora_dropout", json!(0.999_999_999_9)),
            ("use_rslora", json!(1)),
            ("use_rslora", json!("true")),
            ("peft_type", json!("LOHA")),
            ("use_dora", json!(true)),
            ("use_qalora", json!(true)),
            ("use_bdlora", json!({"nblocks": 2})),
            ("bias", json!("all")),
            ("lora_bias", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("layers_to_transform", json!([-1])),
            ("layers_to_transform", json!("0")),
            ("layer_replication", json!([[0, 2]])),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!({"(": 8})),
            ("rank_pattern", json!(["q_proj"])),
            ("alpha_pattern", json!({"q_proj": "8"})),
            ("trainable_token_indices", json!([1])),
            ("target_parameters", json!(["weight"])),
            ("alora_invocation_tokens", json!([1])),
            ("arrow_config", json!({"top_k": 3})),
            ("megatron_config", json!({"a": 1})),
            ("velora_config", json!({"scale": 1})),
            ("kasa_config", json!({"beta": 1})),
            ("monteclora_config", json!({"num_samples": 1})),
            ("target_modules", json!(7)),
            ("target_modules", json!("(")),
            ("exclude_modules", json!([1])),
            ("a_new_key", json!(false)),
        ] {
            let error = error(json!({key: value}));
            assert!(error.contains(&format!("\n  {key}: found {value}, allowed: ")), "{error}");
        }
        assert_eq!(error(json!({"r": 0, "use_dora": true, "new": 1})).lines().count(), 4, "all at once");
        assert!(error(json!({"r": null})).contains("r: missing"));
    }

    #[test]
    fn what_peft_writes_of_a_plain_adapter_is_fine() {
        for init in [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal")] {
            let config =
                load(json!({"init_lora_weights": init, "lora_alpha": 8.5, "eva_config": {"rho": 2.0}})).unwrap();
            assert_eq!((config.init_lora_weights, config.keys.alpha), (init, 8.5));
        }
        load(json!({"peft_version": "0.21.2", "loftq_config": {}, "rank_pattern": {}, "unknown": null, "inference_mode": true,
            "megatron_core": "megatron.core", "qalora_group_size": 16, "corda_config": null, "runtime_config": {}}))
        .unwrap();
    }

    #[test]
    fn modules_are_named_as_in_peft() {
        let is_target = |change: Value, module: &str| load(change).unwrap().keys.is_target(module).unwrap();
        let q = "model.layers.3.self_attn.q_proj";
        assert!(is_target(json!({}), q));
        assert!(!is_target(json!({}), "model.layers.3.self_attn.k_proj"));
        assert!(!is_target(json!({"target_modules": ["proj"]}), q), "a name is whole between dots");
        assert!(is_target(json!({"target_modules": [q]}), q));
        assert!(is_target(json!({"target_modules": r"model\.layers\.(?!1\.)\d+\..*\.(q|v)_proj"}), q));
        assert!(!is_target(json!({"target_modules": "q_proj"}), q), "an expression matches whole names");
        assert!(is_target(json!({"target_modules": "all-linear"}), q));
        assert!(!is_target(json!({"target_modules": "all-linear"}), "lm_head"));
        assert!(!is_target(json!({"exclude_modules": ["self_attn.q_proj"]}), q));
        assert!(!is_target(json!({"exclude_modules": r".*\.3\..*"}), q));
        assert!(
            is_target(json!({"target_modules": null}), q) && is_target(json!({"target_modules": null}), "a.v_proj")
        );
        let slow = load(json!({"target_modules": r"(?=(a+)+b)(a|m|o|d|e|l)*\1x"})).unwrap();
        assert!(slow.keys.is_target(&"a".repeat(64)).is_err(), "the work is bounded");
    }

    #[test]
    fn absent_targets_are_those_of_the_family() {
        let absent = json!({"target_modules": null});
        for model in ["llama-3.1-8b", "qwen2.5-0.5b", "qwen3-8b"] {
            let peft = load_for(model, absent.clone()).unwrap();
            let is_target = |name: &str| peft.keys.is_target(&format!("model.layers.0.self_attn.{name}")).unwrap();
            assert_eq!(["q_proj", "k_proj", "v_proj", "o_proj"].map(is_target), [true, false, true, false], "{model}");
        }
        for (model, family) in [("smollm3-3b", "smollm3"), ("seed-oss-36b", "seed_oss")] {
            let error = load_for(model, absent.clone()).map(|_| ()).unwrap_err().to_string();
            let expected = format!("all-linear; PEFT has no default for {family}");
            assert!(error.contains("target_modules: missing") && error.contains(&expected), "{error}");
            load_for(model, json!({"target_modules": "all-linear"})).unwrap();
        }
    }

    #[test]
    fn another_base_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"base_model_name_or_path": "org/Tiny-1B", "task_type": "SEQ_CLS", "revision": "v2"});
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
        let count = |model: &str| remarks(dir.path(), Path::new(model)).unwrap().len();
        assert_eq!(count("/models/tiny-1b"), 2);
        assert_eq!(count("/hub/models--org--Tiny-1B/snapshots/abc"), 2);
        assert_eq!(count("/models/tiny-7b"), 3);
    }

    #[test]
    fn a_pattern_that_tries_too_much_is_refused() {
        // It tries to cut a name into four pieces in each of 30,000 ways.
        let config = load(json!({"target_modules": "(.*)(.*)(.*)(.*)(?=!)"})).unwrap();
        let error = format!("{:#}", config.keys.is_target("model.layers.0.mlp.down_proj").unwrap_err());
        assert!(error.contains("target_modules: found \"(.*)") && error.contains("too much work"), "{error}");
        assert!(
            load(json!({"target_modules": r".*\.(q|down)_proj(?!x)"})).unwrap().keys.is_target("a.down_proj").unwrap()
        );
    }
}
