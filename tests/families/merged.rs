//! A merged model computes what base and adapter compute, in every family: its logits without an adapter are those of PEFT
//! with one, and after NF4 those of an engine that holds the base in NF4.

use std::path::Path;

use fsdp_qlora::testing::merge::{Form, Merge, Options};
use fsdp_qlora::testing::{Adapter, LoadOptions, Mode, ModelSpec, adapter, load, local};
use tempfile::TempDir;

use super::{LOGITS, families, golden_logits, last_logits, model_with};
use crate::common::{EngineOptions, golden, on_all_ranks, relative_error};

/// Largest relative error of the logits of a row, against base and adapter of this program.
const MERGED: f64 = 1e-5;

/// Writes the merged model in f32, in several files, and returns its folder.
fn merged(model: &Path, adapter: &Adapter, form: Form) -> TempDir {
    let (out, shards) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options =
        LoadOptions { load_in_4bit: true, double_quant: None, shards: Some(shards.path().into()), num_shards: 1 };
    let mut comm = local::groups(1, 1).remove(0).world;
    let opened = load::open(model, &options, &mut *comm, &mut |_| ()).unwrap();
    let options = Options { form, dtype: Some(safetensors::Dtype::F32), max_shard_bytes: 20_000 };
    Merge::new(&opened, adapter, options).unwrap().write(out.path(), &mut |_| ()).unwrap();
    assert!(out.path().join("model.safetensors.index.json").exists());
    out
}

/// The logits of an engine.
fn logits(options: &EngineOptions, adapter: bool) -> Vec<f32> {
    let (golden_files, shards) = (families(), tempfile::tempdir().unwrap());
    on_all_ranks(1, |groups| last_logits(&mut options.engine(groups, shards.path()), &golden_files, adapter)).remove(0)
}

/// Checks a model that is merged in this form. `theirs` is the file of PEFT's logits.
fn check(what: &str, model: &Path, adapter_dir: &Path, form: Form, theirs: Option<&Path>) {
    let spec = ModelSpec::load(model).unwrap();
    let adapter = adapter::load(adapter_dir, &spec).unwrap();
    let of = |model: &Path, adapter: Option<&Adapter>, load_in_4bit: bool| EngineOptions {
        model: model.into(),
        adapter: adapter.cloned(),
        load_in_4bit,
        max_tokens: 80,
        ..EngineOptions::new("", Mode::Generate)
    };
    let out = merged(model, &adapter, form);
    assert_eq!(ModelSpec::load(out.path()).unwrap(), ModelSpec { quantization: None, ..spec }, "{what}");
    let ours = logits(&of(out.path(), None, false), false);
    let apart = logits(&of(model, Some(&adapter), form == Form::Dequantized), true);
    let error = relative_error(&ours, &apart);
    assert!(error <= MERGED, "{what}: merged logits are off by {error:e}");
    if let Some(theirs) = theirs {
        let theirs = golden_logits(theirs, "adapter");
        let error = ours.iter().zip(theirs).map(|(o, t)| (o - t).abs()).fold(0.0, f32::max);
        assert!(error <= LOGITS, "{what}: merged logits differ from PEFT's by {error:e}");
    }
}

#[test]
fn merged_models_compute_what_base_and_adapter_do() {
    for (name, model) in &families().models {
        let folder = golden(&format!("families/{name}"));
        let case = folder.join(model.cases.keys().next().unwrap());
        let place = model_with(&case.join("config.v5.json"), &folder.join("model.safetensors"));
        let adapter = folder.join("adapter");
        check(name, place.path(), &adapter, Form::Original, Some(&case.join("logits.safetensors")));
        check(&format!("{name} after NF4"), place.path(), &adapter, Form::Dequantized, None);
    }
}

#[test]
fn checkpoints_in_4_bit_are_merged_as_they_are() {
    for name in ["phi3-tied", "mistral3"] {
        let adapter = golden(&format!("families/{name}/adapter"));
        check(name, &golden(&format!("families-4bit/{name}")), &adapter, Form::Dequantized, None);
    }
}
