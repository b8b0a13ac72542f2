//! The record: digests of a base's tensors from an earlier start, with the stamps of the files that were read for
//! them.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::files::{self, shown_path};

use super::atomic;

/// A file that changed less than this before it was read is not recorded: it could change again within one tick of
/// the clock that makes its stamps, which is a second on some file systems.
const SETTLED: Duration = Duration::from_secs(1);
const MAX_RECORD_BYTES: u64 = 64 << 20;

/// Identity of a file and the times of its last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamps {
    pub device: u64,
    pub inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamps {
    fn new(metadata: &Metadata) -> Stamps {
        Stamps {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    pub fn of(file: &File, path: &Path) -> Result<Stamps> {
        Ok(Self::new(&file.metadata().with_context(|| shown_path(path))?))
    }

    /// Returns whether every change after `now` will show in the stamps.
    fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(now) = now.duration_since(SystemTime::UNIX_EPOCH) else { return false };
        let changed = Duration::new(self.ctime.0.max(0) as u64, self.ctime.1.clamp(0, 999_999_999) as u32);
        now.checked_sub(changed).is_some_and(|age| age >= SETTLED)
    }
}

/// Digests of earlier starts, for each file of the base.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// xxh3 of `files` as JSON. A record that is damaged counts as absent.
    checksum: String,
    files: BTreeMap<String, RecordedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RecordedFile {
    stamps: Stamps,
    /// Maps a tensor's name to its digest in hex.
    tensors: BTreeMap<String, String>,
}

impl Record {
    /// Makes a record from each file's name, stamps and tensors' digests, which were read after `read_at`. A file
    /// whose next change might not show in its stamps is left out.
    pub fn new<'a>(files: impl Iterator<Item = (String, Stamps, Vec<(&'a str, u128)>)>, read_at: SystemTime) -> Record {
        let recorded = |(name, stamps, tensors): (String, Stamps, Vec<(&str, u128)>)| {
            let tensors =
                tensors.into_iter().map(|(name, digest)| (name.to_string(), format!("{digest:032x}"))).collect();
            stamps.is_settled(read_at).then_some((name, RecordedFile { stamps, tensors }))
        };
        let files = files.filter_map(recorded).collect();
        Record { checksum: checksum(&files), files }
    }

    /// Returns the digest of a tensor in a file that has these stamps now, if it is recorded.
    pub fn digest(&self, file: &str, stamps: &Stamps, tensor: &str) -> Option<u128> {
        let file = self.files.get(file).filter(|file| file.stamps == *stamps)?;
        u128::from_str_radix(file.tensors.get(tensor)?, 16).ok()
    }

    fn parse(path: &Path) -> Option<Record> {
        let record: Record = files::read_json(path, MAX_RECORD_BYTES).ok()?;
        (record.checksum == checksum(&record.files)).then_some(record)
    }
}

fn checksum(files: &BTreeMap<String, RecordedFile>) -> String {
    format!("{:016x}", xxh3_64(serde_json::to_string(files).unwrap_or_default().as_bytes()))
}

/// The place of a base's record: the first of several folders that can be written to.
#[derive(Clone, Debug)]
pub(super) struct RecordPlace {
    folders: Vec<PathBuf>,
    file: String,
}

impl RecordPlace {
    /// Makes the place for the base in `dir` and this machine. Machines that share a folder may see different stamps.
    pub fn new(dir: &Path, folders: Vec<PathBuf>) -> Result<RecordPlace> {
        let dir = dir.canonicalize().with_context(|| shown_path(dir))?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let key = xxh3_64(format!("{host}{}", dir.display()).as_bytes());
        Ok(RecordPlace { folders, file: format!("base-{key:016x}.json") })
    }

    /// Reads the records that exist and are whole.
    pub fn read(&self) -> Vec<Record> {
        self.folders.iter().filter_map(|folder| Record::parse(&folder.join(&self.file))).collect()
    }

    /// Keeps a record. A failure only costs time at the next start, so it is reported through `tell` and is no error.
    pub fn keep(&self, record: &Record, tell: &mut dyn FnMut(String)) {
        let write = |folder: &PathBuf| -> Result<()> {
            atomic::write(&folder.join(&self.file), &serde_json::to_vec(record).context("a record")?)
        };
        let errors: Vec<String> =
            self.folders.iter().map_while(|folder| write(folder).err()).map(|error| format!("{error:#}")).collect();
        if errors.len() == self.folders.len() {
            let why = errors.join("; ");
            tell(format!("the digest of the base cannot be kept, so the next start reads the base again: {why}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_for_its_stamps_alone_and_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, "12").unwrap();
        let stamps = |path: &Path| Stamps::of(&File::open(path).unwrap(), path).unwrap();
        let first = stamps(&path);
        let later = SystemTime::now() + 2 * SETTLED;
        let record = |read_at| Record::new([("a".to_string(), first, vec![("x", 7)])].into_iter(), read_at);
        assert_eq!(record(later).digest("a", &first, "x"), Some(7));
        assert_eq!(record(later).digest("a", &first, "y"), None);
        assert_eq!(record(later).digest("b", &first, "x"), None);
        assert_eq!(record(SystemTime::now()).digest("a", &first, "x"), None, "it could change within the same tick");

        let folders = vec![dir.path().join("file/not/a/folder"), dir.path().join("folder")];
        std::fs::write(dir.path().join("file"), "").unwrap();
        let place = RecordPlace::new(dir.path(), folders.clone()).unwrap();
        assert!(place.read().is_empty());
        place.keep(&record(later), &mut |line| panic!("{line}"));
        assert_eq!(place.read().len(), 1, "in the second folder, as the first cannot be made");
        assert_eq!(place.read()[0].digest("a", &first, "x"), Some(7));
        let mut told = Vec::new();
        RecordPlace::new(dir.path(), folders[..1].to_vec()).unwrap().keep(&record(later), &mut |line| told.push(line));
        assert!(told.len() == 1 && told[0].contains("cannot be kept"), "{told:?}");

        let file = dir.path().join("folder").join(&place.file);
        let whole = std::fs::read_to_string(&file).unwrap();
        for damaged in [whole.replace("7\"", "8\""), whole[..whole.len() / 2].into(), String::new(), "[]".into()] {
            assert_ne!(damaged, whole);
            std::fs::write(&file, damaged).unwrap();
            assert!(place.read().is_empty());
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone().into_bytes();
            damaged[at] ^= 1;
            std::fs::write(&file, &damaged).unwrap();
            let digest = |record: &Record| record.digest("a", &first, "x");
            assert!(place.read().iter().all(|record| digest(record) == Some(7)), "byte {at}");
        }

        // The same size and times, and another inode: a file that was replaced.
        std::fs::write(dir.path().join("other"), "34").unwrap();
        assert_eq!(record(later).digest("a", &stamps(&dir.path().join("other")), "x"), None);
        std::fs::write(&path, "34").unwrap();
        let times = std::fs::FileTimes::new()
            .set_modified(SystemTime::UNIX_EPOCH + Duration::new(first.mtime.0 as u64, first.mtime.1 as u32));
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        let second = stamps(&path);
        assert_eq!((second.mtime, second.size, second.inode), (first.mtime, first.size, first.inode));
        assert_eq!(record(later).digest("a", &second, "x"), None, "ctime shows what mtime hides");
    }
}
