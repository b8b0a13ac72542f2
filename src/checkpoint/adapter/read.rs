//! Reads an adapter: its tensors and `adapter_config.json`, which must agree.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::config::PeftConfig;
use super::origin::other_model;
use super::{Adapter, AdapterSettings, CONFIG_FILE, PREFIX, TENSORS_FILE, tensor_name};
use crate::checkpoint::header;
use crate::checkpoint::output::STAGING;
use crate::checkpoint::source::name_in_memory;
use crate::files::{map, shown};
use crate::model::spec::{LayerSpec, ModelSpec};
use crate::model::trainable::{Kind, LayerTrainables, LoraModule};

/// Reads a PEFT adapter for this model. Every tensor must be there, and none may be left over.
///
/// # Errors
/// The files cannot be read, or contradict each other or the model; `adapter_config.json` has what is not implemented.
pub fn load(dir: &Path, spec: &ModelSpec) -> Result<Adapter> {
    ensure!(
        dir.join(CONFIG_FILE).exists() || !dir.join(STAGING).exists(),
        "{}: a new adapter is being put in place, or was when its run was killed; help: the same `train` again finishes it",
        dir.display()
    );
    let peft = PeftConfig::load(dir, spec)?;
    let path = dir.join(TENSORS_FILE);
    let file = map(&path)?;
    // The library would parse a header of 100 MB.
    let tensors = header::data_start(&file).and_then(|_| Ok(SafeTensors::deserialize(&file)?));
    let tensors = tensors.with_context(|| path.display().to_string())?;
    read_all(dir, peft, &tensors, spec).map_err(|error| anyhow!("{error:#}{}", other_model(dir, &tensors, spec)))
}

fn read_all(dir: &Path, peft: PeftConfig, tensors: &SafeTensors<'_>, spec: &ModelSpec) -> Result<Adapter> {
    let path = dir.join(TENSORS_FILE);
    let mut names = names(tensors).with_context(|| path.display().to_string())?;
    let PeftConfig { keys, dropout, init_lora_weights } = peft;
    let modules = keys.modules(spec).with_context(|| format!("{}: {CONFIG_FILE}", dir.display()))?;
    let settings = AdapterSettings { keys, dropout, init_lora_weights, modules };
    check_modules(tensors, &names, &settings, spec).with_context(|| dir.display().to_string())?;
    let mut take = |name: &str| Ok(tensors.tensor(names.remove(name).context("it is not there")?)?);
    let read = |(layer, modules): (&LayerSpec, &Vec<LoraModule>)| layer_values(layer, modules, "", &mut take);
    let layers = spec.layers.iter().zip(&settings.modules).map(read).collect::<Result<_>>();
    let layers = layers.with_context(|| path.display().to_string())?;
    ensure!(names.is_empty(), "{}: tensors that this model has no place for: {}", path.display(), some_of(&names));
    Ok(Adapter { settings, layers })
}

/// Returns the names of the tensors in the file, each by its name in memory. They differ in adapters of models that also see, saved with
/// transformers before 4.52.
fn names<'a>(tensors: &'a SafeTensors<'_>) -> Result<BTreeMap<String, &'a str>> {
    let mut names = BTreeMap::new();
    for name in tensors.names() {
        let module = name.strip_prefix(PREFIX);
        let in_memory = module.map_or(name.into(), |module| format!("{PREFIX}{}", name_in_memory(module)));
        if let Some(other) = names.insert(in_memory, name) {
            bail!("{} and {} are the same tensor", shown(other), shown(name));
        }
    }
    Ok(names)
}

/// Returns the values of a layer that [`super::views`] has written under this suffix; `find` is given the name of each matrix.
pub fn layer_values<'a>(
    layer: &LayerSpec,
    modules: &[LoraModule],
    suffix: &str,
    mut find: impl FnMut(&str) -> Result<TensorView<'a>>,
) -> Result<Vec<f32>> {
    let trainables = LayerTrainables::new(layer, modules);
    let mut values = vec![0.0; trainables.len()];
    for trainable in trainables.list() {
        let module = layer.module(trainable.module).context("a trainable without a module")?;
        let name = tensor_name(module, trainable.kind) + suffix;
        find(&name)
            .and_then(|view| read(&view, trainable.shape, &mut values[trainable.range.clone()]))
            .with_context(|| name.clone())?;
    }
    Ok(values)
}

/// Fails where the file of tensors and the keys do not agree on every module and its rank, before anything of that size
/// is made.
fn check_modules(
    tensors: &SafeTensors<'_>,
    names: &BTreeMap<String, &str>,
    settings: &AdapterSettings,
    spec: &ModelSpec,
) -> Result<()> {
    let mut num_targets = 0;
    for (layer, modules) in spec.layers.iter().zip(&settings.modules) {
        for module in layer.modules() {
            let (name, matrix) = (&module.name, tensor_name(module, Kind::A));
            let target = modules.iter().find(|target| target.id == module.id);
            let (target, stored) = match (target, names.get(&matrix)) {
                (Some(target), Some(stored)) => (target, stored),
                (None, None) => continue,
                (Some(_), None) => {
                    bail!("{TENSORS_FILE}: no tensors for {name}, which target_modules of {CONFIG_FILE} ask for")
                }
                (None, Some(_)) => bail!(
                    "{TENSORS_FILE}: tensors for {name}, which target_modules, exclude_modules and layers_to_transform of {CONFIG_FILE} \
                     leave out"
                ),
            };
            num_targets += 1;
            let (shape, rank) = (tensors.tensor(stored)?.shape().to_vec(), target.lora_rank);
            ensure!(
                shape.first() == Some(&rank),
                "r is {rank} in {CONFIG_FILE}, and {matrix} of {TENSORS_FILE} has shape {shape:?}"
            );
        }
    }
    let example = spec.modules().next().map_or(String::new(), |module| tensor_name(module, Kind::A));
    ensure!(num_targets > 0, "{TENSORS_FILE}: no LoRA matrix of a layer ({example}, …)");
    Ok(())
}

/// Lists the first of some names and their number.
fn some_of(names: &BTreeMap<String, &str>) -> String {
    let first = names.values().take(5).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{first}, … ({} in all)", names.len()) } else { first }
}

fn read(view: &TensorView<'_>, shape: [usize; 2], out: &mut [f32]) -> Result<()> {
    ensure!(view.shape() == shape, "shape {:?}, should be {shape:?}", view.shape());
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b)),
        Dtype::BF16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, b)| *o = bf16::from_le_bytes(*b).to_f32()),
        Dtype::F16 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32()),
        other => bail!("dtype {other:?}; allowed: F32, BF16, F16"),
    }
    let bad = out.iter().find(|v| !v.is_finite());
    ensure!(bad.is_none(), "holds {bad:?}, not a finite number");
    Ok(())
}
