//! From a Hugging Face directory to what a rank holds: shard files are made when they are not there, then mapped.
//!
//! Units are dealt to ranks in rounds. Each rank quantizes the whole tensors of its unit (the offset of double
//! quantization is the mean over a whole tensor), lays them out and hands every other rank its shard. So the bytes do not
//! depend on who computed them, and a rank holds one unit, its shards of a round, and no more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::comm::{Comm, ShardSource, SharedBytes, all_gather_u64, anywhere, barrier};
use crate::fsdp::exec::Base;
use crate::fsdp::layout::{UnitLayout, UnitTensor};
use crate::fsdp::unit::{self, Encodings, NumUnits};
use crate::model::config::ModelConfig;
use crate::model::names;
use crate::quant::double::{DYNAMIC_MAP, NestedAbsmax};
use crate::quant::nf4::{self, Nf4Tensor};
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

use super::bnb::Absmax;
use super::shards::{self, Found, ShardSpec, ShardWriter};
use super::source::{self, BaseModel};

/// How the base is to be held.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub load_in_4bit: bool,
    /// `None`: as a checkpoint that is in 4 bit already has it, else true.
    pub double_quant: Option<bool>,
    /// Folder of the shard files; `None`: the cache.
    pub shards: Option<PathBuf>,
    /// Number of shards of each unit: how many ranks hold a base together.
    pub num_shards: usize,
}

/// An opened base model whose tensors have been checked, and how they will be stored.
pub struct OpenedBase {
    pub model: Arc<BaseModel>,
    pub config: ModelConfig,
    pub layouts: Vec<UnitLayout>,
    pub spec: ShardSpec,
}

impl Encodings for (&BaseModel, &LoadOptions) {
    fn projection(&self, name: &str) -> Result<Encoding> {
        let (model, options) = *self;
        if model.is_bnb(name) {
            let double_quant = model.get(&format!("{name}.nested_absmax")).is_some();
            ensure!(
                options.load_in_4bit,
                "quantization.load_in_4bit is false, but {name} is in 4 bit in the checkpoint"
            );
            ensure!(
                options.double_quant.is_none_or(|wanted| wanted == double_quant),
                "quantization.bnb_4bit_use_double_quant is {}, but {name} has {double_quant} in the checkpoint",
                !double_quant
            );
            return Ok(Encoding::Nf4 { double_quant });
        }
        match options.load_in_4bit {
            true => Ok(Encoding::Nf4 { double_quant: options.double_quant.unwrap_or(true) }),
            false => Ok(Encoding::Plain(self.plain(name)?)),
        }
    }

    fn plain(&self, name: &str) -> Result<Dtype> {
        let view = self.0.tensor(name)?;
        match view.dtype {
            source::Dtype::F32 => Ok(Dtype::F32),
            source::Dtype::F16 => Ok(Dtype::F16),
            source::Dtype::BF16 => Ok(Dtype::Bf16),
            other => bail!("{view}: dtype {other:?}; allowed: BF16, F16, F32"),
        }
    }
}

/// A base whose weights are, or would be, in bf16.
pub struct InBf16 {
    /// Nothing: projections stay in bf16.
    pub nf4_double_quant: Option<bool>,
}

impl Encodings for InBf16 {
    fn projection(&self, _: &str) -> Result<Encoding> {
        let nf4 = self.nf4_double_quant.map(|double_quant| Encoding::Nf4 { double_quant });
        Ok(nf4.unwrap_or(Encoding::Plain(Dtype::Bf16)))
    }

    fn plain(&self, _: &str) -> Result<Dtype> {
        Ok(Dtype::Bf16)
    }
}

/// Layouts of all units of a model.
pub fn layouts(config: &ModelConfig, encodings: &impl Encodings, num_shards: usize) -> Result<Vec<UnitLayout>> {
    let layout = |unit| Ok(UnitLayout::new(unit::tensors(config, encodings, unit)?, num_shards));
    NumUnits::new(config).all().map(layout).collect()
}

/// Config and layouts for planning; of a folder with a config.json and no weights, as if they were in bf16.
pub fn planned(dir: &Path, options: &LoadOptions) -> Result<(ModelConfig, Vec<UnitLayout>)> {
    if BaseModel::has_weights(dir) {
        let opened = open(dir, options)?;
        return Ok((opened.config, opened.layouts));
    }
    let config = ModelConfig::load(dir)?;
    let nf4_double_quant = options.load_in_4bit.then_some(options.double_quant.unwrap_or(true));
    let layouts = layouts(&config, &InBf16 { nf4_double_quant }, options.num_shards)?;
    Ok((config, layouts))
}

/// Opens and checks a base model; nothing is computed yet.
pub fn open(dir: &Path, options: &LoadOptions) -> Result<OpenedBase> {
    let config = ModelConfig::load(dir)?;
    let model = BaseModel::open(dir)?;
    model.check(&config)?;
    let encodings = (&model, options);
    let layouts = layouts(&config, &encodings, options.num_shards)?;
    let smallest = layouts.iter().take(config.num_hidden_layers).map(num_records).min().unwrap_or(0);
    ensure!(
        options.num_shards <= smallest,
        "{} ranks, but a layer of this model divides into {smallest} parts at most: start fewer ranks",
        options.num_shards
    );
    let base = model.identity()?;
    let encoding = encodings.projection(&names::weight(0, names::Projection::Q))?.name().to_string();
    let dir = match &options.shards {
        Some(dir) => dir.clone(),
        None => shards::automatic_dir(&base, &encoding)?,
    };
    let spec = ShardSpec::new(dir, base, encoding, &layouts);
    Ok(OpenedBase { model: Arc::new(model), config, layouts, spec })
}

/// How many parts a unit can be cut into.
fn num_records(layout: &UnitLayout) -> usize {
    layout.tensors().iter().map(|t| t.elements.len().div_ceil(RECORD_WEIGHTS)).sum()
}

impl OpenedBase {
    /// Maps this rank's shard, after all ranks together have made the files if any of them lacks its own. `tell` gets
    /// progress, the same on all ranks; `warn` what is wrong with this rank's file.
    pub fn load(
        self,
        comm: &mut dyn Comm,
        writes: bool,
        tell: &mut dyn FnMut(String),
        warn: &mut dyn FnMut(String),
    ) -> Result<Base> {
        let shard = comm.rank() % self.spec.num_shards;
        let found = self.spec.open(shard)?;
        if let Found::Invalid(reason) = &found {
            warn(format!("{reason}; it is made again"));
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
            None => match self.spec.open(shard)? {
                Found::Valid(units) => units,
                Found::Missing => bail!("{}: was written and is not there", self.spec.path(shard).display()),
                Found::Invalid(reason) => bail!("{reason}, right after it was written"),
            },
        };
        self.into_base(units)
    }

    /// Makes the files of the shards that this rank `writes`, together with all ranks.
    pub fn write(&self, comm: &mut dyn Comm, writes: &[usize], tell: &mut dyn FnMut(String)) -> Result<()> {
        let (rank, world_size) = (comm.rank(), comm.world_size());
        let mut writers = writes.iter().map(|&s| ShardWriter::create(&self.spec, s)).collect::<Result<Vec<_>>>()?;
        // Every rank tells which shards it wants of each unit: rank-major, padded to the longest list.
        let longest = all_gather_u64(comm, writes.len() as u64)?.into_iter().max().unwrap_or(0) as usize;
        let mut wanted = Vec::new();
        for i in 0..longest {
            wanted.push(all_gather_u64(comm, writes.get(i).map_or(u64::MAX, |&s| s as u64))?);
        }
        let (num_units, mut last_tenth) = (self.layouts.len(), 0);
        for first in (0..num_units).step_by(world_size) {
            let round = first..(first + world_size).min(num_units);
            // At the start, and then about every tenth.
            if first == 0 || last_tenth != first * 10 / num_units {
                last_tenth = first * 10 / num_units;
                tell(format!("quantizing unit {} of {num_units} to {}", first + 1, self.spec.dir.display()));
            }
            let part = round.clone().map(|u| self.spec.unit_bytes[u]).max().unwrap_or(0);
            let flat = match round.clone().nth(rank) {
                Some(unit) => self.sharded_flat(unit)?,
                None => Vec::new(),
            };
            for (i, wanted) in wanted.iter().enumerate() {
                let mut send = vec![0u8; part * world_size];
                for (to, &shard) in wanted.iter().enumerate().filter(|&(_, &s)| s != u64::MAX && !flat.is_empty()) {
                    let bytes = self.spec.unit_bytes[first + rank];
                    send[to * part..to * part + bytes].copy_from_slice(&flat[shard as usize * bytes..][..bytes]);
                }
                let mut received = vec![0u8; part * world_size];
                comm.all_to_all(&send, &mut received)?;
                if let Some(writer) = writers.get_mut(i) {
                    for (from, unit) in round.clone().enumerate() {
                        writer.write_unit(unit, &received[from * part..][..self.spec.unit_bytes[unit]])?;
                    }
                }
            }
        }
        writers.into_iter().try_for_each(ShardWriter::finish)?;
        barrier(comm)
    }

    /// All shards of a unit, padding included, one after the other.
    fn sharded_flat(&self, unit: usize) -> Result<Vec<u8>> {
        let layout = &self.layouts[unit];
        let mut flat = vec![0u8; layout.flat_bytes()];
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            self.tensor_records(tensor, &mut flat[layout.tensor_range(idx)])?;
        }
        let mut shards = vec![0u8; layout.gathered_bytes()];
        for shard in 0..layout.num_shards() {
            let range = layout.shard_range(shard);
            shards[shard * layout.shard_bytes()..][..range.len()].copy_from_slice(&flat[range]);
        }
        Ok(shards)
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
                    // Read as f32 only to refuse what is not a finite number.
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
        let hidden_size = self.config.hidden_size;
        let mut final_norm = vec![0.0; hidden_size];
        self.model.tensor(names::NORM)?.to_f32(0, &mut final_norm)?;
        let model = self.model;
        let embed = move |ids: &[u32], out: &mut [f32]| -> Result<()> {
            let table = model.tensor(names::EMBED_TOKENS)?;
            for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
                table.to_f32(id as usize * hidden_size, row).with_context(|| format!("token id {id}"))?;
            }
            Ok(())
        };
        let shards = shards.into_iter().map(ShardSource::ready).collect();
        Ok(Base { config: self.config, layouts: self.layouts, shards, final_norm, embed: Box::new(embed) })
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
        assert!(
            open(bare.path(), &LoadOptions { load_in_4bit: true, double_quant: None, shards: None, num_shards: 1 })
                .is_err()
        );
    }
}
