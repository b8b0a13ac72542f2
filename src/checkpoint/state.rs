//! Checkpoints of training: `checkpoint-<step>/` in the output folder, from which a run goes on as if it had never
//! stopped.
//!
//! | file | what is in it |
//! |---|---|
//! | `adapter_model.safetensors`, `adapter_config.json` | the adapter after that step, in f32, as PEFT loads it |
//! | `optimizer.safetensors` | AdamW's means, by the name of the matrix with `.exp_avg` or `.exp_avg_sq` behind it |
//! | `metrics.jsonl` | all lines so far |
//! | `state.json` | everything else ([`State`]), and size and digest of the other files |
//!
//! The values are whole tensors, so that any number of ranks can go on from them. The folder is written under another
//! name, synced, read back and compared, `state.json` last, and renamed: a folder of this name with a `state.json` is
//! complete. A file in it that was damaged later is found by its digest, and `state.json` by its own checksum.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::adapter::{self, AdapterSettings, CONFIG_FILE, TENSORS_FILE};
use super::atomic;
use super::output::METRICS_FILE;
use super::output::record::RunIdentity;
use crate::files::{self, map};
use crate::model::spec::ModelSpec;
use crate::optim::loss_scale::LossScaler;

/// Name of the file that is written last.
pub const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const EXP_AVG: &str = ".exp_avg";
const EXP_AVG_SQ: &str = ".exp_avg_sq";
/// Beginning of a checkpoint's name; the number of the step follows.
const PREFIX: &str = "checkpoint-";
/// Names of a checkpoint that is being written, and of one that another of the same step replaces.
const NEW: &str = ".fsdp-qlora-checkpoint-new";
const OLD: &str = ".fsdp-qlora-checkpoint-old";
/// Version of the files' format.
const FORMAT: u32 = 2;

/// The values that training changes, one list for each layer, as the layout of trainables has them.
pub struct Values<'a> {
    pub settings: &'a AdapterSettings,
    pub adapter: Vec<&'a [f32]>,
    pub exp_avg: Vec<&'a [f32]>,
    pub exp_avg_sq: Vec<&'a [f32]>,
}

/// How far training has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Number of steps that have been taken. The place in the data, the epoch and the learning rate follow from it.
    pub step: usize,
    /// Number of updates: in fp16 a step may overflow and update nothing.
    pub num_updates: u32,
    /// The last step that made an update; 0 before the first.
    pub last_update: usize,
    /// True once an update with a learning rate above 0 was made: from then on lora_A has a gradient.
    pub has_learned: bool,
    /// Number of steps that were skipped because their loss or gradient was not finite. An overflow that lowers the loss
    /// scale is not one of them.
    pub num_skipped: usize,
    /// Number of steps that were skipped since the last update.
    pub skipped_in_a_row: usize,
    pub loss_scaler: LossScaler,
    /// True if the evaluation that is due after the step was abandoned.
    pub owes_evaluation: bool,
    pub evaluations: Evaluations,
}

/// A held-out loss, and the step after which it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scored {
    pub step: usize,
    pub eval_loss: f64,
}

/// The results of a run's evaluations, without the one before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluations {
    /// The best of all.
    pub best: Option<Scored>,
    /// The best of those whose adapter is in a checkpoint, if the run looks for it.
    pub best_checkpoint: Option<Scored>,
    /// Number of evaluations in a row that were no better than the best before them.
    pub num_no_better: usize,
}

/// Content of [`STATE_FILE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    format: u32,
    program: String,
    /// Time in UTC.
    written: String,
    pub progress: Progress,
    /// The run, as `run.json` has it.
    pub run: RunIdentity,
    files: Vec<Digest>,
    /// XXH3 of the other keys as JSON, in hexadecimal.
    checksum: String,
}

impl State {
    fn with_checksum(mut self) -> Result<State> {
        self.checksum.clear();
        self.checksum = format!("{:016x}", xxh3_64(&serde_json::to_vec(&self)?));
        Ok(self)
    }

    /// Time at which the checkpoint was written, in UTC.
    pub fn written(&self) -> &str {
        &self.written
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Digest {
    name: String,
    bytes: u64,
    /// XXH3 of 64 bits, in hexadecimal.
    xxh3: String,
}

/// A checkpoint that is to be written.
pub struct Checkpoint<'a> {
    pub values: &'a Values<'a>,
    pub progress: Progress,
    pub run: &'a RunIdentity,
    pub spec: &'a ModelSpec,
    /// Path of the base for `adapter_config.json`.
    pub base: &'a Path,
    /// Lines of `metrics.jsonl` up to this step.
    pub metrics: &'a [u8],
}

impl Checkpoint<'_> {
    /// Writes the checkpoint into an output folder and returns its path. An older one of the same step is replaced.
    pub fn write(&self, output: &Path) -> Result<PathBuf> {
        let (new, old) = (output.join(NEW), output.join(OLD));
        remove(&new)?;
        remove(&old)?;
        std::fs::create_dir_all(&new).with_context(|| new.display().to_string())?;
        let Values { settings, adapter, exp_avg, exp_avg_sq } = self.values;
        adapter::save_values(settings, adapter, self.spec, self.base, &new)?;
        let views = |layers, suffix| adapter::views(settings, self.spec, layers, suffix);
        let moments = || Ok::<_, anyhow::Error>([views(exp_avg, EXP_AVG)?, views(exp_avg_sq, EXP_AVG_SQ)?].concat());
        adapter::write_tensors(&new.join(OPTIMIZER_FILE), moments()?)?;
        atomic::write_synced(&new.join(METRICS_FILE), self.metrics)?;
        check_written(&new.join(TENSORS_FILE), views(adapter, "")?)?;
        check_written(&new.join(OPTIMIZER_FILE), moments()?)?;
        let names = [TENSORS_FILE, CONFIG_FILE, OPTIMIZER_FILE, METRICS_FILE];
        let state = State {
            format: FORMAT,
            program: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
            written: super::output::record::now(),
            progress: self.progress,
            run: self.run.clone(),
            files: names.iter().map(|name| Digest::of(&new, name)).collect::<Result<_>>()?,
            checksum: String::new(),
        };
        let state = state.with_checksum()?;
        atomic::sync_folder(&new)?;
        let mut text = serde_json::to_vec_pretty(&state)?;
        text.push(b'\n');
        atomic::write_synced(&new.join(STATE_FILE), &text)?;
        atomic::sync_folder(&new)?;
        let path = path_of(output, self.progress.step);
        if path.symlink_metadata().is_ok() {
            ensure!(
                path.join(STATE_FILE).exists(),
                "{}: something that is no checkpoint is in its place",
                path.display()
            );
            rename(&path, &old)?;
        }
        // The next checkpoint would remove the older one of this step where it lies now.
        rename(&new, &path).inspect_err(|_| drop(std::fs::rename(&old, &path)))?;
        atomic::sync_folder(output)?;
        remove(&old)?;
        Ok(path)
    }
}

/// Returns the path of a step's checkpoint.
pub fn path_of(output: &Path, step: usize) -> PathBuf {
    output.join(format!("{PREFIX}{step}"))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).with_context(|| format!("{}: cannot be put in place", to.display()))
}

/// Copies a checkpoint to its place in another output folder.
fn copy(from: &Path, output: &Path, to: &Path) -> Result<()> {
    let new = output.join(NEW);
    remove(&new)?;
    std::fs::create_dir_all(&new).with_context(|| new.display().to_string())?;
    for name in [TENSORS_FILE, CONFIG_FILE, OPTIMIZER_FILE, METRICS_FILE, STATE_FILE] {
        let to = new.join(name);
        let copied = std::fs::copy(from.join(name), &to).and_then(|_| std::fs::File::open(&to)?.sync_all());
        copied.with_context(|| to.display().to_string())?;
    }
    atomic::sync_folder(&new)?;
    remove(to)?;
    rename(&new, to)?;
    atomic::sync_folder(output)
}

/// Removes a folder if it is there, its marker first, so that a half-removed one is not taken for whole.
fn remove(dir: &Path) -> Result<()> {
    let is_gone = |path: &Path, removed: std::io::Result<()>| match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", path.display()))
        }
        _ => Ok(()),
    };
    let marker = dir.join(STATE_FILE);
    is_gone(&marker, std::fs::remove_file(&marker))?;
    is_gone(dir, std::fs::remove_dir_all(dir))
}

/// Puts a complete checkpoint in its place that a killed run has left under another name, and removes the rest.
pub fn recover(output: &Path) -> Result<()> {
    for left in [NEW, OLD].map(|name| output.join(name)) {
        if let Ok(state) = read_state(&left) {
            let path = path_of(output, state.progress.step);
            if !path.exists() {
                rename(&left, &path)?;
                atomic::sync_folder(output)?;
            }
        }
        remove(&left)?;
    }
    Ok(())
}

/// Reads the state of a checkpoint, and none of its other files.
pub fn read_state(checkpoint: &Path) -> Result<State> {
    let file = checkpoint.join(STATE_FILE);
    ensure!(file.exists(), "{}: no {STATE_FILE}, so this is no complete checkpoint", checkpoint.display());
    let value: serde_json::Value = files::read_json(&file, files::MAX_SETTINGS_BYTES)?;
    let format = &value["format"];
    ensure!(*format == FORMAT, "{}: format {format}, this program reads {FORMAT}", file.display());
    let state: State = serde_json::from_value(value).with_context(|| file.display().to_string())?;
    ensure!(state.clone().with_checksum()? == state, "{}: damaged: its checksum is wrong", file.display());
    Ok(state)
}

/// Returns whether a run could go on from a checkpoint.
pub fn is_of(checkpoint: &Path, run: &RunIdentity) -> bool {
    read_state(checkpoint).is_ok_and(|state| run.obstacles(&state.run).is_empty())
}

/// Lists the complete checkpoints of an output folder, the newest first, with their steps.
pub fn list(output: &Path) -> Vec<(usize, PathBuf)> {
    let entries = std::fs::read_dir(output).into_iter().flatten().flatten();
    let mut found: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            // Neither `checkpoint-010` nor a folder of another program.
            let path = path_of(output, step);
            (path == entry.path() && path.join(STATE_FILE).exists()).then_some((step, path))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found
}

/// Removes the oldest of the checkpoints up to that of a step, if that one is there, so that `limit` of them are left, or more if the
/// newest and the `best`, which always stay, are more.
pub fn prune(output: &Path, step: usize, limit: usize, best: Option<usize>) -> Result<()> {
    let found: Vec<_> = list(output).into_iter().filter(|(found, _)| *found <= step).collect();
    if found.first().is_none_or(|newest| newest.0 != step) {
        return Ok(());
    }
    let stays = |at: usize| at == step || best == Some(at);
    let num_staying = found.iter().filter(|(at, _)| stays(*at)).count();
    let excess = found.len().saturating_sub(limit.max(num_staying));
    // A checkpoint leaves its name before it goes, so that a half-removed one is in nobody's way.
    let old = output.join(OLD);
    found.iter().rev().filter(|(at, _)| !stays(*at)).take(excess).try_for_each(|(_, path)| {
        remove(&old)?;
        rename(path, &old)?;
        remove(&old)
    })
}

/// A checkpoint that was found complete, with the digests that it names.
pub struct Found {
    pub path: PathBuf,
    pub state: State,
}

impl Found {
    /// Reads the state of a checkpoint, and the other files for their digests.
    ///
    /// # Errors
    /// A file is missing or is not as it was written; the format is that of another version.
    pub fn open(path: &Path) -> Result<Found> {
        let state = read_state(path)?;
        for digest in &state.files {
            let found = Digest::of(path, &digest.name)?;
            ensure!(
                found == *digest,
                "{}: damaged: it has {} bytes with digest {}, and {} bytes with digest {} were written",
                path.join(&digest.name).display(),
                found.bytes,
                found.xxh3,
                digest.bytes,
                digest.xxh3
            );
        }
        let missing = [TENSORS_FILE, CONFIG_FILE, OPTIMIZER_FILE, METRICS_FILE]
            .into_iter()
            .find(|name| state.files.iter().all(|digest| digest.name != *name));
        ensure!(missing.is_none(), "{}: {STATE_FILE} does not list {}", path.display(), missing.unwrap_or_default());
        Ok(Found { path: path.into(), state })
    }

    /// Copies the best checkpoint that this one knows of into an output folder, from beside this one, unless it is there
    /// already. If neither place has it, `say` is told so, and the run goes on without it.
    pub fn bring_best(&mut self, output: &Path, say: &mut dyn FnMut(String)) -> Result<()> {
        let best = &mut self.state.progress.evaluations.best_checkpoint;
        let Some(Scored { step, .. }) = *best else { return Ok(()) };
        let (place, beside) = (path_of(output, step), path_of(self.path.parent().unwrap_or(Path::new("")), step));
        let run = &self.state.run;
        let look = |path: &Path| {
            let obstacles = run.obstacles(&Found::open(path)?.state.run);
            ensure!(obstacles.is_empty(), "{} is of another run ({obstacles})", path.display());
            Ok(())
        };
        match (look(&place), look(&beside)) {
            (Ok(()), _) => {}
            (_, Ok(())) => copy(&beside, output, &place)?,
            (Err(why), _) => {
                say(format!(
                    "the best checkpoint so far, of step {step}, is lost ({why:#}): those from here on are compared"
                ));
                *best = None;
            }
        }
        Ok(())
    }

    /// Returns the lines of `metrics.jsonl` at that step.
    pub fn metrics(&self) -> Result<Vec<u8>> {
        let path = self.path.join(METRICS_FILE);
        std::fs::read(&path).with_context(|| path.display().to_string())
    }

    /// Reads the values of each layer: the adapter's, and AdamW's two. Fails if the adapter has other settings than
    /// these.
    pub fn values(
        &self,
        settings: &AdapterSettings,
        spec: &ModelSpec,
        mut each: impl FnMut(usize, [Vec<f32>; 3]) -> Result<()>,
    ) -> Result<()> {
        let (adapter, optimizer) = (self.path.join(TENSORS_FILE), self.path.join(OPTIMIZER_FILE));
        let files = [map(&adapter)?, map(&optimizer)?];
        let open =
            |i: usize, path: &Path| SafeTensors::deserialize(&files[i]).with_context(|| path.display().to_string());
        let (adapter, optimizer, lora) = (open(0, &adapter)?, open(1, &optimizer)?, settings.lora_config());
        for (i, (layer, modules)) in spec.layers.iter().zip(&lora.layers).enumerate() {
            let read = |tensors: &SafeTensors<'_>, suffix| {
                adapter::layer_values(layer, modules, suffix, |name| Ok(tensors.tensor(name)?))
            };
            let values = [read(&adapter, "")?, read(&optimizer, EXP_AVG)?, read(&optimizer, EXP_AVG_SQ)?];
            each(i, values).with_context(|| self.path.display().to_string())?;
        }
        Ok(())
    }
}

impl Digest {
    fn of(dir: &Path, name: &str) -> Result<Digest> {
        ensure!(Path::new(name).file_name().is_some_and(|file| file == name), "{}: a file {name:?}", dir.display());
        let path = dir.join(name);
        let (bytes, digest) = files::digest(&path)?;
        Ok(Digest { name: name.into(), bytes, xxh3: format!("{digest:016x}") })
    }
}

/// Reads a file of tensors back and compares it with what it should hold.
fn check_written(path: &Path, views: Vec<(String, TensorView<'_>)>) -> Result<()> {
    let file = map(path)?;
    let tensors = SafeTensors::deserialize(&file).with_context(|| path.display().to_string())?;
    for (name, view) in views {
        let is_equal = tensors.tensor(&name).is_ok_and(|found| found == view);
        ensure!(is_equal, "{}: {name} does not read as it was written", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
