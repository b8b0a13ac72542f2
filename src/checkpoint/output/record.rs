//! `run.json`: the inputs of a run, and its state.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::super::atomic;
use crate::comm::host_name;
use crate::comm::watch::{self, End};
use crate::files;

/// Name of the file.
pub const RUN_FILE: &str = "run.json";

/// Largest number of differences that a message names.
const MAX_DIFFERENCES: usize = 5;

/// Keys that do not change what is learned: paths, whose contents are compared by digest, and keys about logging,
/// saving and stopping. Keys about movement, `fsdp.*`, are free too.
const FREE_KEYS: [&str; 14] = [
    "model",
    "output_dir",
    "shards",
    "data.train",
    "data.eval",
    "lora.adapter",
    "training.logging_steps",
    "training.save_steps",
    "training.save_strategy",
    "training.save_total_limit",
    "training.resume",
    "training.grace",
    "training.max_time",
    "training.max_skipped_steps",
];

/// Keys that name places, with the contents that are compared in their stead. Where these differ the places are told too: they name
/// the commits of what is from the hub.
const CONTENTS: [(&str, &[&str]); 3] =
    [("model", &["base model", "tokenizer"]), ("data.train", &["training data"]), ("data.eval", &["evaluation data"])];

/// Names of values that change the order of sums and nothing else: a run may go on with others.
const NUM_RANKS: &str = "number of ranks";
const MICRO_BATCH: &str = "training.per_device_train_batch_size";

/// State of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The run is working. If nobody holds the lock, it was killed or has crashed, and nobody could write why.
    Running,
    /// The run was ended early, by a signal for example, and has saved.
    Stopped,
    /// The result is complete.
    Finished,
    /// An error ended the run.
    Failed,
}

/// Everything that decides a result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    pub world_size: usize,
    /// Number of sequences of a step on all ranks.
    pub global_batch_size: usize,
    /// Identity of the base model.
    pub base: String,
    /// Identity of the tokenizer, if one is needed.
    pub tokenizer: Option<String>,
    /// Digest of the adapter before the first step.
    pub adapter: String,
    /// Digest of the training documents in the order of the sequences, and of those that are evaluated.
    pub data: String,
    pub eval_data: Option<String>,
    /// Decided value of each key of the recipe.
    pub recipe: Map<String, Value>,
    /// The time that chat templates saw when the run began. It is kept for the starts after the first one, and not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<String>,
}

/// The content of `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub program: String,
    pub state: State,
    /// Reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Time of the start, in UTC.
    pub started: String,
    pub ended: Option<String>,
    pub host: String,
    pub pid: u32,
    #[serde(flatten)]
    pub identity: RunIdentity,
    /// Step whose adapter the result is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter_step: Option<usize>,
    /// Names of the files of the result.
    pub files: Vec<String>,
}

impl RunIdentity {
    /// Says which differences make this another run than `other`, which can neither go on where that stopped nor take its
    /// result for its own; empty if there are none.
    pub fn obstacles(&self, other: &RunIdentity) -> String {
        self.differences_in(other, |key| ![NUM_RANKS, MICRO_BATCH].contains(&key) && !self.is_free(key))
    }

    /// Returns whether this may be a run of a recipe, as far as is known before its data are read.
    pub fn may_be_of(&self, recipe: &Map<String, Value>) -> bool {
        // The warm-up is decided when the number of steps is known.
        let is_known = |key: &str| !self.is_free(key) && !key.starts_with("training.warmup_");
        recipe.iter().all(|(key, value)| !is_known(key) || self.recipe.get(key) == Some(value))
    }

    /// Returns whether the result does not depend on a key. If the result is the best of the checkpoints, it depends on
    /// when they are taken.
    fn is_free(&self, key: &str) -> bool {
        let chooses = self.recipe.get("training.load_best_model_at_end") == Some(&Value::Bool(true));
        let decides = chooses && ["training.save_steps", "training.save_strategy"].contains(&key);
        (FREE_KEYS.contains(&key) || key.starts_with("fsdp.")) && !decides
    }

    /// Says in which values, that change the order of sums alone, this run goes on otherwise than `other` began; empty
    /// if it does not.
    pub fn changes(&self, other: &RunIdentity) -> String {
        self.differences_in(other, |key| [NUM_RANKS, MICRO_BATCH].contains(&key))
    }

    fn differences_in(&self, other: &RunIdentity, matters: impl Fn(&str) -> bool) -> String {
        let (mine, theirs) = (self.values(), other.values());
        let mut keys: Vec<&String> = mine.keys().chain(theirs.keys().filter(|key| !mine.contains_key(*key))).collect();
        let differs = |key: &str| mine.get(key) != theirs.get(key);
        let is_elsewhere = |key: &str| {
            CONTENTS.iter().any(|(place, contents)| *place == key && contents.iter().any(|c| differs(c) && matters(c)))
        };
        keys.retain(|key| differs(key) && (matters(key) || is_elsewhere(key)));
        let text = |value: Option<&Value>| value.map_or("absent".into(), Value::to_string);
        let told = keys.iter().take(MAX_DIFFERENCES);
        let told =
            told.map(|key| format!("{key} is {} here and {} there", text(mine.get(*key)), text(theirs.get(*key))));
        let mut told: Vec<String> = told.collect();
        if keys.len() > MAX_DIFFERENCES {
            told.push(format!("{} more", keys.len() - MAX_DIFFERENCES));
        }
        told.join(", ")
    }

    /// Returns all values as one list of keys, the recipe's among them.
    fn values(&self) -> Map<String, Value> {
        let mut values = self.recipe.clone();
        values.insert(NUM_RANKS.into(), self.world_size.into());
        values.insert("sequences of a step".into(), self.global_batch_size.into());
        values.insert("base model".into(), self.base.clone().into());
        values.insert("tokenizer".into(), self.tokenizer.clone().into());
        values.insert("adapter to start from".into(), self.adapter.clone().into());
        values.insert("training data".into(), self.data.clone().into());
        values.insert("evaluation data".into(), self.eval_data.clone().into());
        values
    }
}

impl RunRecord {
    /// Makes the record of a run that begins.
    pub fn new(identity: RunIdentity) -> RunRecord {
        RunRecord {
            program: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
            state: State::Running,
            reason: None,
            started: now(),
            ended: None,
            host: host_name(),
            pid: std::process::id(),
            identity,
            adapter_step: None,
            files: Vec::new(),
        }
    }

    /// Returns the record of the same run after its end.
    pub fn ended(&self, state: State, reason: Option<String>, files: Vec<String>) -> RunRecord {
        RunRecord { state, reason, files, ended: Some(now()), ..self.clone() }
    }

    /// Reads the record of a folder; `None` if it has none.
    pub fn read(dir: &Path) -> Result<Option<RunRecord>> {
        let path = dir.join(RUN_FILE);
        if path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let record = serde_json::from_slice(&files::read(&path, files::MAX_SETTINGS_BYTES)?);
        record.map(Some).with_context(|| format!("{}: not the record of a run", path.display()))
    }

    /// Writes the record into a folder, atomically.
    pub fn write(&self, dir: &Path) -> Result<()> {
        atomic::write(&dir.join(RUN_FILE), (serde_json::to_string_pretty(self)? + "\n").as_bytes())
    }
}

/// The record of the run that this process is at, until somebody takes it to write how the run ended: the run itself, or the watchdog
/// when a rank ends all ranks without coming back here.
#[derive(Clone, Default)]
pub struct OpenRecord(Arc<Mutex<Option<RunRecord>>>);

impl OpenRecord {
    /// Writes the record of a run that begins into a folder.
    pub fn begin(&self, record: RunRecord, dir: PathBuf) -> Result<()> {
        record.write(&dir)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(record);
        let open = self.clone();
        watch::on_end(move |end, why| {
            let state = match end {
                End::Failed => State::Failed,
                End::Stopped => State::Stopped,
            };
            if let Some(record) = open.take() {
                // Without it the next start sees a run that nobody is at.
                let _ = record.ended(state, Some(why.into()), Vec::new()).write(&dir);
            }
        });
        Ok(())
    }

    /// Takes the record of the run; `None` if it has not begun or has ended.
    pub fn take(&self) -> Option<RunRecord> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Returns the time in UTC, to the second.
pub fn now() -> String {
    let now = Timestamp::now();
    now.round(Unit::Second).unwrap_or(now).to_string()
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    pub fn identity(learning_rate: f64) -> RunIdentity {
        let recipe = json!({"training.learning_rate": learning_rate, "output_dir": "out", "fsdp.gather": "auto"});
        RunIdentity {
            world_size: 2,
            global_batch_size: 4,
            base: "b".into(),
            tokenizer: None,
            adapter: "a".into(),
            data: "d".into(),
            eval_data: None,
            recipe: recipe.as_object().unwrap().clone(),
            clock: None,
        }
    }

    #[test]
    fn what_is_written_is_read_and_compared_by_value() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunRecord::read(dir.path()).unwrap(), None);
        let record = RunRecord::new(identity(0.1 + 0.2)).ended(State::Finished, None, vec!["a".into()]);
        record.write(dir.path()).unwrap();
        let read = RunRecord::read(dir.path()).unwrap().unwrap();
        assert_eq!(read, record);
        let mut other = identity(0.1 + 0.2);
        other.recipe["output_dir"] = json!("/home/out");
        other.recipe["fsdp.gather"] = json!("host");
        assert_eq!(read.identity.obstacles(&other), "");
        let (mut best, mut rarer) = (identity(1.0), identity(1.0));
        for (run, save_steps) in [(&mut best, 10), (&mut rarer, 20)] {
            run.recipe.insert("training.save_steps".into(), json!(save_steps));
        }
        assert_eq!(best.obstacles(&rarer), "");
        best.recipe.insert("training.load_best_model_at_end".into(), json!(true));
        rarer.recipe.insert("training.load_best_model_at_end".into(), json!(true));
        assert_eq!(best.obstacles(&rarer), "training.save_steps is 10 here and 20 there");
        other.recipe["training.learning_rate"] = json!(1.0);
        other.world_size = 4;
        let told = other.obstacles(&read.identity);
        assert_eq!(told, "training.learning_rate is 1.0 here and 0.30000000000000004 there");
        assert_eq!(other.changes(&read.identity), "number of ranks is 4 here and 2 there");
        let (mut moved, mut began) = (identity(1.0), identity(1.0));
        moved.recipe.insert("model".into(), json!("o/n@2"));
        began.recipe.insert("model".into(), json!("o/n@1"));
        assert_eq!(moved.obstacles(&began), "");
        moved.base = "another".into();
        let told = "model is \"o/n@2\" here and \"o/n@1\" there, base model is \"another\" here and \"b\" there";
        assert_eq!(moved.obstacles(&began), told);
        std::fs::write(dir.path().join(RUN_FILE), "{").unwrap();
        assert!(
            format!("{:#}", RunRecord::read(dir.path()).unwrap_err()).contains("run.json: not the record of a run")
        );
    }
}
