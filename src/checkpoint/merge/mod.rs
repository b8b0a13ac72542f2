//! Merges an adapter into its base: a folder of safetensors files that transformers loads without PEFT.
//!
//! A projection becomes W + scale · B · A, computed in f32 and rounded once, to the type that is written. [`Form`] says
//! whether W is what the base has or what training computed with. All other tensors are copied. Tensors are read,
//! changed and written one after the other, in the order of the base's files, so that memory depends on the adapter and
//! the largest tensor alone.

mod files;
mod settings;
mod values;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};

use super::adapter::Adapter;
use super::header::Entry;
use super::load::OpenedBase;
use super::source::{BaseModel, Dtype};
use super::weights::Weights;
use crate::files::shown_path;
use crate::fsdp::layout::UnitTensor;
use crate::model::spec::{ModelSpec, ModuleId, TensorId};
use crate::plan::memory::text as bytes;
use crate::quant::record::Encoding;

pub use settings::{differing_files, is_copied};

/// The weights that the adapter is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The base's own weights, in 16 or 32 bit.
    Original,
    /// The weights that QLoRA computes with: quantized to NF4 and dequantized.
    Dequantized,
}

/// How the result is written.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub form: Form,
    /// Type of all tensors of floats. `None` keeps the type of each; a tensor in 4 bit gets the type that it had before.
    pub dtype: Option<Dtype>,
    /// Largest number of bytes of the tensors in a file. A larger tensor has a file of its own.
    pub max_shard_bytes: usize,
}

/// A tensor of the result.
struct Planned<'a> {
    /// Name in the base's file, and in the result.
    stored: &'a str,
    /// Name in memory, by which [`BaseModel`] finds it.
    name: &'a str,
    /// Type in the result.
    dtype: Dtype,
    shape: Vec<usize>,
    /// How the tensor is held if it is a projection or in 4 bit; `None` for all others, which are copied.
    linear: Option<Linear>,
}

impl Planned<'_> {
    /// Number of elements of a row.
    fn columns(&self) -> usize {
        self.shape.last().map_or(1, |&columns| columns.max(1))
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// The weight of a linear module.
struct Linear {
    /// How training holds it, or how it lies in the base where training leaves it alone: beside a text tower.
    tensor: UnitTensor,
    /// Layer and module of a projection; `None` for a module beside a text tower.
    place: Option<(usize, ModuleId)>,
}

/// A merge that has been decided: a base, its adapter, and the files of the result.
pub struct Merge<'a> {
    opened: &'a OpenedBase,
    model: &'a Arc<BaseModel>,
    adapter: &'a Adapter,
    options: Options,
    /// The tensors of each file of the result.
    files: Vec<Vec<Planned<'a>>>,
}

impl<'a> Merge<'a> {
    /// Decides what is written. The adapter must have been loaded for this base.
    ///
    /// # Errors
    /// The base has no weights of the form that is wanted.
    pub fn new(opened: &'a OpenedBase, adapter: &'a Adapter, options: Options) -> Result<Merge<'a>> {
        let Weights::Files(stamps) = &opened.mapped.weights else { bail!("made-up weights cannot be merged") };
        let model = stamps.model();
        let tensors = planned(opened, model, options.dtype)?;
        let in_4bit = |tensor: &Planned<'_>| model.has_quant_state(tensor.name);
        let is_nf4 = |tensor: &Planned<'_>| {
            tensor.linear.as_ref().is_some_and(|linear| matches!(linear.tensor.encoding, Encoding::Nf4 { .. }))
        };
        match options.form {
            Form::Original => ensure!(
                !tensors.iter().any(in_4bit),
                "--base original: {} is a checkpoint in 4 bit and has no weights in 16 bit\n\
                 help: --base dequantized; or --model with the model in 16 bit that it was made from, and --other-base",
                shown_path(model.dir())
            ),
            Form::Dequantized => ensure!(
                tensors.iter().any(is_nf4),
                "--base dequantized: nothing is quantized with quantization.load_in_4bit=false; allowed: --base original"
            ),
        }
        let files = files::split(tensors, options.max_shard_bytes);
        Ok(Merge { opened, model, adapter, options, files })
    }

    /// Bytes of all tensors of the result.
    pub fn bytes(&self) -> usize {
        self.files.iter().flatten().map(Planned::bytes).sum()
    }

    /// Writes all files of the result into an empty folder and syncs them. `tell` gets a line for each file of weights.
    ///
    /// # Errors
    /// A file cannot be written; a value is too large for the type that is written; the base changed meanwhile.
    pub fn write(&self, dir: &Path, tell: &mut dyn FnMut(String)) -> Result<()> {
        settings::write(self.model.dir(), dir, self.options.dtype)?;
        for (idx, tensors) in self.files.iter().enumerate() {
            let name = files::name(idx, self.files.len());
            self.write_file(&dir.join(&name), tensors)?;
            tell(format!("{name}: {}", bytes(tensors.iter().map(Planned::bytes).sum())));
        }
        if self.files.len() > 1 {
            files::write_index(dir, &self.files)?;
        }
        self.opened.mapped.weights.check_unchanged()
    }
}

/// Lists the tensors of the result in the order in which the base's files have them.
fn planned<'a>(opened: &OpenedBase, model: &'a BaseModel, dtype: Option<Dtype>) -> Result<Vec<Planned<'a>>> {
    let in_4bit: Vec<&str> = model.names().filter(|name| model.has_quant_state(name)).collect();
    let parts: HashSet<String> = in_4bit.iter().flat_map(|name| BaseModel::bnb_parts(name)).collect();
    let mut linears = projections(opened);
    for name in in_4bit {
        let num_weights = model.read_bnb(name)?.shape.iter().product();
        let double_quant = model.get(&format!("{name}.nested_absmax")).is_some();
        let (elements, encoding) = (0..num_weights, Encoding::Nf4 { double_quant });
        let tensor = UnitTensor { id: TensorId::Rows, name: name.into(), elements, encoding };
        linears.entry(name.into()).or_insert(Linear { tensor, place: None });
    }
    let mut entries: Vec<_> = model.entries().collect();
    entries.retain(|(name, ..)| !parts.contains(*name) && !is_derived(&opened.spec, name));
    entries.sort_by_key(|(_, file_idx, entry)| (*file_idx, entry.range.start));
    let plan = |(name, _, entry): (&'a str, usize, &Entry)| {
        let (found, shape) = match model.has_quant_state(name) {
            true => model.read_bnb(name).map(|tensor| (tensor.dtype, tensor.shape))?,
            false => (entry.dtype, entry.shape.clone()),
        };
        let is_float = matches!(found, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let dtype = dtype.filter(|_| is_float).unwrap_or(found);
        Ok(Planned { stored: model.stored_name(name), name, dtype, shape, linear: linears.remove(name) })
    };
    entries.into_iter().map(plan).collect()
}

/// The weights of the projections of all layers, by name.
fn projections(opened: &OpenedBase) -> HashMap<String, Linear> {
    let mut projections = HashMap::new();
    for (layer, layout) in opened.layouts.iter().take(opened.spec.num_layers()).enumerate() {
        for tensor in layout.tensors() {
            if let TensorId::Weight(module) = tensor.id {
                let linear = Linear { tensor: tensor.clone(), place: Some((layer, module)) };
                projections.insert(tensor.name.clone(), linear);
            }
        }
    }
    projections
}

/// Returns whether transformers derives a tensor from another one or from the configuration, and does not save it.
fn is_derived(spec: &ModelSpec, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || spec.head.is_tied && name == spec.head.untied_name
}
