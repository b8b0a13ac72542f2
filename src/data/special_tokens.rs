//! Tokens that tokenizer.json lacks, added as transformers 5.24 adds them when it loads a tokenizer.json.
//!
//! Its rules (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`):
//!
//! - Where tokenizer_config.json has `added_tokens_decoder`, its tokens are added in the order of their ids, with its
//!   flags, and special_tokens_map.json and added_tokens.json are not read. Elsewhere the map overrides
//!   tokenizer_config.json, and added_tokens.json gives tokens.
//! - Then every named token (`eos_token`, … and any other `…_token`) and every one of `extra_special_tokens` or
//!   `additional_special_tokens` is added that is not there yet. New tokens get the next free ids.
//!
//! transformers ignores an id that is not the one that a token gets; here it is refused.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::tokenizer::call;

/// The order in which transformers adds and names special tokens.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The files beside tokenizer.json that say what is a token; empty where a file is missing.
#[derive(Default)]
pub struct Files {
    /// tokenizer_config.json
    pub config: Map<String, Value>,
    /// special_tokens_map.json
    pub map: Map<String, Value>,
    /// added_tokens.json
    pub added: Map<String, Value>,
}

/// Adds the tokens to a tokenizer; returns names (`eos_token`, …) and texts of the special ones.
///
/// Errors name the file and the token: an entry of another form, an id that the token does not get.
pub fn add(tokenizer: &mut Tokenizer, files: &Files) -> Result<Vec<(String, String)>> {
    let has_decoder = files.config.contains_key("added_tokens_decoder");
    let mut settings = files.config.clone();
    if !has_decoder {
        settings.extend(files.map.clone());
    }
    let mut named = named_tokens(&settings)?;
    let mut extra = extra_tokens(&settings)?;
    let listed = if has_decoder { decoder(&files.config)? } else { added_tokens(files, &named, &extra)? };
    let mut tokens = listed.clone();
    if !has_decoder {
        tokens.extend(tokenizer.get_added_tokens_decoder());
    }
    // A token that is named and listed has the flags of the list: of the lowest id, where it is there twice.
    let by_content: HashMap<&str, &AddedToken> = tokens.values().rev().map(|t| (t.content.as_str(), t)).collect();
    let flags = |token: &mut AddedToken| {
        if let Some(&listed) = by_content.get(token.content.as_str()) {
            *token = AddedToken { special: true, ..listed.clone() };
        }
    };
    named.iter_mut().for_each(|(_, token)| flags(token));
    extra.iter_mut().for_each(flags);
    // In one call, because each call builds the search for all tokens anew.
    let in_order = tokens.into_values().chain(named.iter().map(|n| n.1.clone())).chain(extra);
    call(|| tokenizer.add_tokens(in_order)).context("added tokens")?;
    let file = if has_decoder { "tokenizer_config.json: added_tokens_decoder" } else { "added_tokens.json" };
    for (id, token) in &listed {
        let found = tokenizer.token_to_id(&token.content);
        ensure!(
            found == Some(*id),
            "{file}: {:?} has the id {id}, but with tokenizer.json it gets {}; help: save the tokenizer again with transformers",
            token.content,
            found.map_or("none".into(), |id| id.to_string())
        );
    }
    Ok(named.into_iter().map(|(name, token)| (name, token.content)).collect())
}

fn named_tokens(settings: &Map<String, Value>) -> Result<Vec<(String, AddedToken)>> {
    let is_other = |name: &&String| name.ends_with("_token") && !NAMES.contains(&name.as_str());
    let others = settings.keys().filter(is_other).map(String::as_str);
    let mut named = Vec::new();
    for name in NAMES.into_iter().chain(others) {
        match settings.get(name) {
            // `add_bos_token` and its like end in `_token` too.
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(value) => named.push((name.to_string(), special(value).with_context(|| name.to_string())?)),
        }
    }
    if let Some(Value::Object(more)) = settings.get("extra_special_tokens") {
        for (name, value) in more {
            named.push((name.clone(), special(value).with_context(|| format!("extra_special_tokens: {name}"))?));
        }
    }
    Ok(named)
}

fn extra_tokens(settings: &Map<String, Value>) -> Result<Vec<AddedToken>> {
    let lists = ["extra_special_tokens", "additional_special_tokens"];
    let list = lists.iter().find_map(|&key| settings.get(key)?.as_array().filter(|list| !list.is_empty()));
    list.into_iter().flatten().map(|value| special(value).context("additional_special_tokens")).collect()
}

fn decoder(config: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>> {
    let place = "tokenizer_config.json: added_tokens_decoder";
    let Some(Value::Object(entries)) = config.get("added_tokens_decoder") else {
        bail!("{place}: found another value than an object of ids and tokens")
    };
    let entry = |(id, value): (&String, &Value)| {
        let number = id.parse().ok().with_context(|| format!("{place}: found {id:?}; allowed: token ids"))?;
        Ok((number, token(value, false).with_context(|| format!("{place}: {id}"))?))
    };
    entries.iter().map(entry).collect()
}

fn added_tokens(
    files: &Files,
    named: &[(String, AddedToken)],
    extra: &[AddedToken],
) -> Result<BTreeMap<u32, AddedToken>> {
    let special: HashSet<&str> = named.iter().map(|n| &n.1).chain(extra).map(|t| t.content.as_str()).collect();
    let entry = |(content, id): (&String, &Value)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = number.with_context(|| format!("added_tokens.json: {content}: found {id}; allowed: a token id"))?;
        Ok((id, AddedToken::from(content, special.contains(content.as_str()))))
    };
    files.added.iter().map(entry).collect()
}

fn special(value: &Value) -> Result<AddedToken> {
    Ok(AddedToken { special: true, ..token(value, true)? })
}

/// A token is a string, or an object with its text and flags. A string is not normalized where it is special.
fn token(value: &Value, is_special: bool) -> Result<AddedToken> {
    let content = value.as_str().or_else(|| value.get("content")?.as_str()).unwrap_or_default();
    ensure!(!content.is_empty(), "found {value}; allowed: a string, or an object with content");
    if value.is_string() {
        return Ok(AddedToken::from(content, is_special));
    }
    let flag = |name: &str, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    Ok(AddedToken {
        content: content.into(),
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", true),
        special: flag("special", false),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::tokenizer::tests::GOLDEN;
    use super::*;

    /// The golden tokenizer with `<|im_start|>` (317) alone, and without files beside it.
    fn bare() -> Tokenizer {
        let text = std::fs::read(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        json["added_tokens"].as_array_mut().unwrap().truncate(1);
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    fn files(config: Value, map: Value, added: Value) -> Files {
        let object = |value: Value| value.as_object().unwrap().clone();
        Files { config: object(config), map: object(map), added: object(added) }
    }

    fn flags(content: &str) -> Value {
        json!({"content": content, "special": true, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false})
    }

    /// Expected ids are those of transformers 5.24.
    #[test]
    fn missing_tokens_are_added_as_transformers_adds_them() {
        let none = || json!({});
        let named = json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"});
        let with = |key: &str, value: Value| {
            let mut config = named.clone();
            config[key] = value;
            config
        };
        let list =
            |entries: &[(&str, &str)]| entries.iter().map(|(id, t)| (id.to_string(), flags(t))).collect::<Value>();
        let all = list(&[("317", "<|im_start|>"), ("318", "<|im_end|>"), ("319", "<|endoftext|>")]);
        let swapped = list(&[("318", "<|endoftext|>"), ("319", "<|im_end|>")]);
        let left = json!({"318": {"content": "<|im_end|>", "lstrip": true, "normalized": false}});
        let (text, ab) = ("ab<|im_end|>", [64, 65]);
        for (name, files, text, expected) in [
            ("decoder", files(with("added_tokens_decoder", all), none(), none()), text, [&ab[..], &[318]].concat()),
            ("swapped", files(with("added_tokens_decoder", swapped), none(), none()), text, [&ab[..], &[319]].concat()),
            (
                "added_tokens.json",
                files(json!({"eos_token": "<|im_end|>"}), none(), json!({"<|im_end|>": 318})),
                text,
                [&ab[..], &[318]].concat(),
            ),
            ("map", files(none(), json!({"eos_token": "<|im_end|>"}), none()), text, [&ab[..], &[318]].concat()),
            ("name alone", files(json!({"eos_token": "<|im_end|>"}), none(), none()), text, [&ab[..], &[318]].concat()),
            ("names", files(named.clone(), none(), none()), "<|im_start|><|endoftext|>", vec![317, 319]),
            (
                "others",
                files(
                    json!({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|x|>"], "image_token": "<img>"}),
                    none(),
                    none(),
                ),
                "<img><|x|>",
                vec![319, 320],
            ),
            ("left", files(with("added_tokens_decoder", left), none(), none()), "a  <|im_end|>", vec![64, 318]),
        ] {
            let mut tokenizer = bare();
            add(&mut tokenizer, &files).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap().get_ids(), expected, "{name}");
        }
    }

    #[test]
    fn the_map_counts_without_a_decoder_alone() {
        let eos = |config: Value| {
            let files = files(config, json!({"eos_token": {"content": "<|endoftext|>"}}), json!({}));
            add(&mut bare(), &files).unwrap().into_iter().find(|(name, _)| name == "eos_token").unwrap().1
        };
        assert_eq!(eos(json!({"eos_token": "<|im_end|>"})), "<|endoftext|>");
        assert_eq!(eos(json!({"eos_token": "<|im_end|>", "added_tokens_decoder": {}})), "<|im_end|>");
        assert_eq!(eos(json!({"eos_token": null, "add_bos_token": true})), "<|endoftext|>");
    }

    #[test]
    fn ids_that_are_not_what_a_token_gets_are_refused() {
        let entry = |id: &str, token: &str| json!({"added_tokens_decoder": {id: flags(token)}});
        for (files, said) in [
            (
                files(entry("400", "<|im_end|>"), json!({}), json!({})),
                "\"<|im_end|>\" has the id 400, but with tokenizer.json it gets 318",
            ),
            (files(entry("5", "<|im_start|>"), json!({}), json!({})), "\"<|im_start|>\" has the id 5"),
            (
                files(json!({}), json!({}), json!({"<|im_end|>": 330})),
                "added_tokens.json: \"<|im_end|>\" has the id 330",
            ),
            (files(json!({}), json!({}), json!({"<|im_end|>": "x"})), "added_tokens.json: <|im_end|>: found \"x\""),
            (files(entry("x", "<|im_end|>"), json!({}), json!({})), "found \"x\"; allowed: token ids"),
            (
                files(json!({"added_tokens_decoder": {"318": 1}}), json!({}), json!({})),
                "added_tokens_decoder: 318: found 1",
            ),
            (files(json!({"eos_token": 7}), json!({}), json!({})), "eos_token: found 7"),
        ] {
            let error = format!("{:#}", add(&mut bare(), &files).unwrap_err());
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn many_tokens_take_no_more_than_their_share_of_time() {
        let tokens: Map<String, Value> = (0..30_000).map(|i| (format!("<{i}>"), json!(318 + i))).collect();
        let mut tokenizer = bare();
        let started = std::time::Instant::now();
        add(&mut tokenizer, &files(json!({}), json!({}), tokens.into())).unwrap();
        assert_eq!(tokenizer.token_to_id("<29999>"), Some(30_317));
        // It takes a tenth of a second, and took five minutes when the search for tokens was built again for each of
        // them.
        assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
    }
}
