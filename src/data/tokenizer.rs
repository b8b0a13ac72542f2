//! The tokenizer of a Hugging Face directory, with its chat template and special tokens.
//!
//! transformers 5.24 is followed, for a folder with a tokenizer.json:
//!
//! - Tokens that other files name are added: `special_tokens`.
//! - `add_bos_token`, `add_eos_token` and `model_max_length` of tokenizer_config.json have no effect:
//!   tokenizer.json's post-processor says what is added to a text, and nothing is cut.
//! - `tokenizer_class: LlamaTokenizer` (or LlamaTokenizerFast), where tokenizer.json is not byte-level, takes
//!   vocabulary and merges from there and puts its own normalizer, pre-tokenizer and decoder in the place of those:
//!   `legacy` (false where it is missing) and `add_prefix_space` decide where a text gets a space in front. Its
//!   default tokens are `<s>`, `</s>` and `<unk>`.
//! - With any other class tokenizer.json is taken as it is. transformers 5 does so for PreTrainedTokenizerFast and
//!   TokenizersBackend; GPT2Tokenizer and other classes of its own it rebuilds from vocabulary and merges, which is
//!   the same for what these classes saved. `add_prefix_space` then has to be what tokenizer.json says.
//! - `clean_up_tokenization_spaces` is about decoding. It is not done, as by default.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Zoned;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::{NormalizerWrapper, Replace};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use xxhash_rust::xxh3::Xxh3Default;

use super::chat_template::{ChatTemplate, Rendered};
use super::growth;
use super::special_tokens::{self, Files};
use crate::files;
use crate::guarded::guarded;

/// Files that decide how text becomes tokens, in the order in which the identity covers them.
const FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE];
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The template that transformers takes for conversations with tools.
pub const TOOL_TEMPLATE_FILE: &str = "additional_chat_templates/tool_use.jinja";

/// Text to token ids and back.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// The template and the file that it stands in.
    template: Option<(PathBuf, ChatTemplate)>,
    /// The file with another template for conversations with tools.
    tool_template: Option<PathBuf>,
    eos_token: Option<String>,
    eos_token_ids: Vec<u32>,
    identity: String,
}

impl TextTokenizer {
    /// Reads tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    /// chat_template.jinja and the eos ids of generation_config.json and config.json. `now` is what the template's
    /// `strftime_now` tells.
    pub fn load(dir: &Path, now: &Zoned) -> Result<TextTokenizer> {
        let path = dir.join("tokenizer.json");
        ensure!(path.exists(), "{}: tokenizer.json is missing; other tokenizer files are not read", dir.display());
        let bytes = files::read(&path, files::MAX_TOKENIZER_BYTES)?;
        growth::check_file(&bytes).with_context(|| path.display().to_string())?;
        let mut tokenizer = call(|| Tokenizer::from_bytes(&bytes)).with_context(|| path.display().to_string())?;
        // Truncation and padding are decided by the data set or the prompt, not by whoever saved the file.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let mut named_by = Files {
            config: json_file(&dir.join("tokenizer_config.json"))?,
            map: json_file(&dir.join("special_tokens_map.json"))?,
            added: json_file(&dir.join("added_tokens.json"))?,
        };
        follow_class(&mut tokenizer, &mut named_by.config)
            .with_context(|| dir.join("tokenizer_config.json").display().to_string())?;
        growth::check(&tokenizer).with_context(|| dir.display().to_string())?;
        let special_tokens =
            special_tokens::add(&mut tokenizer, &named_by).with_context(|| dir.display().to_string())?;
        let config = json_file(&dir.join("config.json"))?;
        for (name, token) in special_tokens.iter().filter(|(name, _)| name == "bos_token" || name == "eos_token") {
            check_token(&tokenizer, name, token, &config).with_context(|| dir.display().to_string())?;
        }
        let eos_token = special_tokens.iter().find(|(name, _)| name == "eos_token").map(|(_, token)| token.clone());
        let template = match template_source(dir, &named_by.config)? {
            Some((file, source)) => {
                let template = ChatTemplate::new(&source, special_tokens, now);
                Some((file.clone(), template.with_context(|| file.display().to_string())?))
            }
            None => None,
        };
        let mut eos_token_ids: Vec<u32> = eos_token.iter().filter_map(|t| tokenizer.token_to_id(t)).collect();
        for mut settings in [json_file(&dir.join("generation_config.json"))?, config] {
            let ids = settings.remove("eos_token_id").unwrap_or_default();
            let ids = ids.as_array().cloned().unwrap_or_else(|| vec![ids]);
            eos_token_ids.extend(ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let identity = identity(dir, eos_token.as_deref(), &eos_token_ids)?;
        let tool_template = tool_template(dir, &named_by.config);
        Ok(TextTokenizer { tokenizer, template, tool_template, eos_token, eos_token_ids, identity })
    }

    /// A digest in hex of all files that decide how text becomes tokens, and of the end-of-sequence token and ids.
    pub fn identity(&self) -> String {
        self.identity.clone()
    }

    /// Token ids; `add_special_tokens` as the tokenizer's post-processor does it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        // Without offsets it takes half the memory.
        let encoding = call(|| self.tokenizer.encode_fast(text, add_special_tokens)).context("tokenizing")?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids, and the bytes of the text that each stands for.
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = call(|| self.tokenizer.encode(text, add_special_tokens)).context("tokenizing")?;
        let offsets = encoding.get_offsets().iter().map(|&(begin, end)| begin..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// Text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        call(|| self.tokenizer.decode(ids, skip_special_tokens)).context("decoding")
    }

    /// A token as the vocabulary has it, e.g. `Ġthe`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Returns true if there is a template, without which [`TextTokenizer::render`] fails.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Returns true if the chat template says which text the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.template.as_ref().is_some_and(|(_, template)| template.marks_generation())
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
        let Some((file, template)) = &self.template else {
            bail!("the tokenizer has no chat template (tokenizer_config.json: chat_template, or chat_template.jinja)")
        };
        if let (Some(of_tools), true) = (&self.tool_template, variables.contains_key("tools")) {
            bail!(
                "tools: {} has a chat template for them, tool_use, and only the default one is read; help: make tool_use \
                 the text of {TEMPLATE_FILE}",
                of_tools.display()
            );
        }
        template.render_with(messages, variables, add_generation_prompt).with_context(|| file.display().to_string())
    }

    /// Returns true if the chat template mentions a word; see [`ChatTemplate::mentions`].
    pub fn template_mentions(&self, word: &str) -> bool {
        self.template.as_ref().is_some_and(|(_, template)| template.mentions(word))
    }

    /// Returns the time as far as the chat template may write it; see [`ChatTemplate::visible_time`].
    pub fn visible_time(&self) -> Option<String> {
        self.template.as_ref().and_then(|(_, template)| template.visible_time())
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

/// Calls the tokenizers library, which panics on some files.
pub(super) fn call<T>(f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    guarded("tokenizer.json", || f().map_err(|error| anyhow!("{error}")))
}

/// An object; empty when the file is not there.
fn json_file(path: &Path) -> Result<Map<String, Value>> {
    if !files::is_there(path) {
        return Ok(Map::new());
    }
    files::read_json(path, files::MAX_SETTINGS_BYTES)
}

/// Rebuilds the tokenizer where transformers' class does, and adds that class's defaults to the settings.
fn follow_class(tokenizer: &mut Tokenizer, config: &mut Map<String, Value>) -> Result<()> {
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let prefix = config.get("add_prefix_space").and_then(Value::as_bool);
    let parts = serde_json::json!([tokenizer.get_pre_tokenizer(), tokenizer.get_decoder()]);
    let byte_level = find_type(&parts, "ByteLevel");
    if class.trim_end_matches("Fast") != "LlamaTokenizer" || byte_level.is_some() {
        let is_generic = ["", "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast"]
            .contains(&class);
        let found = find_type(&parts[0], "ByteLevel").and_then(|part| part["add_prefix_space"].as_bool());
        if let (false, Some(wanted), Some(found)) = (is_generic, prefix, found) {
            ensure!(
                wanted == found,
                "add_prefix_space: found {wanted}, but tokenizer.json has {found}; allowed with {class}: the same in both"
            );
        }
        return Ok(());
    }
    let is_legacy = config.get("legacy").and_then(Value::as_bool).unwrap_or(false);
    let scheme = match prefix.unwrap_or(true) {
        true if is_legacy => PrependScheme::Always,
        true => PrependScheme::First,
        false => PrependScheme::Never,
    };
    let fail = |e| anyhow!("{e}");
    tokenizer.with_normalizer(None::<NormalizerWrapper>).map_err(fail)?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', scheme, false)));
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new("▁", " ").map_err(fail)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if scheme != PrependScheme::Never {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Sequence::new(decoders)));
    for (name, token) in [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")] {
        config.entry(name).or_insert(token.into());
    }
    Ok(())
}

/// The part of a tokenizer.json of this type, at any depth.
fn find_type<'a>(parts: &'a Value, kind: &str) -> Option<&'a Value> {
    match parts {
        Value::Object(part) if part.get("type").is_some_and(|t| t == kind) => Some(parts),
        Value::Object(part) => part.values().find_map(|part| find_type(part, kind)),
        Value::Array(parts) => parts.iter().find_map(|part| find_type(part, kind)),
        _ => None,
    }
}

/// A token that begins or ends texts has to be one token, of an id that the model has.
fn check_token(tokenizer: &Tokenizer, name: &str, token: &str, config: &Map<String, Value>) -> Result<()> {
    let encoding = call(|| tokenizer.encode_fast(token, false)).context("tokenizing")?;
    let ids = encoding.get_ids();
    let &[id] = ids else {
        bail!("{name}: found {token:?}, of which the tokenizer makes {} tokens; allowed: one", ids.len())
    };
    let vocab_size = config.get("vocab_size").and_then(Value::as_u64).unwrap_or(u64::MAX);
    ensure!(
        u64::from(id) < vocab_size,
        "{name}: found {token:?}, which gets the token id {id}, but config.json has vocab_size {vocab_size}; help: name a token \
         that the model has"
    );
    Ok(())
}

/// An xxh3 digest of 128 bits, in hex, over the name, size and bytes of each file and the tokens that were decided.
fn identity(dir: &Path, eos_token: Option<&str>, eos_token_ids: &[u32]) -> Result<String> {
    let mut digest = Xxh3Default::new();
    for name in FILES {
        let path = dir.join(name);
        if files::is_there(&path) {
            let bytes = files::read(&path, files::MAX_TOKENIZER_BYTES)?;
            digest.update(format!("{name} {}\n", bytes.len()).as_bytes());
            digest.update(&bytes);
        }
    }
    digest.update(format!("{eos_token:?} {eos_token_ids:?}").as_bytes());
    Ok(format!("{:032x}", digest.digest128()))
}

/// Returns the file with a template named `tool_use`, where transformers would find it.
fn tool_template(dir: &Path, config: &Map<String, Value>) -> Option<PathBuf> {
    if files::is_there(&dir.join(TEMPLATE_FILE)) {
        return Some(dir.join(TOOL_TEMPLATE_FILE)).filter(|file| files::is_there(file));
    }
    template_named(config.get("chat_template")?.as_array()?, "tool_use").map(|_| dir.join("tokenizer_config.json"))
}

/// Returns the template of this name in a list of them; the last one if there are several.
fn template_named<'a>(list: &'a [Value], name: &str) -> Option<&'a Value> {
    list.iter().rfind(|template| template.get("name").is_some_and(|found| found == name))
}

/// The default chat template and its file: chat_template.jinja before tokenizer_config.json. Other templates
/// (`additional_chat_templates/`, other names of a list) have to be asked for in transformers, but for `tool_use`;
/// nothing asks for them here.
fn template_source(dir: &Path, config: &Map<String, Value>) -> Result<Option<(PathBuf, String)>> {
    let path = dir.join(TEMPLATE_FILE);
    if files::is_there(&path) {
        let source = files::read_text(&path, files::MAX_SETTINGS_BYTES)?;
        return Ok(Some((path, source)));
    }
    let path = dir.join("tokenizer_config.json");
    let place = || format!("{}: chat_template", path.display());
    let source = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => source.clone(),
        Some(Value::Array(list)) => {
            let source = template_named(list, "default").and_then(|t| t.get("template")?.as_str()).map(str::to_string);
            source.with_context(|| format!("{}: none of the list is named default", place()))?
        }
        Some(other) => {
            let other = files::shown(&other.to_string());
            bail!("{}: found {other}; allowed: a string, or a list of {{name, template}}", place())
        }
    };
    Ok(Some((path, source)))
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

    /// The golden tokenizer with another chat template: `generation` marks what the assistant says, `variables`
    /// writes tools, tool calls and a date.
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
        let tools = Map::from_iter([("tools".to_string(), json!([{"name": "f"}]))]);
        let named = |name: &str| json!({"name": name, "template": "t"});
        let both = with_files(json!({"chat_template": [named("default"), named("tool_use")]}), &[]).unwrap();
        assert_eq!(both.render(&[], false).unwrap().text, "t");
        let error = both.render_with(&[], &tools, false).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json has a chat template for them, tool_use"), "{error}");
        let one = with_files(config.clone(), &[("chat_template.jinja", "j")]).unwrap();
        assert_eq!(one.render_with(&[], &tools, false).unwrap().text, "j");
        let refused = with_files(config.clone(), &[("chat_template.jinja", "{{ raise_exception('no') }}")]).unwrap();
        let error = format!("{:#}", refused.render(&[], false).unwrap_err());
        assert!(error.contains("chat_template.jinja: the chat template refuses: invalid operation: no"), "{error}");
    }

    /// The library reads a decoder twice, and the second time unwraps.
    #[test]
    fn a_file_that_the_library_panics_on_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let text = std::fs::read_to_string(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
        let decoder = text.find("\"decoder\": {").unwrap() + "\"decoder\": {".len();
        std::fs::write(&path, format!("{}\"x\": \"\\ud800\", {}", &text[..decoder], &text[decoder..])).unwrap();
        let error = format!("{:#}", TextTokenizer::load(dir.path(), &Zoned::now()).map(drop).unwrap_err());
        assert!(error.contains("tokenizer.json: the library that reads tokenizer.json fails on it"), "{error}");
    }

    /// A tokenizer.json like Llama 2's: bytes, `▁`, a, b, c and the merges `▁a` (263) and `ab` (264).
    fn llama2() -> Value {
        let mut vocab: Map<String, Value> = Map::new();
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let pieces = ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes);
        for piece in pieces.chain(["▁", "a", "b", "c", "▁a", "ab"].map(String::from)) {
            vocab.insert(piece, vocab.len().into());
        }
        let special = |(id, content): (usize, &str)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let added: Vec<Value> = ["<unk>", "<s>", "</s>"].into_iter().enumerate().map(special).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "post_processor": null,
            "pre_tokenizer": null,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": [["▁", "a"], ["a", "b"]]},
        })
    }

    /// Expected ids are those of transformers 5.24.
    #[test]
    fn a_llama_tokenizer_puts_spaces_in_front_as_transformers_does() {
        let load = |config: Value| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("tokenizer.json"), llama2().to_string()).unwrap();
            std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
            TextTokenizer::load(dir.path(), &Zoned::now()).unwrap()
        };
        let first = vec![263, 2, 261, 259, 262, 2, 263, 261];
        let always = vec![263, 2, 259, 261, 259, 262, 2, 263, 261];
        let never = vec![260, 2, 261, 259, 262, 2, 263, 261];
        let json_alone = vec![263, 2, 259, 261, 259, 262, 2, 259, 263, 261];
        for (config, expected) in [
            (json!({"tokenizer_class": "LlamaTokenizer"}), &first),
            (json!({"tokenizer_class": "LlamaTokenizerFast", "legacy": false}), &first),
            (json!({"tokenizer_class": "LlamaTokenizer", "legacy": true}), &always),
            (json!({"tokenizer_class": "LlamaTokenizer", "legacy": true, "add_prefix_space": false}), &never),
            (json!({"tokenizer_class": "PreTrainedTokenizerFast", "legacy": false}), &json_alone),
        ] {
            assert_eq!(load(config.clone()).encode("a</s>b c</s> ab", false).unwrap(), *expected, "{config}");
        }
        let llama = load(json!({"tokenizer_class": "LlamaTokenizer"}));
        assert_eq!((llama.eos_token(), llama.decode(&first, true).unwrap().as_str()), (Some("</s>"), "ab c ab"));
    }

    #[test]
    fn tokens_that_cannot_end_a_text_are_refused() {
        let small = ("config.json", r#"{"vocab_size": 320}"#);
        let error = |config: Value| format!("{:#}", with_files(config, &[small]).err().unwrap());
        let new = error(json!({"eos_token": "<|new|>"}));
        assert!(new.contains("eos_token") && new.contains("token id 320") && new.contains("vocab_size 320"), "{new}");
        // Named, but not used: allowed.
        assert!(with_files(json!({"pad_token": "<|new|>"}), &[small]).is_ok());
        let other = json!({"eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true});
        assert!(error(other).contains("add_prefix_space: found true"));
        assert!(with_files(json!({"add_prefix_space": true, "add_bos_token": true}), &[small]).is_ok());
    }

    #[test]
    fn the_identity_follows_files_and_tokens() {
        let of = |files: &[(&str, &str)]| with_files(json!({}), files).unwrap().identity();
        let plain = of(&[]);
        assert_eq!((plain.len(), &plain), (32, &of(&[])));
        for (name, text) in [
            ("chat_template.jinja", "x"),
            ("added_tokens.json", "{}"),
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
