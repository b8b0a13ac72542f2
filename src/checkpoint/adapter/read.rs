//! Reading an adapter: which tensors are there, and what `adapter_config.json` says about them.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value};

use super::{Adapter, AdapterSettings, CONFIG_FILE, TENSORS_FILE, matrices, tensor_name};
use crate::checkpoint::source::map;
use crate::model::config::ModelConfig;
use crate::model::lora::LoraLayout;
use crate::model::names::Projection;

/// Reads a PEFT adapter for this model. Every tensor must be there, and none may be left over.
pub fn load(dir: &Path, config: &ModelConfig) -> Result<Adapter> {
    let config_path = dir.join(CONFIG_FILE);
    let text = std::fs::read(&config_path).with_context(|| config_path.display().to_string())?;
    let peft: Map<String, Value> = serde_json::from_slice(&text).with_context(|| config_path.display().to_string())?;
    let path = dir.join(TENSORS_FILE);
    let file = map(&path)?;
    let tensors = SafeTensors::deserialize(&file).with_context(|| path.display().to_string())?;
    let mut left: std::collections::BTreeSet<String> = tensors.names().into_iter().map(str::to_string).collect();
    let targets: Vec<Projection> =
        Projection::ALL.into_iter().filter(|&p| left.contains(&tensor_name(0, p, "A"))).collect();
    ensure!(
        !targets.is_empty(),
        "{}: no LoRA matrix of layer 0 ({}, …)",
        path.display(),
        tensor_name(0, Projection::Q, "A")
    );
    let settings = settings(&peft, targets).with_context(|| config_path.display().to_string())?;
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
    ensure!(left.is_empty(), "{}: tensors that this model has no place for: {left:?}", path.display());
    Ok(Adapter { settings, layers })
}

/// Reads the numbers; what changes the math and is not done here is refused by name.
fn settings(peft: &Map<String, Value>, targets: Vec<Projection>) -> Result<AdapterSettings> {
    let is_off = |v: &Value| {
        v.is_null()
            || v == false
            || v == "none"
            || v.as_object().is_some_and(Map::is_empty)
            || v.as_array().is_some_and(Vec::is_empty)
    };
    let refused = [
        "use_dora",
        "use_qalora",
        "use_bdlora",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "megatron_config",
    ];
    for key in refused {
        if let Some(value) = peft.get(key).filter(|v| !is_off(v)) {
            bail!("{key} is {value}; allowed: what leaves plain LoRA on the seven projections");
        }
    }
    let peft_type = peft.get("peft_type").and_then(Value::as_str).unwrap_or("(none)");
    ensure!(peft_type == "LORA", "peft_type is {peft_type}; allowed: LORA");
    let number =
        |key: &str| peft.get(key).and_then(Value::as_f64).with_context(|| format!("{key} is missing or no number"));
    let lora_rank = number("r")? as usize;
    ensure!(lora_rank > 0, "r is 0");
    let use_rslora = peft.get("use_rslora").is_some_and(|v| v == true);
    Ok(AdapterSettings {
        lora_rank,
        alpha: number("lora_alpha")?,
        dropout: number("lora_dropout").unwrap_or(0.0) as f32,
        use_rslora,
        targets,
    })
}

fn read(view: &TensorView<'_>, shape: [usize; 2], out: &mut [f32]) -> Result<()> {
    ensure!(view.shape() == shape, "shape {:?}, should be {shape:?}", view.shape());
    let two = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => out
            .iter_mut()
            .zip(bytes.chunks_exact(4))
            .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Dtype::BF16 => {
            out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = bf16::from_bits(two(b)).to_f32())
        }
        Dtype::F16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = f16::from_bits(two(b)).to_f32()),
        other => bail!("dtype {other:?}; allowed: F32, BF16, F16"),
    }
    let bad = out.iter().find(|v| !v.is_finite());
    ensure!(bad.is_none(), "holds {bad:?}, not a finite number");
    Ok(())
}
