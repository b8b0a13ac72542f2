//! The cache of `huggingface_hub`, which this program reads and writes as Python does.
//!
//! | path in the folder of a repository, `models--ORG--NAME` | what it is |
//! |---|---|
//! | `refs/main` | the commit that the branch had when it was asked for |
//! | `blobs/ETAG` | a file, named by its sha256 (large files) or its hash in git |
//! | `blobs/ETAG.HOST.incomplete` | the part of it that has arrived |
//! | `snapshots/COMMIT/path` | a link to a blob |
//! | `trees/COMMIT.json` | names of all files, written by `huggingface_hub` 2 |
//! | `.fsdp-qlora/COMMIT.json` | names of all files, written by this program; if it were in `trees`, Python would expect all these files in the snapshot |

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::progress::Progress;
use super::reference::{Reference, is_commit, is_inside};
use crate::checkpoint::atomic;
use crate::comm::host_name;
use crate::files::{self, shown_path};

/// Largest file of names, with room for those of a million files.
const MAX_NAMES_BYTES: u64 = 256 << 20;

/// Largest file that names a commit.
const MAX_REF_BYTES: u64 = 1000;

/// Time between two tries to take a lock that another process holds.
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// The folder of a repository in the cache.
pub struct Folder {
    cache: PathBuf,
    name: String,
}

impl Folder {
    pub fn of(cache: &Path, Reference { kind, id, .. }: &Reference) -> Folder {
        Folder { cache: cache.into(), name: format!("{}--{}", kind.plural(), id.replace('/', "--")) }
    }

    fn path(&self) -> PathBuf {
        self.cache.join(&self.name)
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.path().join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.path().join("blobs").join(etag)
    }

    /// Returns the commit of a revision; `None` if the cache does not know it or has no file of it.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let commit = files::read_text(&self.path().join("refs").join(revision), MAX_REF_BYTES).ok()?;
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit) && self.snapshot(commit).is_dir())
    }

    /// Records the commit of a revision.
    pub fn note_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        atomic::write(&self.path().join("refs").join(revision), commit.as_bytes())
    }

    /// Tells whether the cache has a file of a commit.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    /// Returns the names of all files of a commit, if the cache knows them.
    pub fn names(&self, commit: &str) -> Option<Vec<String>> {
        let read = |path: PathBuf| files::read_json::<Value>(&path, MAX_NAMES_BYTES).ok();
        let names: Vec<String> = match read(self.own_names(commit)) {
            Some(names) => serde_json::from_value(names).ok()?,
            None => match read(self.path().join("trees").join(format!("{commit}.json")))?.get("files")? {
                Value::Object(files) => files.keys().cloned().collect(),
                _ => return None,
            },
        };
        names.iter().all(|name| is_inside(name)).then_some(names)
    }

    fn own_names(&self, commit: &str) -> PathBuf {
        self.path().join(".fsdp-qlora").join(format!("{commit}.json"))
    }

    /// Records the names of all files of a commit.
    pub fn note_names(&self, commit: &str, names: &[String]) -> Result<()> {
        atomic::write(&self.own_names(commit), &serde_json::to_vec(names)?)
    }

    /// Returns the names of the files of a commit that are in the cache.
    pub fn present(&self, commit: &str) -> Vec<String> {
        fn walk(dir: &Path, prefix: &str, names: &mut Vec<String>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let (path, name) = (entry.path(), format!("{prefix}{name}"));
                match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    true => walk(&path, &format!("{name}/"), names),
                    false if path.is_file() => names.push(name),
                    false => {}
                }
            }
        }
        let mut names = Vec::new();
        walk(&self.snapshot(commit), "", &mut names);
        names.sort();
        names
    }

    /// Links a file of a commit to its blob.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let place = self.snapshot(commit).join(file);
        let folder = created_folder_of(&place)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        if fs::read_link(&place).is_ok_and(|found| found == Path::new(&target)) {
            return Ok(());
        }
        let linked = tempfile::Builder::new()
            .make_in(folder, |beside| symlink(&target, beside))
            .and_then(|link| link.persist(&place).map_err(|error| error.error));
        linked.with_context(|| {
            format!(
                "{}: no link can be made there; help: HF_HUB_CACHE can name a folder on another file system",
                shown_path(&place)
            )
        })
    }

    /// Returns the path of the part of a blob that has arrived on this machine. Each machine has its own, because the locks of some
    /// shared file systems hold on one machine only.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        let host = xxh3_64(host_name().as_bytes()) as u32;
        self.path().join("blobs").join(format!("{etag}.{host:08x}.incomplete"))
    }

    /// Opens the file at [`Self::incomplete`], to read it and to append to it.
    pub fn open_incomplete(&self, etag: &str) -> Result<File> {
        let path = self.incomplete(etag);
        created_folder_of(&path)?;
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        file.with_context(|| shown_path(&path))
    }

    /// Waits for the lock of a blob, which every process takes that downloads it, those of Python too. Returns `None` on a file system
    /// without locks.
    pub fn lock(&self, etag: &str, progress: &Progress) -> Result<Option<File>> {
        let path = self.cache.join(".locks").join(&self.name).join(format!("{etag}.lock"));
        created_folder_of(&path)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| shown_path(&path))?;
        let mut is_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) if progress.is_stopped() => {
                    bail!("the wait for another process was ended")
                }
                Err(TryLockError::WouldBlock) => {
                    if !is_told {
                        progress.note(format!(
                            "another process downloads this file; waiting for it ({})",
                            shown_path(&path)
                        ));
                        is_told = true;
                    }
                    progress.pause(LOCK_PAUSE);
                }
            }
        }
    }

    /// Fails if the disk has no room for this many bytes more.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        fs::create_dir_all(self.path()).with_context(|| shown_path(&self.path()))?;
        let disk =
            rustix::fs::statvfs(self.path()).map_err(io::Error::from).with_context(|| shown_path(&self.path()))?;
        let free = disk.f_bavail * disk.f_frsize;
        ensure!(
            bytes <= free,
            "{}: {bytes} bytes have to be downloaded, and {free} are free; help: HF_HUB_CACHE can name a folder on another disk",
            shown_path(&self.path())
        );
        Ok(())
    }
}

/// Returns the folder of a path, which is made if it is not there.
fn created_folder_of(path: &Path) -> Result<&Path> {
    let folder = path.parent().context("a file without a folder")?;
    fs::create_dir_all(folder).with_context(|| shown_path(folder))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::super::reference::Kind;
    use super::*;

    #[test]
    fn a_link_takes_the_place_of_another_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let reference = Reference::of_id("org/name", Kind::Model).unwrap();
        let folder = Folder::of(dir.path(), &reference);
        let (commit, [first, second]) = ("0".repeat(40), ["a".repeat(40), "b".repeat(40)]);
        for etag in [&first, &second, &second] {
            folder.link(&commit, "data/file", etag).unwrap();
            let link = folder.snapshot(&commit).join("data/file");
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(&format!("../../../blobs/{etag}")));
            assert_eq!(fs::read_dir(link.parent().unwrap()).unwrap().count(), 1);
        }
        // Files of equal content are linked at the same time.
        std::thread::scope(|scope| {
            for i in 0..8 {
                let (folder, commit, etag) = (&folder, &commit, &first);
                scope.spawn(move || folder.link(commit, &format!("data/{i}"), etag).unwrap());
            }
        });
    }
}
