//! LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use crate::model::config::ModelConfig;
use crate::model::lora::{LoraConfig, LoraEntry, LoraLayout};
use crate::model::names::{self, Projection};

use super::atomic;
use super::source::map;

/// Name of the file of tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// Name of the file that says what they are.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// An adapter as a whole: its numbers, and each layer's values as [`LoraLayout`] lays them out.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub settings: AdapterSettings,
    pub layers: Vec<Vec<f32>>,
}

/// What `adapter_config.json` says that the math needs.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSettings {
    /// PEFT's r.
    pub lora_rank: usize,
    pub alpha: f64,
    pub dropout: f32,
    pub use_rslora: bool,
    pub targets: Vec<Projection>,
}

impl AdapterSettings {
    /// What the model computes with.
    pub fn lora_config(&self) -> LoraConfig {
        let r = self.lora_rank as f64;
        let scale = if self.use_rslora { self.alpha / r.sqrt() } else { self.alpha / r };
        LoraConfig {
            lora_rank: self.lora_rank,
            scale: scale as f32,
            dropout: self.dropout,
            targets: self.targets.clone(),
        }
    }
}

/// PEFT's name of a LoRA matrix; `matrix` is "A" or "B".
fn tensor_name(layer: usize, projection: Projection, matrix: &str) -> String {
    format!("base_model.model.{}.lora_{matrix}.weight", names::module(layer, projection))
}

/// A fresh adapter: A uniform in ±1/√in_features (Kaiming-uniform with a = √5, PEFT's start), B zero. The numbers
/// depend on the seed, the layer and the projection only.
pub fn fresh(settings: AdapterSettings, config: &ModelConfig, seed: u64) -> Adapter {
    let layout = LoraLayout::new(config, &settings.lora_config());
    let layer = |layer: usize| {
        let mut values = vec![0.0; layout.len];
        for entry in layout.entries() {
            let bound = 1.0 / (entry.a_shape[1] as f32).sqrt();
            let mut state = seed ^ ((layer * Projection::ALL.len() + entry.projection as usize + 1) as u64) << 40;
            for value in &mut values[entry.a.clone()] {
                // 24 bits, so that the number in [0, 1) is exact in f32.
                let uniform = (splitmix64(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
                *value = (2.0 * uniform - 1.0) * bound;
            }
        }
        values
    };
    let layers = (0..config.num_hidden_layers).map(layer).collect();
    Adapter { settings, layers }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Reads a PEFT adapter for this model. Every tensor must be there, and none may be left over.
pub fn load(dir: &Path, config: &ModelConfig) -> Result<Adapter> {
    let config_path = dir.join(CONFIG_FILE);
    let text = std::fs::read(&config_path).with_context(|| config_path.display().to_string())?;
    let peft: Map<String, Value> = serde_json::from_slice(&text).with_context(|| config_path.display().to_string())?;
    let path = dir.join(TENSORS_FILE);
    let file = map(&path)?;
    let tensors = SafeTensors::deserialize(&file).with_context(|| path.display().to_string())?;
    let mut left: std::collections::BTreeSet<String> = tensors.names().into_iter().map(str::to_string).collect();
    let targets: Vec<Projection> =
        Projection::ALL.into_iter().filter(|&p| left.contains(&tensor_name(0, p, "A"))).collect();
    ensure!(
        !targets.is_empty(),
        "{}: no LoRA matrix of layer 0 ({}, …)",
        path.display(),
        tensor_name(0, Projection::Q, "A")
    );
    let settings = settings(&peft, targets).with_context(|| config_path.display().to_string())?;
    let layout = LoraLayout::new(config, &settings.lora_config());
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let mut values = vec![0.0; layout.len];
        for entry in layout.entries() {
            for (matrix, range, shape) in matrices(entry) {
                let name = tensor_name(layer, entry.projection, matrix);
                let view = tensors.tensor(&name).with_context(|| format!("{}: {name}", path.display()))?;
                read(&view, shape, &mut values[range]).with_context(|| format!("{}: {name}", path.display()))?;
                left.remove(&name);
            }
        }
        layers.push(values);
    }
    ensure!(left.is_empty(), "{}: tensors that this model has no place for: {left:?}", path.display());
    Ok(Adapter { settings, layers })
}

fn matrices(entry: &LoraEntry) -> [(&'static str, std::ops::Range<usize>, [usize; 2]); 2] {
    [("A", entry.a.clone(), entry.a_shape), ("B", entry.b.clone(), entry.b_shape)]
}

/// Reads the numbers; what changes the math and is not done here is refused by name.
fn settings(peft: &Map<String, Value>, targets: Vec<Projection>) -> Result<AdapterSettings> {
    let is_off = |v: &Value| {
        v.is_null()
            || v == false
            || v == "none"
            || v.as_object().is_some_and(Map::is_empty)
            || v.as_array().is_some_and(Vec::is_empty)
    };
    let refused = [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "megatron_config",
    ];
    for key in refused {
        if let Some(value) = peft.get(key).filter(|v| !is_off(v)) {
            bail!("{key} is {value}; allowed: what leaves plain LoRA on the seven projections");
        }
    }
    let peft_type = peft.get("peft_type").and_then(Value::as_str).unwrap_or("(none)");
    ensure!(peft_type == "LORA", "peft_type is {peft_type}; allowed: LORA");
    let number =
        |key: &str| peft.get(key).and_then(Value::as_f64).with_context(|| format!("{key} is missing or no number"));
    let lora_rank = number("r")? as usize;
    ensure!(lora_rank > 0, "r is 0");
    let use_rslora = peft.get("use_rslora").is_some_and(|v| v == true);
    Ok(AdapterSettings {
        lora_rank,
        alpha: number("lora_alpha")?,
        dropout: number("lora_dropout").unwrap_or(0.0) as f32,
        use_rslora,
        targets,
    })
}

fn read(view: &TensorView<'_>, shape: [usize; 2], out: &mut [f32]) -> Result<()> {
    ensure!(view.shape() == shape, "shape {:?}, should be {shape:?}", view.shape());
    let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => out
            .iter_mut()
            .zip(bytes.chunks_exact(4))
            .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Dtype::BF16 => {
            out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = bf16::from_bits(two(b)).to_f32())
        }
        Dtype::F16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = f16::from_bits(two(b)).to_f32()),
        other => bail!("dtype {other:?}; allowed: F32, BF16, F16"),
    }
    let bad = out.iter().find(|v| !v.is_finite());
    ensure!(bad.is_none(), "holds {bad:?}, not a finite number");
    Ok(())
}

/// Fails when a folder cannot be written, or has no room for the adapter.
pub fn check_room(adapter: &Adapter, dir: &Path) -> Result<()> {
    let bytes = adapter.layers.iter().map(|values| size_of_val(&values[..])).sum();
    atomic::beside_with_room(&dir.join(TENSORS_FILE), bytes).map(drop)
}

/// Writes both files, the tensors first: a folder with a config has its tensors. `base` is the model's path.
pub fn save(adapter: &Adapter, config: &ModelConfig, base: &Path, dir: &Path) -> Result<()> {
    let layout = LoraLayout::new(config, &adapter.settings.lora_config());
    let mut views = Vec::new();
    for (layer, values) in adapter.layers.iter().enumerate() {
        for entry in layout.entries() {
            for (matrix, range, shape) in matrices(entry) {
                let view = TensorView::new(Dtype::F32, shape.to_vec(), bytemuck::cast_slice(&values[range]))?;
                views.push((tensor_name(layer, entry.projection, matrix), view));
            }
        }
    }
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    atomic::write(&dir.join(TENSORS_FILE), &safetensors::serialize(views, Some(metadata))?)?;
    let settings = &adapter.settings;
    let alpha = if settings.alpha.fract() == 0.0 { json!(settings.alpha as i64) } else { json!(settings.alpha) };
    let peft = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.lora_rank,
        "lora_alpha": alpha,
        // Through f64 0.05 would be written as 0.05000000074505806.
        "lora_dropout": settings.dropout.to_string().parse::<f64>()?,
        "use_rslora": settings.use_rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "modules_to_save": null,
        "target_modules": settings.targets.iter().map(|p| p.name()).collect::<Vec<_>>(),
    });
    atomic::write(&dir.join(CONFIG_FILE), format!("{peft:#}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")).unwrap()
    }

    fn settings() -> AdapterSettings {
        let targets = vec![Projection::Q, Projection::Down];
        AdapterSettings { lora_rank: 4, alpha: 8.0, dropout: 0.05, use_rslora: true, targets }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = fresh(settings(), &config(), 42);
        save(&adapter, &config(), Path::new("base"), dir.path()).unwrap();
        assert_eq!(load(dir.path(), &config()).unwrap(), adapter);
        let json: Value = serde_json::from_slice(&std::fs::read(dir.path().join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!((&json["lora_dropout"], &json["lora_alpha"]), (&json!(0.05), &json!(8)));
    }

    #[test]
    fn a_fresh_adapter_is_kaiming_uniform_and_zero() {
        let adapter = fresh(settings(), &config(), 42);
        let layout = LoraLayout::new(&config(), &settings().lora_config());
        let entry = layout.get(Projection::Down).unwrap();
        let a = &adapter.layers[1][entry.a.clone()];
        let bound = 1.0 / 128f32.sqrt();
        assert!(a.iter().all(|v| v.abs() <= bound));
        let variance = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.15, "variance {variance}");
        assert!(adapter.layers[1][entry.b.clone()].iter().all(|&v| v == 0.0));
        assert_ne!(adapter.layers[0], adapter.layers[1]);
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        save(&fresh(settings(), &config(), 1), &config(), Path::new("base"), dir.path()).unwrap();
        let path = dir.path().join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
        assert!(format!("{:#}", load(dir.path(), &config()).unwrap_err()).contains("use_dora is true"));
    }
}
