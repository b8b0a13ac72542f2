//! The identity of a base: a digest of all its tensors' bytes and of the configuration that config.json gives.
//!
//! The digest of each tensor is xxh3 (128 bit) over its bytes. It detects damage, mixed-up revisions and edits, but
//! not a constructed collision. The digest of the weights covers names, types, shapes and these digests, in the order
//! of names, so that it depends neither on where the folder lies nor on how the tensors are spread over files. The
//! identity adds the configuration.
//!
//! Reading 140 GB takes a minute, so the digests of the layers' tensors are kept in a record beside the shards, with
//! the stamps of the file that they were read from. A file whose stamps differ is read again. The other tensors
//! (embedding, final norm, head) are small and read at every start.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::comm::{Comm, all_gather_u64, boot_id, watch};
use crate::files::{self, shown, shown_path};
use crate::progress;

use super::record::{Record, RecordPlace, Stamps};
use super::source::BaseModel;

/// Number of bytes that are read at a time.
const READ_BYTES: usize = 1 << 20;
/// Largest number of threads that read files at a time, which is enough for the fastest disks.
const MAX_THREADS: usize = 4;
/// Size from which progress is reported at every tenth of a base.
const LARGE_BYTES: usize = 4 << 30;

/// The tensors of a base with their digests, and the stamps of its files before they were read.
#[derive(Clone)]
pub struct BaseStamps {
    model: Arc<BaseModel>,
    /// Stamps of each file.
    stamps: Vec<Stamps>,
    /// Digest of each tensor, sorted by name.
    digests: Vec<u128>,
}

/// The digest of the base on this rank and the record to keep of it.
pub(super) struct Digested {
    pub stamps: BaseStamps,
    /// Set on one of the ranks that see these files if something was read that the record lacked.
    pub new_record: Option<Record>,
}

/// A tensor to digest.
struct Item<'a> {
    name: &'a str,
    file_idx: usize,
    range: Range<usize>,
}

/// Returns whether a tensor belongs to a layer. Its bytes are then in the shards, and the base's are not read once
/// these are made.
fn is_of_a_layer(name: &str) -> bool {
    name.contains(".layers.")
}

fn items(model: &BaseModel) -> Vec<Item<'_>> {
    model.entries().map(|(name, file_idx, entry)| Item { name, file_idx, range: entry.range.clone() }).collect()
}

/// Digests a base; ranks that see the same files share the reading. Collective; the collectives do not depend on what
/// a rank finds. `record` is where digests of earlier starts are kept.
pub(super) fn digest(
    model: &Arc<BaseModel>,
    record: &RecordPlace,
    comm: &mut dyn Comm,
    tell: &mut dyn FnMut(String),
) -> Result<Digested> {
    let now = SystemTime::now();
    let stamps = model.files().map(|(path, file)| Stamps::of(file, path)).collect::<Result<Vec<_>>>()?;
    let items = items(model);
    watch::at("identifying the base");
    let (group, place) = ranks_with_these_files(&stamps, comm)?;

    let names: Vec<String> = model.files().map(|(path, _)| file_name(path)).collect();
    let records = record.read();
    let recorded = |item: &Item| {
        let find = |record: &Record| record.digest(&names[item.file_idx], &stamps[item.file_idx], item.name);
        records.iter().find_map(find).filter(|_| is_of_a_layer(item.name))
    };
    let mut known: Vec<Option<u128>> = items.iter().map(recorded).collect();
    share(comm, &group, &mut known)?;
    let missing: Vec<usize> = (0..items.len()).filter(|&i| known[i].is_none()).collect();
    let new = missing.iter().any(|&i| is_of_a_layer(items[i].name));
    if new {
        tell_what_is_read(model, &items, &missing, tell);
    }
    let own = part_of(&items, missing, place, group.len());
    let threads = std::thread::available_parallelism().map_or(1, usize::from) / group.len();
    for (i, digest) in read_all(model, &items, &own, threads.clamp(1, MAX_THREADS))? {
        known[i] = Some(digest);
    }
    share(comm, &group, &mut known)?;
    let digests: Option<Vec<u128>> = known.into_iter().collect();
    let digests = digests.context("a tensor of the base was digested by no rank")?;

    for ((path, file), before) in model.files().zip(&stamps) {
        let after = Stamps::of(file, path)?;
        ensure!(after == *before, "{}: changed while it was read; start again when it is complete", shown_path(path));
    }
    let new_record = (new && place == 0).then(|| {
        let of_layers = || items.iter().zip(&digests).filter(|(item, _)| is_of_a_layer(item.name));
        let in_file = |file_idx: usize| of_layers().filter(move |(item, _)| item.file_idx == file_idx);
        let files = names.into_iter().zip(&stamps).enumerate().map(|(file_idx, (name, stamps))| {
            (name, *stamps, in_file(file_idx).map(|(item, digest)| (item.name, *digest)).collect())
        });
        Record::new(files, now)
    });
    Ok(Digested { stamps: BaseStamps { model: model.clone(), stamps, digests }, new_record })
}

/// Returns the ranks that see the same files as this one, and this rank's place among them.
fn ranks_with_these_files(stamps: &[Stamps], comm: &mut dyn Comm) -> Result<(Vec<usize>, usize)> {
    let key = xxh3_64(format!("{}{stamps:?}", boot_id()).as_bytes());
    let keys = all_gather_u64(comm, key)?;
    let group: Vec<usize> = (0..keys.len()).filter(|&rank| keys[rank] == key).collect();
    let place = group.iter().position(|&rank| rank == comm.rank()).context("a rank without a place")?;
    Ok((group, place))
}

/// Fills in the digests that the other ranks of `group` know. Ranks of other groups may have a different number of
/// tensors.
fn share(comm: &mut dyn Comm, group: &[usize], known: &mut [Option<u128>]) -> Result<()> {
    const BYTES: usize = 1 + size_of::<u128>();
    let longest = all_gather_u64(comm, known.len() as u64)?.into_iter().max().unwrap_or(0) as usize;
    let mut own = vec![0; longest * BYTES];
    for (bytes, digest) in own.as_chunks_mut::<BYTES>().0.iter_mut().zip(known.iter()) {
        if let Some(digest) = digest {
            bytes[0] = 1;
            bytes[1..].copy_from_slice(&digest.to_le_bytes());
        }
    }
    let mut all = vec![0; own.len() * comm.world_size()];
    comm.all_gather(&own, &mut all)?;
    for rank in group {
        let of_rank = all[rank * own.len()..].as_chunks::<BYTES>().0;
        for (digest, bytes) in known.iter_mut().zip(of_rank).filter(|(_, bytes)| bytes[0] == 1) {
            digest.get_or_insert(u128::from_le_bytes(bytes[1..].try_into()?));
        }
    }
    Ok(())
}

fn tell_what_is_read(model: &BaseModel, items: &[Item], missing: &[usize], tell: &mut dyn FnMut(String)) {
    let mut files: Vec<usize> =
        missing.iter().filter(|&&i| is_of_a_layer(items[i].name)).map(|&i| items[i].file_idx).collect();
    files.sort_unstable();
    files.dedup();
    let bytes: usize = missing.iter().map(|&i| items[i].range.len()).sum();
    tell(format!(
        "identity of the base: {} of {} files are new or have changed, {:.1} MB are read",
        files.len(),
        model.files().len(),
        bytes as f64 * 1e-6
    ));
}

/// Returns the tensors that one of `num_places` ranks reads: consecutive ones of each file, about as many bytes as
/// other ranks read.
fn part_of(items: &[Item], mut missing: Vec<usize>, place: usize, num_places: usize) -> Vec<usize> {
    missing.sort_by_key(|&i| (items[i].file_idx, items[i].range.start));
    let total: u128 = missing.iter().map(|&i| items[i].range.len() as u128).sum();
    let mut before = 0;
    missing.retain(|&i| {
        let owner = (before * num_places as u128).checked_div(total).unwrap_or(0);
        before += items[i].range.len() as u128;
        // An empty tensor at the very end would fall after the last part.
        owner.min(num_places as u128 - 1) == place as u128
    });
    missing
}

/// Reads and digests tensors on several threads.
fn read_all(model: &BaseModel, items: &[Item], todo: &[usize], threads: usize) -> Result<Vec<(usize, u128)>> {
    let files: Vec<(&Path, &File)> = model.files().collect();
    let total: usize = todo.iter().map(|&i| items[i].range.len()).sum();
    let (next, (sender, receiver)) = (AtomicUsize::new(0), mpsc::channel());
    let work = |sender: mpsc::Sender<Result<(usize, u128)>>| {
        while let Some(&i) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (path, file) = files[items[i].file_idx];
            let digest = digest_of(file, items[i].range.clone()).with_context(|| shown_path(path));
            if sender.send(digest.map(|digest| (i, digest))).is_err() {
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.min(todo.len()) {
            let sender = sender.clone();
            scope.spawn(|| work(sender));
        }
        drop(sender);
        let (mut found, mut bytes) = (Vec::new(), 0);
        for digest in receiver {
            let (i, digest) = digest?;
            watch::beat();
            found.push((i, digest));
            bytes += items[i].range.len();
            if total > LARGE_BYTES {
                progress::at("identity of the base, in % of its bytes", bytes * 100 / total, 100);
            }
        }
        progress::end();
        Ok(found)
    })
}

/// Returns the digest of a range of a file. It reads the file, because a file that was cut short is an error here,
/// but would end the process if it were read through its mapping.
fn digest_of(file: &File, range: Range<usize>) -> Result<u128> {
    let (mut hash, mut buffer) = (Xxh3::new(), vec![0; READ_BYTES.min(range.len())]);
    for at in range.clone().step_by(READ_BYTES) {
        let bytes = &mut buffer[..READ_BYTES.min(range.end - at)];
        file.read_exact_at(bytes, at as u64).context("cannot be read")?;
        hash.update(bytes);
    }
    Ok(hash.digest128())
}

impl BaseStamps {
    /// Returns the base that was digested.
    pub fn model(&self) -> &Arc<BaseModel> {
        &self.model
    }

    /// Returns the digest, in hex, of names, types, shapes and bytes of all tensors, which shards are made from.
    pub fn weights(&self) -> String {
        let mut hash = Xxh3::new();
        for ((name, _, entry), digest) in self.model.entries().zip(&self.digests) {
            hash.update(format!("{name:?} {:?} {:?} {digest:032x}\n", entry.dtype, entry.shape).as_bytes());
        }
        format!("{:032x}", hash.digest128())
    }

    /// Checks that the base is still the one that was digested. Only stamps are compared; a file whose stamps differ
    /// is read again. Not collective: one rank of each node is enough.
    ///
    /// Errors: a file was overwritten in place, so this run may have read either content; or it was replaced by a
    /// file with other weights, which this run has not read. A file that was only removed or renamed is no error.
    pub fn check_unchanged(&self) -> Result<()> {
        for (file_idx, ((path, file), before)) in self.model.files().zip(&self.stamps).enumerate() {
            if Stamps::of(file, path)? != *before {
                self.compare(file_idx, file, path, "was overwritten during the run, which has read from it")?;
            }
            let Ok(other) = files::open(path) else { continue };
            let now = Stamps::of(&other, path)?;
            if (now.device, now.inode) != (before.device, before.inode) {
                self.compare(file_idx, &other, path, "was replaced during the run, which has read the file of before")?;
            }
        }
        Ok(())
    }

    fn compare(&self, file_idx: usize, file: &File, path: &Path, what: &str) -> Result<()> {
        for (item, digest) in items(&self.model).iter().zip(&self.digests).filter(|(i, _)| i.file_idx == file_idx) {
            watch::beat();
            let found = digest_of(file, item.range.clone());
            if found.as_ref().ok() != Some(digest) {
                bail!("{}: {what}: tensor {} is another one now", shown_path(path), shown(item.name));
            }
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::source::tests::{Written, f32s, write};
    use super::*;
    use crate::comm::local;
    use std::fs;
    use tempfile::{TempDir, tempdir};

    const LAYER: &str = "model.layers.0.mlp.up_proj.weight";
    const EMBED: &str = "model.embed_tokens.weight";

    fn tensors(layer: f32, embed: f32) -> Vec<Written> {
        let mut values = vec![0.5; 5000];
        values[2500] = layer;
        vec![f32s(LAYER, &[5000], &values), f32s(EMBED, &[2, 2], &[1.0, 2.0, 3.0, embed]), f32s("empty", &[0], &[])]
    }

    fn model(tensors: &[Written]) -> TempDir {
        let dir = tempdir().unwrap();
        write(&dir.path().join("model.safetensors"), tensors);
        dir
    }

    /// The digest as one rank makes it, and what is told.
    fn digest_alone(dir: &Path, record: &Path) -> (Digested, Vec<String>) {
        let place = RecordPlace::new(dir, vec![record.to_owned()]).unwrap();
        let (mut comm, mut told) = (local::LocalComm::world(1).remove(0), Vec::new());
        let model = Arc::new(BaseModel::open(dir).unwrap());
        let digested = digest(&model, &place, &mut comm, &mut |line| told.push(line)).unwrap();
        digested.new_record.iter().for_each(|record| place.keep(record, &mut |line| panic!("{line}")));
        (digested, told)
    }

    fn weights(tensors: &[Written]) -> String {
        let (dir, record) = (model(tensors), tempdir().unwrap());
        digest_alone(dir.path(), record.path()).0.stamps.weights()
    }

    #[test]
    fn every_bit_counts_and_the_place_does_not() {
        let first = weights(&tensors(1.0, 4.0));
        assert_eq!(first.len(), 32);
        assert_eq!(first, weights(&tensors(1.0, 4.0)));
        assert_ne!(first, weights(&tensors(f32::from_bits(1.0f32.to_bits() + 1), 4.0)));
        assert_ne!(first, weights(&tensors(1.0, -4.0)));
        assert_ne!(first, weights(&tensors(1.0, 4.0)[..2]));
        let mut renamed = tensors(1.0, 4.0);
        renamed[2].0 = "other".into();
        assert_ne!(first, weights(&renamed));
        renamed = tensors(1.0, 4.0);
        renamed[1].2 = vec![4];
        assert_ne!(first, weights(&renamed));

        let (split, record) = (tempdir().unwrap(), tempdir().unwrap());
        let all = tensors(1.0, 4.0);
        write(&split.path().join("1.safetensors"), &all[..1]);
        write(&split.path().join("2.safetensors"), &all[1..]);
        let index = format!(
            r#"{{"weight_map":{{"{LAYER}":"1.safetensors","{EMBED}":"2.safetensors","empty":"2.safetensors"}}}}"#
        );
        fs::write(split.path().join("model.safetensors.index.json"), index).unwrap();
        assert_eq!(first, digest_alone(split.path(), record.path()).0.stamps.weights());
    }

    #[test]
    fn a_layer_is_read_again_only_after_a_change_and_the_rest_at_every_start() {
        let (dir, record) = (model(&tensors(1.0, 4.0)), tempdir().unwrap());
        // Until a second has passed, a change might not show.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let (first, told) = digest_alone(dir.path(), record.path());
        assert!(told.len() == 1 && told[0].contains("1 of 1 files are new or have changed"), "{told:?}");
        let (second, told) = digest_alone(dir.path(), record.path());
        assert!(told.is_empty() && second.new_record.is_none(), "{told:?}");
        assert_eq!(first.stamps.weights(), second.stamps.weights());

        // A record that says otherwise is believed for a layer, and not for what is read at run time.
        let file = fs::read_dir(record.path()).unwrap().next().unwrap().unwrap().path();
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains(LAYER) && !text.contains(EMBED), "{text}");

        write(&dir.path().join("model.safetensors"), &tensors(1.5, 4.0));
        let (third, told) = digest_alone(dir.path(), record.path());
        assert_eq!(told.len(), 1);
        assert_ne!(first.stamps.weights(), third.stamps.weights());
        fs::write(file, "{").unwrap();
        assert_eq!(digest_alone(dir.path(), record.path()).0.stamps.weights(), third.stamps.weights());
    }

    #[test]
    fn ranks_share_the_reading_and_those_with_other_files_have_their_own_digest() {
        let (here, there) = (model(&tensors(1.0, 4.0)), model(&tensors(1.0, 5.0)[..2]));
        let record = tempdir().unwrap();
        let of_rank = |rank: usize| if rank < 3 { here.path() } else { there.path() };
        let digests: Vec<(String, bool)> = std::thread::scope(|scope| {
            let start = |mut comm: local::LocalComm| {
                let (of_rank, record) = (&of_rank, record.path());
                scope.spawn(move || {
                    let dir = of_rank(comm.rank());
                    let place = RecordPlace::new(dir, vec![record.to_owned()]).unwrap();
                    let model = Arc::new(BaseModel::open(dir).unwrap());
                    let digested = digest(&model, &place, &mut comm, &mut |_| ()).unwrap();
                    (digested.stamps.weights(), digested.new_record.is_some())
                })
            };
            let ranks: Vec<_> = local::LocalComm::world(5).into_iter().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let (first, second) = (weights(&tensors(1.0, 4.0)), weights(&tensors(1.0, 5.0)[..2]));
        for (rank, (digest, writes)) in digests.iter().enumerate() {
            assert_eq!(digest, if rank < 3 { &first } else { &second }, "rank {rank}");
            assert_eq!(*writes, rank == 0 || rank == 3, "rank {rank}");
        }
    }

    #[test]
    fn every_tensor_is_read_by_one_rank() {
        let ranges = [0..10, 10..10, 10..1000, 1000..1001, 1001..1001];
        let item = |range: &Range<usize>| Item { name: "x", file_idx: 0, range: range.clone() };
        let items: Vec<Item> = ranges.iter().map(item).collect();
        for num_places in 1..8 {
            for missing in [vec![0, 1, 2, 3, 4], vec![4], vec![1, 4], vec![]] {
                let mut all: Vec<usize> =
                    (0..num_places).flat_map(|place| part_of(&items, missing.clone(), place, num_places)).collect();
                all.sort_unstable();
                assert_eq!(all, missing, "{num_places}");
            }
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_refused() {
        let (dir, record) = (model(&tensors(1.0, 4.0)), tempdir().unwrap());
        let place = RecordPlace::new(dir.path(), vec![record.path().to_owned()]).unwrap();
        let model = Arc::new(BaseModel::open(dir.path()).unwrap());
        // What is told comes right before the reading.
        let mut overwrite = |_: String| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let file = fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
            file.write_all_at(b"\x01", file.metadata().unwrap().len() - 1).unwrap();
        };
        let error = digest(&model, &place, &mut local::LocalComm::world(1).remove(0), &mut overwrite).err().unwrap();
        assert!(error.to_string().contains("model.safetensors: changed while it was read"), "{error}");
    }

    #[test]
    fn a_base_that_changes_during_a_run_is_noticed() {
        let (dir, record) = (model(&tensors(1.0, 4.0)), tempdir().unwrap());
        let path = dir.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        let stamps = digest_alone(dir.path(), record.path()).0.stamps;
        stamps.check_unchanged().unwrap();
        let error = || stamps.check_unchanged().unwrap_err().to_string();

        // In place, and back again.
        let mut other = whole.clone();
        let last = other.len() - 1;
        other[last] ^= 1;
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&other, 0).unwrap();
        assert!(error().contains("model.safetensors: was overwritten during the run"), "{}", error());
        file.write_all_at(&whole, 0).unwrap();
        stamps.check_unchanged().unwrap();
        // Another file under the name: the same weights, others, none.
        fs::rename(&path, dir.path().join("old")).unwrap();
        stamps.check_unchanged().unwrap();
        fs::write(&path, &whole).unwrap();
        stamps.check_unchanged().unwrap();
        fs::write(&path, &other).unwrap();
        assert!(error().contains("model.safetensors: was replaced during the run"), "{}", error());
        fs::write(&path, "").unwrap();
        assert!(error().contains("was replaced"), "{}", error());
        fs::remove_dir_all(dir.path()).unwrap();
        stamps.check_unchanged().unwrap();
    }
}
