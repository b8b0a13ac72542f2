//! The user's cache of shard files: what is in it, and the removal of what nobody needs.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::files::{map, shown_path};
use crate::fsdp::layout::LAYOUT_VERSION;

use super::atomic;
use super::donor::parse_name;
use super::shards::{BESIDE_KEY, FORMAT, MODEL_KEY, read_header};

/// A set that lacks files may be one that is being made; it is left alone until it has not been used for this long.
const BEING_MADE: Duration = Duration::from_secs(3600);

/// The shard files of one base and encoding for one number of ranks.
#[derive(Debug)]
pub struct ShardSet {
    pub folder: PathBuf,
    /// Digest of the base, its encoding, and the model's folder, if a file of the set can be read and names them.
    pub base: Option<String>,
    pub encoding: Option<String>,
    pub model: Option<String>,
    pub layout_version: Option<u32>,
    /// Number of ranks that hold the base together.
    pub world_size: usize,
    pub files: Vec<PathBuf>,
    pub bytes: u64,
    pub last_used: SystemTime,
    /// True if no file is missing or cut off: of all ranks, or of those that wrote to this folder.
    pub is_complete: bool,
    /// True if a run has a file of the set open.
    pub is_in_use: bool,
}

/// The outcome for what `prune` wants to remove.
#[derive(Debug, PartialEq, Eq)]
pub enum Pruned {
    Removed,
    /// It would be removed if this were no dry run.
    WouldBeRemoved,
    /// A run has it open.
    InUse,
    /// It cannot be locked or removed, with the reason.
    Left(String),
}

/// Lists the sets in the folders below `root`, the one that was used last first.
pub fn list(root: &Path) -> Result<Vec<ShardSet>> {
    let mut sets = Vec::new();
    for folder in entries(root)?.into_iter().filter(|path| path.is_dir()) {
        let mut found: BTreeMap<(String, usize), Vec<(usize, PathBuf)>> = BTreeMap::new();
        for path in entries(&folder)? {
            if let Some((kind, shard, of)) = parse_name(&path) {
                found.entry((kind.to_string(), of)).or_default().push((shard, path.clone()));
            }
        }
        sets.extend(found.into_iter().map(|((_, world_size), files)| ShardSet::new(&folder, world_size, files)));
    }
    sets.sort_by_key(|set| std::cmp::Reverse(set.last_used));
    Ok(sets)
}

/// Paths in a folder, sorted; none if the folder is not there.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| shown_path(folder)),
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Removes sets that lack files, sets of a layout that this program does not read, and sets that were not used for
/// `older_than`; never one that a run has open. Returns the sets that are concerned with what became of each.
pub fn prune(root: &Path, older_than: Option<Duration>, dry_run: bool) -> Result<Vec<(ShardSet, Pruned)>> {
    let now = SystemTime::now();
    let mut pruned = Vec::new();
    for set in list(root)? {
        let age = now.duration_since(set.last_used).unwrap_or_default();
        let is_useless = !set.is_complete || set.layout_version != Some(LAYOUT_VERSION);
        if is_useless && age >= BEING_MADE || older_than.is_some_and(|least| age >= least) {
            let outcome = remove(&set.files, dry_run);
            pruned.push((set, outcome));
        }
    }
    if !dry_run {
        for folder in entries(root)?.into_iter().filter(|path| path.is_dir()) {
            atomic::remove_abandoned(&folder);
            // A folder that is not empty stays.
            let _ = std::fs::remove_dir(folder);
        }
    }
    Ok(pruned)
}

impl ShardSet {
    fn new(folder: &Path, world_size: usize, mut files: Vec<(usize, PathBuf)>) -> ShardSet {
        files.sort();
        let (shards, files): (Vec<usize>, Vec<PathBuf>) = files.into_iter().unzip();
        let (mut bytes, mut last_used, mut are_whole) = (0, SystemTime::UNIX_EPOCH, true);
        let mut metadata = None;
        for path in &files {
            if let Ok(found) = std::fs::metadata(path) {
                bytes += found.len();
                last_used = last_used.max(found.modified().unwrap_or(SystemTime::UNIX_EPOCH));
            }
            let header = map(path).and_then(|file| {
                let (_, header) = read_header(&file)?;
                Ok(header)
            });
            let header = header.ok().filter(|header| header.get("format").map(String::as_str) == Some(FORMAT));
            are_whole &= header.is_some();
            metadata = metadata.or(header);
        }
        let metadata = metadata.unwrap_or_default();
        let text = |key: &str| metadata.get(key).cloned();
        let beside: Option<Vec<usize>> = text(BESIDE_KEY).and_then(|list| serde_json::from_str(&list).ok());
        let expected = beside.unwrap_or_else(|| (0..world_size).collect());
        ShardSet {
            folder: folder.to_path_buf(),
            base: text("base"),
            encoding: text("encoding"),
            model: text(MODEL_KEY),
            layout_version: text("layout_version").and_then(|version| version.parse().ok()),
            world_size,
            is_complete: are_whole && expected.iter().all(|shard| shards.contains(shard)),
            is_in_use: files.iter().any(|path| matches!(lock(path), Err(TryLockError::WouldBlock))),
            files,
            bytes,
            last_used,
        }
    }
}

/// Removes files if all of them can be locked, so that no run has one open.
pub fn remove(files: &[PathBuf], dry_run: bool) -> Pruned {
    let mut locks = Vec::new();
    for path in files {
        match lock(path) {
            Ok(file) => locks.push(file),
            Err(TryLockError::WouldBlock) => return Pruned::InUse,
            Err(TryLockError::Error(error)) => return Pruned::Left(format!("{}: {error}", shown_path(path))),
        }
    }
    if dry_run {
        return Pruned::WouldBeRemoved;
    }
    for path in files {
        if let Err(error) = std::fs::remove_file(path) {
            return Pruned::Left(format!("{}: {error}", shown_path(path)));
        }
    }
    Pruned::Removed
}

/// Locks a file against all others. A lock over NFS needs a file that is open for writing.
pub fn lock(path: &Path) -> Result<File, TryLockError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(TryLockError::Error)?;
    file.try_lock()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::shards::{Found, Made, ShardSpec, ShardWriter};
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// Writes some of the shards for `num_shards` ranks, last used some time ago.
    fn write(
        root: &Path,
        base: &str,
        num_shards: usize,
        shards: &[usize],
        beside: &[usize],
        age: Duration,
    ) -> ShardSpec {
        let (unit_bytes, model) = (vec![64, 128], "/models/tiny".to_string());
        let dir = root.join(format!("{base}-nf4-v{LAYOUT_VERSION}"));
        let spec = ShardSpec { dir, base: base.into(), encoding: "nf4".into(), num_shards, unit_bytes, model };
        let made = Made { makers: Vec::new(), beside: beside.to_vec() };
        for &shard in shards {
            let mut writer = ShardWriter::create(&spec, shard, vec![60, 128], &made).unwrap();
            writer.append(0, &[1; 60]).unwrap();
            writer.append(1, &[2; 128]).unwrap();
            writer.finish().unwrap();
            let file = OpenOptions::new().write(true).open(spec.path(shard)).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        spec
    }

    #[test]
    fn a_set_is_listed_with_what_it_is_and_whether_it_is_complete() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(&root.path().join("not there")).unwrap().is_empty());
        write(root.path(), "a", 2, &[0, 1], &[0, 1], DAY);
        write(root.path(), "b", 4, &[2, 3], &[2, 3], 2 * DAY);
        write(root.path(), "c", 2, &[1], &[0, 1], 3 * DAY);
        std::fs::write(root.path().join("base-0123.json"), "{}").unwrap();
        let sets = list(root.path()).unwrap();
        let told: Vec<_> = sets.iter().map(|set| (set.base.as_deref(), set.world_size, set.is_complete)).collect();
        assert_eq!(told, [(Some("a"), 2, true), (Some("b"), 4, true), (Some("c"), 2, false)]);
        let set = &sets[0];
        assert_eq!((set.encoding.as_deref(), set.model.as_deref()), (Some("nf4"), Some("/models/tiny")));
        assert_eq!((set.files.len(), set.is_in_use), (2, false));
        assert_eq!(set.bytes, set.files.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum::<u64>());
    }

    #[test]
    fn only_what_nobody_needs_or_uses_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let used = write(root.path(), "used", 2, &[0, 1], &[0, 1], 40 * DAY);
        let old = write(root.path(), "old", 2, &[0, 1], &[0, 1], 40 * DAY);
        let torn = write(root.path(), "torn", 2, &[1], &[0, 1], DAY);
        let new = write(root.path(), "new", 2, &[0, 1], &[0, 1], Duration::ZERO);
        let being_made = write(root.path(), "being made", 2, &[0], &[0, 1], Duration::ZERO);
        let foreign = root.path().join(format!("old-nf4-v{LAYOUT_VERSION}/notes.txt"));
        std::fs::write(&foreign, "mine").unwrap();
        let outcomes = |older_than, dry_run| -> Vec<(String, Pruned)> {
            let pruned = prune(root.path(), older_than, dry_run).unwrap();
            pruned.into_iter().map(|(set, outcome)| (set.base.unwrap(), outcome)).collect()
        };
        assert_eq!(outcomes(None, true), [("torn".to_string(), Pruned::WouldBeRemoved)]);
        assert!(torn.path(1).exists());
        assert_eq!(outcomes(None, false), [("torn".to_string(), Pruned::Removed)]);
        assert!(!torn.dir.exists(), "the empty folder goes too");

        // A run that has mapped a shard keeps the set; that it did so is a use.
        let Found::Valid(mapped) = used.open(0).unwrap() else { panic!("a valid file") };
        assert!(outcomes(Some(30 * DAY), false).iter().all(|(base, _)| base == "old"));
        assert!(!old.path(0).exists() && !old.path(1).exists() && foreign.exists());
        let in_use = |base: &str| (base.to_string(), Pruned::InUse);
        assert!(outcomes(Some(Duration::ZERO), true).contains(&in_use("used")));
        drop(mapped);
        assert!(!outcomes(Some(Duration::ZERO), true).contains(&in_use("used")));
        assert!(used.path(1).exists() && new.path(0).exists() && being_made.path(0).exists());
    }
}
