//! Replaces an old result by a complete new one, which lies in a folder inside the output folder.
//!
//! Two folders could be exchanged in one call (renameat2), but an output folder may be a mount point, a link or
//! somebody's working directory, and NFS has no such call. So the files are moved one after the other: the old
//! `adapter_config.json` leaves first and the new one comes after all other files. A reader finds the old adapter,
//! none (PEFT and this program refuse a folder without a config), or the new one, but never tensors with the numbers
//! of another config. The list of moves follows from what lies where, so after a kill the next start makes the list
//! again and performs the rest.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::super::adapter::{CONFIG_FILE, TENSORS_FILE};
use super::super::atomic::sync_folder;
use super::super::state;
use super::record::{RUN_FILE, RunRecord};
use super::{METRICS_FILE, RESULT_FILES, STAGING};

/// Name of the old config until the new tensors are in place.
const REPLACED_CONFIG: &str = "replaced_adapter_config.json";

/// One atomic step.
#[derive(Clone, Debug, PartialEq)]
pub enum Move {
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Syncs this folder, so that the moves in it are durable.
    Sync(PathBuf),
    RemoveFolder(PathBuf),
}

/// Lists the moves that remain until the result is in its place.
pub fn plan(dir: &Path, record: &RunRecord) -> Vec<Move> {
    let staging = dir.join(STAGING);
    let (sync, mut moves) = (Move::Sync(dir.into()), Vec::new());
    if staging.join(TENSORS_FILE).exists() && dir.join(CONFIG_FILE).exists() {
        moves.extend([Move::Rename(dir.join(CONFIG_FILE), staging.join(REPLACED_CONFIG)), sync.clone()]);
    }
    let rename = |name: &str| {
        let from = staging.join(name);
        from.exists().then(|| Move::Rename(from, dir.join(name)))
    };
    moves.extend(record.files.iter().filter(|name| *name != CONFIG_FILE).filter_map(|name| rename(name)));
    // Files of the old result that the new one lacks are removed, once there is no way back. Files that no run has written stay.
    let old = RunRecord::read(dir).ok().flatten().map(|old| old.files).unwrap_or_default();
    let stale = RESULT_FILES.iter().map(|name| name.to_string());
    let stale = stale.filter(|name| old.contains(name) && !record.files.contains(name));
    moves.extend(stale.map(|name| dir.join(name)).filter(|path| path.exists()).map(Move::Remove));
    moves.push(sync.clone());
    moves.extend(rename(CONFIG_FILE));
    moves.extend([sync.clone(), Move::Rename(staging.join(RUN_FILE), dir.join(RUN_FILE)), sync]);
    // Checkpoints of another run, and the staging folder.
    let of_another = state::list(dir).into_iter().filter(|(_, path)| !state::is_of(path, &record.identity));
    moves.extend(of_another.map(|(_, checkpoint)| Move::RemoveFolder(checkpoint)));
    moves.push(Move::RemoveFolder(staging));
    moves
}

/// Performs moves in their order.
pub fn perform(moves: &[Move]) -> Result<()> {
    for step in moves {
        match step {
            Move::Rename(from, to) => {
                std::fs::rename(from, to).with_context(|| format!("{}: cannot be put in place", to.display()))?
            }
            Move::Remove(path) => std::fs::remove_file(path).with_context(|| format!("{}", path.display()))?,
            Move::Sync(dir) => sync_folder(dir)?,
            // The result is in place. If the folder cannot be removed now, the next start removes it.
            Move::RemoveFolder(dir) => drop(std::fs::remove_dir_all(dir)),
        }
    }
    Ok(())
}

/// Undoes a failed exchange, so that the old result is whole again. Once the new tensors are in place there is no way
/// back: the next start performs the rest. Where the run has left checkpoints beside its result, they stay with this record
/// of its failure.
pub fn take_back(dir: &Path, failed: &RunRecord) {
    let staging = dir.join(STAGING);
    if staging.join(TENSORS_FILE).exists() {
        let _ = std::fs::rename(staging.join(REPLACED_CONFIG), dir.join(CONFIG_FILE));
    } else if complete(&staging).is_some() {
        return;
    }
    if state::list(&staging).is_empty() {
        let _ = std::fs::remove_dir_all(staging);
        return;
    }
    // The next start must not take the result for complete once files of it are gone. A disk may be too full for this record.
    if failed.write(&staging).is_err() {
        let _ = std::fs::remove_file(staging.join(RUN_FILE));
    }
    for name in RESULT_FILES.iter().filter(|name| **name != METRICS_FILE) {
        let _ = std::fs::remove_file(staging.join(name));
    }
}

/// Returns the record of a complete result; `None` if it is incomplete. The record is the last file to be written. A
/// record that names other files is not this program's.
pub fn complete(staging: &Path) -> Option<RunRecord> {
    let is_ours = |files: &[String]| !files.is_empty() && files.iter().all(|name| RESULT_FILES.contains(&&name[..]));
    RunRecord::read(staging).ok().flatten().filter(|record| is_ours(&record.files))
}

/// State in which the last run left the output folder.
#[derive(Clone, Debug, PartialEq)]
pub enum Left {
    /// No exchange was under way.
    Clean,
    /// A complete result had not been moved; it is in its place now.
    PutInPlace,
    /// Files of a run that did not finish were removed.
    Removed,
    /// A run that did not finish has left checkpoints to go on from.
    Unfinished(Box<RunRecord>),
}

/// Finishes the exchange of a run that was killed: moves a complete result to its place, and removes an incomplete
/// one.
pub fn recover(dir: &Path) -> Result<Left> {
    let staging = dir.join(STAGING);
    if !staging.exists() {
        return Ok(Left::Clean);
    }
    match complete(&staging) {
        Some(record) => {
            perform(&plan(dir, &record))?;
            Ok(Left::PutInPlace)
        }
        None => {
            state::recover(&staging)?;
            if !state::list(&staging).is_empty() {
                let help = "help: repair that file, or move the folder, which has the checkpoints of a run";
                let record = RunRecord::read(&staging).and_then(|record| record.context("there is no run.json"));
                let record = record.with_context(|| format!("{}: {help}", staging.display()))?;
                return Ok(Left::Unfinished(Box::new(record)));
            }
            std::fs::remove_dir_all(&staging).with_context(|| staging.display().to_string())?;
            Ok(Left::Removed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::State;
    use super::super::record::tests::identity;
    use super::*;

    const CHAT: &str = "chat_template.jinja";

    fn write(dir: &Path, names: &[&str], content: &str) {
        std::fs::create_dir_all(dir).unwrap();
        names.iter().for_each(|name| std::fs::write(dir.join(name), content).unwrap());
    }

    /// Makes an output folder with an old result and a new one that has not been moved yet.
    fn with_two_results() -> (tempfile::TempDir, RunRecord) {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), &[TENSORS_FILE, CONFIG_FILE, CHAT, "metrics.jsonl", "notes.txt"], "old");
        RunRecord::new(identity(1.0))
            .ended(State::Finished, None, [TENSORS_FILE, CONFIG_FILE, CHAT].map(String::from).to_vec())
            .write(place.path())
            .unwrap();
        let names = [TENSORS_FILE, "tokenizer.json", "metrics.jsonl", CONFIG_FILE];
        write(&place.path().join(STAGING), &names, "new");
        let files = names.map(String::from).to_vec();
        let record = RunRecord::new(identity(2.0)).ended(State::Finished, None, files);
        record.write(&place.path().join(STAGING)).unwrap();
        (place, record)
    }

    fn failed(record: &RunRecord) -> RunRecord {
        record.ended(State::Failed, Some("no room".into()), Vec::new())
    }

    fn content(path: PathBuf) -> Option<String> {
        std::fs::read_to_string(path).ok()
    }

    #[test]
    fn a_kill_between_any_two_moves_leaves_an_adapter_that_is_old_new_or_absent() {
        let (place, record) = with_two_results();
        let (mut absent, num_moves) = (0, plan(place.path(), &record).len());
        for done in 0..=num_moves {
            let (place, record) = with_two_results();
            let at = |name: &str| place.path().join(name);
            perform(&plan(place.path(), &record)[..done]).unwrap();
            match (content(at(CONFIG_FILE)), content(at(TENSORS_FILE))) {
                (None, _) => absent += 1,
                (config, tensors) => assert_eq!(config, tensors, "after {done} moves"),
            }
            let left = recover(place.path()).unwrap();
            assert_eq!(left == Left::Clean, done == num_moves, "after {done} moves");
            for name in record.files.iter() {
                assert_eq!(content(at(name)).as_deref(), Some("new"), "{name} after {done} moves");
            }
            assert!(!at(CHAT).exists(), "the old result's file is no part of the new one");
            assert_eq!(content(at("notes.txt")).as_deref(), Some("old"), "files of others are left alone");
            assert_eq!(RunRecord::read(place.path()).unwrap(), Some(record));
            assert!(!at(STAGING).exists());
        }
        assert!(absent > 0, "the order is not what this test is about");
    }

    #[test]
    fn a_kill_before_the_new_result_is_complete_leaves_the_old_one() {
        let (place, _) = with_two_results();
        std::fs::remove_file(place.path().join(STAGING).join(RUN_FILE)).unwrap();
        assert_eq!(recover(place.path()).unwrap(), Left::Removed);
        for name in [TENSORS_FILE, CONFIG_FILE, CHAT] {
            assert_eq!(content(place.path().join(name)).as_deref(), Some("old"));
        }
    }

    #[test]
    fn a_failure_between_any_two_moves_leaves_no_tensors_with_another_config() {
        for done in 0..=plan(with_two_results().0.path(), &with_two_results().1).len() {
            let (place, record) = with_two_results();
            let at = |name: &str| content(place.path().join(name));
            perform(&plan(place.path(), &record)[..done]).unwrap();
            take_back(place.path(), &failed(&record));
            let is_absent = at(CONFIG_FILE).is_none();
            assert!(is_absent || at(CONFIG_FILE) == at(TENSORS_FILE), "after {done} moves");
            let left = recover(place.path()).unwrap();
            assert!(at(CONFIG_FILE).is_some() && at(CONFIG_FILE) == at(TENSORS_FILE), "after {done} moves");
            assert!(!is_absent || left == Left::PutInPlace, "after {done} moves");
        }
    }

    #[test]
    fn checkpoints_outlive_a_result_that_cannot_be_put_in_place() {
        let (place, record) = with_two_results();
        let staging = place.path().join(STAGING);
        write(&staging.join("checkpoint-3"), &["state.json"], "{}");
        take_back(place.path(), &failed(&record));
        assert_eq!(content(place.path().join(CONFIG_FILE)).as_deref(), Some("old"));
        assert!(!staging.join(TENSORS_FILE).exists() && staging.join(METRICS_FILE).exists());
        assert_eq!(recover(place.path()).unwrap(), Left::Unfinished(Box::new(failed(&record))));
        // A record that cannot be read is no reason to remove them.
        write(&staging, &[RUN_FILE], "{}");
        let error = format!("{:#}", recover(place.path()).unwrap_err());
        assert!(error.contains("which has the checkpoints of a run"), "{error}");
        assert!(staging.join("checkpoint-3/state.json").exists());
    }

    #[test]
    fn a_move_that_fails_is_taken_back() {
        let (place, record) = with_two_results();
        std::fs::remove_file(place.path().join(TENSORS_FILE)).unwrap();
        write(&place.path().join(TENSORS_FILE), &["in the way"], "");
        assert!(perform(&plan(place.path(), &record)).is_err());
        take_back(place.path(), &failed(&record));
        assert_eq!(content(place.path().join(CONFIG_FILE)).as_deref(), Some("old"));
        assert!(!place.path().join(STAGING).exists());
    }
}
