//! `--shape` and the sizes beside it, which stand in the place of a recipe.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::Value;

use crate::files;
use crate::model::shapes;
use crate::model::spec::ModelSpec;
use crate::recipe::{self, Job};

use super::usage;

/// Returns the help of `quantize --shape`.
pub fn made_up_help() -> String {
    format!(
        "In the place of a model: made-up weights of a shape, with a config.json beside the shards, for `bench step \
         --shards`. {}",
        help()
    )
}

/// Returns the help of `--shape`.
pub fn help() -> String {
    format!("A folder with a config.json, or one of {}", shapes::names())
}

/// Returns the model that `--shape` names, with fewer layers if `layers` says so.
pub fn spec(name: &str, layers: Option<u32>) -> Result<ModelSpec> {
    let folder = path(name)?;
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

/// Returns the text of the config.json of the model that `--shape` names.
pub fn config(name: &str) -> Result<Vec<u8>> {
    let file = path(name)?.join("config.json");
    match file.exists() {
        true => files::read(&file, files::MAX_SETTINGS_BYTES),
        false => {
            let config = shapes::config(name, None).map_err(|error| usage(&error.to_string()))?;
            Ok((serde_json::to_string_pretty(&config)? + "\n").into_bytes())
        }
    }
}

fn path(name: &str) -> Result<PathBuf> {
    recipe::read_path(name).map_err(|error| usage(&format!("--shape: found {name}: {error}")))
}

/// Returns the folder of a job's made-up shards, which has no default; `option` names it on the command line.
pub fn folder(job: &Job, option: &str) -> Result<PathBuf> {
    job.shards.clone().ok_or_else(|| usage(&format!("{option}: found auto; made-up shards need a folder of their own")))
}

/// Returns the keys that `--seq`, `--micro-batch` and `--accum` set.
pub fn keys([seq, micro_batch, accum]: [u32; 3]) -> Vec<(&'static str, Value)> {
    vec![
        ("data.max_length", seq.into()),
        ("training.per_device_train_batch_size", micro_batch.into()),
        ("training.gradient_accumulation_steps", accum.into()),
    ]
}
