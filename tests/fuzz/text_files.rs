//! Fuzz targets of the files that become text and tokens: those of a tokenizer, chat templates, rows.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use anyhow::Result;
use fsdp_qlora::testing::data::{Prompts, Source};
use fsdp_qlora::testing::{ChatTemplate, DataOptions, Dataset, Format, LossOn, Overlong, Packing, TextTokenizer};
use jiff::Zoned;
use serde_json::{Map, Value, json};

use super::driver::Target;
use super::folder::Folder;
use super::form::Form;
use super::golden;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// A template may take 1 GiB and 30 seconds before it is refused.
const TEMPLATE_BYTES: usize = 3 << 29;
const TEMPLATE_SECONDS: f64 = 40.0;

fn file(name: &str) -> Vec<u8> {
    fs::read(golden("tokenizer").join(name)).unwrap()
}

fn conversation() -> Vec<Value> {
    let call = json!({"type": "function", "function": {"name": "f", "arguments": {"x": 1.5, "y": [null, "a"]}}});
    vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "What is 2 + 2?"}),
        json!({"role": "assistant", "content": "<think>\n4?\n</think>\n4", "reasoning": "4?", "tool_calls": [call]}),
        json!({"role": "tool", "content": {"x": [1, 2]}}),
        json!({"role": "assistant", "content": "4"}),
    ]
}

fn variables() -> Map<String, Value> {
    let tool =
        json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}});
    Map::from_iter([("tools".into(), json!([tool])), ("enable_thinking".into(), json!(false))])
}

/// Loads a tokenizer and uses all of it.
fn use_tokenizer(dir: &Path) -> Result<()> {
    let tokenizer = TextTokenizer::load(dir, &Zoned::now())?;
    for text in ["The quick  brown\nfox <|im_start|>ü𝒳 12345", ""] {
        let ids = tokenizer.encode(text, true)?;
        tokenizer.encode_with_offsets(text, false)?;
        tokenizer.decode(&ids, true)?;
    }
    if tokenizer.has_chat_template() {
        tokenizer.render_with(&conversation(), &variables(), true)?;
    }
    Ok(())
}

/// The files beside tokenizer.json, as an object of names and contents.
pub fn tokenizer_config() -> Target {
    const FILES: [&str; 6] = [
        TOKENIZER_CONFIG,
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "config.json",
        "chat_template.jinja",
    ];
    let folder = Folder::new(&[(TOKENIZER, file(TOKENIZER))]);
    let read = move |input: &[u8]| {
        let files: Map<String, Value> = serde_json::from_slice(input).unwrap_or_default();
        for name in FILES {
            let _ = fs::remove_file(folder.path().join(name));
            match files.get(name) {
                Some(Value::String(text)) => folder.write(name, text.as_bytes()),
                Some(value) => folder.write(name, value.to_string().as_bytes()),
                None => {}
            }
        }
        let result = use_tokenizer(&folder.path());
        folder.check_outside();
        result
    };
    let words =
        &["LlamaTokenizer", "add_prefix_space", "legacy", "extra_special_tokens", "image_token", "▁", "../outside/a"];
    let config: Value = serde_json::from_slice(&file(TOKENIZER_CONFIG)).unwrap();
    let seeds = vec![json!({TOKENIZER_CONFIG: config}).to_string().into_bytes()];
    let target = Target::new(Form::Json, words, seeds, read);
    Target { max_bytes: TEMPLATE_BYTES, max_seconds: TEMPLATE_SECONDS, ..target }
}

/// tokenizer.json.
pub fn tokenizer() -> Target {
    let folder = Folder::new(&[(TOKENIZER_CONFIG, file(TOKENIZER_CONFIG))]);
    let read = move |input: &[u8]| {
        folder.write(TOKENIZER, input);
        use_tokenizer(&folder.path())
    };
    let words =
        &["Unigram", "WordPiece", "WordLevel", "Metaspace", "Sequence", "Split", "Regex", "(a+)+$", "Replace", "Strip"];
    Target::new(Form::Json, words, vec![file(TOKENIZER)], read)
}

/// A chat template.
pub fn template() -> Target {
    let read = |input: &[u8]| {
        let text = String::from_utf8_lossy(input);
        let tokens = ["bos_token", "eos_token"].map(|name| (name.to_string(), format!("<{name}>")));
        let template = ChatTemplate::new(&text, tokens.to_vec(), &Zoned::now())?;
        let rendered = template.render_with(&conversation(), &variables(), true)?;
        for span in &rendered.assistant_spans {
            assert!(rendered.text.get(span.clone()).is_some(), "{span:?} of {} bytes", rendered.text.len());
        }
        Ok(())
    };
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(golden("chat_templates.json")).unwrap()).unwrap();
    let mut seeds: Vec<Vec<u8>> = cases.iter().filter_map(|case| Some(case["template"].as_str()?.into())).collect();
    seeds.dedup();
    let target = Target::new(Form::Text, TEMPLATE_WORDS, seeds, read);
    Target { max_bytes: TEMPLATE_BYTES, max_seconds: TEMPLATE_SECONDS, ..target }
}

const TEMPLATE_WORDS: &[&str] = &[
    "{% for a in range(1000) %}",
    "{% endfor %}",
    "{% set a = a ~ a %}",
    "{% set ns = namespace(a=[]) %}",
    "{% set ns.a = ns.a + [ns.a] %}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{% include '../outside/a' %}",
    "{% import 'a' as b %}",
    "{% extends 'a' %}",
    "{% block a %}{% endblock %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{{ 'a' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ 'a' * -1 }}",
    "{{ 2 ** 1000 }}",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ range(1000000000) | list }}",
    "{{ 'a'.replace('', 'aaaa') }}",
    "{{ 'a'.split('') }}",
    "{{ '%s' % 'a' }}",
    "{{ '{:>1000}'.format('a') }}",
    "{{ messages | tojson(indent=4) }}",
    "{{ strftime_now('%Y-%m-%d') }}",
    "{{ raise_exception('no') }}",
    "{{ loop.previtem }}",
    " | sort(attribute='a')",
    " | batch(3)",
    " | indent(1000000)",
    " | join",
    " | unique",
    " | slice(3)",
    " | center(1000000)",
    "[::-1]",
    "[:1:0]",
    " is defined",
    " if a else b",
    "(((((((",
];

/// A folder with a tokenizer and a chat template.
fn with_tokenizer() -> (Folder, TextTokenizer) {
    let folder = Folder::new(&[(TOKENIZER, file(TOKENIZER)), (TOKENIZER_CONFIG, file(TOKENIZER_CONFIG))]);
    folder.write("chat_template.jinja", &file("generation_template.jinja"));
    let tokenizer = TextTokenizer::load(&folder.path(), &Zoned::now()).unwrap();
    (folder, tokenizer)
}

/// Rows to be continued by `generate`; the form of the file and the option follow from the rows.
pub fn prompts() -> Target {
    let (folder, tokenizer) = with_tokenizer();
    let read = move |input: &[u8]| {
        let hash = hash(input);
        let name = ["rows.jsonl", "rows.jsonl", "rows.json", "rows.csv", "rows.txt"][hash / 2 % 5];
        folder.write(name, input);
        let prompts = Prompts { tokenizer: &tokenizer, raw: hash.is_multiple_of(2) };
        let (rows, _) = prompts.of_file(&folder.path().join(name))?;
        assert!(!rows.is_empty(), "no row and no message");
        Ok(())
    };
    let words =
        &["prompt", "messages", "text", "role", "content", "user", "assistant", "tools", "chat_template_kwargs"];
    let seeds =
        ["{\"prompt\": \"a\"}\n{\"text\": \"b\"}", "[{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}]"];
    Target::new(Form::Lines, words, seeds.map(Vec::from).to_vec(), read)
}

/// Rows of a data set; the form of the file and the options follow from the rows.
pub fn rows() -> Target {
    let (folder, tokenizer) = with_tokenizer();
    let read = move |input: &[u8]| {
        let (name, format, options) = options(input);
        folder.write(name, input);
        let sources = [Source { format, ..Source::new(folder.path().join(name)) }];
        let dataset = Dataset::load(&sources, Some(&tokenizer), 320, &options)?;
        dataset.digest();
        assert!(dataset.sequence_lengths().all(|length| length > 0), "an empty sequence");
        Dataset::load_with_held_out(&sources, Some(&tokenizer), 320, &options, 0.3).map(drop)
    };
    let words = &[
        "input_ids",
        "labels",
        "attention_mask",
        "position_ids",
        "seq_lengths",
        "tools",
        "chat_template_kwargs",
        "conversations",
        "from",
        "value",
        "function_call",
        "weight",
    ];
    Target::new(Form::Lines, words, vec![fs::read(golden("qlora_steps/rows.jsonl")).unwrap()], read)
}

fn hash(input: &[u8]) -> usize {
    let mut hash = DefaultHasher::new();
    input.hash(&mut hash);
    hash.finish() as usize
}

fn options(input: &[u8]) -> (&'static str, Format, DataOptions) {
    let hash = hash(input);
    let name = ["rows.jsonl", "rows.jsonl", "rows.jsonl", "rows.json", "rows.csv", "rows.txt"][hash / 2048 % 6];
    let format = [Format::Auto, Format::Auto, Format::Auto, Format::Messages][hash % 4];
    let options = DataOptions {
        loss_on: [LossOn::Auto, LossOn::Auto, LossOn::All, LossOn::Completion, LossOn::Assistant][hash / 4 % 5],
        packing: [Packing::BestFit, Packing::Wrapped, Packing::None][hash / 32 % 3],
        overlong: [Overlong::Truncate, Overlong::Split, Overlong::Drop, Overlong::Error][hash / 128 % 4],
        max_length: [2, 3, 64, 1024][hash / 512 % 4],
    };
    (name, format, options)
}
