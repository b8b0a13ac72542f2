//! Reads an adapter: its tensors and `adapter_config.json`, which must agree.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::config::PeftConfig;
use super::{Adapter, AdapterSettings, CONFIG_FILE, TENSORS_FILE, matrices, tensor_name};
use crate::checkpoint::output::STAGING;
use crate::checkpoint::source::map;
use crate::model::config::ModelConfig;
use crate::model::lora::LoraLayout;
use crate::model::names::{self, Projection};

/// Reads a PEFT adapter for this model. Every tensor must be there, and none may be left over.
///
/// # Errors
/// The files cannot be read, or contradict each other or the model; `adapter_config.json` asks for something that is not implemented.
pub fn load(dir: &Path, config: &ModelConfig) -> Result<Adapter> {
    ensure!(
        dir.join(CONFIG_FILE).exists() || !dir.join(STAGING).exists(),
        "{}: a new adapter is being put in place, or was when its run was killed; help: the same `train` again finishes it",
        dir.display()
    );
    let peft = PeftConfig::load(dir)?;
    let path = dir.join(TENSORS_FILE);
    let file = map(&path)?;
    let tensors = SafeTensors::deserialize(&file).with_context(|| path.display().to_string())?;
    let mut left: BTreeSet<String> = tensors.names().into_iter().map(str::to_string).collect();
    let targets = targets(&peft, &left, config).with_context(|| dir.display().to_string())?;
    let settings = AdapterSettings { targets, ..peft.settings };
    check_rank(&tensors, &settings).with_context(|| dir.display().to_string())?;
    let layout = LoraLayout::new(config, &settings.lora_config());
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let mut values = vec![0.0; layout.len];
        for entry in layout.entries() {
            for (matrix, range, shape) in matrices(entry) {
                let name = tensor_name(layer, entry.projection, matrix);
                let view = tensors.tensor(&name).with_context(|| format!("{}: {name}", path.display()))?;
                read(&view, shape, &mut values[range]).with_context(|| format!("{}: {name}", path.display()))?;
                left.remove(&name);
            }
        }
        layers.push(values);
    }
    ensure!(left.is_empty(), "{}: tensors that this model has no place for: {}", path.display(), some_of(&left));
    Ok(Adapter { settings, layers })
}

/// Returns the projections that have an adapter in layer 0, which must be the same in all layers. The file of tensors and `target_modules` must agree on
/// every module.
fn targets(peft: &PeftConfig, tensors: &BTreeSet<String>, config: &ModelConfig) -> Result<Vec<Projection>> {
    for module in ["lm_head", "model.embed_tokens"] {
        ensure!(
            !peft.targets(module)?,
            "{CONFIG_FILE}: target_modules: {module} is one; allowed: projections of layers"
        );
    }
    let has_tensors = |layer: usize, p: Projection| tensors.contains(&tensor_name(layer, p, "A"));
    for layer in 0..config.num_hidden_layers {
        for projection in Projection::ALL {
            let module = names::module(layer, projection);
            match (peft.targets(&module)?, has_tensors(layer, projection), has_tensors(0, projection)) {
                (true, true, true) | (false, false, false) => {}
                (true, false, _) => {
                    bail!("{TENSORS_FILE}: no tensors for {module}, which target_modules of {CONFIG_FILE} ask for")
                }
                (false, true, _) => {
                    bail!(
                        "{TENSORS_FILE}: tensors for {module}, which target_modules and exclude_modules of {CONFIG_FILE} leave out"
                    )
                }
                _ => bail!("{module}: only some layers have an adapter there; allowed: all or none"),
            }
        }
    }
    let targets: Vec<Projection> = Projection::ALL.into_iter().filter(|&p| has_tensors(0, p)).collect();
    ensure!(
        !targets.is_empty(),
        "{TENSORS_FILE}: no LoRA matrix of layer 0 ({}, …)",
        tensor_name(0, Projection::Q, "A")
    );
    Ok(targets)
}

/// Compares r with the tensors before memory of that size is allocated.
fn check_rank(tensors: &SafeTensors<'_>, settings: &AdapterSettings) -> Result<()> {
    let name = tensor_name(0, settings.targets[0], "A");
    let shape = tensors.tensor(&name)?.shape().to_vec();
    let rank = settings.lora_rank;
    ensure!(
        shape.first() == Some(&rank),
        "r is {rank} in {CONFIG_FILE}, and {name} of {TENSORS_FILE} has shape {shape:?}"
    );
    Ok(())
}

/// Lists the first of some names and their number.
fn some_of(names: &BTreeSet<String>) -> String {
    let first = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
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
