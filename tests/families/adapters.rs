//! An adapter of every family on all linear modules is saved with the names and shapes that PEFT saves it with, and one with the names of
//! older versions is read.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fsdp_qlora::testing::{Adapter, ModelSpec, adapter};
use safetensors::SafeTensors;

use super::{families, spellings};
use crate::common::golden;

/// Shapes of the tensors of an adapter, by name.
fn shapes(adapter: &Path) -> BTreeMap<String, Vec<usize>> {
    let bytes = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect()
}

/// Copies an adapter, with the names that modules of text towers had before transformers 4.52. Returns whether there are any.
fn with_old_names(adapter: &Path, to: &Path) -> bool {
    let (new, old) = ("base_model.model.model.language_model.", "base_model.model.language_model.model.");
    let bytes = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let renamed: Vec<_> = tensors.into_iter().map(|(name, view)| (name.replace(new, old), view)).collect();
    fs::copy(adapter.join("adapter_config.json"), to.join("adapter_config.json")).unwrap();
    let has_any = renamed.iter().all(|(name, _)| name.starts_with(old));
    safetensors::serialize_to_file(renamed, None, &to.join("adapter_model.safetensors")).unwrap();
    has_any
}

#[test]
fn adapters_are_saved_as_peft_saves_them() {
    let mut num_with_old_names = 0;
    for name in families().models.keys() {
        let folder = golden(&format!("families/{name}"));
        let case = families().models[name].cases.keys().next().unwrap().clone();
        let spec = spellings(&folder.join(case)).pop().unwrap();
        let spec = ModelSpec::parse(&fs::read(&spec).unwrap(), name).unwrap();
        let peft = folder.join("adapter");
        let loaded = adapter::load(&peft, &spec).unwrap();
        let place = tempfile::tempdir().unwrap();
        adapter::save(&loaded, &spec, Path::new(name), place.path()).unwrap();
        assert_eq!(shapes(place.path()), shapes(&peft), "{name}");
        let saved = adapter::load(place.path(), &spec).unwrap();
        // Modules of a text tower are saved by their whole names, whatever pattern chose them.
        let computes = |adapter: &Adapter| (adapter.settings.lora_config(), adapter.layers.clone());
        assert_eq!(computes(&saved), computes(&loaded), "{name}");
        let place = tempfile::tempdir().unwrap();
        if with_old_names(&peft, place.path()) {
            assert_eq!(adapter::load(place.path(), &spec).unwrap(), loaded, "{name}");
            num_with_old_names += 1;
        }
    }
    assert_eq!(num_with_old_names, 5, "models that also see");
}
