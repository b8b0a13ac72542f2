//! What was written, as one flat list: dotted key to value, from the YAML text and then from `--set key=value`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::keys::{self, Key, KeyInfo};

/// The keys that were written, with their values, and what was wrong about them.
pub(super) struct Written {
    values: BTreeMap<String, Value>,
    pub errors: Vec<String>,
    /// Whether the text is YAML.
    pub is_read: bool,
}

impl Written {
    /// `yaml` is the text of a recipe, `overrides` are `key=value` with YAML values; the last one holds.
    pub fn new(yaml: &str, overrides: &[String]) -> Self {
        let mut written = Self { values: BTreeMap::new(), errors: Vec::new(), is_read: true };
        match serde_saphyr::from_str::<Value>(yaml) {
            Ok(value) => written.add(String::new(), value, false),
            Err(error) => {
                written.errors.push(format!("not valid YAML: {}", first_line(&error)));
                written.is_read = false;
            }
        }
        for text in overrides {
            match text.split_once('=').map(|(key, value)| (key, serde_saphyr::from_str(value))) {
                Some((key, Ok(value))) if !key.trim().is_empty() => written.add(key.trim().to_owned(), value, true),
                Some((_, Err(error))) => {
                    written.errors.push(format!("--set {text}: not valid YAML: {}", first_line(&error)))
                }
                _ => written.errors.push(format!("--set {text}: expected key=value, e.g. training.max_steps=100")),
            }
        }
        written
    }

    /// Adds a key, or all keys of a section. Only an override may replace what is there.
    fn add(&mut self, path: String, value: Value, is_override: bool) {
        let is_section = path.is_empty() || keys::is_section(&path);
        match value {
            Value::Object(map) if is_section => {
                for (key, value) in map {
                    self.add(if path.is_empty() { key } else { format!("{path}.{key}") }, value, is_override);
                }
            }
            // A section with nothing in it.
            Value::Null if is_section => {}
            value if path.is_empty() => self.errors.push(format!("found {value}, a recipe is a mapping of keys")),
            value if is_section => self.errors.push(format!("{path}: found {value}, this is a mapping of keys")),
            value => {
                if self.values.contains_key(&path) && !is_override {
                    self.errors.push(format!("{path}: is there twice"));
                }
                self.values.insert(path, value);
            }
        }
    }

    /// Sets a key from elsewhere on the command line.
    pub fn set<T>(&mut self, key: &Key<T>, value: Value) {
        self.values.insert(key.path.to_owned(), value);
    }

    /// Whether the key was written, be it with its default.
    pub fn has<T>(&self, key: &Key<T>) -> bool {
        self.values.contains_key(key.path)
    }

    /// Value of a key, else its default; nothing if what was written is not allowed, which [`Self::check`] has said.
    pub fn get<T>(&self, key: &Key<T>) -> Option<T> {
        match self.values.get(key.path) {
            Some(value) => (key.read)(value),
            None => serde_saphyr::from_str(key.default).ok().as_ref().and_then(key.read),
        }
    }

    /// Checks each key that was written. `only`: the keys, or sections, that the command looks at.
    pub fn check(&mut self, only: Option<&[&str]>) {
        let problem = |(path, value): (&String, &Value)| match keys::ALL.iter().find(|key| key.path == path) {
            Some(key) => check_value(key, value).or_else(|| check_used(path, only?)),
            None if keys::KEYS_NOT_YET.contains(&path.as_str()) => {
                Some(format!("{path}: not supported yet, remove it"))
            }
            None => Some(format!("{path}: unknown key, the nearest known one is {}", nearest(path))),
        };
        let problems: Vec<String> = self.values.iter().filter_map(problem).collect();
        self.errors.extend(problems);
    }
}

/// The message alone; an excerpt of the text follows it.
fn first_line(error: &serde_saphyr::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn check_value(key: &KeyInfo, value: &Value) -> Option<String> {
    if (key.is_allowed)(value) {
        return None;
    }
    let path = key.path;
    let not_yet = keys::VALUES_NOT_YET.iter().any(|&(p, v)| p == path && value.as_str() == Some(v));
    let reason = if not_yet { " (not supported yet)" } else { "" };
    Some(format!("{path}: found {value}{reason}, allowed: {}", key.allowed.join(", ")))
}

fn check_used(path: &str, only: &[&str]) -> Option<String> {
    let is_used = only.iter().any(|known| path == *known || known.ends_with('.') && path.starts_with(known));
    (!is_used).then(|| format!("{path}: this command does not use it"))
}

/// The known key that takes the fewest edits, its section counted or not.
fn nearest(path: &str) -> &'static str {
    let last = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
    let distance = |key: &&KeyInfo| {
        let full = strsim::damerau_levenshtein(path, key.path);
        full.min(strsim::damerau_levenshtein(path.rsplit('.').next().unwrap_or(path), last(key.path)))
    };
    keys::ALL.iter().min_by_key(distance).map_or("", |key| key.path)
}
