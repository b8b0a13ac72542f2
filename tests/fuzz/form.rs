//! The forms of inputs, and a change of an input that keeps its form, mostly.

use std::collections::BTreeSet;

use fastrand::Rng;
use serde_json::Value;

use super::{json, text};

/// Language of an input.
#[derive(Clone, Copy, PartialEq)]
pub enum Form {
    Json,
    /// One JSON document a line.
    Lines,
    /// Length of the header, header in JSON, data.
    Safetensors,
    /// YAML, of which JSON is a part.
    Yaml,
    /// Text of which only words are known.
    Text,
}

/// Most words of a target, and the longest.
const MAX_WORDS: usize = 4000;
const MAX_WORD_BYTES: usize = 80;

impl Form {
    /// Returns a new input made from `input`, with parts of `other`.
    pub fn change(self, rng: &mut Rng, input: &[u8], other: &[u8], words: &[Vec<u8>]) -> Vec<u8> {
        let changed = match self {
            _ if rng.u32(0..5) == 0 => None,
            Form::Json => change_json(rng, input, other, words),
            Form::Yaml if rng.bool() => change_yaml(rng, input, other, words),
            Form::Lines => change_lines(rng, input, other, words),
            Form::Safetensors => change_safetensors(rng, input, other, words),
            Form::Yaml | Form::Text => None,
        };
        changed.filter(|changed| changed.len() <= text::MAX_BYTES).unwrap_or_else(|| {
            let mut changed = input.to_vec();
            (0..1 << rng.u32(0..4)).for_each(|_| text::change(rng, &mut changed, words, other));
            changed
        })
    }

    /// Returns the JSON of an input, or of its parts.
    fn documents(self, input: &[u8]) -> Vec<Value> {
        let documents = match self {
            Form::Json => vec![serde_json::from_slice(input).ok()],
            Form::Yaml => vec![yaml(input)],
            Form::Lines => input.split(|&b| b == b'\n').map(|line| serde_json::from_slice(line).ok()).collect(),
            Form::Safetensors => vec![header(input).and_then(|(header, _)| serde_json::from_slice(header).ok())],
            Form::Text => Vec::new(),
        };
        documents.into_iter().flatten().collect()
    }

    /// Returns the words of an input: keys and strings of its JSON, or what stands between spaces and signs.
    pub fn words(self, input: &[u8]) -> BTreeSet<Vec<u8>> {
        let mut words = BTreeSet::new();
        self.documents(input).iter().for_each(|document| add_strings(document, &mut words));
        if self == Form::Text {
            let is_sign = |b: &u8| !b.is_ascii_alphanumeric() && !b"_".contains(b);
            words.extend(input.split(is_sign).map(<[u8]>::to_vec));
        }
        words.retain(|word| !word.is_empty() && word.len() <= MAX_WORD_BYTES);
        words.into_iter().take(MAX_WORDS).collect()
    }
}

fn add_strings(value: &Value, words: &mut BTreeSet<Vec<u8>>) {
    match value {
        Value::String(text) => drop(words.insert(text.clone().into())),
        Value::Array(items) => items.iter().for_each(|item| add_strings(item, words)),
        Value::Object(items) => {
            words.extend(items.keys().map(|key| key.clone().into_bytes()));
            items.values().for_each(|item| add_strings(item, words));
        }
        _ => {}
    }
}

fn change_json(rng: &mut Rng, input: &[u8], other: &[u8], words: &[Vec<u8>]) -> Option<Vec<u8>> {
    let mut document = serde_json::from_slice(input).ok()?;
    let other = serde_json::from_slice(other).unwrap_or_default();
    Some(json::change(rng, &mut document, words, &other))
}

fn yaml(input: &[u8]) -> Option<Value> {
    serde_saphyr::from_str(std::str::from_utf8(input).ok()?).ok()
}

fn change_yaml(rng: &mut Rng, input: &[u8], other: &[u8], words: &[Vec<u8>]) -> Option<Vec<u8>> {
    let mut document = yaml(input)?;
    Some(json::change(rng, &mut document, words, &yaml(other).unwrap_or_default()))
}

fn change_lines(rng: &mut Rng, input: &[u8], other: &[u8], words: &[Vec<u8>]) -> Option<Vec<u8>> {
    let lines = |text: &[u8]| text.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (mut lines, others) = (lines(input), lines(other));
    let (at, with) = (rng.usize(0..lines.len()), rng.usize(0..others.len()));
    match rng.u32(0..10) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, others[with].clone()),
        2 => lines.extend(vec![lines[at].clone(); 1 << rng.u32(0..6)]),
        _ => lines[at] = change_json(rng, &lines[at], &others[with], words)?,
    }
    Some(lines.join(&b'\n'))
}

/// Returns the header of a safetensors file, and the data behind it.
fn header(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// Returns a safetensors file.
pub fn safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn change_safetensors(rng: &mut Rng, input: &[u8], other: &[u8], words: &[Vec<u8>]) -> Option<Vec<u8>> {
    let ((text, data), (other, other_data)) = (header(input)?, header(other)?);
    let mut data = data.to_vec();
    let text = match rng.u32(0..8) {
        0 => {
            data.resize(rng.usize(0..=2 * data.len() + 8), 0);
            text.to_vec()
        }
        1 => {
            text::change(rng, &mut data, words, other_data);
            text.to_vec()
        }
        2 => {
            let mut changed = text.to_vec();
            text::change(rng, &mut changed, words, other);
            changed
        }
        _ => change_json(rng, text, other, words)?,
    };
    let mut file = safetensors(&text, &data);
    if rng.u32(0..16) == 0 {
        let length = if rng.bool() { rng.u64(..) } else { (text.len() as u64).wrapping_add(rng.u64(0..16)) };
        file[..8].copy_from_slice(&length.to_le_bytes());
    }
    Some(file)
}
