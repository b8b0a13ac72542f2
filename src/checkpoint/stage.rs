//! A folder that appears under its name when it is whole: it is filled beside its place, under a lock, and renamed.
//!
//! A process that is killed leaves the hidden folder. The next process for the same place takes it over and empties it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::atomic;
use super::output::{LOCK_FILE, Lock};
use crate::comm::watch::{self, Phase};
use crate::files::shown_path;

/// A hidden folder beside its place. It is removed when it is dropped before it is finished.
pub struct Stage {
    /// `None` once the folder is finished.
    lock: Option<Lock>,
    dir: PathBuf,
    place: PathBuf,
}

impl Stage {
    /// Makes an empty folder that is to become `place`.
    ///
    /// # Errors
    /// Something is at `place` already that is no empty folder; an empty one cannot be replaced, for instance because
    /// it is a mount point; another process fills the same folder.
    pub fn make(place: &Path) -> Result<Stage> {
        check_free(place)?;
        Self::beside(place)
    }

    /// Makes an empty folder beside `place` that is removed when it is dropped. Nothing is done to `place` itself.
    ///
    /// # Errors
    /// The folder cannot be made; another process fills it.
    pub fn beside(place: &Path) -> Result<Stage> {
        let place = std::path::absolute(place).context("the working directory")?;
        let (Some(name), Some(parent)) = (place.file_name(), place.parent()) else {
            bail!("{}: no name of a folder", shown_path(&place));
        };
        let dir = parent.join(format!(".{}.fsdp-qlora-new", name.to_string_lossy()));
        let lock = Lock::take(&dir)?;
        let stage = Stage { lock: Some(lock), dir, place };
        stage.clear()?;
        Ok(stage)
    }

    /// The folder to fill.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fails if the disk has no room for so many bytes.
    pub fn check_room(&self, bytes: usize) -> Result<()> {
        let file = fs::File::open(&self.dir).with_context(|| shown_path(&self.dir))?;
        atomic::check_room(&file, &self.place, bytes)
    }

    /// Puts the folder in its place. The files in it must have been synced.
    ///
    /// # Errors
    /// The folder cannot be renamed. Then it stays where it is, and the error names that place.
    pub fn finish(mut self) -> Result<()> {
        watch::phase(Phase::Save)?;
        atomic::sync_folder(&self.dir)?;
        if let Some(lock) = self.lock.take() {
            lock.rename_folder(&self.place).with_context(|| {
                format!("{}: cannot be made; all of it is in {}", shown_path(&self.place), shown_path(&self.dir))
            })?;
        }
        self.place.parent().map_or(Ok(()), atomic::sync_folder)
    }

    /// Removes everything but the lock.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).with_context(|| shown_path(&self.dir))? {
            let path = entry.with_context(|| shown_path(&self.dir))?.path();
            if path.file_name().is_some_and(|name| name != LOCK_FILE) {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.with_context(|| shown_path(&path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // The next process for this place removes what stays behind.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Fails if something is at `place` that is no empty folder. An empty folder is removed.
fn check_free(place: &Path) -> Result<()> {
    let Ok(found) = place.symlink_metadata() else { return Ok(()) };
    let is_empty = found.is_dir() && fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(is_empty, "{}: it is there already\nhelp: name a new folder", shown_path(place));
    fs::remove_dir(place)
        .with_context(|| format!("{}: this folder cannot be replaced; name a folder inside it", shown_path(place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_when_it_is_whole() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("a/out");
        let left = || fs::read_dir(place.path().join("a")).unwrap().count();
        let stage = Stage::make(&out).unwrap();
        fs::write(stage.dir().join("file"), "half").unwrap();
        let error = Stage::make(&out).err().unwrap().to_string();
        assert!(error.contains("is in use by another run"), "{error}");
        assert!(!out.exists());
        drop(stage);
        assert_eq!(left(), 0);
        // A killed process leaves such a folder.
        fs::create_dir_all(place.path().join("a/.out.fsdp-qlora-new/folder")).unwrap();
        fs::create_dir(&out).unwrap();
        let stage = Stage::make(&out).unwrap();
        fs::write(stage.dir().join("file"), "whole").unwrap();
        stage.finish().unwrap();
        let names: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!((names, left()), (vec!["file".into()], 1));
        let error = Stage::make(&out).err().unwrap().to_string();
        assert!(error.contains("it is there already\nhelp: name a new folder"), "{error}");
        // A folder for what is not kept needs no free place.
        let scratch = Stage::beside(&out).unwrap();
        fs::write(scratch.dir().join("file"), "not kept").unwrap();
        drop(scratch);
        assert_eq!((fs::read_to_string(out.join("file")).unwrap().as_str(), left()), ("whole", 1));
        assert!(Stage::make(Path::new("/")).is_err() && Stage::beside(Path::new("/")).is_err());
    }

    #[test]
    fn a_folder_that_was_filled_meanwhile_is_kept() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let stage = Stage::make(&out).unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("mine"), "").unwrap();
        fs::write(stage.dir().join("file"), "whole").unwrap();
        assert!(stage.finish().unwrap_err().to_string().contains("out: cannot be made; all of it is in "));
        assert!(out.join("mine").exists() && place.path().join(".out.fsdp-qlora-new/file").exists());
        assert!(Stage::make(&place.path().join("out/mine")).is_err());
    }
}
