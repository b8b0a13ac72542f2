//! Chooses the files of a model or an adapter among the names of all files of a repository.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use serde::Deserialize;

use super::Part;
use super::reference::{Reference, is_inside};
use crate::checkpoint::adapter;
use crate::checkpoint::folder::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use crate::checkpoint::merge;
use crate::checkpoint::output::TOKENIZER_FILES;
use crate::checkpoint::source::MAX_INDEX_BYTES;
use crate::data::tokenizer::TOOL_TEMPLATE_FILE;
use crate::files::{self, listed, shown};

/// File that names the tokens at which a generated text ends.
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Returns the files of a part of a model, without its weights.
pub fn about(reference: &Reference, names: &[String], part: &Part) -> Result<Vec<String>> {
    ensure!(has(names, CONFIG_FILE), "{reference}: {}", no_model(reference, names));
    let is_wanted = |name: &str| match part {
        Part::Config => false,
        Part::Merge => merge::is_copied(name),
        _ => [GENERATION_CONFIG_FILE, TOOL_TEMPLATE_FILE].contains(&name) || TOKENIZER_FILES.contains(&name),
    };
    let others = names.iter().map(String::as_str).filter(|name| is_wanted(name));
    Ok([CONFIG_FILE].into_iter().chain(others).map(String::from).collect())
}

/// The form of the weights of a model.
pub enum Weights {
    /// All weights are in one file.
    Single,
    /// An index names the files.
    Indexed,
}

/// Returns the form of the weights. One file is preferred to an index, as in transformers.
pub fn weights(reference: &Reference, names: &[String]) -> Result<Weights> {
    match (has(names, SINGLE_FILE), has(names, INDEX_FILE)) {
        (true, _) => Ok(Weights::Single),
        (false, true) => Ok(Weights::Indexed),
        (false, false) => {
            bail!("{reference}: there is neither {SINGLE_FILE} nor {INDEX_FILE}{}", other_weights(reference, names))
        }
    }
}

/// Returns the files that an index names, each once. Fails if one of them is not in the index's own folder, because the index comes
/// from somebody else.
pub fn shards(index: &Path) -> Result<Vec<String>> {
    let Index { weight_map } = files::read_json(index, MAX_INDEX_BYTES)?;
    let mut shards: Vec<String> = weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    let other = shards.iter().find(|name| !is_inside(name) || name.contains('/'));
    ensure!(
        other.is_none(),
        "{INDEX_FILE} names {:?}; allowed are files beside it",
        shown(other.map_or("", String::as_str))
    );
    Ok(shards)
}

/// Returns the files of an adapter.
pub fn adapter(reference: &Reference, names: &[String]) -> Result<Vec<String>> {
    let wanted = [adapter::CONFIG_FILE, adapter::TENSORS_FILE];
    let missing = wanted.iter().find(|name| !has(names, name));
    ensure!(
        missing.is_none(),
        "{reference}: not an adapter of PEFT, because there is no {}; there is:{}",
        missing.unwrap_or(&""),
        some(names)
    );
    Ok(wanted.map(String::from).into())
}

fn has(names: &[String], name: &str) -> bool {
    names.iter().any(|found| found == name)
}

/// Says what a repository without a config.json holds.
fn no_model(reference: &Reference, names: &[String]) -> String {
    if has(names, adapter::CONFIG_FILE) {
        return format!("an adapter ({}), not a base model; give its base as the model", adapter::CONFIG_FILE);
    }
    format!("there is no {CONFIG_FILE}{}", other_weights(reference, names))
}

/// Says which weights are there instead of safetensors.
fn other_weights(reference: &Reference, names: &[String]) -> String {
    let with = |endings: &[&str]| names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)));
    if let Some(name) = with(&[".bin", ".pth", ".pt", ".ckpt"]) {
        return format!(
            "; {} is in PyTorch's format, which is not read\nhelp: look for a revision with safetensors among the pull requests of \
             the repository ({}@refs/pr/NUMBER)",
            shown(name),
            reference.id
        );
    }
    if let Some(name) = with(&[".gguf"]) {
        return format!("; {} is in GGUF, which is not read; take the model that it was made from", shown(name));
    }
    format!("; there is:{}", some(names))
}

/// Lists the names of files, one on each line; ` nothing` if there are none.
pub fn some(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().map(|name| shown(name)).collect();
    if shown.is_empty() { " nothing".into() } else { listed(&shown) }
}

#[cfg(test)]
mod tests {
    use super::super::reference::Kind;
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn only_what_a_model_needs_is_chosen() {
        let reference = Reference::of_id("org/name", Kind::Model).unwrap();
        let all = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "original/consolidated.00.pth",
            "pytorch_model.bin",
            "tokenizer.json",
            "chat_template.jinja",
            "preprocessor_config.json",
            "additional_chat_templates/rag.jinja",
            "additional_chat_templates/tool_use.jinja",
        ]);
        assert_eq!(about(&reference, &all, &Part::Config).unwrap(), ["config.json"]);
        let with_tokenizer = ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"];
        let of_tools = "additional_chat_templates/tool_use.jinja";
        assert_eq!(about(&reference, &all, &Part::Weights).unwrap(), [&with_tokenizer[..], &[of_tools]].concat());
        let of_merge = ["preprocessor_config.json", "additional_chat_templates/rag.jinja", of_tools];
        assert_eq!(about(&reference, &all, &Part::Merge).unwrap(), [&with_tokenizer[..], &of_merge].concat());
        assert!(matches!(weights(&reference, &all).unwrap(), Weights::Indexed));
        let index = tempfile::NamedTempFile::new().unwrap();
        let write = |map: &str| std::fs::write(index.path(), format!("{{\"weight_map\": {map}}}")).unwrap();
        write(r#"{"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}"#);
        assert_eq!(shards(index.path()).unwrap(), ["m-1.safetensors", "m-2.safetensors"]);
        for name in ["../m", "/etc/hostname", "a/b", "", ".."] {
            write(&format!("{{\"a\": \"{name}\"}}"));
            assert!(shards(index.path()).unwrap_err().to_string().contains("allowed are files beside it"), "{name}");
        }
    }

    #[test]
    fn a_repository_that_is_no_model_is_told_apart() {
        let reference = Reference::of_id("org/name", Kind::Model).unwrap();
        for (files, found) in [
            (&["adapter_config.json", "adapter_model.safetensors"][..], "org/name: an adapter (adapter_config.json)"),
            (&["x-Q4_K.gguf"], "there is no config.json; x-Q4_K.gguf is in GGUF"),
            (
                &["config.json", "pytorch_model.bin"],
                "pytorch_model.bin is in PyTorch's format, which is not read\nhelp: ",
            ),
            (
                &["config.json", "a"],
                "neither model.safetensors nor model.safetensors.index.json; there is:\n  config.json\n  a",
            ),
            (&[], "there is no config.json; there is: nothing"),
        ] {
            let error = match about(&reference, &names(files), &Part::Weights) {
                Err(error) => error.to_string(),
                Ok(_) => weights(&reference, &names(files)).err().unwrap().to_string(),
            };
            assert!(error.contains(found), "{found} is not in {error}");
        }
        let error = adapter(&reference, &names(&["adapter_config.json", "adapter_model.bin"])).unwrap_err().to_string();
        assert!(error.contains("there is no adapter_model.safetensors; there is:\n  adapter_config.json"), "{error}");
    }
}
