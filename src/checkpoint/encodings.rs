//! Decides which tensors of a base are stored in 4 bit and which in their own type.

use anyhow::{Result, bail, ensure};

use crate::fsdp::unit::Encodings;
use crate::model::spec::ModelSpec;
use crate::quant::record::{Dtype, Encoding};

use super::load::LoadOptions;
use super::source::{self, BaseModel};

/// The stored encodings that a checkpoint and the options decide.
pub(super) struct Decided<'a> {
    model: &'a BaseModel,
    options: &'a LoadOptions,
    /// True if the checkpoint is in 4 bit already; its plain tensors then stay plain.
    in_4bit: bool,
}

impl<'a> Decided<'a> {
    pub fn new(model: &'a BaseModel, spec: &ModelSpec, options: &'a LoadOptions) -> Self {
        let mut weights = linears(spec);
        let in_4bit = spec.quantization.is_some() || weights.any(|weight| model.is_bnb(&weight));
        Self { model, options, in_4bit }
    }
}

impl Encodings for Decided<'_> {
    fn linear(&self, name: &str) -> Result<Encoding> {
        let Self { model, options, in_4bit } = *self;
        ensure!(
            options.load_in_4bit || !in_4bit,
            "quantization.load_in_4bit: found false, but this checkpoint is in 4 bit; allowed: true, or the 16-bit model that it \
             was made from"
        );
        if model.is_bnb(name) {
            let double_quant = model.get(&format!("{name}.nested_absmax")).is_some();
            ensure!(
                options.double_quant.is_none_or(|wanted| wanted == double_quant),
                "quantization.bnb_4bit_use_double_quant is {}, but {name} has {double_quant} in the checkpoint",
                !double_quant
            );
            return Ok(Encoding::Nf4 { double_quant });
        }
        match options.load_in_4bit && !in_4bit {
            true => Ok(Encoding::Nf4 { double_quant: options.double_quant.unwrap_or(true) }),
            false => Ok(Encoding::Plain(self.plain(name)?)),
        }
    }

    fn plain(&self, name: &str) -> Result<Dtype> {
        let view = self.model.tensor(name)?;
        match view.dtype {
            source::Dtype::F32 => Ok(Dtype::F32),
            source::Dtype::F16 => Ok(Dtype::F16),
            source::Dtype::BF16 => Ok(Dtype::Bf16),
            other => bail!("{view}: dtype {other:?}; allowed: BF16, F16, F32"),
        }
    }
}

/// Names of the weights of all linear modules.
pub(super) fn linears(spec: &ModelSpec) -> impl Iterator<Item = String> {
    spec.modules().map(|module| format!("{}.weight", module.name))
}

/// A base whose weights are, or would be, in bf16.
pub struct InBf16 {
    /// True if NF4 uses double quantization; `None` leaves projections in bf16.
    pub nf4_double_quant: Option<bool>,
}

impl Encodings for InBf16 {
    fn linear(&self, _: &str) -> Result<Encoding> {
        let nf4 = self.nf4_double_quant.map(|double_quant| Encoding::Nf4 { double_quant });
        Ok(nf4.unwrap_or(Encoding::Plain(Dtype::Bf16)))
    }

    fn plain(&self, _: &str) -> Result<Dtype> {
        Ok(Dtype::Bf16)
    }
}
