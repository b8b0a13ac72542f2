//! The content of an output folder that no run is writing to.

use std::path::Path;

use anyhow::{Result, ensure};

use super::super::adapter::{CONFIG_FILE, TENSORS_FILE};
use super::super::state::{self, Found as FoundCheckpoint};
use super::record::{RunIdentity, RunRecord, State};
use super::{METRICS_FILE, RESULT_FILES};

/// Content of an output folder.
pub enum Found {
    /// Holds nothing that could be lost.
    Nothing,
    /// Holds the whole result of a run.
    Finished(Box<RunRecord>),
    /// Holds what a run has left that did not finish: metrics, and perhaps checkpoints.
    Unfinished(Box<RunRecord>),
    /// Holds something else, described in words.
    Other(String),
}

pub fn has_content(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.len() > 0)
}

pub fn has_adapter(dir: &Path) -> bool {
    [TENSORS_FILE, CONFIG_FILE].iter().any(|name| dir.join(name).exists())
}

/// Finds what a folder holds that no run is writing to.
pub fn look(dir: &Path) -> Found {
    let record = match RunRecord::read(dir) {
        Err(error) => return Found::Other(format!("has a run.json that cannot be read ({error:#})")),
        Ok(record) => record,
    };
    let has_metrics = has_content(&dir.join(METRICS_FILE));
    match record {
        None => match RESULT_FILES.iter().find(|name| has_content(&dir.join(name))) {
            Some(name) => Found::Other(format!("has {name} and no run.json")),
            None => Found::Nothing,
        },
        Some(record) if record.state == State::Finished => {
            match record.files.iter().find(|name| !dir.join(name).exists()) {
                Some(gone) => Found::Other(format!("has the result of a run, of which {gone} is gone")),
                None => Found::Finished(Box::new(record)),
            }
        }
        Some(_) if !has_adapter(dir) && !has_metrics && state::list(dir).is_empty() => Found::Nothing,
        Some(record) if has_adapter(dir) => {
            Found::Other(format!("has an adapter and the record of a run that {}", told_of(&record)))
        }
        Some(record) => Found::Unfinished(Box::new(record)),
    }
}

/// Says how a run that did not finish has ended, and when and where it was started.
pub fn told_of(record: &RunRecord) -> String {
    let how = match (record.state, &record.reason) {
        (State::Running, _) => "was killed or has crashed".into(),
        (State::Stopped, _) => "was stopped".into(),
        (_, reason) => format!("failed ({})", reason.as_deref().unwrap_or_default()),
    };
    format!("{how}; it was started at {} on {}", record.started, record.host)
}

/// Returns the newest checkpoint of a run that is whole; `say` is told of those that are not. Fails if there are checkpoints and none is
/// whole.
pub fn newest(dir: &Path, run: &RunIdentity, say: &mut dyn FnMut(String)) -> Result<Option<FoundCheckpoint>> {
    let all = state::list(dir);
    for (_, path) in &all {
        let found = FoundCheckpoint::open(path).and_then(|found| {
            let obstacles = run.obstacles(&found.state.run);
            ensure!(obstacles.is_empty(), "{} is of another run ({obstacles})", path.display());
            Ok(found)
        });
        match found {
            Ok(found) => return Ok(Some(found)),
            Err(error) => say(format!("a checkpoint that cannot be used is passed over: {error:#}")),
        }
    }
    ensure!(
        all.is_empty(),
        "{}: the run has left {} checkpoint(s), of which none can be used; help: repair one, or begin with the first step by \
         `train --set training.resume=never`",
        dir.display(),
        all.len()
    );
    Ok(None)
}
