//! Adapters: `adapter_config.json` and the tensors beside it.

use std::fs;

use fsdp_qlora::testing::{ModelSpec, adapter};

use super::driver::Target;
use super::folder::Folder;
use super::form::Form;
use super::golden;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// A target that puts its input in the place of one of the two files.
fn target(form: Form, replaced: &'static str) -> Target {
    let file = |name: &str| fs::read(golden("qlora_steps/start").join(name)).unwrap();
    let folder = Folder::new(&[CONFIG, TENSORS].map(|name| (name, file(name))));
    let spec = ModelSpec::load(&golden("tiny")).unwrap();
    let read = move |input: &[u8]| {
        folder.write(replaced, input);
        adapter::load(&folder.path(), &spec)?;
        adapter::remarks(&folder.path(), &golden("tiny")).map(drop)
    };
    let words = &[
        "all-linear",
        "q_proj",
        "(a+)+$",
        "(.*)*x",
        "(?=a)*",
        ".*\\.(q_proj|v_proj)",
        "exclude_modules",
        "lm_head",
        "F16",
        "\u{1b}[2J",
    ];
    Target::new(form, words, vec![file(replaced)], read)
}

pub fn config() -> Target {
    target(Form::Json, CONFIG)
}

pub fn tensors() -> Target {
    target(Form::Safetensors, TENSORS)
}
