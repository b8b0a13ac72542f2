//! The files beside the weights: config.json, and those of the tokenizer, the generation and the processors.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::checkpoint::atomic;
use crate::checkpoint::folder::CONFIG_FILE;
use crate::checkpoint::output::TOKENIZER_FILES;
use crate::checkpoint::source::Dtype;
use crate::files::{self, MAX_SETTINGS_BYTES, MAX_TOKENIZER_BYTES, shown_path};

/// Files of a model's folder that are copied in addition to [`TOKENIZER_FILES`].
const COPIED_FILES: [&str; 13] = [
    "generation_config.json",
    "chat_template.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "NOTICE",
];

/// Folder of the chat templates that a model has in addition to its main one.
const TEMPLATES: &str = "additional_chat_templates";

/// Keys of config.json whose values are configurations with types of their own.
const PARTS: [&str; 2] = ["text_config", "vision_config"];

/// Returns whether a file of a base goes into the result as it is. `name` is its path in the base's folder.
pub fn is_copied(name: &str) -> bool {
    let template = name.strip_prefix(TEMPLATES).and_then(|rest| rest.strip_prefix('/'));
    TOKENIZER_FILES.contains(&name)
        || COPIED_FILES.contains(&name)
        || template.is_some_and(|file| !file.contains('/') && file.ends_with(".jinja"))
}

/// Writes config.json of a base without what says that it is in 4 bit, and copies the other files.
pub(super) fn write(base: &Path, dir: &Path, dtype: Option<Dtype>) -> Result<()> {
    let config = files::read_json(&base.join(CONFIG_FILE), MAX_SETTINGS_BYTES)?;
    let config = format!("{:#}\n", Value::Object(merged_config(config, dtype)));
    atomic::write_synced(&dir.join(CONFIG_FILE), config.as_bytes())?;
    for name in TOKENIZER_FILES.into_iter().chain(COPIED_FILES) {
        if files::is_there(&base.join(name)) {
            copy(&base.join(name), &dir.join(name))?;
        }
    }
    let (originals, copies) = (base.join(TEMPLATES), dir.join(TEMPLATES));
    let templates = match std::fs::read_dir(&originals) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found.with_context(|| shown_path(&originals))?,
    };
    std::fs::create_dir(&copies).with_context(|| shown_path(&copies))?;
    for entry in templates {
        let path = entry.with_context(|| shown_path(&originals))?.path();
        if let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|e| e == "jinja")) {
            copy(&path, &copies.join(name))?;
        }
    }
    atomic::sync_folder(&copies)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = files::open(from)?;
    let mut write = || {
        let mut file = File::create(to)?;
        std::io::copy(&mut source, &mut file)?;
        file.sync_all()
    };
    write().with_context(|| format!("{}: cannot be copied to {}", shown_path(from), shown_path(to)))
}

/// Returns the configuration of the result: `quantization_config` is removed everywhere, and so is `auto_map`, which
/// names code that is not copied, since transformers has the architecture itself. A type that all floats get is named
/// everywhere.
fn merged_config(mut config: Map<String, Value>, dtype: Option<Dtype>) -> Map<String, Value> {
    let word = match dtype {
        Some(Dtype::F32) => Some("float32"),
        Some(Dtype::F16) => Some("float16"),
        Some(Dtype::BF16) => Some("bfloat16"),
        _ => None,
    };
    let change = |part: &mut Map<String, Value>| {
        part.shift_remove("quantization_config");
        let mut is_named = false;
        for key in ["dtype", "torch_dtype"] {
            if let (Some(word), Some(value)) = (word, part.get_mut(key)) {
                (*value, is_named) = (word.into(), true);
            }
        }
        is_named
    };
    config.shift_remove("auto_map");
    for part in PARTS {
        if let Some(Value::Object(part)) = config.get_mut(part) {
            change(part);
        }
    }
    if let (false, Some(word)) = (change(&mut config), word) {
        // transformers 4 and 5 both read this one.
        config.insert("torch_dtype".into(), word.into());
    }
    config
}

/// Returns the names of the tokenizer's files beside an adapter that differ from the base's. The base's are copied.
pub fn differing_files(adapter: &Path, base: &Path) -> Vec<&'static str> {
    let read = |dir: &Path, name: &str| files::read(&dir.join(name), MAX_TOKENIZER_BYTES).ok();
    let differs =
        |name: &&str| read(adapter, name).is_some_and(|own| read(base, name).is_none_or(|other| own != other));
    TOKENIZER_FILES.into_iter().filter(differs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_config_says_what_the_result_is() {
        let merged = |config: Value, dtype| Value::Object(merged_config(config.as_object().unwrap().clone(), dtype));
        let config = json!({
            "a": 1, "quantization_config": {}, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "c.Config"}, "b": 2,
            "text_config": {"dtype": "bfloat16", "quantization_config": {}}, "vision_config": {"c": 3},
        });
        let as_base = merged(config.clone(), None);
        let expected = json!({"a": 1, "torch_dtype": "bfloat16", "b": 2, "text_config": {"dtype": "bfloat16"}, "vision_config": {"c": 3}});
        assert_eq!(as_base.to_string(), expected.to_string(), "the order of keys is kept");
        let in_f32 = merged(config, Some(Dtype::F32));
        assert_eq!((&in_f32["torch_dtype"], &in_f32["text_config"]["dtype"]), (&json!("float32"), &json!("float32")));
        assert_eq!(in_f32["vision_config"], json!({"c": 3}));
        assert_eq!(merged(json!({}), Some(Dtype::F16)), json!({"torch_dtype": "float16"}));
    }

    #[test]
    fn files_are_copied_and_others_are_not() {
        let (base, out, adapter) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(base.path().join(TEMPLATES)).unwrap();
        for name in ["tokenizer.json", "merges.txt", "notes.txt", "additional_chat_templates/rag.jinja"] {
            std::fs::write(base.path().join(name), name).unwrap();
        }
        std::fs::write(base.path().join(CONFIG_FILE), "{}").unwrap();
        write(base.path(), out.path(), None).unwrap();
        let has = |name: &str| out.path().join(name).exists();
        assert!(has("tokenizer.json") && has("merges.txt") && has("additional_chat_templates/rag.jinja"));
        assert!(!has("notes.txt") && has(CONFIG_FILE));
        assert!(is_copied("merges.txt") && is_copied("additional_chat_templates/rag.jinja"));
        assert!(
            ["notes.txt", "additional_chat_templates", "additional_chat_templates/a/b.jinja"]
                .iter()
                .all(|name| !is_copied(name))
        );
        assert!(differing_files(adapter.path(), base.path()).is_empty());
        for (name, content) in [("tokenizer.json", "tokenizer.json"), ("chat_template.jinja", "other")] {
            std::fs::write(adapter.path().join(name), content).unwrap();
        }
        assert_eq!(differing_files(adapter.path(), base.path()), ["chat_template.jinja"]);
    }
}
