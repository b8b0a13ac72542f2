//! Rows are tokenized once on a node: whoever comes first writes the tokens to the user's cache folder, and all others
//! map them, other ranks of this run and later runs too.
//!
//! A file has the digest of all that decides its content as its name ([`Making::key`]), so that a file that is there
//! is up to date. It is written beside its place and renamed; meanwhile its writer holds a lock, which is gone when the
//! writer is killed. Nothing here is collective: ranks that see one cache folder share its files.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use crate::checkpoint::cache::{self, Pruned};
use crate::checkpoint::{atomic, shards};
use crate::comm::watch;
use crate::data::source::{Files, Source};
use crate::data::store::{MADE_BY, Meta, Store};
use crate::data::tokens::{Making, Progress, Tokens};
use crate::files::{self, shown_path};
use crate::progress;
use crate::train::log::bytes;

use super::Start;

/// Ending of a file of tokens.
pub const ENDING: &str = "tokens";
/// Ending of the file that the writer of a file of tokens locks.
const LOCK_ENDING: &str = "lock";

/// Time between two looks at a file that another process is writing.
const LOOK: Duration = Duration::from_millis(50);
/// Time for which the other ranks of a node leave the writing to the first one, because rank 0 tells its progress.
const FIRST_RANK: Duration = Duration::from_millis(500);
/// Time between two lines about progress.
const TELL: Duration = Duration::from_secs(10);

/// Returns the folder of the files of tokens.
pub fn folder() -> Result<PathBuf> {
    Ok(shards::cache_dir()?.join("tokens"))
}

/// Returns rows as tokens: from the cache folder, or made and put there. Where no file can be put there, this rank
/// makes its own, in a temporary file without a name. `key` names the rows in messages.
pub fn tokens(start: &Start, model: &Path, sources: &[Source], making: &Making, key: &str) -> Result<Tokens> {
    let files = Files::find(sources)?;
    let stamps = files.stamps();
    let name = making.key(&files)?;
    let place = folder().map(|folder| folder.join(format!("{name}.{ENDING}")));
    let found = place.and_then(|place| Ok((find(start, &place, key)?, place)));
    let (_lock, place) = match found {
        Ok((Found::Tokens(store), _)) => return Ok(Tokens { store, files }),
        Ok((Found::Nothing(lock), place)) => (lock, place),
        Err(error) => {
            tracing::warn!("{key}: tokens are not kept: {error:#}");
            let tokens = Tokens::temporary(making, files, &mut shown(start, key));
            progress::end();
            return tokens;
        }
    };
    let mut out = atomic::beside(&place)?;
    let made_from: Vec<&Path> = [model].into_iter().chain(sources.iter().map(|source| source.path.as_path())).collect();
    let made_from = made_from.into_iter().map(|path| path.display().to_string()).collect();
    making.write(&files, made_from, out.as_file_mut(), &shown_path(&place), &mut shown(start, key))?;
    progress::end();
    if files.stamps() != stamps {
        // The tokens are not those of the bytes that gave them their name.
        tracing::warn!("{key}: a file has changed while it was read; its tokens are not kept");
        return Ok(Tokens { store: Store::open(out.into_file())?, files });
    }
    atomic::rename(out, &place)?;
    let store = open(&place)?.with_context(|| format!("{}: was written and is not there", shown_path(&place)))?;
    Ok(Tokens { store, files })
}

enum Found {
    Tokens(Store),
    /// This process has to write the file.
    Nothing(Lock),
}

/// Waits for the file while another process writes it. Fails if the cache folder cannot be written to.
fn find(start: &Start, place: &Path, key: &str) -> Result<Found> {
    let begun = Instant::now();
    let (mut wait, mut written, mut damage) = (None, 0, None);
    loop {
        if let Some(store) = open_unless_damaged(place, &mut damage) {
            return Ok(Found::Tokens(store));
        }
        let is_first = start.world.local_rank == 0 || begun.elapsed() >= FIRST_RANK;
        if is_first && let Some(lock) = Lock::take(place)? {
            // The file may have come between the look and the lock.
            if let Some(store) = open_unless_damaged(place, &mut damage) {
                return Ok(Found::Tokens(store));
            }
            if let Some((_, error)) = damage {
                tracing::warn!("{}: damaged: {error:#}; it is made again", shown_path(place));
            }
            return Ok(Found::Nothing(lock));
        }
        wait.get_or_insert_with(|| {
            start.log.line(format!("{key}: another process is tokenizing the same rows; waiting for it"));
            watch::wait(format!("the tokens of {key}"))
        });
        let now = bytes_written(place);
        if now != written {
            watch::beat();
        }
        written = now;
        std::thread::sleep(LOOK);
    }
}

/// Opens the file of tokens if it is there and whole. `damage` keeps the inode of a damaged file with the error: such a
/// file stays there until it is replaced, and whoever waits for that does not read all of it again at each look.
fn open_unless_damaged(place: &Path, damage: &mut Option<(u64, anyhow::Error)>) -> Option<Store> {
    let inode = place.metadata().ok()?.ino();
    if damage.as_ref().is_some_and(|(damaged, _)| *damaged == inode) {
        return None;
    }
    match open(place) {
        Ok(found) => found,
        Err(error) => {
            *damage = Some((inode, error));
            None
        }
    }
}

/// Opens a file of tokens, if there is one, and says that it is in use. All its bytes are compared with checksums.
fn open(place: &Path) -> Result<Option<Store>> {
    shards::open_in_use(place)?.map(Store::open).transpose()
}

/// Bytes of the unfinished files beside a place.
fn bytes_written(place: &Path) -> u64 {
    let entries = place.parent().and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let unfinished = entries.filter(|entry| atomic::is_temporary(&entry.path()));
    unfinished.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// The right to write a file, until this is dropped.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Returns the right to write the file at `place`, unless another process has it. Where the file system has no
    /// locks, everybody has the right.
    fn take(place: &Path) -> Result<Option<Lock>> {
        let path = place.with_extension(LOCK_ENDING);
        let folder = path.parent().context("a folder")?;
        std::fs::create_dir_all(folder).with_context(|| shown_path(folder))?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| shown_path(&path))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Ok(None);
        }
        // Before the lock, the one who had it may have removed the file.
        let is_there = path.metadata().is_ok_and(|found| file.metadata().is_ok_and(|own| own.ino() == found.ino()));
        Ok(is_there.then_some(Lock { path, _file: file }))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A file of tokens in the cache folder.
#[derive(Debug)]
pub struct TokenFile {
    pub path: PathBuf,
    pub bytes: u64,
    pub last_used: SystemTime,
    /// A run has it open.
    pub is_in_use: bool,
    /// Number of tokens, and what the file says of itself; `None` if its header is damaged.
    pub content: Option<(u64, Meta)>,
}

/// Returns the files in a folder whose names have this ending.
fn files_with(folder: &Path, ending: &'static str) -> Result<impl Iterator<Item = PathBuf>> {
    Ok(cache::entries(folder)?.into_iter().filter(move |path| path.extension().is_some_and(|e| e == ending)))
}

/// Lists the files of tokens in a folder, the one that was used last first.
pub fn list(folder: &Path) -> Result<Vec<TokenFile>> {
    let mut found = Vec::new();
    for path in files_with(folder, ENDING)? {
        // Another process may have removed it by now.
        let (Ok(metadata), Ok(file)) = (path.metadata(), files::open(&path)) else { continue };
        let is_in_use = matches!(cache::lock(&path), Err(TryLockError::WouldBlock));
        let last_used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        found.push(TokenFile { path, bytes: metadata.len(), last_used, is_in_use, content: Store::peek(&file).ok() });
    }
    found.sort_by_key(|file| std::cmp::Reverse(file.last_used));
    Ok(found)
}

/// Removes files of tokens that are damaged or that this version does not read, and those that were not used for
/// `older_than`; never one that a run has open. Returns the files that are concerned with what became of each.
pub fn prune(folder: &Path, older_than: Option<Duration>, dry_run: bool) -> Result<Vec<(TokenFile, Pruned)>> {
    let (now, mut pruned) = (SystemTime::now(), Vec::new());
    for file in list(folder)? {
        let is_useless = file.content.as_ref().is_none_or(|(_, meta)| meta.made_by != MADE_BY);
        let age = now.duration_since(file.last_used).unwrap_or_default();
        if is_useless || older_than.is_some_and(|least| age >= least) {
            let outcome = cache::remove(std::slice::from_ref(&file.path), dry_run);
            pruned.push((file, outcome));
        }
    }
    if !dry_run {
        atomic::remove_abandoned(folder);
        // A lock that nobody holds was left by a process that was killed. It is removed when it is dropped.
        files_with(folder, LOCK_ENDING)?.for_each(|path| drop(Lock::take(&path)));
    }
    Ok(pruned)
}

/// Returns what is to be called with the progress of tokenizing: it moves the bar, and now and then tells a line.
fn shown<'a>(start: &'a Start, key: &'a str) -> impl FnMut(Progress) + 'a {
    let (what, mut told) = (format!("tokenizing {key}"), Duration::ZERO);
    move |Progress { bytes_read, bytes: all, rows, tokens, since }| {
        let (read, all, elapsed) = (bytes_read as usize, all as usize, since.elapsed());
        let rate = read as f64 / 1e6 / elapsed.as_secs_f64();
        progress::bar(&what, read, all, || format!("{rate:.1} MB/s"));
        if elapsed >= told + TELL {
            told = elapsed;
            let (read, all) = (bytes(read), bytes(all));
            start.log.line(format!("{what}: {read} of {all} read ({rate:.1} MB/s), {rows} rows, {tokens} tokens"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_may_write() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("new/a.tokens");
        let lock = Lock::take(&place).unwrap().unwrap();
        assert!(Lock::take(&place).unwrap().is_none());
        assert!(Lock::take(&place.with_file_name("b.tokens")).unwrap().is_some());
        drop(lock);
        assert!(!place.with_extension(LOCK_ENDING).exists());
        // What a killed process leaves is a file without a lock.
        std::fs::write(place.with_extension(LOCK_ENDING), "").unwrap();
        assert!(Lock::take(&place).unwrap().is_some());
    }
}
