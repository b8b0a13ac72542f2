//! Says which model an adapter was made for, where that is not the one that it is used with.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;

use super::config::read_map;
use super::{CONFIG_FILE, PREFIX};
use crate::checkpoint::source::name_in_memory;
use crate::files::shown;
use crate::model::spec::ModelSpec;

/// A model as far as the names and shapes of its modules tell it.
#[derive(Default)]
struct Outline {
    /// The name of the list of layers, e.g. `model.layers`.
    layers: String,
    num_layers: usize,
    /// Inputs and outputs of each module, by the last part of its name; 0 where they are not known.
    modules: BTreeMap<String, [usize; 2]>,
}

impl Outline {
    fn add(&mut self, module: &str, [in_features, out_features]: [usize; 2]) {
        let Some((layers, rest)) = module.split_once(".layers.") else { return };
        let Some((layer, path)) = rest.split_once('.') else { return };
        let Ok(layer) = layer.parse::<usize>() else { return };
        self.layers = format!("{layers}.layers");
        self.num_layers = self.num_layers.max(layer.saturating_add(1));
        let widths = self.modules.entry(path.rsplit('.').next().unwrap_or(path).into()).or_default();
        *widths = [widths[0].max(in_features), widths[1].max(out_features)];
    }

    fn of_adapter(tensors: &SafeTensors<'_>) -> Self {
        let mut outline = Outline::default();
        for (name, view) in tensors.iter() {
            let name = name_in_memory(name.strip_prefix(PREFIX).unwrap_or(name));
            if let (Some(module), &[_, inputs]) = (name.strip_suffix(".lora_A.weight"), view.shape()) {
                outline.add(module, [inputs, 0]);
            } else if let (Some(module), &[outputs, _]) = (name.strip_suffix(".lora_B.weight"), view.shape()) {
                outline.add(module, [0, outputs]);
            }
        }
        outline
    }

    fn of_model(spec: &ModelSpec) -> Self {
        let mut outline = Outline::default();
        for module in spec.modules() {
            outline.add(&module.name, [module.in_features, module.out_features]);
        }
        outline
    }
}

/// Returns a line that says how the model of an adapter differs from this one, for the end of an error; it is empty where names and
/// shapes show no difference.
pub(super) fn other_model(dir: &Path, tensors: &SafeTensors<'_>, spec: &ModelSpec) -> String {
    let (theirs, ours) = (Outline::of_adapter(tensors), Outline::of_model(spec));
    let mut differences = Vec::new();
    if theirs.num_layers != ours.num_layers {
        differences
            .push(format!("its number of layers is {}, that of this model {}", theirs.num_layers, ours.num_layers));
    }
    if theirs.layers != ours.layers {
        differences.push(format!("its layers are {:?}, those of this model {:?}", shown(&theirs.layers), ours.layers));
    }
    for (name, [inputs, outputs]) in &theirs.modules {
        match ours.modules.get(name) {
            Some(found) if found == &[*inputs, *outputs] => {}
            Some([i, o]) => differences
                .push(format!("its {name} has {inputs} inputs and {outputs} outputs, that of this model {i} and {o}")),
            None => differences.push(format!("its {} is no module of this model", shown(name))),
        }
    }
    if differences.is_empty() || theirs.modules.is_empty() {
        return String::new();
    }
    // A few are enough to tell two models apart.
    differences.truncate(4);
    let base = read_map(&dir.join(CONFIG_FILE)).ok();
    let base =
        base.as_ref().and_then(|map| map.get("base_model_name_or_path")?.as_str()).filter(|base| !base.is_empty());
    let base = base.map_or("another model".into(), |base| format!("{:?}", shown(base)));
    format!(
        "\nhelp: the adapter was made for {base}, and this model is of the family {}: {}",
        spec.family,
        differences.join("; ")
    )
}
