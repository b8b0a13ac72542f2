//! The weights that a base is made from: the files of a model, or numbers that are made up.

use std::sync::Arc;

use anyhow::{Context, Result};
use xxhash_rust::xxh3::Xxh3;

use crate::fsdp::exec::Embed;
use crate::fsdp::layout::UnitTensor;
use crate::model::spec::ModelSpec;
use crate::quant::double::{DYNAMIC_MAP, NestedAbsmax};
use crate::quant::nf4::{self, Nf4Tensor};
use crate::quant::record::{Encoding, RECORD_WEIGHTS};

use super::bnb::Absmax;
use super::identity::BaseStamps;
use super::made_up::MadeUp;
use super::source::BaseModel;

/// The source of a base's weights. Everything that is done with a base asks here, so that made-up weights are loaded,
/// sharded, trained on and compared as those of a model are.
#[derive(Clone)]
pub enum Weights {
    /// Files, which have been digested.
    Files(BaseStamps),
    MadeUp(MadeUp),
}

impl Weights {
    /// Returns the digest, 32 hex digits, of the weights that shards are made from.
    pub fn digest(&self) -> String {
        match self {
            Weights::Files(stamps) => stamps.weights(),
            Weights::MadeUp(made_up) => made_up.digest(),
        }
    }

    /// Returns the digest, 32 hex digits, of the weights and the configuration, which ranks must have in common.
    pub fn identity(&self, spec: &ModelSpec) -> String {
        let mut hash = Xxh3::new();
        hash.update(format!("{} {spec:?}", self.digest()).as_bytes());
        format!("{:032x}", hash.digest128())
    }

    /// Checks that the weights are still those that were digested: see [`BaseStamps::check_unchanged`].
    pub fn check_unchanged(&self) -> Result<()> {
        match self {
            Weights::Files(stamps) => stamps.check_unchanged(),
            Weights::MadeUp(_) => Ok(()),
        }
    }

    /// Returns whether a projection's weight is all zeros.
    pub fn is_zero(&self, weight: &str) -> Result<bool> {
        match self {
            Weights::Files(stamps) => stamps.model().is_zero(weight),
            Weights::MadeUp(_) => Ok(false),
        }
    }

    /// Writes the records of a tensor, which is entry `idx` of this unit.
    pub(super) fn write_records(&self, unit: usize, idx: usize, tensor: &UnitTensor, out: &mut [u8]) -> Result<()> {
        match self {
            Weights::Files(stamps) => of_files(stamps.model(), tensor, out),
            Weights::MadeUp(made_up) => made_up.write_records(unit, idx, tensor, out),
        }
    }

    /// Returns the weights of the norm before the head, `[hidden_size]`.
    pub(super) fn final_norm(&self, spec: &ModelSpec) -> Result<Vec<f32>> {
        let mut weights = vec![1.0 - spec.head.norm.offset; spec.hidden_size];
        if let Weights::Files(stamps) = self {
            stamps.model().tensor(&spec.head.norm.name)?.to_f32(0, &mut weights)?;
        }
        Ok(weights)
    }

    /// Returns the lookup in the embedding table.
    pub(super) fn embed(&self, spec: &ModelSpec) -> Box<Embed> {
        match self {
            Weights::Files(stamps) => embed_from_files(stamps.model().clone(), spec),
            Weights::MadeUp(made_up) => made_up.embed(),
        }
    }
}

fn embed_from_files(model: Arc<BaseModel>, spec: &ModelSpec) -> Box<Embed> {
    let (name, hidden_size) = (spec.embedding.name.clone(), spec.hidden_size);
    Box::new(move |ids: &[u32], out: &mut [f32]| {
        let table = model.tensor(&name)?;
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(hidden_size)) {
            table.to_f32(id as usize * hidden_size, row).with_context(|| format!("token id {id}"))?;
        }
        Ok(())
    })
}

/// Writes the records of a tensor in a model's files.
pub(super) fn of_files(model: &BaseModel, tensor: &UnitTensor, out: &mut [u8]) -> Result<()> {
    let view = model.tensor(&tensor.name)?;
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
        Encoding::Nf4 { .. } if model.is_bnb(&tensor.name) => of_bnb(model, tensor)?.write_records(out)?,
        Encoding::Nf4 { double_quant } => {
            nf4::quantize(num_weights, double_quant, |first, out| view.to_f32(first, out))?.write_records(out)?
        }
    }
    model.release(&view)
}

fn of_bnb(model: &BaseModel, tensor: &UnitTensor) -> Result<Nf4Tensor> {
    let found = model.bnb_tensor(&tensor.name, &nf4::CODEBOOK, &DYNAMIC_MAP)?;
    let absmax = match found.absmax {
        Absmax::F32(absmax) => nf4::Absmax::F32(absmax),
        Absmax::Nested { codes, nested_absmax, offset } => {
            nf4::Absmax::Nested(NestedAbsmax { codes: codes.to_vec(), nested_absmax, offset })
        }
    };
    Ok(Nf4Tensor { num_weights: tensor.elements.len(), codes: found.codes.to_vec(), absmax })
}
