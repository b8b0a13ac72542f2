//! Writing an adapter as PEFT reads it.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::{Adapter, AdapterSettings, CONFIG_FILE, TENSORS_FILE, tensor_name};
use crate::checkpoint::atomic;
use crate::model::spec::{ModelSpec, TEXT_TOWER};
use crate::model::trainable::{LayerTrainables, Trainable};

/// Names of modules, or a pattern of their paths where other towers of the model have modules of these names too.
fn target_modules(settings: &AdapterSettings, spec: &ModelSpec) -> Value {
    let names: Vec<_> = settings.targets.iter().map(|module| module.name()).collect();
    match spec.is_text_tower {
        false => json!(names),
        true => json!(format!(r"{}\..*\.({})", TEXT_TOWER.replace('.', r"\."), names.join("|"))),
    }
}

/// Returns one list of values for each layer, in the places of the adapter's matrices, as tensors. `suffix` follows
/// PEFT's name of the matrix.
pub fn views<'a, V: AsRef<[f32]>>(
    settings: &AdapterSettings,
    spec: &ModelSpec,
    layers: &'a [V],
    suffix: &str,
) -> Result<Vec<(String, TensorView<'a>)>> {
    let (lora, mut views) = (settings.lora_config(), Vec::new());
    for (layer, values) in spec.layers.iter().zip(layers) {
        for Trainable { module, kind, shape, range } in LayerTrainables::new(layer, &lora).list() {
            let module = layer.module(*module).context("a trainable without a module")?;
            let view =
                TensorView::new(Dtype::F32, shape.to_vec(), bytemuck::cast_slice(&values.as_ref()[range.clone()]))?;
            views.push((tensor_name(module, *kind) + suffix, view));
        }
    }
    Ok(views)
}

/// Writes a file of tensors durably. The values go straight to the file, because a copy of all of them may not fit
/// into memory.
pub fn write_tensors(path: &Path, views: Vec<(String, TensorView<'_>)>) -> Result<()> {
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(File::open(path)?.sync_all()?))
        .with_context(|| format!("{}: cannot be written", path.display()))
}

/// Writes both files durably into a folder that has no adapter yet: how the folder takes the place of another result
/// is the matter of [`crate::checkpoint::output`]. `base` is the model's path.
pub fn save(adapter: &Adapter, spec: &ModelSpec, base: &Path, dir: &Path) -> Result<()> {
    save_values(&adapter.settings, &adapter.layers, spec, base, dir)
}

/// Writes both files of an adapter with these values of each layer, as [`save`] does.
pub fn save_values<V: AsRef<[f32]>>(
    settings: &AdapterSettings,
    layers: &[V],
    spec: &ModelSpec,
    base: &Path,
    dir: &Path,
) -> Result<()> {
    write_tensors(&dir.join(TENSORS_FILE), views(settings, spec, layers, "")?)?;
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
        "init_lora_weights": settings.init_lora_weights,
        "modules_to_save": null,
        "target_modules": target_modules(settings, spec),
    });
    atomic::write_synced(&dir.join(CONFIG_FILE), format!("{peft:#}\n").as_bytes()).map(drop)
}
