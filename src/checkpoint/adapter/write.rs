//! Writing an adapter as PEFT reads it.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use super::{Adapter, AdapterSettings, CONFIG_FILE, TENSORS_FILE, tensor_name};
use crate::checkpoint::{atomic, folder};
use crate::model::spec::{LayerSpec, ModelSpec, ModuleId, TEXT_TOWER};
use crate::model::targets::{Layers, Modules};
use crate::model::trainable::{LayerTrainables, LoraModule, Trainable};

/// All integers below this are exact in f64, and fit into i64.
const EXACT_INTEGERS: f64 = (1u64 << 53) as f64;

/// Returns PEFT's keys that say which modules have the adapter. Where other towers of the model have modules of these
/// names too, they are a pattern of whole names, or all whole names.
fn selection(settings: &AdapterSettings, spec: &ModelSpec) -> Result<Map<String, Value>> {
    let AdapterSettings { keys, modules, .. } = settings;
    let mut map = Map::new();
    let is_plain = keys.excluded.is_none() && keys.layers == Layers::default();
    let ends = match &keys.targets {
        Modules::AllLinear => Some(settings.lora_config().targets()),
        Modules::Names(names) => names.iter().map(|name| ModuleId::from_name(name)).collect(),
        Modules::Pattern(_) => None,
    };
    let targets = match (&keys.targets, ends) {
        (_, Some(ends)) if spec.is_text_tower && is_plain => {
            let ends: Vec<_> = ends.iter().map(|id| id.name()).collect();
            json!(format!(r"{}\..*\.({})", TEXT_TOWER.replace('.', r"\."), ends.join("|")))
        }
        _ if spec.is_text_tower => {
            let layers = spec.layers.iter().zip(modules);
            let of_layer = |(layer, modules): (&LayerSpec, &Vec<LoraModule>)| -> Vec<String> {
                modules.iter().filter_map(|module| Some(layer.module(module.id)?.name.clone())).collect()
            };
            json!(layers.flat_map(of_layer).collect::<Vec<_>>())
        }
        (Modules::AllLinear, Some(ends)) => json!(ends),
        (targets, _) => serde_json::to_value(targets)?,
    };
    map.insert("target_modules".into(), targets);
    if !spec.is_text_tower {
        let excluded = keys.excluded.as_ref().map(|excluded| ("exclude_modules", json!(excluded)));
        let layers = keys.layers.indices.as_ref().map(|indices| ("layers_to_transform", json!(indices)));
        let patterns = &keys.layers.patterns;
        let patterns = (!patterns.is_empty()).then(|| ("layers_pattern", json!(patterns)));
        map.extend([excluded, layers, patterns].into_iter().flatten().map(|(key, value)| (key.to_string(), value)));
    }
    if !keys.rank_pattern.is_empty() {
        map.insert("rank_pattern".into(), json!(keys.rank_pattern));
    }
    if !keys.alpha_pattern.is_empty() {
        map.insert("alpha_pattern".into(), json!(keys.alpha_pattern));
    }
    Ok(map)
}

/// Returns one list of values for each layer, in the places of the adapter's matrices, as tensors. `suffix` follows
/// PEFT's name of the matrix.
pub fn views<'a, V: AsRef<[f32]>>(
    settings: &AdapterSettings,
    spec: &ModelSpec,
    layers: &'a [V],
    suffix: &str,
) -> Result<Vec<(String, TensorView<'a>)>> {
    let mut views = Vec::new();
    for ((layer, modules), values) in spec.layers.iter().zip(&settings.modules).zip(layers) {
        for Trainable { module, kind, shape, range } in LayerTrainables::new(layer, modules).list() {
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

/// Writes both files durably into a folder that has no adapter yet; [`crate::checkpoint::output`] puts the folder in
/// the place of another result. `base` is the model's path; that of a snapshot in the hub's cache is written as the
/// model's id and commit.
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
    let keys = &settings.keys;
    let is_integer = keys.alpha.fract() == 0.0 && keys.alpha < EXACT_INTEGERS;
    let alpha = if is_integer { json!(keys.alpha as i64) } else { json!(keys.alpha) };
    // An adapter of a model of the hub names it as PEFT does, so that it serves wherever that can be reached.
    let (base, revision) = match folder::id_and_commit(base) {
        Some((id, commit)) => (json!(id), json!(commit)),
        None => (json!(base), Value::Null),
    };
    let mut peft = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": keys.r,
        "lora_alpha": alpha,
        // Through f64 0.05 would be written as 0.05000000074505806.
        "lora_dropout": settings.dropout.to_string().parse::<f64>()?,
        "use_rslora": keys.use_rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": settings.init_lora_weights,
        "modules_to_save": null,
    });
    if let Some(map) = peft.as_object_mut() {
        map.extend(selection(settings, spec)?);
    }
    atomic::write_synced(&dir.join(CONFIG_FILE), format!("{peft:#}\n").as_bytes()).map(drop)
}
