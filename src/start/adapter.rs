//! The adapter that a run starts from: the one that its job names, or a new one.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};

use crate::checkpoint::adapter::{self, Adapter, AdapterSettings};
use crate::model::spec::ModelSpec;
use crate::model::trainable::LayerTrainables;
use crate::recipe::{Job, LoraJob};
use crate::train::log::bytes;

use super::{Start, host_memory};

impl Start<'_> {
    /// Returns the adapter that a job names, and tells what the user should know about it.
    pub fn named_adapter(&self, job: &Job, config: &ModelSpec) -> Result<Option<Adapter>> {
        let Some(dir) = &job.lora.adapter else { return Ok(None) };
        self.adapter_at(dir, job, config).map(Some)
    }

    fn adapter_at(&self, dir: &Path, job: &Job, config: &ModelSpec) -> Result<Adapter> {
        let name = job.command.name_of("lora.adapter").unwrap_or_default();
        let adapter = adapter::load(dir, config).with_context(|| name.to_string())?;
        for remark in adapter::remarks(dir, &job.model)? {
            self.log.warn(format!("{name}: {remark}"));
        }
        Ok(adapter)
    }

    /// Returns the adapters of a command that uses them in turn and trains none, and tells what the user should know about
    /// them.
    ///
    /// # Errors
    /// One differs from the first in more than its values, so that it needs other memory.
    pub fn adapters_in_turn(&self, job: &Job, config: &ModelSpec) -> Result<Vec<Adapter>> {
        let mut adapters: Vec<Adapter> = Vec::new();
        for dir in &job.adapters {
            let mut adapter = self.adapter_at(dir, job, config)?;
            adapter.settings.dropout = 0.0;
            if let Some(first) = adapters.first() {
                ensure!(
                    adapter.settings.lora_config() == first.settings.lora_config(),
                    "--adapter: {} and {} differ in r, alpha or target modules; adapters that take turns in a run have them \
                     in common; help: run the command once for each",
                    job.adapters[0].display(),
                    dir.display()
                );
            }
            adapters.push(adapter);
        }
        Ok(adapters)
    }

    /// Returns the adapter that training starts from: the one that the job names, with the job's dropout, or a new
    /// one.
    pub fn adapter_to_train(&self, job: &Job, config: &ModelSpec) -> Result<Adapter> {
        if let Some(mut adapter) = self.named_adapter(job, config)? {
            adapter.settings.dropout = job.lora.dropout;
            return Ok(adapter);
        }
        Ok(adapter::fresh(new_settings(&job.lora, config)?, config, job.training.seed))
    }
}

/// Returns the settings of the adapter that a job trains, without its values: of the one that it names, with the
/// job's dropout, or of a new one, whatever memory that takes.
pub fn planned_settings(lora: &LoraJob, config: &ModelSpec) -> Result<AdapterSettings> {
    match &lora.adapter {
        Some(dir) => {
            let mut settings = adapter::load(dir, config).context("lora.adapter")?.settings;
            settings.dropout = lora.dropout;
            Ok(settings)
        }
        None => settings(lora, config),
    }
}

/// Returns the settings of a new adapter. Fails where it is larger than the memory that is available, since it is
/// made before the plan knows of it.
pub fn new_settings(lora: &LoraJob, config: &ModelSpec) -> Result<AdapterSettings> {
    let settings = settings(lora, config)?;
    let layers = config.layers.iter().zip(settings.lora_config().layers);
    let num_values: usize = layers.map(|(layer, modules)| LayerTrainables::new(layer, &modules).len()).sum();
    let needed = num_values as f64 * size_of::<f32>() as f64;
    let there = host_memory::available_bytes();
    ensure!(
        needed < there as f64,
        "lora.r: the adapter takes {}, and {} of host memory are available: lower lora.r or the ranks of lora.rank_pattern, or \
         name fewer modules in lora.target_modules",
        bytes(needed as usize),
        bytes(there)
    );
    Ok(settings)
}

fn settings(lora: &LoraJob, config: &ModelSpec) -> Result<AdapterSettings> {
    AdapterSettings::new(lora.keys.clone(), lora.dropout, config).map_err(|error| anyhow!("lora.{error:#}"))
}
