//! `--shape` and the sizes beside it, which stand in the place of a recipe.

use anyhow::Result;
use serde_json::Value;

use crate::model::shapes;
use crate::model::spec::ModelSpec;
use crate::recipe;

use super::usage;

/// Returns the help of `--shape`.
pub fn help() -> String {
    format!("A folder with a config.json, or one of {}", shapes::names())
}

/// Returns the model that `--shape` names, with fewer layers if `layers` says so.
pub fn spec(name: &str, layers: Option<u32>) -> Result<ModelSpec> {
    let folder = recipe::read_path(name).map_err(|error| usage(&format!("--shape: found {name}: {error}")))?;
    let mut spec = match folder.join("config.json").exists() {
        true => ModelSpec::load(&folder)?,
        false => shapes::named(name, None).map_err(|error| usage(&error.to_string()))?,
    };
    let all = spec.num_layers();
    match layers.map_or(all, |layers| layers as usize) {
        layers if (1..=all).contains(&layers) => {
            spec.layers.truncate(layers);
            Ok(spec)
        }
        layers => Err(usage(&format!("--layers: found {layers}, allowed: 1 to the {all} of {name}"))),
    }
}

/// Returns the keys that `--seq`, `--micro-batch` and `--accum` set.
pub fn keys([seq, micro_batch, accum]: [u32; 3]) -> Vec<(&'static str, Value)> {
    vec![
        ("data.max_length", seq.into()),
        ("training.per_device_train_batch_size", micro_batch.into()),
        ("training.gradient_accumulation_steps", accum.into()),
    ]
}
