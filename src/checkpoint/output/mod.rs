//! The life of an output folder: which run may write there, what it holds, and how a result is saved.
//!
//! A run locks the folder (`lock`), tries what its end needs, and writes `run.json` (`record`). An existing result
//! stays as it is until the new one is complete: until then the files of the run are in [`STAGING`] inside the
//! folder. At the end the whole result is written there, `run.json` last, and moved to its place (`exchange`). If
//! that cannot be done, it is written to a folder beside the output folder, in the cache folder, or in the folder of
//! temporary files.
//!
//! A run that did not finish leaves its checkpoints in that folder or in the output folder, and the same run goes on
//! from the newest of them that is whole.

mod exchange;
mod found;
mod lock;
pub mod record;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::adapter::{CONFIG_FILE, TENSORS_FILE};
use super::state::{self, Found as FoundCheckpoint};
use super::{atomic, shards};
use exchange::Left;
use found::{Found, has_adapter, has_content, look, newest, told_of};
pub use lock::is_at;
pub(super) use lock::{LOCK_FILE, Lock};
use record::{OpenRecord, RUN_FILE, RunIdentity, RunRecord, State};

/// Folder inside the output folder for a result that is not complete.
pub const STAGING: &str = ".fsdp-qlora-new";
/// Folder inside the output folder in which the writing of a result is tried.
const PROBE: &str = ".fsdp-qlora-trial";
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
    /// Record of a run that did not finish and has left checkpoints in the staging folder.
    staged: Option<Box<RunRecord>>,
    /// Folder that the run writes to before its end.
    live: PathBuf,
    /// Record of the run that writes here.
    record: OpenRecord,
}

/// The place that a run begins from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint of the same run, if there is one.
    Auto,
    /// The first step.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// Serializes the word or the path of a recipe.
impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Resume::Auto => serializer.serialize_str("auto"),
            Resume::Never => serializer.serialize_str("never"),
            Resume::From(path) => path.serialize(serializer),
        }
    }
}

/// The beginning of a run.
pub enum Begun {
    /// This run has finished here before.
    Finished,
    /// The run begins with its first step.
    New,
    /// The run goes on after a checkpoint.
    Resumed(Box<FoundCheckpoint>),
}

/// The result of a run, to be written.
pub struct RunResult<'a> {
    /// Writes [`TENSORS_FILE`] and [`CONFIG_FILE`] into a folder.
    pub adapter: &'a dyn Fn(&Path) -> Result<()>,
    /// Names and contents of the other files.
    pub others: Vec<(&'static str, Vec<u8>)>,
    /// Step whose adapter it is.
    pub step: usize,
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
        let mut staged = None;
        match exchange::recover(dir)? {
            Left::Clean => {}
            Left::PutInPlace => {
                say(format!("output_dir: the complete result of a run that was killed is in {place} now"))
            }
            Left::Removed => say(format!("output_dir: files of a run that did not finish were removed from {place}")),
            Left::Unfinished(record) => staged = Some(record),
        }
        state::recover(dir)?;
        atomic::remove_abandoned(dir);
        let found = look(dir);
        if let (Found::Other(what), false) = (&found, overwrite) {
            bail!("{place} {what}; {HELP}");
        }
        let absolute = std::path::absolute(dir).context("the working directory")?;
        let live = dir.to_path_buf();
        let record = OpenRecord::default();
        let output = Output { dir: dir.into(), absolute, lock, overwrite, found, staged, live, record };
        output.try_the_end(bytes)?;
        Ok(output)
    }

    /// Returns the records of runs that did not finish, and the folders that hold their checkpoints.
    fn unfinished(&self) -> impl Iterator<Item = (&RunRecord, PathBuf)> {
        let here = if let Found::Unfinished(record) = &self.found { Some((&**record, self.dir.clone())) } else { None };
        let staged = self.staged.as_deref().map(|record| (record, self.dir.join(STAGING)));
        here.into_iter().chain(staged)
    }

    /// Returns the runs of which this start may be another one: that which has finished here, those that did not, and that of the
    /// checkpoint to begin from. The last is the most likely.
    fn known(&self, resume: &Resume) -> Result<Vec<RunIdentity>> {
        let finished = if let Found::Finished(record) = &self.found { Some(&**record) } else { None };
        let finished = finished.filter(|_| !self.overwrite);
        let unfinished = self.unfinished().map(|(record, _)| record);
        let here = finished.into_iter().chain(unfinished.filter(|_| !self.overwrite || *resume != Resume::Never));
        let mut known: Vec<RunIdentity> = here.map(|record| record.identity.clone()).collect();
        if let Resume::From(path) = resume {
            known.push(state::read_state(path).context("training.resume")?.run);
        }
        Ok(known)
    }

    /// Returns the number of sequences of a step of the run that goes on here or has finished here, if its recipe has these values.
    /// Another number of ranks keeps it.
    pub fn global_batch_size(&self, recipe: &Map<String, Value>, resume: &Resume) -> Result<Option<usize>> {
        let keys = ["training.gradient_accumulation_steps", "training.global_batch_size"];
        let is_alike = |run: &RunIdentity| keys.iter().all(|key| run.recipe.get(*key) == recipe.get(*key));
        Ok(self.known(resume)?.into_iter().rfind(is_alike).map(|run| run.global_batch_size))
    }

    /// Returns the time that chat templates saw in the run that goes on here or has finished here, if its recipe has these values.
    pub fn clock(&self, recipe: &Map<String, Value>, resume: &Resume) -> Result<Option<String>> {
        Ok(self.known(resume)?.into_iter().rfind(|run| run.may_be_of(recipe)).and_then(|run| run.clock))
    }

    /// Returns whether a new result may replace what the folder holds.
    pub fn overwrites(&self) -> bool {
        self.overwrite
    }

    /// Returns whether a run goes on here that did not finish, or finished already.
    pub fn knows(&self, run: &RunIdentity, resume: &Resume) -> Result<bool> {
        Ok(self.known(resume)?.iter().any(|known| run.obstacles(known).is_empty()))
    }

    /// Begins a run: decides where it writes and from where it goes on, and writes `run.json`. `say` tells the user.
    pub fn begin(&mut self, run: RunIdentity, resume: &Resume, say: &mut dyn FnMut(String)) -> Result<Begun> {
        let place = self.dir.display();
        match &self.found {
            Found::Finished(record) if !self.overwrite => {
                let obstacles = run.obstacles(&record.identity);
                ensure!(obstacles.is_empty(), "{place} has the result of another run ({obstacles}); {HELP}");
                let changes = run.changes(&record.identity);
                let more = if changes.is_empty() { changes } else { format!("; {changes}") };
                say(format!("already finished: the adapter of this run is in {place}{more}"));
                return Ok(Begun::Finished);
            }
            Found::Unfinished(record) if !self.overwrite => {
                let obstacles = run.obstacles(&record.identity);
                let told = told_of(record);
                ensure!(obstacles.is_empty(), "{place} has another run, which {told} ({obstacles}); {HELP}");
            }
            _ => {}
        }
        let same = self.unfinished().find(|(record, _)| run.obstacles(&record.identity).is_empty());
        let same = same.map(|(record, live)| (told_of(record), live));
        self.live = match (&same, &self.found) {
            (Some((_, live)), _) => live.clone(),
            (None, Found::Nothing) => self.dir.clone(),
            (None, _) => self.dir.join(STAGING),
        };
        let staging = self.dir.join(STAGING);
        if let Some(staged) = self.staged.as_deref().filter(|_| self.live != staging || same.is_none()) {
            let (told, at) = (told_of(staged), staging.display());
            ensure!(
                self.overwrite,
                "{at} has checkpoints of another run, which {told}; help: move that folder, or `train --overwrite`"
            );
            say(format!("the checkpoints of another run, which {told}, are removed from {at}"));
            std::fs::remove_dir_all(&staging).with_context(|| staging.display().to_string())?;
        }
        let mut checkpoint = match resume {
            Resume::Never => None,
            Resume::Auto if same.is_some() => newest(&self.live, &run, say)?,
            Resume::Auto => None,
            Resume::From(path) => {
                let found = FoundCheckpoint::open(path).context("training.resume")?;
                let obstacles = run.obstacles(&found.state.run);
                ensure!(obstacles.is_empty(), "training.resume: {} is of another run ({obstacles})", path.display());
                Some(found)
            }
        };
        match (&checkpoint, &same) {
            (Some(found), _) => {
                let (path, step) = (found.path.display(), found.state.progress.step);
                say(format!("going on after step {step}, from {path}, written at {}", found.state.written()));
                let changes = run.changes(&found.state.run);
                if !changes.is_empty() {
                    say(format!("the order of sums is another one from here on: {changes}"));
                }
            }
            (None, Some((told, _))) if *resume == Resume::Auto => {
                say(format!("the same run {told}, and has left no checkpoint: it begins with the first step"));
            }
            _ => {}
        }
        let record = RunRecord::new(run);
        std::fs::create_dir_all(&self.live).with_context(|| self.live.display().to_string())?;
        if let Some(found) = &mut checkpoint {
            found.bring_best(&self.live, say)?;
        }
        self.record.begin(record, self.live.clone())?;
        Ok(checkpoint.map_or(Begun::New, |found| Begun::Resumed(found.into())))
    }

    /// Returns the folder that the run writes to before its end: the output folder, or one inside it while that holds
    /// another result.
    pub fn live(&self) -> &Path {
        &self.live
    }

    /// Returns whether the folder holds something that only a complete result may replace.
    pub fn keeps_a_result(&self) -> bool {
        self.live != self.dir
    }

    /// Notes that the run was stopped, and can go on from its newest checkpoint.
    pub fn stop(&mut self, reason: String) -> Result<()> {
        let record = self.record.take().context("the run has not begun")?;
        record.ended(State::Stopped, Some(reason), Vec::new()).write(&self.live)
    }

    /// Saves a result and ends the run. The result goes to the output folder in one step, or else to the first other
    /// place that can take it.
    pub fn finish(&mut self, result: &RunResult<'_>) -> Result<Place> {
        let begun = self.record.take().context("the run has not begun")?;
        let state = if result.doubt.is_some() { State::Failed } else { State::Finished };
        let ended = begun.ended(state, result.doubt.clone(), names(result));
        let record = RunRecord { adapter_step: Some(result.step), ..ended };
        let mut why = match self.replace(result, &record) {
            Ok(()) => return Ok(Place::OutputDir),
            Err(error) => format!("{error:#}"),
        };
        for dir in self.other_places() {
            let made = std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string());
            match made.and_then(|()| write_result(&dir, result, &record)) {
                Ok(()) => {
                    self.note_failure(&begun, format!("the result was saved in {}: {why}", dir.display()));
                    return Ok(Place::Elsewhere { dir, why });
                }
                Err(error) => {
                    let _ = std::fs::remove_dir_all(&dir);
                    why += &format!("; {error:#}");
                }
            }
        }
        self.note_failure(&begun, format!("the result could be saved nowhere: {why}"));
        bail!("the adapter could be saved nowhere: {why}")
    }

    /// Notes in the run's folder why its result is not in the output folder, unless that folder is gone, or has the complete result,
    /// which the next start puts in place. The folder may accept no files any more, which may be the reason.
    fn note_failure(&self, begun: &RunRecord, reason: String) {
        if !self.keeps_a_result() || self.live.exists() && exchange::complete(&self.live).is_none() {
            let _ = begun.ended(State::Failed, Some(reason), Vec::new()).write(&self.live);
        }
    }

    /// Notes why the run failed. A run without a step leaves no files.
    pub fn fail(&self, reason: &str) {
        let Some(record) = self.record.take() else { return };
        let live = &self.live;
        // The run's error is reported already. If something cannot be written or removed here, the next start sees
        // it.
        if has_content(&live.join(METRICS_FILE)) || !state::list(live).is_empty() {
            let _ = record.ended(State::Failed, Some(reason.into()), Vec::new()).write(live);
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
            if !matches!(self.found, Found::Nothing) && !self.overwrite {
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
        written.inspect_err(|error| {
            let reason = format!("the result could not be put in place: {error:#}");
            exchange::take_back(&self.dir, &record.ended(State::Failed, Some(reason), Vec::new()));
        })
    }

    /// Returns the folders to try if the output folder cannot take the result.
    fn other_places(&self) -> Vec<PathBuf> {
        let name = self.absolute.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{name}-saved-{}-{}", jiff::Timestamp::now().as_second(), std::process::id());
        let beside = self.absolute.with_file_name(&name);
        let cache = shards::cache_dir().ok().map(|dir| dir.join("results").join(&name));
        [Some(beside), cache, Some(std::env::temp_dir().join(&name))].into_iter().flatten().collect()
    }

    /// Tries what the end of the run does: writes a small file in a folder inside the output folder and renames it.
    fn try_the_end(&self, bytes: usize) -> Result<()> {
        self.check_places()?;
        let (staging, probe) = (self.dir.join(PROBE), ".fsdp-qlora-probe");
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
