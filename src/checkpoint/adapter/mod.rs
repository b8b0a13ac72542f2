//! LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod origin;
mod read;
mod write;

pub use config::remarks;
pub use read::{layer_values, load};
pub use write::{save, save_values, views, write_tensors};

use anyhow::Result;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

#[cfg(test)]
use crate::model::spec::ModuleId;
use crate::model::spec::{LayerSpec, ModelSpec, Module};
use crate::model::targets::LoraKeys;
#[cfg(test)]
use crate::model::targets::Modules;
use crate::model::trainable::{Kind, LayerTrainables, LoraConfig, LoraModule};

/// Name of the file of tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// Name of the file that describes the tensors.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// An adapter: its settings, and each layer's values as [`LayerTrainables`] lays them out.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub settings: AdapterSettings,
    pub layers: Vec<Vec<f32>>,
}

impl Adapter {
    /// Returns a digest of settings and values.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(format!("{:?}", self.settings).as_bytes());
        self.layers.iter().for_each(|values| hash.update(bytemuck::cast_slice(values)));
        hash.digest()
    }

    /// Returns the bytes of the values.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|values| size_of_val(&values[..])).sum()
    }
}

/// The settings in `adapter_config.json` that the computation needs.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSettings {
    /// PEFT's keys, which say which modules have an adapter, and of which rank and scale.
    pub keys: LoraKeys,
    pub dropout: f32,
    /// Initialization that PEFT used, kept for the file that is saved.
    pub init_lora_weights: Value,
    /// The modules of each layer that have an adapter: what the keys mean for the model.
    modules: Vec<Vec<LoraModule>>,
}

impl AdapterSettings {
    /// Makes the settings of a new adapter.
    ///
    /// # Errors
    /// The keys name what the model does not have, see [`LoraKeys::new_modules`].
    pub fn new(keys: LoraKeys, dropout: f32, spec: &ModelSpec) -> Result<AdapterSettings> {
        let modules = keys.new_modules(spec)?;
        Ok(AdapterSettings { keys, dropout, init_lora_weights: true.into(), modules })
    }

    /// Settings of the smallest adapter: of rank 1, without dropout, on the projections of the queries.
    #[cfg(test)]
    pub fn smallest(spec: &ModelSpec) -> AdapterSettings {
        let keys = LoraKeys::uniform(1, 1.0, Modules::with_ids(&[ModuleId::Q]));
        AdapterSettings::new(keys, 0.0, spec).unwrap()
    }

    /// Returns the numbers that the model computes with.
    pub fn lora_config(&self) -> LoraConfig {
        LoraConfig { dropout: self.dropout, layers: self.modules.clone() }
    }
}

/// Beginning of PEFT's names of tensors; the module's name follows.
const PREFIX: &str = "base_model.model.";

/// PEFT's name of a LoRA matrix.
fn tensor_name(module: &Module, kind: Kind) -> String {
    format!("{PREFIX}{}.lora_{}.weight", module.name, kind.letter())
}

/// A fresh adapter: A uniform in ±1/√in_features (Kaiming-uniform with a = √5, PEFT's start), B zero. The numbers
/// depend on the seed and the module only.
pub fn fresh(settings: AdapterSettings, spec: &ModelSpec, seed: u64) -> Adapter {
    let values_of = |(layer, modules): (&LayerSpec, &Vec<LoraModule>)| {
        let trainables = LayerTrainables::new(layer, modules);
        let mut values = vec![0.0; trainables.len()];
        for a in trainables.list().iter().filter(|trainable| trainable.kind == Kind::A) {
            let bound = 1.0 / (a.shape[1] as f32).sqrt();
            let number = layer.module(a.module).map_or(0, |module| module.number);
            let mut state = seed ^ (u64::from(number) + 1) << 40;
            for value in &mut values[a.range.clone()] {
                // 24 bits, so that the number in [0, 1) is exact in f32.
                let uniform = (splitmix64(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
                *value = (2.0 * uniform - 1.0) * bound;
            }
        }
        values
    };
    Adapter { layers: spec.layers.iter().zip(&settings.modules).map(values_of).collect(), settings }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::model::targets::Patterns;

    fn config() -> ModelSpec {
        ModelSpec::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")).unwrap()
    }

    pub fn settings(spec: &ModelSpec) -> AdapterSettings {
        let keys = LoraKeys::uniform(4, 8.0, Modules::with_ids(&[ModuleId::Q, ModuleId::Down]));
        let keys = LoraKeys { use_rslora: true, ..keys };
        AdapterSettings { init_lora_weights: "eva".into(), ..AdapterSettings::new(keys, 0.05, spec).unwrap() }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = fresh(settings(&config()), &config(), 42);
        save(&adapter, &config(), Path::new("base"), dir.path()).unwrap();
        assert_eq!(load(dir.path(), &config()).unwrap(), adapter);
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!((&json["lora_dropout"], &json["lora_alpha"]), (&json!(0.05), &json!(8)));
        for alpha in [0.5, 1e20] {
            let dir = tempfile::tempdir().unwrap();
            let keys = LoraKeys::uniform(4, alpha, Modules::with_ids(&[ModuleId::Q]));
            let adapter = fresh(AdapterSettings::new(keys, 0.0, &config()).unwrap(), &config(), 42);
            save(&adapter, &config(), Path::new("base"), dir.path()).unwrap();
            assert!(load(dir.path(), &config()).unwrap() == adapter, "alpha {alpha}");
        }
    }

    /// An adapter whose modules differ, as a recipe would have it.
    fn ragged(spec: &ModelSpec) -> Adapter {
        let number = |v: &Value| v.as_u64().map(|r| r as usize);
        let keys = LoraKeys {
            excluded: Modules::read_excluded(&json!(["layers.0.mlp.up_proj"])),
            rank_pattern: Patterns::read(&json!({"q_proj": 1, r".*\.0\..*": 7}), number).unwrap(),
            alpha_pattern: Patterns::read(&json!({"mlp.down.*": 2.5}), Value::as_f64).unwrap(),
            ..LoraKeys::uniform(4, 8.0, Modules::AllLinear)
        };
        fresh(AdapterSettings::new(keys, 0.0, spec).unwrap(), spec, 42)
    }

    #[test]
    fn patterns_are_saved_as_they_were_written() {
        let (dir, spec) = (tempfile::tempdir().unwrap(), config());
        let mut adapter = ragged(&spec);
        save(&adapter, &spec, Path::new("base"), dir.path()).unwrap();
        // PEFT writes the names that all-linear stands for.
        adapter.settings.keys.targets = Modules::with_ids(&adapter.settings.lora_config().targets());
        assert!(load(dir.path(), &spec).unwrap() == adapter);
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!(json["exclude_modules"], json!(["layers.0.mlp.up_proj"]));
        assert_eq!(json["rank_pattern"].to_string(), r#"{"q_proj":1,".*\\.0\\..*":7}"#, "the order counts");
        assert_eq!((&json["r"], &json["layers_to_transform"]), (&json!(4), &Value::Null));
        // A rank of the file that is not the tensors' is told by module.
        let path = dir.path().join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).unwrap().replace("\"q_proj\": 1", "\"q_proj\": 2");
        std::fs::write(&path, text).unwrap();
        let error = format!("{:#}", load(dir.path(), &spec).unwrap_err());
        assert!(error.contains("r is 2 in") && error.contains("self_attn.q_proj.lora_A.weight"), "{error}");
    }

    #[test]
    fn patterns_of_a_text_tower_are_saved_with_whole_names() {
        let file = "tests/golden/families/mistral3/default/config.v5.json";
        let text = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let (dir, spec) = (tempfile::tempdir().unwrap(), ModelSpec::parse(&text, file).unwrap());
        let adapter = ragged(&spec);
        save(&adapter, &spec, Path::new("base"), dir.path()).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
        let names: Vec<_> = json["target_modules"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(names.contains(&"model.language_model.layers.0.mlp.gate_proj"), "{names:?}");
        assert!(!names.contains(&"model.language_model.layers.0.mlp.up_proj") && json["exclude_modules"].is_null());
        let again = load(dir.path(), &spec).unwrap();
        assert_eq!(again.settings.lora_config(), adapter.settings.lora_config());
        assert!(again.layers == adapter.layers);
    }

    #[test]
    fn an_adapter_of_a_text_tower_leaves_other_towers_alone() {
        let file = "tests/golden/families/mistral3/default/config.v5.json";
        let text = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        let spec = ModelSpec::parse(&text, file).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let adapter = fresh(settings(&spec), &spec, 42);
        save(&adapter, &spec, Path::new("base"), dir.path()).unwrap();
        let again = load(dir.path(), &spec).unwrap();
        assert_eq!(again.settings.lora_config(), adapter.settings.lora_config());
        assert!(again.layers == adapter.layers);
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!(json["target_modules"], json!(r"model\.language_model\..*\.(q_proj|down_proj)"));
    }

    #[test]
    fn a_fresh_adapter_is_kaiming_uniform_and_zero() {
        let adapter = fresh(settings(&config()), &config(), 42);
        let trainables = LayerTrainables::new(&config().layers[1], &adapter.settings.modules[1]);
        let range = |kind| trainables.get(ModuleId::Down, kind).unwrap().range.clone();
        let a = &adapter.layers[1][range(Kind::A)];
        let bound = 1.0 / 128f32.sqrt();
        assert!(a.iter().all(|v| v.abs() <= bound));
        let variance = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.15, "variance {variance}");
        assert!(adapter.layers[1][range(Kind::B)].iter().all(|&v| v == 0.0));
        assert_ne!(adapter.layers[0], adapter.layers[1]);
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        save(&fresh(settings(&config()), &config(), 1), &config(), Path::new("base"), dir.path()).unwrap();
        let path = dir.path().join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
        assert!(format!("{:#}", load(dir.path(), &config()).unwrap_err()).contains("use_dora: found true"));
    }

    #[test]
    fn a_config_that_contradicts_the_tensors_is_refused_with_both() {
        let dir = tempfile::tempdir().unwrap();
        save(&fresh(settings(&config()), &config(), 1), &config(), Path::new("base"), dir.path()).unwrap();
        let path = dir.path().join(CONFIG_FILE);
        let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (key, value, words) in [
            ("r", json!(8), ["r is 8", "[4, 64]"]),
            ("target_modules", json!(["q_proj"]), ["layers.0.mlp.down_proj", "leave out"]),
            ("target_modules", json!("all-linear"), ["layers.0.self_attn.k_proj", "no tensors"]),
            ("target_modules", json!(["q_proj", "down_proj", "lm_head"]), ["lm_head", "projections of layers"]),
            ("exclude_modules", json!(["layers.1.mlp.down_proj"]), ["layers.1.mlp.down_proj", "leave out"]),
        ] {
            let mut changed = whole.clone();
            changed[key] = value;
            std::fs::write(&path, changed.to_string()).unwrap();
            let error = format!("{:#}", load(dir.path(), &config()).unwrap_err());
            assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
        }
    }

    #[test]
    fn a_header_too_long_to_parse_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        save(&fresh(settings(&config()), &config(), 1), &config(), Path::new("base"), dir.path()).unwrap();
        let path = dir.path().join(TENSORS_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(32 << 20, b' ');
        bytes[..8].copy_from_slice(&(20u64 << 20).to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", load(dir.path(), &config()).unwrap_err());
        assert!(error.contains("header of 20971520 bytes, at most"), "{error}");
    }
}
