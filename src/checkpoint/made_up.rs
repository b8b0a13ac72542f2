//! Weights that look random, of a model that was never trained, in the form that a run loads: a folder with a
//! config.json and shard files. They are what [`synthetic::base`] draws, so that a folder holds nothing that the shape
//! does not decide.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use half::bf16;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::comm::{Comm, anywhere};
use crate::device::cpu::uniform;
use crate::files::{self, shown_path};
use crate::fsdp::exec::Embed;
use crate::fsdp::layout::UnitTensor;
use crate::model::spec::{ModelSpec, TensorId};
use crate::quant::nf4;
use crate::quant::record::{Encoding, RECORD_WEIGHTS};

use super::shards::ranks_with_this_folder;
use super::source::BaseModel;
use super::synthetic::{self, EMBEDDING_ROWS, EMBEDDING_SEED, HALF_WIDTH};
use super::{atomic, folder};

/// The way in which weights are drawn, in their digest: another way gets another number.
const DRAWING: &str = "made-up weights 1";

/// Made-up weights of a shape.
#[derive(Clone)]
pub struct MadeUp {
    /// Text of the config.json.
    config: Vec<u8>,
    spec: Arc<ModelSpec>,
}

impl MadeUp {
    /// Reads the text of a config.json that came from `source`.
    pub fn new(config: Vec<u8>, source: &str) -> Result<MadeUp> {
        let spec = Arc::new(ModelSpec::parse(&config, source)?);
        Ok(MadeUp { config, spec })
    }

    /// Reads the config.json of a folder of made-up shards.
    pub fn load(dir: &Path) -> Result<MadeUp> {
        check_no_model(dir)?;
        let path = dir.join(folder::CONFIG_FILE);
        ensure!(
            path.exists(),
            "{}: not there\nhelp: `fsdp-qlora quantize --shape NAME --output {} --world-size N` writes it, and the shards",
            shown_path(&path),
            shown_path(dir)
        );
        MadeUp::new(files::read(&path, files::MAX_SETTINGS_BYTES)?, &shown_path(&path))
    }

    /// Checks that a folder may take shards of these weights: it is not there, is empty, or has shards of them.
    pub fn check_folder(&self, dir: &Path) -> Result<()> {
        check_no_model(dir)?;
        let path = dir.join(folder::CONFIG_FILE);
        if path.exists() {
            ensure!(
                files::read(&path, files::MAX_SETTINGS_BYTES)? == self.config,
                "{}: is there and is of another shape; it is not overwritten\nhelp: name another folder in --output",
                shown_path(&path)
            );
            return Ok(());
        }
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let is_shard = |path: &Path| super::donor::parse_name(path).is_some();
        match entries.map(|entry| entry.path()).find(|path| !atomic::is_temporary(path) && !is_shard(path)) {
            Some(other) => bail!(
                "{}: is there, and {} is no folder of made-up shards\nhelp: name another folder in --output",
                shown_path(&other),
                shown_path(dir)
            ),
            None => Ok(()),
        }
    }

    /// Writes config.json, which comes last: a folder that has it has whole shards. Collective.
    pub fn finish_folder(&self, comm: &mut dyn Comm, dir: &Path) -> Result<()> {
        let is_first = ranks_with_this_folder(comm, dir)?[comm.rank()] == comm.rank();
        let written = if is_first { atomic::write(&dir.join(folder::CONFIG_FILE), &self.config) } else { Ok(()) };
        let failed = anywhere(comm, written.is_err())?;
        written?;
        ensure!(!failed, "another rank could not write its config.json");
        Ok(())
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    pub(super) fn digest(&self) -> String {
        let mut hash = Xxh3::new();
        hash.update(DRAWING.as_bytes());
        hash.update(&self.config);
        format!("{:032x}", hash.digest128())
    }

    /// Writes the records of a tensor, which is entry `idx` of this unit. No tensor exists in f32 as a whole.
    pub(super) fn write_records(&self, unit: usize, idx: usize, tensor: &UnitTensor, out: &mut [u8]) -> Result<()> {
        let norm = match tensor.id {
            TensorId::Norm(id) => Some(1.0 - self.spec.layers[unit].norm_offset(id)),
            _ => None,
        };
        let draw = |first: usize, out: &mut [f32]| match norm {
            Some(weight) => out.fill(weight),
            None => uniform::fill(synthetic::seed(unit, idx), first as u64, HALF_WIDTH, out),
        };
        let num_weights = tensor.elements.len();
        match tensor.encoding {
            Encoding::Nf4 { double_quant } => nf4::quantize(num_weights, double_quant, |first, out| {
                draw(first, out);
                Ok(())
            })?
            .write_records(out),
            Encoding::Plain(_) => {
                let record_bytes = tensor.encoding.parts(RECORD_WEIGHTS).bytes;
                out.par_chunks_mut(record_bytes).enumerate().for_each(|(record, out)| {
                    let first = record * RECORD_WEIGHTS;
                    let mut values = vec![0.0; RECORD_WEIGHTS.min(num_weights - first)];
                    draw(first, &mut values);
                    in_bf16(&values, out);
                });
                Ok(())
            }
        }
    }

    /// Returns the lookup in the embedding table, of which the first rows are drawn: ids beyond begin again.
    pub(super) fn embed(&self) -> Box<Embed> {
        let hidden_size = self.spec.hidden_size;
        let mut table = vec![0.0; EMBEDDING_ROWS * hidden_size];
        uniform::fill(EMBEDDING_SEED, 0, HALF_WIDTH, &mut table);
        synthetic::embed(table, hidden_size)
    }
}

/// Writes values as a record in bf16, with zeros behind them.
pub(super) fn in_bf16(values: &[f32], record: &mut [u8]) {
    record.fill(0);
    for (bytes, value) in record.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = bf16::from_f32(*value).to_le_bytes();
    }
}

fn check_no_model(dir: &Path) -> Result<()> {
    ensure!(
        !BaseModel::has_weights(dir),
        "{}: has the weights of a model, beside which none are made up\nhelp: `quantize --model` writes its shards, and \
         `train` trains it",
        shown_path(dir)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::load::{self, LoadOptions};
    use super::super::shards::Found;
    use super::*;
    use crate::comm::local::LocalComm;
    use crate::device::cpu::Cpu;

    const CONFIG: &str = "tests/golden/tiny/config.json";

    /// A tiny shape of which projections are cut by shards.
    fn made_up() -> MadeUp {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(CONFIG)).unwrap();
        let text = text.replace("\"intermediate_size\": 128", "\"intermediate_size\": 1024");
        MadeUp::new(text.into_bytes(), CONFIG).unwrap()
    }

    #[test]
    fn shard_files_hold_what_a_device_draws() {
        for double_quant in [Some(true), Some(false), None] {
            let (dir, made_up) = (tempfile::tempdir().unwrap(), made_up());
            let options = LoadOptions {
                load_in_4bit: double_quant.is_some(),
                double_quant,
                shards: Some(dir.path().into()),
                num_shards: 3,
            };
            let opened = load::made_up(made_up.clone(), dir.path(), &options).unwrap();
            let mut comm = LocalComm::world(1).remove(0);
            opened.write(&mut comm, &[0, 1, 2], &mut |_| (), &mut |line| panic!("{line}")).unwrap();
            for shard in 0..3 {
                let spec = made_up.spec().clone();
                let drawn = synthetic::base(&Cpu::new(1), spec, double_quant, (shard, 3), |_| ()).unwrap();
                let Found::Valid(written) = opened.shard_spec.open(shard).unwrap() else { panic!("no valid shard") };
                for (unit, (source, written)) in drawn.shards.into_iter().zip(written).enumerate() {
                    let drawn = source.take(unit).unwrap();
                    assert!((*drawn).as_ref() == (*written).as_ref(), "{double_quant:?}, shard {shard}, unit {unit}");
                }
                let ids = [3, 5000, 17];
                let of = |embed: &Embed| {
                    let mut out = vec![0.0; ids.len() * made_up.spec().hidden_size];
                    embed(&ids, &mut out).unwrap();
                    out
                };
                assert_eq!(of(&*made_up.embed()), of(&*drawn.embed));
            }
        }
    }

    #[test]
    fn only_a_folder_of_its_own_is_filled() {
        let (place, made_up) = (tempfile::tempdir().unwrap(), made_up());
        let dir = place.path().join("shards");
        made_up.check_folder(&dir).unwrap();
        let error = MadeUp::load(&dir).err().unwrap().to_string();
        assert!(
            error.contains("config.json: not there") && error.contains("help: `fsdp-qlora quantize --shape"),
            "{error}"
        );
        made_up.finish_folder(&mut LocalComm::world(1).remove(0), &dir).unwrap();
        made_up.check_folder(&dir).unwrap();
        assert_eq!(MadeUp::load(&dir).unwrap().digest(), made_up.digest());
        let refused = |name: &str, content: &[u8], words: &str| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(name), content).unwrap();
            let error = made_up.check_folder(dir.path()).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("help:"), "{error}");
        };
        refused("config.json", b"{}", "of another shape");
        refused("model.safetensors", b"", "has the weights of a model");
        refused("notes.txt", b"mine", "notes.txt: is there");
    }
}
