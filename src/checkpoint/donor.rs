//! Shards of another number of ranks in the same folder, from which new ones are cut without the model.
//!
//! A unit without padding is the same whatever number of ranks share it, so that the shards of one number of ranks hold
//! all bytes of any other. Each part is read and compared with its checksum before it is used.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::watch;
use crate::files::{map_opened, shown_path};
use crate::fsdp::layout::UnitLayout;

use super::shards::{ShardSpec, open_in_use};

/// All shards of a base for one number of ranks.
pub(super) struct Donor {
    spec: ShardSpec,
    layouts: Vec<UnitLayout>,
    files: Vec<ShardFile>,
}

struct ShardFile {
    path: PathBuf,
    /// Says for as long as it is open that the file is in use.
    file: File,
    /// Byte at which the data of the first unit begins.
    begin: usize,
    checksums: Vec<u64>,
}

impl Donor {
    /// Finds a set of shards of the same base, encoding and layout in the folder of `wanted`, all of whose files are
    /// there with whole headers.
    pub fn find(wanted: &ShardSpec, layouts: &[UnitLayout]) -> Option<Donor> {
        wanted.numbers_of_shards().into_iter().find_map(|num_shards| Self::open(wanted, layouts, num_shards))
    }

    fn open(spec: &ShardSpec, layouts: &[UnitLayout], num_shards: usize) -> Option<Donor> {
        let named = ShardSpec { num_shards, ..spec.clone() };
        if !(0..num_shards).all(|shard| named.path(shard).exists()) {
            return None;
        }
        let layouts: Vec<UnitLayout> =
            layouts.iter().map(|layout| UnitLayout::new(layout.tensors().to_vec(), num_shards)).collect();
        let unit_bytes = layouts.iter().map(UnitLayout::shard_bytes).collect();
        let spec = ShardSpec { unit_bytes, ..named };
        let files = (0..num_shards).map(|shard| ShardFile::open(&spec, shard)).collect::<Option<_>>()?;
        Some(Donor { spec, layouts, files })
    }

    /// Returns a unit without padding. Fails if a part of it cannot be read or is damaged.
    pub fn flat(&self, unit: usize) -> Result<Vec<u8>> {
        let (layout, bytes) = (&self.layouts[unit], self.spec.unit_bytes[unit]);
        let offset: usize = self.spec.unit_bytes[..unit].iter().sum();
        let mut flat = Vec::with_capacity(layout.flat_bytes());
        let mut part = vec![0; bytes];
        for (shard, ShardFile { path, file, begin, checksums }) in self.files.iter().enumerate() {
            let place = || format!("{}: unit {unit}", shown_path(path));
            file.read_exact_at(&mut part, (begin + offset) as u64).with_context(place)?;
            ensure!(xxh3_64(&part) == checksums[unit], "{}: damaged: its checksum is wrong", place());
            watch::beat();
            flat.extend_from_slice(&part[..layout.shard_range(shard).len()]);
        }
        Ok(flat)
    }
}

impl ShardFile {
    fn open(spec: &ShardSpec, shard: usize) -> Option<ShardFile> {
        let path = spec.path(shard);
        let file = open_in_use(&path).ok()??;
        let map = map_opened(&file).ok()?;
        if spec.foreign(&map, shard).is_some() {
            return None;
        }
        let (begin, checksums, _) = spec.data(&map).ok()?;
        Some(ShardFile { path, file, begin, checksums })
    }
}

impl fmt::Display for Donor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "the shards of {} ranks are there", self.spec.num_shards)
    }
}

/// Returns index and number of shards from the name of a shard file, `nf4-00000-of-00002.safetensors`.
pub(super) fn parse_name(path: &Path) -> Option<(&str, usize, usize)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".safetensors")?;
    let (kind, numbers) = stem.split_once('-')?;
    let (shard, of) = numbers.split_once("-of-")?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    let (shard, of) = (number(shard)?, number(of)?);
    (["nf4", "plain"].contains(&kind) && shard < of).then_some((kind, shard, of))
}

impl ShardSpec {
    /// Returns the numbers of shards of which the folder has the first file, in order.
    fn numbers_of_shards(&self) -> Vec<usize> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let number = |path: PathBuf| parse_name(&path).and_then(|(_, shard, of)| (shard == 0).then_some(of));
        let mut numbers: Vec<usize> = entries.filter_map(|entry| number(entry.path())).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}
