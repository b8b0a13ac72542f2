//! Changes of JSON that keep it JSON, mostly: values of other types and sizes, keys that are missing, new, renamed or
//! there twice, nesting, integers of any length.

use fastrand::Rng;
use serde_json::{Map, Value, json};

use super::text::{self, NUMBERS};

/// A string that stands for text that [`Value`] cannot hold, which is put in its place when the value is written.
const RAW: &str = "\u{fdef}raw";

/// Changes some places of a JSON document. `other` is another document to take parts from.
pub fn change(rng: &mut Rng, document: &mut Value, words: &[Vec<u8>], other: &Value) -> Vec<u8> {
    let mut raw = None;
    for _ in 0..1 << rng.u32(0..4) {
        let count = num_nodes(document);
        let node = node(document, &mut rng.usize(0..count)).expect("a node for each number below their count");
        raw = change_node(rng, node, words, other).or(raw);
    }
    let text = if rng.u32(0..8) == 0 { serde_json::to_vec_pretty(document) } else { serde_json::to_vec(document) };
    let text = String::from_utf8(text.expect("JSON can be written")).expect("JSON is UTF-8");
    match raw {
        Some(raw) => text.replacen(&json!(RAW).to_string(), &raw, 1).into_bytes(),
        None => text.into_bytes(),
    }
}

fn num_nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(num_nodes).sum(),
        Value::Object(items) => items.values().map(num_nodes).sum::<usize>(),
        _ => 0,
    }
}

/// Returns the node of a number, counted from the root on.
fn node<'a>(value: &'a mut Value, number: &mut usize) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| node(item, number)),
        Value::Object(items) => items.values_mut().find_map(|item| node(item, number)),
        _ => None,
    }
}

fn any_part(rng: &mut Rng, document: &Value) -> Value {
    let mut copy = document.clone();
    let mut number = rng.usize(0..num_nodes(document));
    node(&mut copy, &mut number).cloned().unwrap_or_default()
}

/// Returns text that replaces [`RAW`], if the change has put that there.
fn change_node(rng: &mut Rng, node: &mut Value, words: &[Vec<u8>], other: &Value) -> Option<String> {
    match rng.u32(0..10) {
        0 => *node = odd_value(rng),
        1 => *node = any_part(rng, other),
        2 => *node = if rng.bool() { json!([node.take()]) } else { json!({"a": node.take()}) },
        3 if rng.u32(0..4) == 0 => {
            let raw = raw_text(rng, node);
            *node = RAW.into();
            return Some(raw);
        }
        _ => match node {
            Value::Object(map) => change_object(rng, map, words, other),
            Value::Array(list) => change_list(rng, list, other),
            Value::Number(number) => *node = near(rng, number.as_f64().unwrap_or_default()),
            Value::String(text) => {
                let mut bytes = std::mem::take(text).into_bytes();
                let part = any_part(rng, other);
                text::change(rng, &mut bytes, words, part.as_str().unwrap_or_default().as_bytes());
                *text = String::from_utf8_lossy(&bytes).into_owned();
            }
            Value::Bool(value) => *value = !*value,
            Value::Null => *node = odd_value(rng),
        },
    }
    None
}

fn odd_value(rng: &mut Rng) -> Value {
    match rng.u32(0..7) {
        0 => Value::Null,
        1 => json!(rng.bool()),
        2 => json!([]),
        3 => json!({}),
        4 => json!(""),
        5 => json!("a".repeat(1 << rng.u32(0..12))),
        _ => serde_json::from_str(NUMBERS[rng.usize(0..NUMBERS.len())]).unwrap_or_default(),
    }
}

/// A number not far from another.
fn near(rng: &mut Rng, number: f64) -> Value {
    let new = match rng.u32(0..7) {
        0 => number + 1.0,
        1 => number - 1.0,
        2 => number * 2.0,
        3 => -number,
        4 => number / 2.0,
        5 => number * 1e6,
        _ => return odd_value(rng),
    };
    if new == new.trunc() && new.abs() < 1e15 { json!(new as i64) } else { json!(new) }
}

/// Text that a [`Value`] cannot hold: an integer of many digits, deep nesting, a key that is there twice.
fn raw_text(rng: &mut Rng, node: &Value) -> String {
    let times = 1 << rng.u32(0..14);
    match (rng.u32(0..4), node) {
        (0, _) => NUMBERS[rng.usize(0..NUMBERS.len())].into(),
        (1, _) => "9".repeat(times),
        (2, _) => "[".repeat(times) + &"]".repeat(times),
        (_, Value::Object(map)) if !map.is_empty() => {
            let (key, value) = map.iter().nth(rng.usize(0..map.len())).expect("as many keys as counted");
            let twice = format!("{{{}:{value},", Value::from(key.as_str()));
            twice + &node.to_string()[1..]
        }
        _ => "{\"a\":".repeat(times) + "1" + &"}".repeat(times),
    }
}

/// Draws how often a value is repeated, so that an input stays small.
fn times(rng: &mut Rng, value: &Value) -> usize {
    (1 << rng.u32(0..12)).min(1 + (1 << 16) / value.to_string().len())
}

fn change_object(rng: &mut Rng, map: &mut Map<String, Value>, words: &[Vec<u8>], other: &Value) {
    let keys: Vec<String> = map.keys().cloned().collect();
    let key = keys.get(rng.usize(0..keys.len().max(1))).cloned().unwrap_or_default();
    let word = words.get(rng.usize(0..words.len().max(1))).map_or(&b"a"[..], Vec::as_slice);
    let word = String::from_utf8_lossy(word).into_owned();
    match rng.u32(0..8) {
        0 | 1 => drop(map.remove(&key)),
        2 => {
            let value = map.remove(&key).unwrap_or_default();
            map.insert(word, value);
        }
        3 | 4 => drop(map.insert(word, any_part(rng, other))),
        5 => {
            let (a, b) = (key, keys.get(rng.usize(0..keys.len().max(1))).cloned().unwrap_or_default());
            if let (Some(x), Some(y)) = (map.get(&a).cloned(), map.get(&b).cloned()) {
                map.extend([(a, y), (b, x)]);
            }
        }
        6 => {
            let value = map.get(&key).cloned().unwrap_or_default();
            map.extend((0..times(rng, &value)).map(|i| (format!("{key}{i}"), value.clone())));
        }
        _ => {
            if let Value::Object(more) = any_part(rng, other) {
                map.extend(more);
            }
        }
    }
}

fn change_list(rng: &mut Rng, list: &mut Vec<Value>, other: &Value) {
    let at = rng.usize(0..list.len().max(1));
    match (rng.u32(0..5), list.get(at).cloned()) {
        (0, Some(_)) => drop(list.remove(at)),
        (1, Some(item)) => list.insert(at, item),
        (2, Some(item)) => list.extend(vec![item.clone(); times(rng, &item)]),
        (3, Some(_)) => {
            let with = rng.usize(0..list.len());
            list.swap(at, with);
        }
        _ => list.push(any_part(rng, other)),
    }
}
