//! Shard files: one safetensors file per shard, `nf4-00000-of-00002.safetensors`.
//!
//! Each unit is one U8 tensor, `unit.00000` and so on, of equal length in every shard (`fsdp::layout`). The metadata
//! says what the file was made from and holds a checksum (xxh3, 64 bit) of each unit's bytes. It also names the
//! program, the rank and machine that made each unit, the model's folder, and the shards that were written beside it;
//! older files without these names are valid. A file is written beside its place and renamed. A file with other
//! metadata than expected is foreign; one whose checksums fail is damaged.
#![expect(unsafe_code, reason = "gives advice on mapped pages")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use memmap2::{Mmap, UncheckedAdvice};
use rustix::fs::{Advice, fadvise};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::comm::{Comm, ShardBytes, SharedBytes, all_gather_bytes, all_gather_u64};
use crate::files::{self, map, map_opened, shown, shown_path};
use crate::fsdp::layout::{LAYOUT_VERSION, UnitLayout};

use super::{atomic, header};

/// Metadata key of the program that made a file.
const PROGRAM_KEY: &str = "program";
const PROGRAM: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));

/// Key of a JSON list of the ranks that made the units: unit u was made by entry u modulo the length of the list.
const MAKERS_KEY: &str = "makers";

/// Key of the folder of the model that the units were made from, as the ranks saw it.
pub(super) const MODEL_KEY: &str = "model";

/// Key of the shards that were written to the same folder: all of them, or those of one node's ranks.
pub(super) const BESIDE_KEY: &str = "beside";

/// Data begins at a multiple of this.
const DATA_ALIGN_BYTES: usize = 64;
/// Format name in the metadata of every shard file.
pub(super) const FORMAT: &str = "fsdp-qlora shard";

/// Describes the shard files of one base, quantization and number of shards.
#[derive(Clone, Debug)]
pub struct ShardSpec {
    /// Folder of the files.
    pub dir: PathBuf,
    /// Digest of the base's weights (`identity::BaseStamps::weights`).
    pub base: String,
    /// Encodings of the projections, `nf4+dq`, `nf4` or a plain type; several, NF4 first, where they differ.
    pub encoding: String,
    pub num_shards: usize,
    /// Bytes of a shard of each unit.
    pub unit_bytes: Vec<usize>,
    /// Folder of the model, for people.
    pub model: String,
}

/// Notes in a new file about how it was made. No run depends on them; `cache` shows them.
#[derive(Clone, Debug, Default)]
pub struct Made {
    /// Ranks that made the units, as for [`MAKERS_KEY`].
    pub makers: Vec<String>,
    /// Shards that are written to the same folder.
    pub beside: Vec<usize>,
}

/// Finding at the path of a shard file.
pub enum Found {
    Valid(Vec<SharedBytes>),
    Missing,
    /// A file of something else, which is never overwritten, with the difference that shows it.
    Foreign(String),
    /// A damaged file, with the reason.
    Damaged(String),
}

/// The error of a [`Found::Foreign`].
pub fn foreign(reason: &str) -> String {
    format!(
        "{reason}; it is not overwritten\nhelp: name another folder in `shards` (--output of quantize), or remove the file"
    )
}

impl ShardSpec {
    pub fn new(dir: PathBuf, base: String, encoding: String, layouts: &[UnitLayout], model: String) -> ShardSpec {
        let (num_shards, unit_bytes) = (layouts[0].num_shards(), layouts.iter().map(UnitLayout::shard_bytes).collect());
        ShardSpec { dir, base, encoding, num_shards, unit_bytes, model }
    }

    /// Returns whether linear modules are in NF4, all of them or some.
    pub fn is_nf4(&self) -> bool {
        self.encoding.starts_with("nf4")
    }

    /// Returns the path of one shard's file.
    pub fn path(&self, shard: usize) -> PathBuf {
        let kind = if self.is_nf4() { "nf4" } else { "plain" };
        self.dir.join(format!("{kind}-{shard:05}-of-{:05}.safetensors", self.num_shards))
    }

    /// Tells whether this rank writes the file of its shard if the files have to be made: it is the first of the
    /// ranks that see this folder and hold this shard, and the others map its file. Collective.
    pub fn is_written_here(&self, comm: &mut dyn Comm) -> Result<bool> {
        let folders = ranks_with_this_folder(comm, &self.dir)?;
        let file = |rank: usize| (folders[rank], rank % self.num_shards);
        Ok((0..comm.world_size()).find(|&rank| file(rank) == file(comm.rank())) == Some(comm.rank()))
    }

    /// Returns the bytes of one shard's file without its header.
    pub fn data_bytes(&self) -> usize {
        self.unit_bytes.iter().sum()
    }

    /// Returns the metadata that a valid file must have.
    fn metadata(&self, shard: usize, checksums: &[u64]) -> Map<String, Value> {
        let text = |v: String| Value::String(v);
        let checksums: Vec<String> = checksums.iter().map(|c| format!("{c:016x}")).collect();
        let mut metadata = Map::new();
        metadata.insert("format".into(), text(FORMAT.into()));
        metadata.insert("layout_version".into(), text(LAYOUT_VERSION.to_string()));
        metadata.insert("base".into(), text(self.base.clone()));
        metadata.insert("encoding".into(), text(self.encoding.clone()));
        metadata.insert("shard".into(), text(format!("{shard} of {}", self.num_shards)));
        metadata.insert("checksums".into(), text(checksums.join(" ")));
        metadata
    }

    /// Returns the bytes before the data. Their number does not depend on the checksums.
    fn header(&self, shard: usize, checksums: &[u64], made: &Made) -> Vec<u8> {
        let mut header = Map::new();
        let mut metadata = self.metadata(shard, checksums);
        metadata.insert(PROGRAM_KEY.into(), PROGRAM.into());
        metadata.insert(MAKERS_KEY.into(), json!(made.makers).to_string().into());
        metadata.insert(MODEL_KEY.into(), self.model.clone().into());
        metadata.insert(BESIDE_KEY.into(), json!(made.beside).to_string().into());
        header.insert("__metadata__".into(), Value::Object(metadata));
        let mut begin = 0;
        for (idx, bytes) in self.unit_bytes.iter().enumerate() {
            let entry = json!({"dtype": "U8", "shape": [bytes], "data_offsets": [begin, begin + bytes]});
            header.insert(unit_name(idx), entry);
            begin += bytes;
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize((text.len() + 8).next_multiple_of(DATA_ALIGN_BYTES) - 8, b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes
    }

    /// Maps a shard's file and checks all of it.
    pub fn open(&self, shard: usize) -> Result<Found> {
        let path = self.path(shard);
        let Some(file) = open_in_use(&path)? else { return Ok(Found::Missing) };
        let map = map_opened(&file).with_context(|| shown_path(&path))?;
        let mapped = Arc::new(MappedFile { path: path.clone(), map, file });
        if let Some(reason) = self.foreign(&mapped.map, shard) {
            return Ok(Found::Foreign(format!("{}: {reason}", shown_path(&path))));
        }
        Ok(match self.check(&mapped) {
            Ok(units) => Found::Valid(units),
            Err(reason) => Found::Damaged(format!("{}: damaged: {reason:#}", shown_path(&path))),
        })
    }

    /// Says why the file is not this shard's; `None` if it is, or if its header cannot be read.
    pub(super) fn foreign(&self, file: &[u8], shard: usize) -> Option<String> {
        let metadata = read_header(file).ok()?.1;
        let foreign = metadata.get("format").map(String::as_str) != Some(FORMAT);
        if foreign {
            return Some("is there and is not a shard file of this program".into());
        }
        let differs = |(key, expected): (String, Value)| {
            let found = metadata.get(&key).cloned().unwrap_or_default();
            let differs = key != "checksums" && expected.as_str() != Some(&found);
            differs.then(|| format!("holds other shards: {key} is {:?}, should be {expected}", shown(&found)))
        };
        self.metadata(shard, &[]).into_iter().find_map(differs)
    }

    /// Returns where the data of a file begins, the checksum of each unit, and the metadata. Checks the file's length.
    pub(super) fn data(&self, file: &[u8]) -> Result<(usize, Vec<u64>, HashMap<String, String>)> {
        let (header_bytes, metadata) = read_header(file)?;
        let checksums: Vec<u64> = metadata
            .get("checksums")
            .map(|text| text.split(' ').filter_map(|c| u64::from_str_radix(c, 16).ok()).collect())
            .unwrap_or_default();
        ensure!(checksums.len() == self.unit_bytes.len(), "it has {} checksums", checksums.len());
        let begin = 8 + header_bytes;
        let expected = begin + self.data_bytes();
        ensure!(file.len() == expected, "{} bytes, should be {expected}", file.len());
        Ok((begin, checksums, metadata))
    }

    fn check(&self, mapped: &Arc<MappedFile>) -> Result<Vec<SharedBytes>> {
        let file = &mapped.map;
        let (mut begin, checksums, metadata) = self.data(file)?;
        let mut units = Vec::new();
        for (idx, (&bytes, &checksum)) in self.unit_bytes.iter().zip(&checksums).enumerate() {
            let range = begin..begin + bytes;
            ensure!(
                xxh3_64(&file[range.clone()]) == checksum,
                "the checksum of {} is wrong{}",
                unit_name(idx),
                made_by(&metadata, idx)
            );
            units.push(Arc::new(MappedUnit { file: mapped.clone(), range }) as SharedBytes);
            begin += bytes;
        }
        Ok(units)
    }
}

/// Opens a shard file and says, for as long as it is open, that it is in use: `cache prune` leaves it where it is. The
/// time of the file's last change is that of its last use. Returns `None` if the file is not there.
pub fn open_in_use(path: &Path) -> Result<Option<File>> {
    loop {
        if !path.exists() {
            return Ok(None);
        }
        let file = files::open(path)?;
        // Without locks, or on a disk that is not to be written to, the file serves as well.
        let _ = file.lock_shared();
        let _ = file.set_modified(SystemTime::now());
        // Before the lock, the file may have been removed or replaced.
        if file.metadata().with_context(|| shown_path(path))?.nlink() > 0 {
            return Ok(Some(file));
        }
    }
}

/// Returns, for each rank, the first rank that sees the same folder. A rank that cannot write to its folder, and sees
/// no file of another rank there, counts as alone: it may still map files that are there. Collective.
pub fn ranks_with_this_folder(comm: &mut dyn Comm, dir: &Path) -> Result<Vec<usize>> {
    let probe = atomic::beside(&dir.join("probe")).ok();
    let name =
        probe.as_ref().and_then(|probe| probe.path().file_name()).map(|name| name.to_string_lossy().into_owned());
    let names = all_gather_bytes(comm, name.unwrap_or_default().as_bytes())?;
    let is_here = |name: &Vec<u8>| !name.is_empty() && dir.join(&*String::from_utf8_lossy(name)).exists();
    let first = names.iter().position(is_here).unwrap_or(comm.rank());
    // The probe stays until all ranks have looked, for which this waits.
    Ok(all_gather_u64(comm, first as u64)?.into_iter().map(|rank| rank as usize).collect())
}

/// Returns length and metadata of a file's header.
pub(super) fn read_header(file: &[u8]) -> Result<(usize, HashMap<String, String>)> {
    header::data_start(file)?;
    let (header_bytes, header) = SafeTensors::read_metadata(file)?;
    Ok((header_bytes, header.metadata().clone().unwrap_or_default()))
}

fn unit_name(idx: usize) -> String {
    format!("unit.{idx:05}")
}

/// Says who made a unit, if the file names its maker.
fn made_by(metadata: &HashMap<String, String>, idx: usize) -> String {
    let makers: Option<Vec<String>> = metadata.get(MAKERS_KEY).and_then(|text| serde_json::from_str(text).ok());
    match (makers.as_deref(), metadata.get(PROGRAM_KEY)) {
        (Some(makers @ [_, ..]), Some(program)) => format!(" (made by {}, {program})", makers[idx % makers.len()]),
        _ => String::new(),
    }
}

struct MappedFile {
    path: PathBuf,
    map: Mmap,
    file: File,
}

/// One unit's bytes in a mapped shard file.
struct MappedUnit {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl ShardBytes for MappedUnit {
    /// Advises the system to drop the unit's pages from this process and from the page cache.
    fn let_go(&self) {
        let (begin, len) = (self.range.start, self.range.len());
        // SAFETY: the mapping is read-only and backed by the file: pages that are let go come back as they were.
        let _ = unsafe { self.file.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, len) };
        let _ = fadvise(&self.file.file, begin as u64, NonZeroU64::new(len as u64), Advice::DontNeed);
    }

    fn check_length(&self) -> Result<()> {
        files::check_length(&self.file.path, &self.file.file, &self.file.map)
    }
}

impl AsRef<[u8]> for MappedUnit {
    fn as_ref(&self) -> &[u8] {
        &self.file.map[self.range.clone()]
    }
}

/// Writes one shard's file. Units may come in any order, each in pieces.
pub struct ShardWriter<'a> {
    spec: &'a ShardSpec,
    shard: usize,
    file: NamedTempFile,
    made: &'a Made,
    header_bytes: usize,
    units: Vec<WrittenUnit>,
}

/// Progress of writing a unit.
struct WrittenUnit {
    /// Bytes without padding.
    bytes: usize,
    written: usize,
    checksum: Xxh3,
}

impl<'a> ShardWriter<'a> {
    /// Begins a file. `part_bytes` gives the bytes of each unit's shard without padding. Fails before anything is
    /// written if the disk has no room or another base's shard is in the way.
    pub fn create(spec: &'a ShardSpec, shard: usize, part_bytes: Vec<usize>, made: &'a Made) -> Result<Self> {
        let path = spec.path(shard);
        if path.exists()
            && let Some(reason) = spec.foreign(&map(&path)?, shard)
        {
            bail!(foreign(&format!("{}: {reason}", shown_path(&path))));
        }
        let file = atomic::beside_with_room(&path, spec.data_bytes())
            .context("a shard; another folder can be given with `shards`")?;
        let header_bytes = spec.header(shard, &vec![0; part_bytes.len()], made).len();
        let unit = |bytes| WrittenUnit { bytes, written: 0, checksum: Xxh3::new() };
        Ok(Self { spec, shard, file, made, header_bytes, units: part_bytes.into_iter().map(unit).collect() })
    }

    /// Returns the bytes of a unit that have not been written yet, without padding.
    pub fn bytes_left(&self, idx: usize) -> usize {
        self.units[idx].bytes - self.units[idx].written
    }

    /// Appends the next bytes of a unit.
    pub fn append(&mut self, idx: usize, bytes: &[u8]) -> Result<()> {
        ensure!(bytes.len() <= self.bytes_left(idx), "unit {idx}: {} bytes too many", bytes.len());
        self.pad(idx, bytes)
    }

    fn pad(&mut self, idx: usize, bytes: &[u8]) -> Result<()> {
        let unit = &mut self.units[idx];
        let offset = self.header_bytes + self.spec.unit_bytes[..idx].iter().sum::<usize>() + unit.written;
        unit.checksum.update(bytes);
        unit.written += bytes.len();
        self.write_at(offset, bytes)
    }

    /// Writes padding and the header with the checksums, then renames the file.
    pub fn finish(mut self) -> Result<()> {
        for idx in 0..self.units.len() {
            ensure!(self.bytes_left(idx) == 0, "unit {idx}: {} bytes are missing", self.bytes_left(idx));
            self.pad(idx, &vec![0; self.spec.unit_bytes[idx] - self.units[idx].written])?;
        }
        let checksums: Vec<u64> = self.units.iter().map(|unit| unit.checksum.digest()).collect();
        let header = self.spec.header(self.shard, &checksums, self.made);
        self.write_at(0, &header)?;
        atomic::rename(self.file, &self.spec.path(self.shard))
    }

    fn write_at(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_file_mut();
        file.seek(SeekFrom::Start(offset as u64))
            .and_then(|_| file.write_all(bytes))
            .with_context(|| format!("{}: cannot be written (is the disk full?)", self.spec.path(self.shard).display()))
    }
}

/// Returns the user's cache folder: `$FSDP_QLORA_CACHE`, else `$XDG_CACHE_HOME/fsdp-qlora`, else
/// `~/.cache/fsdp-qlora`.
pub fn cache_dir() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("FSDP_QLORA_CACHE") {
        return Ok(dir);
    }
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    Ok(base
        .context("no cache folder: set FSDP_QLORA_CACHE, XDG_CACHE_HOME or HOME, or the key `shards`")?
        .join("fsdp-qlora"))
}

/// Returns the folder that contains the folders of automatic shard files.
pub fn automatic_root() -> Result<PathBuf> {
    Ok(cache_dir()?.join("shards"))
}

/// Returns the folder of automatic shard files. Each base, encoding and layout has its own.
pub fn automatic_dir(base: &str, encoding: &str) -> Result<PathBuf> {
    Ok(automatic_root()?.join(format!("{base}-{encoding}-v{LAYOUT_VERSION}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_that_changes_is_found_or_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let unit_bytes = vec![64, 128];
        let (dir, base, encoding, model) = (dir.path().to_path_buf(), "a".into(), "nf4".into(), "/model".into());
        let spec = ShardSpec { dir, base, encoding, num_shards: 2, unit_bytes, model };
        let made = Made { makers: vec!["rank 0 on a".into()], beside: vec![0, 1] };
        let mut writer = ShardWriter::create(&spec, 1, vec![60, 128], &made).unwrap();
        (0..2).for_each(|unit| writer.append(unit, &vec![7; [60, 128][unit]]).unwrap());
        writer.finish().unwrap();
        let whole = std::fs::read(spec.path(1)).unwrap();
        let data = &whole[whole.len() - spec.data_bytes()..];
        let name = spec.path(1).display().to_string();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            let cut = (at % 16 == 0).then_some((&whole[..at], true));
            for (damaged, is_cut) in std::iter::once((&flipped[..], false)).chain(cut) {
                std::fs::write(spec.path(1), damaged).unwrap();
                match spec.open(1).unwrap() {
                    Found::Valid(units) => {
                        let units: Vec<&[u8]> = units.iter().map(|unit| (**unit).as_ref()).collect();
                        assert!(!is_cut && units.concat() == data, "byte {at}");
                    }
                    Found::Damaged(reason) | Found::Foreign(reason) => assert!(reason.contains(&name), "{reason}"),
                    Found::Missing => panic!("byte {at}: a file that is there"),
                }
            }
        }
    }
}
