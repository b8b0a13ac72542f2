//! The life of an output folder: which run may write there, what it holds, and how a result is saved.
//!
//! A run locks the folder (`lock`), tries what its end needs, and writes `run.json` (`record`). An existing result
//! stays as it is until the new one is complete: until then the files of the run are in [`STAGING`] inside the
//! folder. At the end the whole result is written there, `run.json` last, and moved to its place (`exchange`). If
//! that cannot be done, it is written to a folder beside the output folder, in the cache folder, or in the folder of
//! temporary files.

mod exchange;
mod lock;
pub mod record;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::adapter::{CONFIG_FILE, TENSORS_FILE};
use super::{atomic, shards};
use exchange::Left;
use lock::Lock;
pub use lock::is_at;
use record::{RUN_FILE, RunIdentity, RunRecord, State};

/// Folder inside the output folder for a result that is not complete.
pub const STAGING: &str = ".fsdp-qlora-new";
/// Name of the file of metrics.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Files of a tokenizer, copied beside the adapter.
pub const TOKENIZER_FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json"];
/// All files that a result may have in addition to `run.json`.
const RESULT_FILES: [&str; 8] = [
    TENSORS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    TOKENIZER_FILES[0],
    TOKENIZER_FILES[1],
    TOKENIZER_FILES[2],
    TOKENIZER_FILES[3],
    TOKENIZER_FILES[4],
];

/// Help for a folder that is refused.
const HELP: &str = "help: choose another output_dir, or replace what is there with `train --overwrite`";

/// An output folder that this process has locked.
pub struct Output {
    dir: PathBuf,
    /// The absolute path of `dir`, because its neighbours must not depend on the working directory.
    absolute: PathBuf,
    lock: Lock,
    overwrite: bool,
    found: Found,
    /// Record of the run that writes here; `None` before it begins.
    record: Option<RunRecord>,
}

/// Content of an output folder.
enum Found {
    /// Holds nothing that could be lost.
    Nothing,
    /// Holds the whole result of a run.
    Finished(Box<RunRecord>),
    /// Holds something else, described in words.
    Other(String),
}

/// The result of a run, to be written.
pub struct RunResult<'a> {
    /// Writes [`TENSORS_FILE`] and [`CONFIG_FILE`] into a folder.
    pub adapter: &'a dyn Fn(&Path) -> Result<()>,
    /// Names and contents of the other files.
    pub others: Vec<(&'static str, Vec<u8>)>,
    /// Reason why the result cannot be trusted. Such a result never replaces another one, and its run has failed.
    pub doubt: Option<String>,
}

/// Place where a result was saved.
#[derive(Debug)]
pub enum Place {
    OutputDir,
    Elsewhere { dir: PathBuf, why: String },
}

impl Output {
    /// Makes and locks a folder, repairs what a killed run has left, and refuses a folder whose content would be
    /// lost. Then it tries what the end needs: permissions, room for `bytes`, a rename, and no folder in the place of
    /// a file. `say` gets lines for people.
    pub fn open(dir: &Path, overwrite: bool, bytes: usize, say: &mut dyn FnMut(String)) -> Result<Output> {
        let lock = Lock::take(dir)?;
        let place = dir.display();
        if let Some(why) = &lock.unlocked {
            say(format!("output_dir: the file system of {place} has no locks ({why}): start no second run there"));
        }
        match exchange::recover(dir)? {
            Left::Clean => {}
            Left::PutInPlace => {
                say(format!("output_dir: the complete result of a run that was killed is in {place} now"))
            }
            Left::Removed => say(format!("output_dir: files of a run that did not finish were removed from {place}")),
        }
        atomic::remove_abandoned(dir);
        let found = look(dir);
        if let (Found::Other(what), false) = (&found, overwrite) {
            bail!("{place} {what}; {HELP}");
        }
        let absolute = std::path::absolute(dir).context("the working directory")?;
        let output = Output { dir: dir.into(), absolute, lock, overwrite, found, record: None };
        output.try_the_end(bytes)?;
        Ok(output)
    }

    /// Writes `run.json` for a run that begins, and returns true; or returns false if the same run has finished here.
    pub fn begin(&mut self, identity: RunIdentity) -> Result<bool> {
        if let (Found::Finished(record), false) = (&self.found, self.overwrite) {
            let differences = identity.differences(&record.identity);
            let place = self.dir.display();
            ensure!(differences.is_empty(), "{place} has the result of another run ({differences}); {HELP}");
            return Ok(false);
        }
        let record = RunRecord::new(identity);
        std::fs::create_dir_all(self.live()).with_context(|| self.live().display().to_string())?;
        record.write(&self.live())?;
        self.record = Some(record);
        Ok(true)
    }

    /// Returns the folder that the run writes to before its end: the output folder, or one inside it while that holds
    /// another result.
    pub fn live(&self) -> PathBuf {
        if self.keeps_a_result() { self.dir.join(STAGING) } else { self.dir.clone() }
    }

    /// Returns whether the folder holds something that only a complete result may replace.
    pub fn keeps_a_result(&self) -> bool {
        !matches!(self.found, Found::Nothing)
    }

    /// Saves a result and ends the run. The result goes to the output folder in one step, or else to the first other
    /// place that can take it.
    pub fn finish(&mut self, result: &RunResult<'_>) -> Result<Place> {
        let begun = self.record.take().context("the run has not begun")?;
        let state = if result.doubt.is_some() { State::Failed } else { State::Finished };
        let record = begun.ended(state, result.doubt.clone(), names(result));
        let mut why = match self.replace(result, &record) {
            Ok(()) => return Ok(Place::OutputDir),
            Err(error) => format!("{error:#}"),
        };
        for dir in self.other_places() {
            let made = std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string());
            match made.and_then(|()| write_result(&dir, result, &record)) {
                Ok(()) => {
                    if !self.keeps_a_result() {
                        // The folder may accept no files any more, which may be why the result is elsewhere.
                        let reason = format!("the result was saved in {}: {why}", dir.display());
                        let _ = begun.ended(State::Failed, Some(reason), Vec::new()).write(&self.dir);
                    }
                    return Ok(Place::Elsewhere { dir, why });
                }
                Err(error) => {
                    let _ = std::fs::remove_dir_all(&dir);
                    why += &format!("; {error:#}");
                }
            }
        }
        bail!("the adapter could be saved nowhere: {why}")
    }

    /// Notes why the run failed. A run without a step leaves no files.
    pub fn fail(&self, reason: &str) {
        let Some(record) = &self.record else { return };
        let live = self.live();
        // The run's error is reported already. If something cannot be written or removed here, the next start sees
        // it.
        if has_content(&live.join(METRICS_FILE)) {
            let _ = record.ended(State::Failed, Some(reason.into()), Vec::new()).write(&live);
        } else {
            let _ = std::fs::remove_file(live.join(RUN_FILE));
            let _ = std::fs::remove_file(live.join(METRICS_FILE));
            let _ = std::fs::remove_dir_all(self.dir.join(STAGING));
        }
    }

    /// Writes the whole result into the staging folder and exchanges it with the old one.
    fn replace(&mut self, result: &RunResult<'_>, record: &RunRecord) -> Result<()> {
        ensure!(
            result.doubt.is_none() || !self.keeps_a_result(),
            "{} keeps the result that it has",
            self.dir.display()
        );
        if !self.lock.is_held() {
            self.lock = Lock::take(&self.dir).context("the folder was removed during the run")?;
            self.found = look(&self.dir);
            if let (Found::Finished(_) | Found::Other(_), false) = (&self.found, self.overwrite) {
                ensure!(!has_adapter(&self.dir), "{} has another result by now", self.dir.display());
            }
        } else if !self.keeps_a_result() {
            ensure!(!has_adapter(&self.dir), "{} has another adapter by now", self.dir.display());
        }
        self.check_places()?;
        let staging = self.dir.join(STAGING);
        let written = std::fs::create_dir_all(&staging)
            .with_context(|| staging.display().to_string())
            .and_then(|()| write_result(&staging, result, record))
            .and_then(|()| exchange::perform(&exchange::plan(&self.dir, record)));
        if written.is_err() {
            exchange::take_back(&self.dir);
        }
        written
    }

    /// Returns the folders to try if the output folder cannot take the result.
    fn other_places(&self) -> Vec<PathBuf> {
        let name = self.absolute.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{name}-saved-{}-{}", jiff::Timestamp::now().as_second(), std::process::id());
        let beside = self.absolute.with_file_name(&name);
        let cache = shards::cache_dir().ok().map(|dir| dir.join("results").join(&name));
        [Some(beside), cache, Some(std::env::temp_dir().join(&name))].into_iter().flatten().collect()
    }

    /// Tries what the end of the run does: writes a small file in the staging folder and renames it.
    fn try_the_end(&self, bytes: usize) -> Result<()> {
        self.check_places()?;
        let (staging, probe) = (self.dir.join(STAGING), ".fsdp-qlora-probe");
        let tried = || -> Result<()> {
            std::fs::create_dir_all(&staging).with_context(|| staging.display().to_string())?;
            let file = atomic::write_synced(&staging.join(probe), b"probe")?;
            atomic::check_room(&file, &self.dir.join(TENSORS_FILE), bytes)?;
            let to = self.dir.join(probe);
            std::fs::rename(staging.join(probe), &to).with_context(|| to.display().to_string())?;
            std::fs::remove_file(&to).with_context(|| to.display().to_string())
        };
        let result = tried();
        let _ = std::fs::remove_dir_all(&staging);
        result
    }

    /// Fails if a file of the result cannot take its place, because a folder or, in a sticky folder, another user's
    /// file is there.
    fn check_places(&self) -> Result<()> {
        // The owner of the lock file is the user that this process writes as, even if a file server maps users.
        let me = std::fs::metadata(self.dir.join(lock::LOCK_FILE)).map(|m| m.uid()).ok();
        let folder = std::fs::metadata(&self.dir).with_context(|| self.dir.display().to_string())?;
        for name in RESULT_FILES.into_iter().chain([RUN_FILE]) {
            let path = self.dir.join(name);
            let Ok(file) = std::fs::symlink_metadata(&path) else { continue };
            ensure!(!file.is_dir(), "{}: a folder is in the place of this file, remove it", path.display());
            ensure!(
                me.is_none_or(|me| may_replace(me, folder.uid(), folder.mode(), file.uid())),
                "{}: it is user {}'s, and the sticky bit of the folder keeps others from replacing it",
                path.display(),
                file.uid()
            );
        }
        Ok(())
    }
}

/// Returns whether user `me` may replace a file. If the folder's sticky bit is set, only the owners of file and
/// folder and root may.
fn may_replace(me: u32, folder: u32, folder_mode: u32, file: u32) -> bool {
    folder_mode & 0o1000 == 0 || me == 0 || me == folder || me == file
}

/// Returns the names of a result's files in the order in which they are written.
fn names(result: &RunResult<'_>) -> Vec<String> {
    let others = result.others.iter().map(|(name, _)| *name);
    [TENSORS_FILE].into_iter().chain(others).chain([CONFIG_FILE]).map(String::from).collect()
}

/// Writes all files durably, `run.json` last, so that its presence shows that all are there.
fn write_result(dir: &Path, result: &RunResult<'_>, record: &RunRecord) -> Result<()> {
    (result.adapter)(dir)?;
    for (name, content) in &result.others {
        atomic::write_synced(&dir.join(name), content)?;
    }
    atomic::sync_folder(dir)?;
    record.write(dir)
}

fn has_content(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.len() > 0)
}

fn has_adapter(dir: &Path) -> bool {
    [TENSORS_FILE, CONFIG_FILE].iter().any(|name| dir.join(name).exists())
}

/// Finds what a folder holds that no run is writing to.
fn look(dir: &Path) -> Found {
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
        Some(_) if !has_adapter(dir) && !has_metrics => Found::Nothing,
        Some(record) => {
            let how = match record.state {
                State::Running => "was killed".into(),
                State::Stopped => "was stopped".into(),
                _ => format!("failed ({})", record.reason.unwrap_or_default()),
            };
            let (started, host) = (record.started, record.host);
            Found::Other(format!("has a run that {how}; it was started at {started} on {host}, and cannot be resumed"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sticky_folder_keeps_the_files_of_others() {
        let (me, other, third, sticky) = (7, 8, 9, 0o41777);
        assert!(may_replace(me, other, 0o40777, third), "no sticky bit");
        assert!(may_replace(me, me, sticky, other), "my folder");
        assert!(may_replace(me, other, sticky, me), "my file");
        assert!(may_replace(0, other, sticky, third), "root");
        assert!(!may_replace(me, other, sticky, third) && !may_replace(me, other, sticky, other));
    }

    #[test]
    fn a_folder_without_room_is_refused_before_anything_is_lost() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("out");
        let error = Output::open(&dir, false, usize::MAX, &mut |_| ()).err().unwrap().to_string();
        assert!(error.contains("bytes are needed"), "{error}");
        assert!(!dir.exists());
    }
}
