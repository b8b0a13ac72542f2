//! The tokenizer of a Hugging Face directory, with its chat template and special tokens.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Zoned;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::Xxh3Default;

use super::chat_template::{ChatTemplate, Rendered};

/// Files that decide how text becomes tokens, in the order in which the identity covers them.
const FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Text to token ids and back.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos_token: Option<String>,
    eos_token_ids: Vec<u32>,
    identity: String,
}

impl TextTokenizer {
    /// Reads tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    /// the eos ids of generation_config.json and config.json. `now` is what the template's `strftime_now` tells.
    pub fn load(dir: &Path, now: &Zoned) -> Result<TextTokenizer> {
        let path = dir.join("tokenizer.json");
        ensure!(path.exists(), "{}: tokenizer.json is missing; other tokenizer files are not read", dir.display());
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        // What a data set or a prompt needs of either is decided here, not by whoever saved the file.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let config = json_file(&dir.join("tokenizer_config.json"))?;
        let map = json_file(&dir.join("special_tokens_map.json"))?;
        let special = |name: &str| token(config.get(name)).or_else(|| token(map.get(name)));
        let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let special_tokens = names.iter().filter_map(|&name| Some((name.to_string(), special(name)?))).collect();
        let template = match template_source(dir, &config)? {
            Some(source) => {
                Some(ChatTemplate::new(&source, special_tokens, now).with_context(|| dir.display().to_string())?)
            }
            None => None,
        };
        let eos_token = special("eos_token");
        let mut eos_token_ids: Vec<u32> = eos_token.iter().filter_map(|t| tokenizer.token_to_id(t)).collect();
        for file in ["generation_config.json", "config.json"] {
            let ids = json_file(&dir.join(file))?.remove("eos_token_id").unwrap_or_default();
            let ids = ids.as_array().cloned().unwrap_or_else(|| vec![ids]);
            eos_token_ids.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32));
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let identity = identity(dir, eos_token.as_deref(), &eos_token_ids)?;
        Ok(TextTokenizer { tokenizer, template, eos_token, eos_token_ids, identity })
    }

    /// A digest in hex of all files that decide how text becomes tokens, and of the end-of-sequence token and ids.
    pub fn identity(&self) -> String {
        self.identity.clone()
    }

    /// Token ids; `add_special_tokens` as the tokenizer's post-processor does it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        // Without offsets it takes half the memory.
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| anyhow!("tokenizing: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids, and the bytes of the text that each stands for.
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.tokenizer.encode(text, add_special_tokens).map_err(|e| anyhow!("tokenizing: {e}"))?;
        let offsets = encoding.get_offsets().iter().map(|&(begin, end)| begin..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// Text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(|e| anyhow!("decoding: {e}"))
    }

    /// Whether [`TextTokenizer::render`] can do anything.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Whether the chat template says which text the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.template.as_ref().is_some_and(ChatTemplate::marks_generation)
    }

    /// A conversation as the chat template writes it; see [`ChatTemplate::render`].
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<Rendered> {
        self.render_with(messages, &Map::new(), add_generation_prompt)
    }

    /// A conversation with further variables of the template; see [`ChatTemplate::render_with`].
    pub fn render_with(
        &self,
        messages: &[Value],
        variables: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        let Some(template) = &self.template else {
            bail!("the tokenizer has no chat template (tokenizer_config.json: chat_template, or chat_template.jinja)")
        };
        template.render_with(messages, variables, add_generation_prompt)
    }

    /// Whether the chat template mentions a word; see [`ChatTemplate::mentions`].
    pub fn template_mentions(&self, word: &str) -> bool {
        self.template.as_ref().is_some_and(|template| template.mentions(word))
    }

    /// The text of the end-of-sequence token.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    /// Ids that end a generated text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }
}

/// An object; empty when the file is not there.
fn json_file(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: not a JSON object", path.display()))
}

/// A special token is a string, or an object with its content.
fn token(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// An xxh3 digest of 128 bits, in hex, over the name, size and bytes of each file and the tokens that were decided.
fn identity(dir: &Path, eos_token: Option<&str>, eos_token_ids: &[u32]) -> Result<String> {
    let mut digest = Xxh3Default::new();
    for name in FILES {
        let path = dir.join(name);
        if path.exists() {
            let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
            digest.update(format!("{name} {}\n", bytes.len()).as_bytes());
            digest.update(&bytes);
        }
    }
    digest.update(format!("{eos_token:?} {eos_token_ids:?}").as_bytes());
    Ok(format!("{:032x}", digest.digest128()))
}

fn template_source(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).with_context(|| path.display().to_string());
    }
    let place = || format!("{}: chat_template", dir.join("tokenizer_config.json").display());
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t.get("name").is_some_and(|n| n == "default"));
            let source = default.and_then(|t| t.get("template")?.as_str()).map(str::to_string);
            source.map(Some).with_context(|| format!("{}: none of the list is named default", place()))
        }
        Some(other) => bail!("{}: found {other}; allowed: a string, or a list of {{name, template}}", place()),
    }
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    pub const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tokenizer");

    /// A copy of the golden tokenizer with another tokenizer_config.json and other files beside it.
    fn with_files(config: Value, files: &[(&str, &str)]) -> Result<TextTokenizer> {
        let dir = tempfile::tempdir()?;
        std::fs::copy(Path::new(GOLDEN).join("tokenizer.json"), dir.path().join("tokenizer.json"))?;
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string())?;
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text)?;
        }
        TextTokenizer::load(dir.path(), &Zoned::now())
    }

    /// The golden tokenizer with another chat template: `generation` marks what the assistant says, `variables` writes tools,
    /// tool calls and a date.
    pub fn with_template(name: &str) -> TextTokenizer {
        let template = std::fs::read_to_string(Path::new(GOLDEN).join(format!("{name}_template.jinja"))).unwrap();
        let config = std::fs::read(Path::new(GOLDEN).join("tokenizer_config.json")).unwrap();
        with_files(serde_json::from_slice(&config).unwrap(), &[("chat_template.jinja", &template)]).unwrap()
    }

    #[test]
    fn encodes_and_decodes_as_tokenizers_does() {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &Zoned::now()).unwrap();
        let golden = std::fs::read(Path::new(GOLDEN).join("tokenized.json")).unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        for case in golden["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(json!(ids), case["ids"], "{text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }

    #[test]
    fn special_tokens_come_from_any_of_the_files() {
        let map = ("special_tokens_map.json", r#"{"eos_token": {"content": "<|im_end|>"}}"#);
        let generation = ("generation_config.json", r#"{"eos_token_id": [319, 318]}"#);
        let tokenizer = with_files(json!({}), &[map, generation, ("config.json", r#"{"eos_token_id": 7}"#)]).unwrap();
        assert_eq!((tokenizer.eos_token(), tokenizer.eos_token_ids()), (Some("<|im_end|>"), &[7, 318, 319][..]));
        assert!(!tokenizer.has_chat_template());
        assert!(tokenizer.render(&[], false).is_err());
    }

    #[test]
    fn the_template_file_wins_over_the_default_of_a_list() {
        let config = json!({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]});
        let render =
            |files: &[(&str, &str)]| with_files(config.clone(), files).unwrap().render(&[], false).unwrap().text;
        assert_eq!(render(&[]), "d");
        assert_eq!(render(&[("chat_template.jinja", "j")]), "j");
        let error = with_files(json!({"chat_template": [{"name": "rag", "template": "r"}]}), &[]).err().unwrap();
        assert!(format!("{error:#}").contains("tokenizer_config.json: chat_template"), "{error:#}");
    }

    #[test]
    fn the_identity_follows_files_and_tokens() {
        let of = |files: &[(&str, &str)]| with_files(json!({}), files).unwrap().identity();
        let plain = of(&[]);
        assert_eq!((plain.len(), &plain), (32, &of(&[])));
        for (name, text) in [
            ("chat_template.jinja", "x"),
            ("special_tokens_map.json", "{}"),
            ("tokenizer_config.json", "{ }"),
            ("generation_config.json", r#"{"eos_token_id": 3}"#),
        ] {
            assert_ne!(of(&[(name, text)]), plain, "{name}");
        }
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = TextTokenizer::load(dir.path(), &Zoned::now()).err().unwrap().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("tokenizer.json"), "{error}");
    }
}
