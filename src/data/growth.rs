//! Bounds how much longer the parts of a tokenizer.json make a text: forty replacements, each of which doubles it,
//! would take all memory for one letter.

use anyhow::{Context, Result, ensure};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::tokenizer::call;
use crate::guarded::guarded;

/// Largest growth. That of released tokenizers is at most 16.
const MAX_GROWTH: f64 = 64.0;

/// The parts of a tokenizer.json; its tokens are skipped.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
}

/// Refuses the content of a tokenizer.json like [`check`], before the library reads it: while it does, the normalizer
/// already sees the added tokens.
pub fn check_file(bytes: &[u8]) -> Result<()> {
    let parts = match serde_json::from_slice::<Parts>(bytes) {
        // The library says what is wrong with JSON that cannot be read, but takes a part that is there twice.
        Err(error) if !error.is_data() => return Ok(()),
        parts => parts.context("tokenizer.json")?,
    };
    let mut alone = json!(parts);
    alone["version"] = "1.0".into();
    alone["model"] = json!({"type": "WordLevel", "vocab": {}, "unk_token": ""});
    // Parts that cannot be read are the library's to refuse, too.
    call(|| Tokenizer::from_bytes(alone.to_string())).map_or(Ok(()), |parts| check(&parts))
}

/// Refuses a tokenizer whose parts, one after the other, could make texts much longer. `Precompiled` counts as a small
/// number, because its table is not looked into.
pub fn check(tokenizer: &Tokenizer) -> Result<()> {
    let to_tokens = json!([tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer(), tokenizer.get_post_processor()]);
    for (parts, what) in [(to_tokens, "a text"), (json!(tokenizer.get_decoder()), "the text of tokens")] {
        let growth = growth(&parts);
        ensure!(
            growth <= MAX_GROWTH,
            "tokenizer.json: found parts that can make {what} {growth:.0} times as long; allowed: at most {MAX_GROWTH} times"
        );
    }
    Ok(())
}

/// Returns how many times as long a text can become, in bytes or tokens, by a part and those in it.
fn growth(part: &Value) -> f64 {
    let inner: f64 = match part {
        Value::Array(parts) => parts.iter().map(growth).product(),
        Value::Object(parts) => parts.values().map(growth).product(),
        _ => 1.0,
    };
    let text = |key: &str| part.get(key).and_then(Value::as_str).unwrap_or_default();
    let own = match text("type") {
        "Replace" => replacement(&part["pattern"], text("content").len()),
        // Parts of a text between added tokens may be of one byte.
        "Prepend" => 1.0 + text("prepend").len() as f64,
        "Metaspace" | "Precompiled" => 4.0,
        "ByteLevel" | "BertNormalizer" => 2.0,
        "BPEDecoder" => replacement(&json!({"String": text("suffix")}), 1),
        "CTC" => replacement(&json!({"String": text("word_delimiter_token")}), 1),
        "TemplateProcessing" => {
            let pieces = part["single"].as_array().map_or(&[][..], Vec::as_slice);
            pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count().max(1) as f64
        }
        _ => 1.0,
    };
    inner * own
}

/// Returns the growth where each match of a pattern becomes `bytes` bytes. An empty match adds them to each character.
fn replacement(pattern: &Value, bytes: usize) -> f64 {
    let (shortest, matches_nothing) = match (pattern["String"].as_str(), pattern["Regex"].as_str()) {
        (Some(text), _) => (text.len(), text.is_empty()),
        (_, Some(regex)) => {
            let regex = guarded("a pattern", || Ok(Regex::new(regex)?));
            (1, regex.is_ok_and(|regex| regex.is_match("").unwrap_or(true)))
        }
        _ => (1, true),
    };
    let longer = if matches_nothing { 1.0 + bytes as f64 } else { bytes as f64 / shortest as f64 };
    longer.max(1.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tokenizer::tests::GOLDEN;
    use super::*;

    /// The growth of the golden tokenizer with a part in another form, if it is refused.
    fn refused(key: &str, part: Value) -> Option<String> {
        let text = std::fs::read(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        json[key] = part;
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap_or_else(|error| panic!("{key}: {error}"));
        check(&tokenizer).err().map(|error| error.to_string())
    }

    fn sequence(key: &str, part: Value, times: usize) -> Value {
        json!({"type": "Sequence", key: vec![part; times]})
    }

    #[test]
    fn parts_that_multiply_are_refused() {
        let byte_level =
            || json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let template = json!({"type": "TemplateProcessing", "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 70],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}});
        let long = "a".repeat(100);
        for (key, part, what) in [
            ("normalizer", sequence("normalizers", replace(json!({"String": "a"}), "aa"), 40), "a text"),
            ("normalizer", sequence("normalizers", replace(json!({"Regex": "x*"}), "x"), 40), "a text"),
            ("normalizer", replace(json!({"String": "a"}), &long), "a text"),
            ("normalizer", json!({"type": "Prepend", "prepend": long}), "a text"),
            ("pre_tokenizer", sequence("pretokenizers", byte_level(), 40), "a text"),
            ("post_processor", template, "a text"),
            ("decoder", sequence("decoders", replace(json!({"String": "a"}), "aa"), 40), "the text of tokens"),
            ("decoder", sequence("decoders", json!({"type": "BPEDecoder", "suffix": ""}), 40), "the text of tokens"),
        ] {
            let error = refused(key, part).unwrap_or_else(|| panic!("{key} must be refused"));
            assert!(error.contains(&format!("can make {what} ")), "{error}");
        }
    }

    #[test]
    fn parts_are_refused_before_an_added_token_goes_through_them() {
        let text = std::fs::read(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        check_file(json.to_string().as_bytes()).unwrap();
        json["normalizer"] =
            sequence("normalizers", json!({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}), 40);
        json["added_tokens"][0]["content"] = "e".into();
        json["added_tokens"][0]["normalized"] = true.into();
        let error = check_file(json.to_string().as_bytes()).unwrap_err().to_string();
        assert!(error.contains("can make a text "), "{error}");
        let twice = r#"{"normalizer": null, "normalizer": null}"#;
        assert!(format!("{:#}", check_file(twice.as_bytes()).unwrap_err()).contains("duplicate field `normalizer`"));
    }

    #[test]
    fn parts_of_released_tokenizers_are_allowed() {
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let llama = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁")]});
        assert_eq!(refused("normalizer", llama), None);
        assert_eq!(refused("normalizer", sequence("normalizers", replace(json!({"Regex": " {2,}"}), " "), 40)), None);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        assert_eq!(refused("pre_tokenizer", metaspace), None);
        assert_eq!(refused("decoder", sequence("decoders", replace(json!({"String": "▁"}), " "), 40)), None);
    }
}
