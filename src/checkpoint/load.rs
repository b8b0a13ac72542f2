//! Loads a base: shard files are made from a Hugging Face directory if they are not there ([`super::make`]), and each
//! rank maps its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, ShardSource, SharedBytes, anywhere};
use crate::fsdp::exec::Base;
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::unit::{self, Encodings, NumUnits};
use crate::model::spec::ModelSpec;
use crate::plan::memory::text as bytes;
use crate::quant::record::{Encoding, RECORD_WEIGHTS};

use super::atomic;
use super::encodings::{Decided, InBf16, linears};
use super::folder;
use super::identity::{self, Digested};
use super::made_up::MadeUp;
use super::mapped::MappedBase;
use super::record::{Record, RecordPlace};
use super::room::Want;
use super::shards::{self, Found, ShardSpec};
use super::source::BaseModel;
use super::weights::Weights;

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

/// A base whose tensors have been checked, how they will be stored, and which base it is.
pub struct OpenedBase {
    pub mapped: MappedBase,
    pub spec: ModelSpec,
    pub layouts: Vec<UnitLayout>,
    pub shard_spec: ShardSpec,
    /// Room on disks that making the shards must leave, because this rank writes there later.
    pub kept_free: Vec<Want>,
    /// The record of digests that this rank has to keep, if it is the one to do so, and its place.
    new_record: Option<(RecordPlace, Record)>,
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
    check_num_shards(&spec, &layouts, options.num_shards)?;
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
    let digest = stamps.weights();
    let shards = match &options.shards {
        Some(dir) => dir.clone(),
        None => shards::automatic_dir(&digest, &encoding)?,
    };
    let origin = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf()).display().to_string();
    let shard_spec = ShardSpec::new(shards, digest, encoding, &layouts, origin);
    let new_record = new_record.map(|record| (record_place, record));
    let mapped = MappedBase::new(Weights::Files(stamps));
    Ok(OpenedBase { mapped, spec, layouts, shard_spec, kept_free: Vec::new(), new_record })
}

/// Opens made-up weights, whose shards are in `dir` or will be.
pub fn made_up(made_up: MadeUp, dir: &Path, options: &LoadOptions) -> Result<OpenedBase> {
    let spec = made_up.spec().clone();
    let nf4_double_quant = options.load_in_4bit.then_some(options.double_quant.unwrap_or(true));
    let encodings = InBf16 { nf4_double_quant };
    let layouts = layouts(&spec, &encodings, options.num_shards)?;
    check_num_shards(&spec, &layouts, options.num_shards)?;
    let encoding = encodings.linear("")?.name().to_string();
    let weights = Weights::MadeUp(made_up);
    let shard_spec = ShardSpec::new(dir.into(), weights.digest(), encoding, &layouts, "made-up weights".into());
    Ok(OpenedBase {
        mapped: MappedBase::new(weights),
        spec,
        layouts,
        shard_spec,
        kept_free: Vec::new(),
        new_record: None,
    })
}

/// Fails where a layer has fewer parts than there are shards.
fn check_num_shards(spec: &ModelSpec, layouts: &[UnitLayout], num_shards: usize) -> Result<()> {
    let smallest = layouts.iter().take(spec.num_layers()).map(num_records).min().unwrap_or(0);
    ensure!(
        num_shards <= smallest,
        "{num_shards} ranks, but a layer of this model divides into {smallest} parts at most: start fewer ranks"
    );
    Ok(())
}

/// Number of records of a unit, which is the number of parts that it can be cut into.
fn num_records(layout: &UnitLayout) -> usize {
    layout.tensors().iter().map(|t| t.elements.len().div_ceil(RECORD_WEIGHTS)).sum()
}

impl OpenedBase {
    /// Returns the identity of this base, 32 hex digits. It is the same wherever the same bytes lie, and differs if a
    /// byte differs or if config.json makes another model of them.
    pub fn identity(&self) -> String {
        self.mapped.weights.identity(&self.spec)
    }

    /// Keeps the digests of this start for the next one, on the rank that has to. `tell` gets a failure.
    pub fn keep_digests(&mut self, tell: &mut dyn FnMut(String)) {
        if let Some((place, record)) = self.new_record.take() {
            place.keep(&record, tell);
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
        let start = Instant::now();
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
        let are_made = anywhere(comm, units.is_none())?;
        if are_made {
            drop(units.take());
            let own: Vec<usize> = if writes { vec![shard] } else { Vec::new() };
            self.write(comm, &own, tell, warn)?;
        }
        let units = match units {
            Some(units) => units,
            None => match self.shard_spec.open(shard)? {
                Found::Valid(units) => units,
                Found::Missing => bail!("{}: was written and is not there", self.shard_spec.path(shard).display()),
                Found::Foreign(reason) | Found::Damaged(reason) => bail!("{reason}, right after it was written"),
            },
        };
        tell(format!(
            "shards: {} of this rank {} in {:.1} s",
            bytes(self.shard_spec.data_bytes()),
            if are_made { "made, checked and mapped" } else { "were there, and are checked and mapped" },
            start.elapsed().as_secs_f64()
        ));
        self.keep_digests(warn);
        self.mapped.set_shard(&units);
        self.into_base(units)
    }

    fn into_base(self, shards: Vec<SharedBytes>) -> Result<Base> {
        let Self { mapped: MappedBase { weights, .. }, spec, layouts, .. } = self;
        let mut final_norm = weights.final_norm(&spec)?;
        // The factor of the logits is folded into the final norm, so that the head needs none.
        let head = &spec.head;
        final_norm.iter_mut().for_each(|weight| *weight = (*weight + head.norm.offset) * head.scale);
        let embed = weights.embed(&spec);
        let shards = shards.into_iter().map(ShardSource::ready).collect();
        Ok(Base { spec, layouts, shards, final_norm, embed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
