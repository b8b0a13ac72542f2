//! Files that are whole or absent: each is written beside its final place, synced and renamed.
//!
//! Whoever writes a temporary file holds a lock on it. One without a lock was left by a process that was killed, and
//! the next process that writes in its folder removes it. Where the file system has no locks, nothing is removed.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::fstatvfs;
use tempfile::{Builder, NamedTempFile};

/// Beginning of the name of a temporary file.
const TEMPORARY: &str = ".fsdp-qlora-tmp-";

/// Makes a temporary file beside `path`, which is removed when it is dropped.
pub fn beside(path: &Path) -> Result<NamedTempFile> {
    let dir = folder_of(path);
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be created", dir.display()))?;
    remove_abandoned(dir);
    loop {
        let file = Builder::new()
            .prefix(TEMPORARY)
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(dir)
            .with_context(|| format!("{}: cannot be written to", dir.display()))?;
        // A file without a lock works as well; it only stays behind if this process is killed.
        let _ = file.as_file().lock();
        // Before the lock, another process may have removed the file as one left behind.
        if file.as_file().metadata().with_context(|| dir.display().to_string())?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Returns whether this is the name of a temporary file.
pub fn is_temporary(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY))
}

/// Removes the temporary files of processes that were killed.
pub fn remove_abandoned(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if !is_temporary(&entry.path()) {
            continue;
        }
        // Files of other users, and files that are gone by now, are skipped.
        let Ok(file) = OpenOptions::new().write(true).open(entry.path()) else { continue };
        if file.try_lock().is_ok() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Makes a temporary file beside `path` if the disk has room for this many bytes.
pub fn beside_with_room(path: &Path, bytes: usize) -> Result<NamedTempFile> {
    let file = beside(path)?;
    check_room(file.as_file(), path, bytes)?;
    Ok(file)
}

/// Fails if the disk that `file` is on has no room for this many bytes more, which are to go to `path`.
pub fn check_room(file: &File, path: &Path, bytes: usize) -> Result<()> {
    let disk = fstatvfs(file).with_context(|| path.display().to_string())?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    ensure!(bytes as u64 <= free, "{}: {bytes} bytes are needed, {free} are free on this disk", path.display());
    Ok(())
}

/// Makes a written temporary file durable under its name.
pub fn rename(file: NamedTempFile, path: &Path) -> Result<()> {
    let place = || path.display().to_string();
    file.as_file().sync_all().with_context(place)?;
    file.persist(path).map_err(|e| e.error).with_context(place)?;
    sync_folder(folder_of(path))
}

/// Writes a whole file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = beside(path)?;
    file.write_all(bytes).with_context(|| format!("{}: cannot be written", path.display()))?;
    rename(file, path)
}

/// Writes a file and waits until the disk has it.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<File> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok::<_, std::io::Error>(file)
    };
    write().with_context(|| format!("{}: cannot be written", path.display()))
}

/// Syncs a folder, so that the names in it are durable.
pub fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| dir.display().to_string())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_looked_for_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/file");
        drop(beside_with_room(&path, 1).unwrap());
        let error = beside_with_room(&path, usize::MAX).unwrap_err().to_string();
        assert!(error.contains(&format!("new/file: {} bytes are needed", usize::MAX)), "{error}");
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 0);
    }

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let held = beside(&dir.path().join("file")).unwrap();
        let left = dir.path().join(format!("{TEMPORARY}left"));
        let foreign = dir.path().join(".tmpforeign");
        [&left, &foreign].iter().for_each(|path| std::fs::write(path, "half").unwrap());
        write(&dir.path().join("other"), b"whole").unwrap();
        assert!(held.path().exists() && !left.exists() && foreign.exists());
    }

    #[test]
    fn many_writers_of_one_folder_do_not_remove_each_others_files() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for i in 0..8 {
                let path = dir.path().join(i.to_string());
                scope.spawn(move || (0..50).for_each(|_| write(&path, b"whole").unwrap()));
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 8);
    }
}
