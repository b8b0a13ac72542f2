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

use super::adapter::{self, Adapter, AdapterSettings, CONFIG_FILE, TENSORS_FILE};
use super::atomic;
use super::output::METRICS_FILE;
use super::output::record::RunIdentity;
use super::source::map;
use crate::files;
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
const FORMAT: u32 = 1;

/// The values that training changes, one list for each layer, as the layout of trainables has them.
pub struct Values {
    pub adapter: Adapter,
    pub exp_avg: Vec<Vec<f32>>,
    pub exp_avg_sq: Vec<Vec<f32>>,
}

impl Values {
    /// Makes room for the values of training from this adapter.
    pub fn like(adapter: &Adapter) -> Values {
        let zeros = || adapter.layers.iter().map(|values| vec![0.0; values.len()]).collect();
        Values { adapter: adapter.clone(), exp_avg: zeros(), exp_avg_sq: zeros() }
    }
}

/// How far training has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Number of steps that have been taken. The place in the data, the epoch and the learning rate follow from it.
    pub step: usize,
    /// Number of updates: in fp16 a step may overflow and update nothing.
    pub num_updates: u32,
    /// True once an update with a learning rate above 0 was made: from then on lora_A has a gradient.
    pub has_learned: bool,
    pub loss_scaler: LossScaler,
    /// True if the evaluation that is due after the step was abandoned.
    #[serde(default)]
    pub owes_evaluation: bool,
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
    pub values: &'a Values,
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
        let Values { adapter, exp_avg, exp_avg_sq } = self.values;
        adapter::save(adapter, self.spec, self.base, &new)?;
        let views = |layers, suffix| adapter::views(&adapter.settings, self.spec, layers, suffix);
        let moments = || Ok::<_, anyhow::Error>([views(exp_avg, EXP_AVG)?, views(exp_avg_sq, EXP_AVG_SQ)?].concat());
        adapter::write_tensors(&new.join(OPTIMIZER_FILE), moments()?)?;
        atomic::write_synced(&new.join(METRICS_FILE), self.metrics)?;
        check_written(&new.join(TENSORS_FILE), views(&adapter.layers, "")?)?;
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
        rename(&new, &path)?;
        atomic::sync_folder(output)?;
        remove(&old)?;
        Ok(path)
    }
}

/// Returns the path of a step's checkpoint.
fn path_of(output: &Path, step: usize) -> PathBuf {
    output.join(format!("{PREFIX}{step}"))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).with_context(|| format!("{}: cannot be put in place", to.display()))
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

/// Removes the oldest of the checkpoints up to a step, so that `limit` of them are left.
pub fn prune(output: &Path, step: usize, limit: usize) -> Result<()> {
    let older = list(output).into_iter().filter(|(found, _)| *found <= step);
    older.skip(limit).try_for_each(|(_, path)| remove(&path))
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
                "{}: {} bytes with digest {}, written were {} bytes with digest {}",
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
        for (i, layer) in spec.layers.iter().enumerate() {
            let read = |tensors: &SafeTensors<'_>, suffix| {
                adapter::layer_values(layer, &lora, suffix, |name| Ok(tensors.tensor(name)?))
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
mod tests {
    use super::*;
    use crate::checkpoint::output::record::tests::identity;

    fn spec() -> ModelSpec {
        ModelSpec::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")).unwrap()
    }

    fn values() -> Values {
        let settings = adapter::tests::settings();
        let mut values = Values::like(&adapter::fresh(settings, &spec(), 42));
        values.exp_avg.iter_mut().flatten().enumerate().for_each(|(i, value)| *value = i as f32 * 1e-3);
        values.exp_avg_sq.iter_mut().flatten().enumerate().for_each(|(i, value)| *value = i as f32 * 1e-7);
        values
    }

    fn write(output: &Path, step: usize) -> PathBuf {
        let (values, run, spec) = (values(), identity(1.0), spec());
        let (num_updates, loss_scaler) = (5, LossScaler::new(true));
        let progress = Progress { step, num_updates, has_learned: true, loss_scaler, owes_evaluation: true };
        let base = Path::new("base");
        Checkpoint { values: &values, progress, run: &run, spec: &spec, base, metrics: b"{}\n" }.write(output).unwrap()
    }

    #[test]
    fn what_is_written_is_found_and_read() {
        let output = tempfile::tempdir().unwrap();
        let (spec, path) = (spec(), write(output.path(), 7));
        assert_eq!(list(output.path()), [(7, path.clone())]);
        let (found, values) = (Found::open(&path).unwrap(), values());
        assert_eq!((found.state.progress.step, found.metrics().unwrap()), (7, b"{}\n".to_vec()));
        assert_eq!(adapter::load(&path, &spec).unwrap(), values.adapter);
        let mut num_layers = 0;
        let each = |i: usize, [master, exp_avg, exp_avg_sq]: [Vec<f32>; 3]| {
            assert_eq!(
                [&master, &exp_avg, &exp_avg_sq],
                [&values.adapter.layers[i], &values.exp_avg[i], &values.exp_avg_sq[i]]
            );
            num_layers += 1;
            Ok(())
        };
        found.values(&values.adapter.settings, &spec, each).unwrap();
        assert_eq!(num_layers, spec.num_layers());
    }

    #[test]
    fn any_byte_that_changes_is_found() {
        let output = tempfile::tempdir().unwrap();
        let path = write(output.path(), 7);
        for name in [TENSORS_FILE, CONFIG_FILE, OPTIMIZER_FILE, METRICS_FILE] {
            let whole = std::fs::read(path.join(name)).unwrap();
            for at in (0..whole.len()).step_by(1 + whole.len() / 50).chain([whole.len() - 1]) {
                let mut flipped = whole.clone();
                flipped[at] ^= 1;
                for damaged in [&flipped[..], &whole[..at]] {
                    std::fs::write(path.join(name), damaged).unwrap();
                    let error = format!("{:#}", Found::open(&path).err().unwrap());
                    assert!(error.contains(name) && error.contains("written were"), "{error}");
                }
            }
            std::fs::write(path.join(name), whole).unwrap();
        }
        Found::open(&path).unwrap();
        std::fs::remove_file(path.join(OPTIMIZER_FILE)).unwrap();
        assert!(format!("{:#}", Found::open(&path).err().unwrap()).contains(OPTIMIZER_FILE));
        std::fs::remove_file(path.join(STATE_FILE)).unwrap();
        assert_eq!(list(output.path()), []);
    }

    #[test]
    fn a_state_that_was_damaged_says_nothing_else() {
        let output = tempfile::tempdir().unwrap();
        let path = write(output.path(), 7);
        let (whole, state) = (std::fs::read(path.join(STATE_FILE)).unwrap(), read_state(&path).unwrap());
        let mut refused = 0;
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(path.join(STATE_FILE), &damaged).unwrap();
            match read_state(&path) {
                Ok(found) => assert_eq!(found, state, "byte {at}: {}", String::from_utf8_lossy(&damaged)),
                Err(error) => {
                    assert!(format!("{error:#}").contains(STATE_FILE), "{error:#}");
                    refused += 1;
                }
            }
        }
        assert!(2 * refused > whole.len(), "{refused} of {} bytes matter", whole.len());
    }

    #[test]
    fn the_oldest_go_and_other_folders_stay() {
        let output = tempfile::tempdir().unwrap();
        for step in [2, 10, 4, 30] {
            write(output.path(), step);
        }
        std::fs::create_dir_all(output.path().join("checkpoint-best")).unwrap();
        std::fs::create_dir_all(output.path().join("checkpoint-3")).unwrap();
        let steps = || list(output.path()).iter().map(|(step, _)| *step).collect::<Vec<_>>();
        assert_eq!(steps(), [30, 10, 4, 2]);
        prune(output.path(), 10, 2).unwrap();
        assert_eq!(steps(), [30, 10, 4]);
        assert!(output.path().join("checkpoint-best").exists() && output.path().join("checkpoint-3").exists());
        let again = write(output.path(), 10);
        assert_eq!(list(output.path())[1], (10, again));
    }
}
