//! A lock that lets only one run at a time write to an output folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::comm::host_name;

/// Name of the file that is locked.
pub const LOCK_FILE: &str = ".fsdp-qlora.lock";

/// A lock on a folder. Dropping it removes the file, and the folder too if the lock made it and it is empty. The
/// kernel frees the lock of a process that was killed.
pub struct Lock {
    file: File,
    path: PathBuf,
    made_folder: bool,
    /// Reason why the file system gives no lock; `None` if it does.
    pub unlocked: Option<String>,
}

impl Lock {
    /// Makes the folder if it is not there, and locks it. Fails, naming host and process, if another run holds the
    /// lock.
    pub fn take(dir: &Path) -> Result<Lock> {
        let made_folder = !dir.exists();
        std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be created", dir.display()))?;
        let path = dir.join(LOCK_FILE);
        loop {
            // Locks over NFS need a file that is open for writing.
            let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
            let mut file = options.open(&path).with_context(|| format!("{}: cannot be opened", path.display()))?;
            let unlocked = match file.try_lock() {
                Ok(()) => None,
                Err(TryLockError::Error(why)) => Some(why.to_string()),
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = file.read_to_string(&mut holder);
                    bail!("{} is in use by another run ({})", dir.display(), holder.trim())
                }
            };
            // The former holder may have removed the file before this process locked it.
            if !is_at(&file, &path) {
                continue;
            }
            let told = format!("host {}, process {}\n", host_name(), std::process::id());
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(told.as_bytes()))
                .with_context(|| format!("{}: cannot be written", path.display()))?;
            return Ok(Lock { file, path, made_folder, unlocked });
        }
    }

    /// Renames the locked folder, in one step, to a place where nothing is or an empty folder, and ends the lock.
    pub fn rename_folder(mut self, to: &Path) -> std::io::Result<()> {
        std::fs::rename(self.path.parent().unwrap_or(Path::new(".")), to)?;
        (self.path, self.made_folder) = (to.join(LOCK_FILE), false);
        Ok(())
    }

    /// Returns whether the locked file is still in the folder.
    pub fn is_held(&self) -> bool {
        is_at(&self.file, &self.path)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that cannot be removed is not locked any more and does no harm.
        if self.is_held() {
            let _ = std::fs::remove_file(&self.path);
        }
        if let Some(dir) = self.path.parent().filter(|_| self.made_folder) {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Returns whether this open file is the one at `path`.
pub fn is_at(file: &File, path: &Path) -> bool {
    let identity = |m: std::fs::Metadata| (m.dev(), m.ino());
    file.metadata().ok().map(identity) == std::fs::metadata(path).ok().map(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_holds_it() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("out");
        let lock = Lock::take(&dir).unwrap();
        let error = Lock::take(&dir).err().unwrap().to_string();
        assert!(error.contains(&format!("host {}, process {}", host_name(), std::process::id())), "{error}");
        drop(lock);
        assert!(!dir.exists(), "an empty folder that it made is removed");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(LOCK_FILE), "host gone, process 1, and more text than the next holder writes").unwrap();
        let lock = Lock::take(&dir).unwrap();
        assert!(lock.is_held() && !std::fs::read_to_string(dir.join(LOCK_FILE)).unwrap().contains("gone"));
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(!lock.is_held());
    }
}
