//! Gathers what was written into one flat map of dotted keys to values, from the YAML text and then from `--set
//! key=value`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::command::Command;
use super::keys::{self, Key, KeyInfo};
use super::values;
use crate::files::shown;

/// The keys that were written, with their values and errors.
#[derive(Default)]
pub(super) struct Written {
    values: BTreeMap<String, Value>,
    /// Keys that `--set` gave.
    overridden: BTreeSet<String>,
    /// Keys that an option of the command line gave.
    given: BTreeSet<String>,
    pub errors: Vec<String>,
    /// True if the text could be read as YAML.
    pub is_read: bool,
}

impl Written {
    /// Reads `yaml`, the text of a recipe, and `overrides`, `key=value` with YAML values, of which the last one for a
    /// key wins.
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
            // An empty section sets no key.
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

    /// Sets a key from an option of the command line.
    pub fn give(&mut self, command: Command, path: &'static str, value: Value) {
        if self.has(path) {
            self.errors.push(not_read(command, path));
        }
        self.given.insert(path.to_owned());
        self.values.insert(path.to_owned(), value);
    }

    /// Returns whether the key was written, even with its default as the value.
    pub fn has(&self, path: &str) -> bool {
        self.values.contains_key(path)
    }

    /// Returns the value of a key, or its default; `None` if the written value is not allowed, which [`Self::check`]
    /// reports.
    pub fn get<T>(&self, key: &Key<T>) -> Option<T> {
        match self.values.get(key.path) {
            Some(value) => (key.read)(value),
            None => serde_saphyr::from_str(key.default).ok().as_ref().and_then(key.read),
        }
    }

    /// Checks each key that was written: keys of a recipe as `train` reads them, keys of the command line as this
    /// command does.
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
            None => {
                let help = nearest(path).map_or("`fsdp-qlora train --help-recipe` lists all keys".to_string(), |key| {
                    format!("the nearest known one is {key}")
                });
                Some(format!("{}: unknown key, {help}", shown(path)))
            }
        };
        let problems: Vec<String> = self.values.iter().filter_map(problem).collect();
        self.errors.extend(problems);
    }
}

/// Returns the message without the excerpt of the text that follows it.
fn first_line(error: &serde_saphyr::Error) -> String {
    shown(error.to_string().lines().next().unwrap_or_default())
}

/// Returns the error of a value, if it is not allowed. `name` is what the user calls the key.
fn check_value(key: &KeyInfo, name: &str, value: &Value) -> Option<String> {
    if (key.is_allowed)(value) {
        return None;
    }
    let reason = values::why_no_path(value).or_else(|| values::why_no_scheduler(value));
    let reason = reason.map_or(String::new(), |why| format!(" ({why})"));
    Some(format!("{name}: found {}{reason}, allowed: {}", shown(&value.to_string()), key.allowed.join(", ")))
}

/// Returns the error of a `--set` key that the command does not read, with what replaces it there.
fn not_read(command: Command, path: &str) -> String {
    let option = command.options().iter().find(|(key, _)| *key == path);
    let (name, option) = (command.name(), option.map(|(_, option)| option));
    match option {
        Some(option) => format!("{path}: {name} takes it from {option}, not from --set"),
        None => format!("{path}: {name} does not read it, remove it"),
    }
}

/// Returns the known key with the smallest edit distance, with or without its section; first of all one that has the
/// written word in its name. Returns `None` where no key is near.
fn nearest(path: &str) -> Option<&'static str> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let word = last(path);
    let has_word = |key: &KeyInfo| word.len() > 2 && last(key.path).contains(&word);
    let distance = |key: &KeyInfo| {
        let full = strsim::damerau_levenshtein(path, key.path);
        full.min(strsim::damerau_levenshtein(&word, &last(key.path)))
    };
    let key = keys::ALL.iter().min_by_key(|key| (!has_word(key), distance(key)))?;
    let is_near = has_word(key) || distance(key) <= word.chars().count() / 3;
    is_near.then_some(key.path)
}
