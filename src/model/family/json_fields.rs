//! Reads a JSON object key by key and collects every problem.

use serde_json::{Map, Value};

use crate::files::shown;

/// A JSON object of which each key is taken once. A key that is left at the end was not understood.
pub(super) struct Fields {
    pub map: Map<String, Value>,
    /// Stands before the object's keys in messages.
    pub prefix: String,
    pub problems: Vec<String>,
}

impl Fields {
    pub fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// True where the key is written as null.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Takes a key. Null counts as absent.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    pub fn refuse(&mut self, key: &str, found: impl Into<Value>, allowed: impl AsRef<str>) {
        let (prefix, found, allowed) = (&self.prefix, shown(&found.into().to_string()), allowed.as_ref());
        self.problems.push(format!("{prefix}{key}: found {found}, allowed: {allowed}"));
    }

    /// Takes a key. `stand_in` takes its place in later checks where the key is missing or wrong.
    pub fn parse<T>(
        &mut self,
        key: &str,
        default: Option<T>,
        stand_in: T,
        allowed: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> T {
        let Some(value) = self.take(key) else {
            return default.unwrap_or_else(|| {
                self.problems.push(format!("{}{key}: missing, {allowed}", self.prefix));
                stand_in
            });
        };
        read(&value).unwrap_or_else(|| {
            self.refuse(key, value, allowed);
            stand_in
        })
    }

    pub fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        // u32 keeps products of two sizes from overflowing.
        let read = |value: &Value| value.as_u64().filter(|&n| 0 < n && n <= u32::MAX.into()).map(|n| n as usize);
        self.parse(key, default, 1, "an integer above 0", read)
    }

    pub fn float(&mut self, key: &str, default: Option<f64>) -> f64 {
        // Beyond these, f32 has no such number, or none of full precision.
        let read = |value: &Value| value.as_f64().filter(|x| (1e-30..=1e30).contains(x));
        self.parse(key, default, 1.0, "a number above 0 (from 1e-30 to 1e30)", read)
    }

    /// Like [`Self::float`], but 0 is allowed.
    pub fn float_or_zero(&mut self, key: &str, default: f64) -> f64 {
        let read = |value: &Value| value.as_f64().filter(|x| *x == 0.0 || (1e-30..=1e30).contains(x));
        self.parse(key, Some(default), default, "0 or a number above it (from 1e-30 to 1e30)", read)
    }

    /// Takes a size that is switched off by null, which differs from an absent key.
    pub fn size_or_null(&mut self, key: &str, absent: Option<usize>) -> Option<usize> {
        match (self.is_null(key), absent) {
            (true, _) => None,
            (false, None) if !self.has(key) => None,
            (false, absent) => Some(self.size(key, absent)),
        }
    }

    pub fn flag(&mut self, key: &str, default: bool) -> bool {
        self.parse(key, Some(default), default, "true or false", Value::as_bool)
    }

    /// Takes an object, which is empty where the key is absent. Its problems have to be moved to those of `self`.
    pub fn object(&mut self, key: &str) -> Fields {
        let map = self.parse(key, Some(Map::new()), Map::new(), "an object", |value| value.as_object().cloned());
        Fields { map, prefix: format!("{}{key}.", self.prefix), problems: Vec::new() }
    }

    pub fn check_neutral<const N: usize>(&mut self, neutral: [(&str, Value); N]) {
        for (key, neutral) in neutral {
            match self.take(key) {
                // 0 and 0.0 are one value here and two in JSON.
                Some(found) if found != neutral && (!found.is_number() || found.as_f64() != neutral.as_f64()) => {
                    self.refuse(key, found, format!("{neutral}; other values are not implemented"));
                }
                _ => {}
            }
        }
    }

    /// Refuses the keys that nobody took.
    pub fn check_rest(&mut self) {
        for (key, value) in std::mem::take(&mut self.map).into_iter().filter(|(_, value)| !value.is_null()) {
            self.problems.push(format!(
                "{}{}: found {}, not a key this program knows; remove it if it does not change the model",
                self.prefix,
                shown(&key),
                shown(&value.to_string())
            ));
        }
    }
}
