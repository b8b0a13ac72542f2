//! Files of rows as a recipe names them: a path, or a path with what is special about it.

use std::path::PathBuf;

use serde::Serialize;
use serde::ser::SerializeSeq;
use serde_json::Value;

use super::paths;
use crate::data::{ColumnNames, Format, Source};

/// Largest weight: more epochs than a set of rows is worth in one.
const MAX_WEIGHT: f64 = 1000.0;

/// A file or folder as a recipe names it. `None` leaves a property to the key of the same name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct WrittenSource {
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    columns: Option<ColumnNames>,
}

/// Files and folders, in the order in which their rows are read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WrittenSources(Vec<WrittenSource>);

impl WrittenSources {
    /// Allowed values, for messages.
    pub const ALLOWED: &[&str] = &[
        "a file",
        "a directory",
        "ORG/NAME, ORG/NAME@REVISION or hf://datasets/ORG/NAME@REVISION/PATH of the hub",
        "{path: …, weight: a number above 0 and at most 1000, format: …, split: a word, columns: …}",
        "a list of them",
    ];

    /// Reads one of [`WrittenSources::ALLOWED`]. Returns `None` for anything else.
    pub fn read(value: &Value) -> Option<WrittenSources> {
        let sources = match value {
            Value::Array(list) => list.iter().map(WrittenSource::read).collect::<Option<Vec<_>>>()?,
            one => vec![WrittenSource::read(one)?],
        };
        (!sources.is_empty()).then_some(WrittenSources(sources))
    }

    /// Decides what was not written.
    pub fn decided(self, format: Format, columns: &ColumnNames) -> Vec<Source> {
        let decide = |source: WrittenSource| Source {
            path: source.path,
            weight: source.weight.unwrap_or(1.0),
            format: source.format.unwrap_or(format),
            split: source.split,
            files: Vec::new(),
            columns: source.columns.unwrap_or_else(|| columns.clone()),
        };
        self.0.into_iter().map(decide).collect()
    }
}

/// Serializes the list as a recipe would have it: a source of which only the path is written is that path.
impl Serialize for WrittenSources {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for source in &self.0 {
            match source {
                WrittenSource { path, weight: None, format: None, split: None, columns: None } => {
                    list.serialize_element(path)?;
                }
                source => list.serialize_element(source)?,
            }
        }
        list.end()
    }
}

impl WrittenSource {
    fn read(value: &Value) -> Option<WrittenSource> {
        let path = |value: &Value| paths::read(value.as_str()?).ok();
        let Value::Object(keys) = value else {
            return Some(WrittenSource { path: path(value)?, weight: None, format: None, split: None, columns: None });
        };
        if keys.keys().any(|key| !["path", "weight", "format", "split", "columns"].contains(&key.as_str())) {
            return None;
        }
        let given = |key: &str| keys.get(key).filter(|value| !value.is_null());
        let weight = |value: &Value| value.as_f64().filter(|&weight| weight > 0.0 && weight <= MAX_WEIGHT);
        let split = |value: &Value| value.as_str().filter(|split| is_word(split)).map(str::to_string);
        Some(WrittenSource {
            path: path(given("path")?)?,
            weight: read(given("weight"), weight)?,
            format: read(given("format"), |value| value.as_str()?.parse().ok())?,
            split: read(given("split"), split)?,
            columns: read(given("columns"), ColumnNames::read)?,
        })
    }
}

/// Reads a value that may be missing. Returns `None` if it is there and not allowed.
fn read<T>(value: Option<&Value>, read: impl Fn(&Value) -> Option<T>) -> Option<Option<T>> {
    value.map_or(Some(None), |value| read(value).map(Some))
}

/// Tells whether a text can be a part of the name of a file.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "_-".contains(c))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sources_are_paths_or_say_more() {
        let of = |value: Value| WrittenSources::read(&value).unwrap().decided(Format::Text, &ColumnNames::default());
        let plain = Source { format: Format::Text, ..Source::new("a.jsonl") };
        assert_eq!(of(json!("a.jsonl")), std::slice::from_ref(&plain));
        let columns = json!({"prompt": "question"});
        let all = json!({"path": "b", "weight": 0.5, "format": "sharegpt", "split": "train", "columns": columns});
        let sources = of(json!(["a.jsonl", all, {"path": "a.jsonl", "weight": null}]));
        let expected = Source {
            path: "b".into(),
            weight: 0.5,
            format: Format::Sharegpt,
            split: Some("train".into()),
            files: Vec::new(),
            columns: ColumnNames::read(&columns).unwrap(),
        };
        assert_eq!(sources, [plain.clone(), expected, plain]);
        let written = WrittenSources::read(&json!(["a.jsonl", all])).unwrap();
        assert_eq!(serde_json::to_value(written).unwrap(), json!(["a.jsonl", all]));
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for wrong in [
            json!([]),
            json!(5),
            json!({"weight": 1}),
            json!({"path": "a", "weigth": 1}),
            json!({"path": "a", "weight": 0}),
            json!({"path": "a", "weight": 1e6}),
            json!({"path": "a", "weight": "1"}),
            json!({"path": "a", "format": "sharegtp"}),
            json!({"path": "a", "split": "../x"}),
            json!({"path": "a", "split": ""}),
            json!({"path": "a", "columns": {"x": "y"}}),
            json!({"path": "$HOME/a"}),
        ] {
            assert_eq!(WrittenSources::read(&wrong), None, "{wrong}");
        }
    }
}
