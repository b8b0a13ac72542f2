//! What was written, as one flat list: dotted key to value, from the YAML text and then from `--set key=value`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::command::Command;
use super::keys::{self, Key, KeyInfo};
use crate::files::shown;

/// The keys that were written, with their values, and what was wrong about them.
#[derive(Default)]
pub(super) struct Written {
    values: BTreeMap<String, Value>,
    /// Keys that `--set` has written.
    overridden: BTreeSet<String>,
    /// Keys that an option of the command line has given.
    given: BTreeSet<String>,
    pub errors: Vec<String>,
    /// Whether the text is YAML.
    pub is_read: bool,
}

impl Written {
    /// `yaml` is the text of a recipe, `overrides` are `key=value` with YAML values; the last one holds.
    pub fn new(yaml: &str, overrides: &[String]) -> Self {
        let mut written = Self { is_read: true, ..Self::default() };
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
                    written.errors.push(format!("--set {}: not valid YAML: {}", shown(text), first_line(&error)))
                }
                _ => written
                    .errors
                    .push(format!("--set {}: expected key=value, e.g. training.max_steps=100", shown(text))),
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
            value if path.is_empty() => {
                self.errors.push(format!("found {}, a recipe is a mapping of keys", shown(&value.to_string())))
            }
            value if is_section => {
                self.errors.push(format!("{path}: found {}, this is a mapping of keys", shown(&value.to_string())))
            }
            value => {
                if self.values.contains_key(&path) && !is_override {
                    self.errors.push(format!("{path}: is there twice"));
                }
                if is_override {
                    self.overridden.insert(path.clone());
                }
                self.values.insert(path, value);
            }
        }
    }

    /// Sets a key that an option of the command line gives.
    pub fn give(&mut self, command: Command, path: &'static str, value: Value) {
        if self.has(path) {
            self.errors.push(not_read(command, path));
        }
        self.given.insert(path.to_owned());
        self.values.insert(path.to_owned(), value);
    }

    /// Whether the key was written, be it with its default.
    pub fn has(&self, path: &str) -> bool {
        self.values.contains_key(path)
    }

    /// Value of a key, else its default; `None` if what was written is not allowed, which [`Self::check`] has said.
    pub fn get<T>(&self, key: &Key<T>) -> Option<T> {
        match self.values.get(key.path) {
            Some(value) => (key.read)(value),
            None => serde_saphyr::from_str(key.default).ok().as_ref().and_then(key.read),
        }
    }

    /// Checks each key that was written. What is in a recipe is for `train`; what is on the command line is for this command.
    pub fn check(&mut self, command: Command) {
        let problem = |(path, value): (&String, &Value)| match keys::ALL.iter().find(|key| key.path == path) {
            Some(key) if self.given.contains(path) => {
                check_value(key, command.name_of(key.path).unwrap_or(key.path), value)
            }
            Some(key) => {
                let reader = if self.overridden.contains(path) { command } else { Command::Train };
                let is_read = key.readers.contains(&reader);
                if is_read { check_value(key, path, value) } else { Some(not_read(reader, path)) }
            }
            None if keys::KEYS_NOT_YET.contains(&path.as_str()) => {
                Some(format!("{path}: not supported yet, remove it"))
            }
            None => Some(format!("{}: unknown key, the nearest known one is {}", shown(path), nearest(path))),
        };
        let problems: Vec<String> = self.values.iter().filter_map(problem).collect();
        self.errors.extend(problems);
    }
}

/// The message alone; an excerpt of the text follows it.
fn first_line(error: &serde_saphyr::Error) -> String {
    shown(error.to_string().lines().next().unwrap_or_default())
}

/// `name` is how the user knows the key.
fn check_value(key: &KeyInfo, name: &str, value: &Value) -> Option<String> {
    if (key.is_allowed)(value) {
        return None;
    }
    let not_yet = keys::VALUES_NOT_YET.iter().any(|&(path, v)| path == key.path && value.as_str() == Some(v));
    let reason = match (not_yet, keys::why_no_path(value)) {
        (true, _) => " (not supported yet)".into(),
        (false, Some(why)) => format!(" ({why})"),
        (false, None) => String::new(),
    };
    Some(format!("{name}: found {}{reason}, allowed: {}", shown(&value.to_string()), key.allowed.join(", ")))
}

/// A key that a command does not read after `--set`, and what does its work there.
fn not_read(command: Command, path: &str) -> String {
    let option = command.options().iter().find(|(key, _)| *key == path);
    let (name, option) = (command.name(), option.map(|(_, option)| option));
    match option {
        Some(option) => format!("{path}: {name} takes it from {option}, not from --set"),
        None => format!("{path}: {name} does not read it, remove it"),
    }
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
