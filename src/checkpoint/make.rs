//! Makes shard files, all ranks together.
//!
//! Units are dealt to ranks in rounds. Each rank quantizes the whole tensors of its unit (the offset of double
//! quantization is the mean over a whole tensor), or cuts the unit from the shards of another number of ranks. It lays
//! the unit out and sends every other rank the shards that it wants of it, in pieces. So the bytes do not depend on
//! who made them nor from what, and a rank holds one unit and one piece.

use anyhow::{Context, Result};

use crate::comm::pairs::{self, PIECE_BYTES};
use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, all_gather_bytes, all_gather_u64s, barrier, host_name};
use crate::fsdp::layout::UnitLayout;
use crate::progress;

use super::donor::Donor;
use super::load::OpenedBase;
use super::room::{self, Want};
use super::shards::{Made, ShardWriter, ranks_with_this_folder};
use super::weights::Weights;

/// The ranks that make units, in the order in which units are dealt to them. Collective.
fn makers(comm: &mut dyn Comm, num_units: usize) -> Result<Vec<String>> {
    let own = format!("rank {} on {}", comm.rank(), host_name());
    let all = all_gather_bytes(comm, own.as_bytes())?;
    Ok(all.into_iter().take(num_units).map(|name| String::from_utf8_lossy(&name).into_owned()).collect())
}

/// Returns the shards that are written to the folder of this rank, given what each rank writes and the first rank that
/// sees its folder.
fn beside(wanted: &[Vec<u64>], folders: &[usize], rank: usize) -> Vec<usize> {
    let here = wanted.iter().zip(folders).filter(|(_, folder)| **folder == folders[rank]);
    let mut shards: Vec<usize> = here.flat_map(|(wanted, _)| wanted).map(|&shard| shard as usize).collect();
    shards.sort_unstable();
    shards.dedup();
    shards
}

impl OpenedBase {
    /// Makes the files of the shards that this rank `writes`, together with all ranks.
    /// `tell` gets progress, the same on all ranks; `warn` is told what is wrong with shards that are there.
    pub fn write(
        &self,
        comm: &mut dyn Comm,
        writes: &[usize],
        tell: &mut dyn FnMut(String),
        warn: &mut dyn FnMut(String),
    ) -> Result<()> {
        self.write_in_pieces(comm, writes, tell, warn, PIECE_BYTES)
    }

    /// Each rank in turn sends every other rank the parts of its unit that the other one wants. A rank holds its unit
    /// and one piece.
    fn write_in_pieces(
        &self,
        comm: &mut dyn Comm,
        writes: &[usize],
        tell: &mut dyn FnMut(String),
        warn: &mut dyn FnMut(String),
        piece_bytes: usize,
    ) -> Result<()> {
        watch::phase(Phase::Quantize)?;
        let (rank, world_size, num_units) = (comm.rank(), comm.world_size(), self.layouts.len());
        let shards = Want { dir: self.shard_spec.dir.clone(), bytes: writes.len() * self.shard_spec.data_bytes() };
        let wants: Vec<Want> = self.kept_free.iter().cloned().chain((!writes.is_empty()).then_some(shards)).collect();
        room::check(comm, &wants).context("the shards cannot be written; another folder can be given with `shards`")?;
        let wanted = all_gather_u64s(comm, &writes.iter().map(|&shard| shard as u64).collect::<Vec<_>>())?;
        let folders = ranks_with_this_folder(comm, &self.shard_spec.dir)?;
        let made = Made { makers: makers(comm, num_units)?, beside: beside(&wanted, &folders, rank) };
        let mut donor = Donor::find(&self.shard_spec, &self.layouts);
        let part_bytes = |shard: usize| self.layouts.iter().map(|layout| layout.shard_range(shard).len()).collect();
        let create = |&shard: &usize| ShardWriter::create(&self.shard_spec, shard, part_bytes(shard), &made);
        let mut writers = writes.iter().map(create).collect::<Result<Vec<_>>>()?;
        let mut buffer = Vec::new();
        let verb = match &donor {
            Some(_) => "cutting",
            None if matches!(self.mapped.weights, Weights::MadeUp(_)) => "drawing",
            None if self.shard_spec.is_nf4() => "quantizing",
            None => "copying",
        };
        let source = donor.as_ref().map_or(String::new(), |donor| format!("{donor}: "));
        tell(format!("{source}{verb} {num_units} units to {}", self.shard_spec.dir.display()));
        for first in (0..num_units).step_by(world_size) {
            progress::at(&format!("{verb} units"), first, num_units);
            watch::at(format!("{verb} units {} to {} of {num_units}", first + 1, num_units.min(first + world_size)));
            let own = self.layouts.get(first + rank);
            let flat = own.map_or(Ok(Vec::new()), |layout| self.flat(first + rank, layout, &mut donor, warn))?;
            for (to, from) in pairs::turns(rank, world_size) {
                let mut sent = own
                    .into_iter()
                    .flat_map(|layout| wanted[to].iter().map(|&shard| layout.shard_range(shard as usize)))
                    .flat_map(|range| flat[range].chunks(piece_bytes));
                let mut received = self.layouts.get(first + from).into_iter().flat_map(|layout| {
                    let pieces = |&shard: &usize| layout.shard_range(shard).len().div_ceil(piece_bytes);
                    writes.iter().enumerate().flat_map(move |(i, shard)| std::iter::repeat_n(i, pieces(shard)))
                });
                loop {
                    let (piece, writer) = (sent.next(), received.next());
                    if piece.is_none() && writer.is_none() {
                        break;
                    }
                    let left = writer.map_or(0, |i| writers[i].bytes_left(first + from));
                    buffer.resize(left.min(piece_bytes), 0);
                    comm.send_receive(to, piece.unwrap_or_default(), from, &mut buffer)?;
                    writer.map_or(Ok(()), |i| writers[i].append(first + from, &buffer))?;
                }
            }
        }
        progress::end();
        // No file gets its name before every rank has found that its part came from the base that all have agreed on.
        self.mapped.weights.check_unchanged()?;
        barrier(comm)?;
        writers.into_iter().try_for_each(ShardWriter::finish)?;
        barrier(comm)
    }

    /// Returns a unit without padding, from shards of another number of ranks or, where these are not there or are
    /// damaged, from the weights. The bytes are the same.
    fn flat(
        &self,
        unit: usize,
        layout: &UnitLayout,
        donor: &mut Option<Donor>,
        warn: &mut dyn FnMut(String),
    ) -> Result<Vec<u8>> {
        match donor.as_ref().map(|donor| donor.flat(unit)) {
            Some(Ok(flat)) => return Ok(flat),
            Some(Err(error)) => {
                warn(format!("{error:#}; units are made from the model instead"));
                *donor = None;
            }
            None => {}
        }
        let mut flat = vec![0u8; layout.flat_bytes()];
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            self.mapped.weights.write_records(unit, idx, tensor, &mut flat[layout.tensor_range(idx)])?;
            watch::beat();
        }
        Ok(flat)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::{bail, ensure};
    use safetensors::SafeTensors;

    use super::super::load::{LoadOptions, open};
    use super::super::shards::{Found, ShardSpec};
    use super::*;
    use crate::comm::local::LocalComm;

    /// Refuses messages of more than a piece, and all that every rank would get a copy of.
    struct Pieces {
        comm: LocalComm,
        piece_bytes: usize,
    }

    /// Bytes of a rank in a collective that only says who wants what.
    const A_FEW: usize = 200;

    impl Comm for Pieces {
        fn rank(&self) -> usize {
            self.comm.rank()
        }

        fn world_size(&self) -> usize {
            self.comm.world_size()
        }

        fn all_gather(&mut self, send: &[u8], recv: &mut [u8]) -> Result<()> {
            ensure!(send.len() <= A_FEW, "{} bytes to all", send.len());
            self.comm.all_gather(send, recv)
        }

        fn all_to_all(&mut self, send: &[u8], _: &mut [u8]) -> Result<()> {
            bail!("{} bytes to all", send.len())
        }

        fn send_receive(&mut self, to: usize, send: &[u8], from: usize, recv: &mut [u8]) -> Result<()> {
            ensure!(send.len().max(recv.len()) <= self.piece_bytes, "{} and {} bytes", send.len(), recv.len());
            self.comm.send_receive(to, send, from, recv)
        }
    }

    /// The units of each shard's file, made by the ranks of a world, each of which writes some shards.
    fn made(writes: &[&[usize]], num_shards: usize, piece_bytes: usize) -> Vec<Vec<Vec<u8>>> {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for mut comm in LocalComm::world(writes.len()) {
                let (folder, tiny) = (&folder, &tiny);
                scope.spawn(move || {
                    let dir = folder.path().join(comm.rank().to_string());
                    let options = LoadOptions { load_in_4bit: true, double_quant: None, shards: Some(dir), num_shards };
                    let opened = open(tiny, &options, &mut comm, &mut |_| ()).unwrap();
                    let own = writes[comm.rank()];
                    let mut comm = Pieces { comm, piece_bytes };
                    opened
                        .write_in_pieces(&mut comm, own, &mut |_| (), &mut |line| panic!("{line}"), piece_bytes)
                        .unwrap();
                    own.iter().for_each(|&shard| assert!(matches!(opened.shard_spec.open(shard), Ok(Found::Valid(_)))));
                });
            }
        });
        let files = (0..writes.len()).flat_map(|rank| writes[rank].iter().map(move |shard| (shard, rank)));
        let mut shards = vec![Vec::new(); num_shards];
        for (&shard, rank) in files {
            let name = format!("{rank}/nf4-{shard:05}-of-{num_shards:05}.safetensors");
            let bytes = std::fs::read(folder.path().join(name)).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let mut units: Vec<_> = file.iter().map(|(name, unit)| (name, unit.data().to_vec())).collect();
            units.sort();
            let units: Vec<Vec<u8>> = units.into_iter().map(|(_, bytes)| bytes).collect();
            assert!(shards[shard].is_empty() || shards[shard] == units, "shard {shard} of rank {rank}");
            shards[shard] = units;
        }
        shards
    }

    #[test]
    fn shards_are_the_same_whoever_makes_and_writes_them_in_pieces_of_any_size() {
        let alone = made(&[&[0, 1, 2]], 3, usize::MAX);
        // full_shard, hybrid_shard of two nodes, `quantize` with ranks that write several and none.
        for writes in [&[&[0][..], &[1], &[2]][..], &[&[0], &[1], &[2], &[0], &[1], &[2]], &[&[2, 0], &[], &[1]]] {
            for piece_bytes in [1000, 4096, 1 << 20] {
                assert!(made(writes, 3, piece_bytes) == alone, "{writes:?} in pieces of {piece_bytes}");
            }
        }
        // no_shard: some ranks write the whole.
        assert!(made(&[&[0], &[], &[0], &[], &[]], 1, 4096) == made(&[&[0]], 1, usize::MAX));
    }

    /// Makes the files of `num_shards` shards in a folder on as many ranks. Returns what was told.
    fn write_all(folder: &Path, num_shards: usize) -> Vec<String> {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let told = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for mut comm in LocalComm::world(num_shards) {
                let (tiny, told) = (&tiny, &told);
                scope.spawn(move || {
                    let shards = Some(folder.to_path_buf());
                    let options = LoadOptions { load_in_4bit: true, double_quant: None, shards, num_shards };
                    let opened = open(tiny, &options, &mut comm, &mut |_| ()).unwrap();
                    let (own, mut tell) = ([comm.rank()], |line: String| told.lock().unwrap().push(line));
                    let mut warn = |line: String| told.lock().unwrap().push(format!("warning: {line}"));
                    opened.write(&mut comm, &own, &mut tell, &mut warn).unwrap();
                });
            }
        });
        told.into_inner().unwrap()
    }

    fn files(folder: &Path, num_shards: usize) -> Vec<Vec<u8>> {
        let name = |shard| format!("nf4-{shard:05}-of-{num_shards:05}.safetensors");
        (0..num_shards).map(|shard| std::fs::read(folder.join(name(shard))).unwrap()).collect()
    }

    #[test]
    fn shards_that_are_cut_from_those_of_another_number_of_ranks_are_those_of_the_model() {
        let fresh: Vec<_> = (1..=4)
            .map(|num_shards| {
                let folder = tempfile::tempdir().unwrap();
                let told = write_all(folder.path(), num_shards);
                assert!(told.iter().any(|line| line.starts_with("quantizing ")), "{told:?}");
                folder
            })
            .collect();
        for (from, to) in (1..=4).flat_map(|from| (1..=4).map(move |to| (from, to))) {
            let folder = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(fresh[from - 1].path()).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
            }
            let told = write_all(folder.path(), to);
            let cut = told.iter().filter(|line| line.contains(&format!("the shards of {from} ranks"))).count();
            assert!(cut > 0 && !told.iter().any(|line| line.contains("quantizing")), "{from} to {to}: {told:?}");
            assert!(files(folder.path(), to) == files(fresh[to - 1].path(), to), "{from} to {to}");
        }
    }

    #[test]
    fn a_damaged_part_is_made_from_the_model_and_shards_that_lack_a_file_are_not_used() {
        let (folder, fresh) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_all(fresh.path(), 3);
        write_all(folder.path(), 2);
        let path = folder.path().join("nf4-00001-of-00002.safetensors");
        let mut file = std::fs::read(&path).unwrap();
        let middle = file.len() / 2;
        file[middle] ^= 4;
        std::fs::write(&path, file).unwrap();
        let told = write_all(folder.path(), 3);
        let warned = |line: &String| line.starts_with("warning: ") && line.contains("its checksum is wrong");
        assert!(told.iter().any(warned), "{told:?}");
        assert!(files(folder.path(), 3) == files(fresh.path(), 3));

        (0..3).for_each(|i| {
            std::fs::remove_file(folder.path().join(format!("nf4-{i:05}-of-00003.safetensors"))).unwrap()
        });
        std::fs::remove_file(&path).unwrap();
        let told = write_all(folder.path(), 3);
        assert!(told.iter().any(|line| line.starts_with("quantizing ")), "{told:?}");
        assert!(files(folder.path(), 3) == files(fresh.path(), 3));
    }

    #[test]
    fn one_rank_of_those_that_see_a_folder_writes_a_shard() {
        let place = tempfile::tempdir().unwrap();
        let [one, other, link] = ["one", "other", "link"].map(|name| place.path().join(name));
        std::fs::create_dir(&one).unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        std::fs::write(place.path().join("file"), "").unwrap();
        let unwritable = place.path().join("file/folder");
        // Two nodes of two ranks, each node with a base: on one disk, under two names of it, and on two disks.
        for (folders, expected) in [
            ([&one, &one, &one, &one], [true, true, false, false]),
            ([&one, &one, &link, &link], [true, true, false, false]),
            ([&one, &one, &other, &other], [true; 4]),
            // Nobody can write there, but there may be files to map.
            ([&unwritable; 4], [true; 4]),
        ] {
            let writes: Vec<bool> = std::thread::scope(|scope| {
                let ranks = LocalComm::world(4).into_iter().zip(folders).map(|(mut comm, dir)| {
                    let spec = ShardSpec {
                        dir: dir.clone(),
                        base: String::new(),
                        encoding: "nf4".into(),
                        num_shards: 2,
                        unit_bytes: Vec::new(),
                        model: String::new(),
                    };
                    scope.spawn(move || spec.is_written_here(&mut comm).unwrap())
                });
                let ranks: Vec<_> = ranks.collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert_eq!(writes, expected, "{folders:?}");
            assert_eq!(std::fs::read_dir(&one).unwrap().count(), 0, "no probe stays");
        }
    }

    #[test]
    fn a_file_names_the_shards_of_its_folder() {
        // Ranks 0 and 1 are a node with a disk of its own, rank 2 and 3 see another one.
        let (wanted, folders) = ([vec![0], vec![1], vec![2], vec![]], [0, 0, 2, 2]);
        assert_eq!(
            [0, 1, 2, 3].map(|rank| beside(&wanted, &folders, rank)),
            [vec![0, 1], vec![0, 1], vec![2], vec![2]]
        );
    }
}
