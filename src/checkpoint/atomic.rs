//! Files that are whole or not there: written beside, synced, renamed.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

/// A temporary file beside `path`, gone when it is dropped.
pub fn beside(path: &Path) -> Result<NamedTempFile> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be created", dir.display()))?;
    let file = NamedTempFile::new_in(dir).with_context(|| format!("{}: cannot be written to", dir.display()))?;
    file.as_file().set_permissions(Permissions::from_mode(0o644)).with_context(|| dir.display().to_string())?;
    Ok(file)
}

/// Makes a written temporary file durable under its name.
pub fn rename(file: NamedTempFile, path: &Path) -> Result<()> {
    let place = || path.display().to_string();
    file.as_file().sync_all().with_context(place)?;
    file.persist(path).map_err(|e| e.error).with_context(place)?;
    if let Some(dir) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        File::open(dir).and_then(|d| d.sync_all()).with_context(|| dir.display().to_string())?;
    }
    Ok(())
}

/// Writes a whole file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = beside(path)?;
    file.write_all(bytes).with_context(|| format!("{}: cannot be written", path.display()))?;
    rename(file, path)
}
