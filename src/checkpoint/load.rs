//! Loads a base: shard files are made from a Hugging Face directory if they are not there, and each rank maps its
//! own.
//!
//! Units are dealt to ranks in rounds. Each rank quantizes the whole tensors of its unit (the offset of double
//! quantization is the mean over a whole tensor), lays them out and sends every other rank the shards that it wants
//! of them, in pieces. So the bytes do not depend on who computed them, and a rank holds one unit and one piece.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::comm::pairs::{self, PIECE_BYTES};
use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, ShardSource, SharedBytes, all_gather_bytes, all_gather_u64s, anywhere, barrier, host_name};
use crate::fsdp::exec::Base;
use crate::fsdp::layout::{UnitLayout, UnitTensor};
use crate::fsdp::unit::{self, Encodings, NumUnits};
use crate::model::spec::ModelSpec;
use crate::quant::double::{DYNAMIC_MAP, NestedAbsmax};
use crate::quant::nf4::{self, Nf4Tensor};
use crate::quant::record::{Encoding, RECORD_WEIGHTS};

use super::atomic;
use super::bnb::Absmax;
use super::encodings::{Decided, InBf16, linears};
use super::folder;
use super::identity::{self, BaseStamps, Digested};
use super::record::{Record, RecordPlace};
use super::room::{self, Want};
use super::shards::{self, Found, ShardSpec, ShardWriter};
use super::source::BaseModel;

/// The form in which a base is held.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub load_in_4bit: bool,
    /// `None` follows a checkpoint that is in 4 bit already, and means true for any other.
    pub double_quant: Option<bool>,
    /// Folder of the shard files; `None` means the cache folder.
    pub shards: Option<PathBuf>,
    /// Number of shards of each unit: how many ranks hold a base together.
    pub num_shards: usize,
}

/// A base model whose tensors have been checked, how they will be stored, and which base it is.
pub struct OpenedBase {
    pub model: Arc<BaseModel>,
    pub spec: ModelSpec,
    pub layouts: Vec<UnitLayout>,
    pub shard_spec: ShardSpec,
    /// Room on disks that making the shards must leave, because this rank writes there later.
    pub kept_free: Vec<Want>,
    stamps: BaseStamps,
    record_place: RecordPlace,
    /// The record of digests that this rank has to keep, if it is the one to do so.
    new_record: Option<Record>,
}

/// Layouts of all units of a model.
pub fn layouts(spec: &ModelSpec, encodings: &impl Encodings, num_shards: usize) -> Result<Vec<UnitLayout>> {
    let layout = |unit| Ok(UnitLayout::new(unit::tensors(spec, encodings, unit)?, num_shards));
    NumUnits::new(spec).all().map(layout).collect()
}

/// The model and its layouts for planning. A folder may have a config.json and no weights, which are then taken to be
/// in bf16.
pub fn planned(dir: &Path, options: &LoadOptions) -> Result<(ModelSpec, Vec<UnitLayout>)> {
    if BaseModel::has_weights(dir) {
        let checked = check(dir, options)?;
        return Ok((checked.spec, checked.layouts));
    }
    folder::check(dir)?;
    let spec = ModelSpec::load(dir)?;
    let nf4_double_quant = options.load_in_4bit.then_some(options.double_quant.unwrap_or(true));
    let layouts = layouts(&spec, &InBf16 { nf4_double_quant }, options.num_shards)?;
    Ok((spec, layouts))
}

/// A base model whose tensors have been checked, and how they will be stored.
struct Checked {
    model: BaseModel,
    spec: ModelSpec,
    layouts: Vec<UnitLayout>,
    /// Encoding of each linear module's weight, with the weight's name.
    linears: Vec<(String, Encoding)>,
}

fn check(dir: &Path, options: &LoadOptions) -> Result<Checked> {
    folder::check(dir)?;
    let spec = ModelSpec::load(dir)?;
    let model = BaseModel::open(dir)?;
    model.check(&spec)?;
    let decided = Decided::new(&model, &spec, options);
    let layouts = layouts(&spec, &decided, options.num_shards)?;
    let smallest = layouts.iter().take(spec.num_layers()).map(num_records).min().unwrap_or(0);
    ensure!(
        options.num_shards <= smallest,
        "{} ranks, but a layer of this model divides into {smallest} parts at most: start fewer ranks",
        options.num_shards
    );
    let linears = linears(&spec).map(|name| decided.linear(&name).map(|encoding| (name, encoding)));
    let linears = linears.collect::<Result<_>>()?;
    Ok(Checked { model, spec, layouts, linears })
}

impl Checked {
    /// Returns the encodings of the linear modules as one text, NF4 first. There are several if a checkpoint in 4 bit
    /// keeps some plain.
    fn encoding(&self) -> String {
        let mut names: Vec<&str> = self.linears.iter().map(|(_, encoding)| encoding.name()).collect();
        names.sort_unstable();
        names.dedup();
        names.reverse();
        names.join(",")
    }

    /// Says how many tensors a text tower leaves alone.
    fn tell_text_tower(&self, tell: &mut dyn FnMut(String)) {
        let others = self.model.names().filter(|name| self.spec.is_beside_text(name)).count();
        if self.spec.is_text_tower {
            tell(format!(
                "this model also sees: its text tower alone is used, and {others} tensors beside it are left alone"
            ));
        }
    }

    /// Says which modules are not in 4 bit although others are.
    fn tell_plain(&self, tell: &mut dyn FnMut(String)) {
        let is_plain = |(_, encoding): &&(String, Encoding)| matches!(encoding, Encoding::Plain(_));
        let mut plain = self.linears.iter().filter(is_plain);
        let num_plain = plain.clone().count();
        if let Some((first, _)) = plain.next().filter(|_| num_plain < self.linears.len()) {
            let all = self.linears.len();
            tell(format!(
                "{num_plain} of {all} projections are not in 4 bit in the checkpoint, and stay as they are ({first} first)"
            ));
        }
    }
}

/// Opens and checks a base model and finds out which one it is; weights are read only where no earlier start has kept
/// their digests. Collective. `tell` gets progress.
pub fn open(
    dir: &Path,
    options: &LoadOptions,
    comm: &mut dyn Comm,
    tell: &mut dyn FnMut(String),
) -> Result<OpenedBase> {
    let checked = check(dir, options)?;
    checked.tell_text_tower(tell);
    checked.tell_plain(tell);
    let encoding = checked.encoding();
    let Checked { model, spec, layouts, .. } = checked;
    let model = Arc::new(model);
    let record_folders = options.shards.clone().into_iter().chain(shards::automatic_root().ok()).collect();
    let record_place = RecordPlace::new(dir, record_folders)?;
    let Digested { stamps, new_record } = identity::digest(&model, &record_place, comm, tell)?;
    let weights = stamps.weights();
    let shards = match &options.shards {
        Some(dir) => dir.clone(),
        None => shards::automatic_dir(&weights, &encoding)?,
    };
    let shard_spec = ShardSpec::new(shards, weights, encoding, &layouts);
    Ok(OpenedBase { model, spec, layouts, shard_spec, kept_free: Vec::new(), stamps, record_place, new_record })
}

/// The ranks that make units, in the order in which units are dealt to them. Collective.
fn makers(comm: &mut dyn Comm, num_units: usize) -> Result<Vec<String>> {
    let own = format!("rank {} on {}", comm.rank(), host_name());
    let all = all_gather_bytes(comm, own.as_bytes())?;
    Ok(all.into_iter().take(num_units).map(|name| String::from_utf8_lossy(&name).into_owned()).collect())
}

/// Number of records of a unit, which is the number of parts that it can be cut into.
fn num_records(layout: &UnitLayout) -> usize {
    layout.tensors().iter().map(|t| t.elements.len().div_ceil(RECORD_WEIGHTS)).sum()
}

impl OpenedBase {
    /// Returns the identity of this base, 32 hex digits. It is the same wherever the same bytes lie, and differs if a
    /// byte differs or if config.json makes another model of them.
    pub fn identity(&self) -> String {
        self.stamps.identity(&self.spec)
    }

    /// Returns the stamps that a run compares at its end, to notice a base that was overwritten meanwhile.
    pub fn stamps(&self) -> BaseStamps {
        self.stamps.clone()
    }

    /// Keeps the digests of this start for the next one, on the rank that has to. `tell` gets a failure.
    pub fn keep_digests(&mut self, tell: &mut dyn FnMut(String)) {
        if let Some(record) = self.new_record.take() {
            self.record_place.keep(&record, tell);
        }
    }

    /// Maps this rank's shard, after all ranks together have made the files if any of them lacks its own. `tell` gets
    /// progress, the same on all ranks; `warn` is told what is wrong with this rank's file.
    pub fn load(
        mut self,
        comm: &mut dyn Comm,
        writes: bool,
        tell: &mut dyn FnMut(String),
        warn: &mut dyn FnMut(String),
    ) -> Result<Base> {
        watch::phase(Phase::Load)?;
        let shard = comm.rank() % self.shard_spec.num_shards;
        atomic::remove_abandoned(&self.shard_spec.dir);
        let found = self.shard_spec.open(shard)?;
        match &found {
            Found::Foreign(reason) => bail!(shards::foreign(reason)),
            Found::Damaged(reason) => warn(format!("{reason}; it is made again")),
            Found::Missing | Found::Valid(_) => {}
        }
        let mut units = match found {
            Found::Valid(units) => Some(units),
            _ => None,
        };
        if anywhere(comm, units.is_none())? {
            drop(units.take());
            let own: Vec<usize> = if writes { vec![shard] } else { Vec::new() };
            self.write(comm, &own, tell)?;
        }
        let units = match units {
            Some(units) => units,
            None => match self.shard_spec.open(shard)? {
                Found::Valid(units) => units,
                Found::Missing => bail!("{}: was written and is not there", self.shard_spec.path(shard).display()),
                Found::Foreign(reason) | Found::Damaged(reason) => bail!("{reason}, right after it was written"),
            },
        };
        self.keep_digests(warn);
        self.into_base(units)
    }

    /// Makes the files of the shards that this rank `writes`, together with all ranks.
    pub fn write(&self, comm: &mut dyn Comm, writes: &[usize], tell: &mut dyn FnMut(String)) -> Result<()> {
        self.write_in_pieces(comm, writes, tell, PIECE_BYTES)
    }

    /// Each rank in turn sends every other rank the parts of its unit that the other one wants. A rank holds its unit
    /// and one piece.
    fn write_in_pieces(
        &self,
        comm: &mut dyn Comm,
        writes: &[usize],
        tell: &mut dyn FnMut(String),
        piece_bytes: usize,
    ) -> Result<()> {
        watch::phase(Phase::Quantize)?;
        let (rank, world_size, num_units) = (comm.rank(), comm.world_size(), self.layouts.len());
        let shards = Want { dir: self.shard_spec.dir.clone(), bytes: writes.len() * self.shard_spec.data_bytes() };
        let wants: Vec<Want> = self.kept_free.iter().cloned().chain((!writes.is_empty()).then_some(shards)).collect();
        room::check(comm, &wants).context("no room for the shards; another folder can be given with `shards`")?;
        let wanted = all_gather_u64s(comm, &writes.iter().map(|&shard| shard as u64).collect::<Vec<_>>())?;
        let makers = makers(comm, num_units)?;
        let part_bytes = |shard: usize| self.layouts.iter().map(|layout| layout.shard_range(shard).len()).collect();
        let create = |&shard: &usize| ShardWriter::create(&self.shard_spec, shard, part_bytes(shard), &makers);
        let mut writers = writes.iter().map(create).collect::<Result<Vec<_>>>()?;
        let (mut buffer, mut last_tenth) = (Vec::new(), 0);
        let doing = if self.shard_spec.is_nf4() { "quantizing" } else { "copying" };
        for first in (0..num_units).step_by(world_size) {
            // Progress is told at the start, and then after about every tenth.
            if first == 0 || last_tenth != first * 10 / num_units {
                last_tenth = first * 10 / num_units;
                tell(format!("{doing} unit {} of {num_units} to {}", first + 1, self.shard_spec.dir.display()));
            }
            watch::at(format!("{doing} units {} to {} of {num_units}", first + 1, num_units.min(first + world_size)));
            let own = self.layouts.get(first + rank);
            let flat = own.map_or(Ok(Vec::new()), |layout| self.flat(layout))?;
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
        // No file gets its name before every rank has found that its part came from the base that all have agreed on.
        self.stamps.check_unchanged()?;
        barrier(comm)?;
        writers.into_iter().try_for_each(ShardWriter::finish)?;
        barrier(comm)
    }

    /// A unit without padding: its shards one after the other.
    fn flat(&self, layout: &UnitLayout) -> Result<Vec<u8>> {
        let mut flat = vec![0u8; layout.flat_bytes()];
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            self.tensor_records(tensor, &mut flat[layout.tensor_range(idx)])?;
            watch::beat();
        }
        Ok(flat)
    }

    fn tensor_records(&self, tensor: &UnitTensor, out: &mut [u8]) -> Result<()> {
        let view = self.model.tensor(&tensor.name)?;
        let num_weights = tensor.elements.len();
        match tensor.encoding {
            Encoding::Plain(dtype) => {
                let mut values = vec![0f32; RECORD_WEIGHTS.min(num_weights)];
                let mut at = 0;
                for first in (0..num_weights).step_by(RECORD_WEIGHTS) {
                    let num = RECORD_WEIGHTS.min(num_weights - first);
                    let element = tensor.elements.start + first;
                    // The values are read as f32 only to refuse those that are not finite.
                    view.to_f32(element, &mut values[..num])?;
                    let parts = tensor.encoding.parts(num);
                    let bytes = element * dtype.size_bytes()..(element + num) * dtype.size_bytes();
                    out[at..][parts.codes].copy_from_slice(&view.bytes[bytes]);
                    at += parts.bytes;
                }
            }
            Encoding::Nf4 { .. } if self.model.is_bnb(&tensor.name) => self.bnb_tensor(tensor)?.write_records(out)?,
            Encoding::Nf4 { double_quant } => {
                nf4::quantize(num_weights, double_quant, |first, out| view.to_f32(first, out))?.write_records(out)?
            }
        }
        self.model.release(&view)
    }

    fn bnb_tensor(&self, tensor: &UnitTensor) -> Result<Nf4Tensor> {
        let found = self.model.bnb_tensor(&tensor.name, &nf4::CODEBOOK, &DYNAMIC_MAP)?;
        let absmax = match found.absmax {
            Absmax::F32(absmax) => nf4::Absmax::F32(absmax),
            Absmax::Nested { codes, nested_absmax, offset } => {
                nf4::Absmax::Nested(NestedAbsmax { codes: codes.to_vec(), nested_absmax, offset })
            }
        };
        Ok(Nf4Tensor { num_weights: tensor.elements.len(), codes: found.codes.to_vec(), absmax })
    }

    fn into_base(self, shards: Vec<SharedBytes>) -> Result<Base> {
        let Self { model, spec, layouts, .. } = self;
        let (hidden_size, head) = (spec.hidden_size, &spec.head);
        let mut final_norm = vec![0.0; hidden_size];
        model.tensor(&head.norm.name)?.to_f32(0, &mut final_norm)?;
        // The factor of the logits is folded into the final norm, so that the head needs none.
        final_norm.iter_mut().for_each(|weight| *weight = (*weight + head.norm.offset) * head.scale);
        let name = spec.embedding.name.clone();
        let embed = move |ids: &[u32], out: &mut [f32]| -> Result<()> {
            let table = model.tensor(&name)?;
            for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
                table.to_f32(id as usize * hidden_size, row).with_context(|| format!("token id {id}"))?;
            }
            Ok(())
        };
        let shards = shards.into_iter().map(ShardSource::ready).collect();
        Ok(Base { spec, layouts, shards, final_norm, embed: Box::new(embed) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::LocalComm;
    use safetensors::SafeTensors;

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
                    opened.write_in_pieces(&mut comm, own, &mut |_| (), piece_bytes).unwrap();
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

    #[test]
    fn a_config_is_enough_for_a_plan() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let bare = tempfile::tempdir().unwrap();
        std::fs::copy(tiny.join("config.json"), bare.path().join("config.json")).unwrap();
        for load_in_4bit in [true, false] {
            let options = LoadOptions { load_in_4bit, double_quant: None, shards: None, num_shards: 2 };
            let [with, without] = [&tiny, bare.path()].map(|dir| planned(dir, &options).unwrap());
            assert_eq!(with.0, without.0);
            // Plain weights have the width of the checkpoint, which a config does not tell.
            let tensors = |layouts: &[UnitLayout]| -> Vec<_> {
                let tensors = layouts.iter().flat_map(UnitLayout::tensors);
                tensors
                    .map(|t| (t.name.clone(), t.elements.clone(), matches!(t.encoding, Encoding::Nf4 { .. })))
                    .collect()
            };
            assert_eq!(tensors(&with.1), tensors(&without.1));
        }
        let options = LoadOptions { load_in_4bit: true, double_quant: None, shards: None, num_shards: 1 };
        assert!(check(bare.path(), &options).is_err());
    }
}
