//! Chat templates, rendered as transformers renders them: Jinja through minijinja.

use std::ops::Range;

use anyhow::{Result, anyhow, ensure};
use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Mark the assistant's spans in rendered text: noncharacters of Unicode, refused in messages.
const SPAN_BEGIN: char = '\u{FDD0}';
const SPAN_END: char = '\u{FDD1}';

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
    source: String,
}

/// Rendered text and the byte ranges that the assistant generates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub assistant_spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// `special_tokens` are variables of the template: `bos_token`, `eos_token`, …; `now` is what `strftime_now` formats.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>, now: &Zoned) -> Result<ChatTemplate> {
        let (source, marks_generation) = rewrite_generation(&source.replace("\r\n", "\n"));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| anyhow!("{e:#}"))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_filter("mark_generation", |text: String| format!("{SPAN_BEGIN}{text}{SPAN_END}"));
        // To minijinja none is iterable, to Jinja not; undefined is to both. Templates ask it of `tools`, which is none.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let now = now.clone();
        environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
            jiff::fmt::strtime::format(&format, &now)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        environment
            .add_template_owned("chat", source.clone())
            .map_err(|e| anyhow!("the chat template is not valid: {e:#}"))?;
        Ok(ChatTemplate { environment, special_tokens, marks_generation, source })
    }

    /// Whether it says which text the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Whether this word stands anywhere in the template. A message's key that does not is never read.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
    }

    /// Renders a conversation; `add_generation_prompt` ends it where the assistant begins to speak.
    /// Errors: what the template refuses with `raise_exception`, or cannot do.
    pub fn render(&self, messages: &[serde_json::Value], add_generation_prompt: bool) -> Result<Rendered> {
        self.render_with(messages, &serde_json::Map::new(), add_generation_prompt)
    }

    /// Renders a conversation with further variables: `tools`, `documents`, and any others that the template reads. They
    /// replace special tokens of the same name.
    pub fn render_with(
        &self,
        messages: &[serde_json::Value],
        variables: &serde_json::Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        for text in [serde_json::to_string(messages)?, serde_json::to_string(variables)?] {
            ensure!(
                !text.contains([SPAN_BEGIN, SPAN_END]),
                "a message holds U+FDD0 or U+FDD1, which mark what the assistant says; allowed: characters of Unicode"
            );
        }
        let mut context = serde_json::Map::new();
        context.insert("messages".into(), messages.into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        for key in ["tools", "documents"] {
            context.insert(key.into(), serde_json::Value::Null);
        }
        for (name, token) in &self.special_tokens {
            context.insert(name.clone(), token.clone().into());
        }
        context.extend(variables.clone());
        let template = self.environment.get_template("chat").map_err(|e| anyhow!("{e:#}"))?;
        let marked = template.render(Serde(&context)).map_err(|e| anyhow!("the chat template refuses: {e:#}"))?;
        Ok(take_spans(&marked))
    }
}

/// `{% generation %}` is transformers' own tag. It becomes a filter block, a block tag too, so that whitespace control
/// (`-`, trim_blocks, lstrip_blocks) acts on it as on the original.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut out = String::new();
    let mut rest = source;
    let mut found = false;
    while let Some(begin) = rest.find("{%") {
        let Some(len) = rest[begin..].find("%}") else { break };
        let tag = &rest[begin..begin + len + 2];
        let word = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out += &rest[..begin];
        match word {
            "generation" => {
                found = true;
                out += &tag.replacen(word, "filter mark_generation", 1);
            }
            "endgeneration" => out += &tag.replacen(word, "endfilter", 1),
            _ => out += tag,
        }
        rest = &rest[begin + len + 2..];
    }
    (out + rest, found)
}

fn take_spans(marked: &str) -> Rendered {
    let (mut text, mut assistant_spans, mut begin) = (String::new(), Vec::new(), 0);
    for c in marked.chars() {
        match c {
            SPAN_BEGIN => begin = text.len(),
            SPAN_END => assistant_spans.push(begin..text.len()),
            c => text.push(c),
        }
    }
    Rendered { text, assistant_spans }
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`; other arguments are refused.
fn to_json(_: &State, value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    if ensure_ascii == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii is true; allowed: false"));
    }
    kwargs.assert_all_used()?;
    let fail = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut bytes = Vec::new();
    match indent {
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)).map_err(fail)?
        }
        Some(n) => {
            let spaces = " ".repeat(n);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(fail)?
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Python's separators: `", "` and `": "`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, vec![("bos_token".into(), "<s>".into())], &Zoned::now()).unwrap()
    }

    fn golden() -> Vec<serde_json::Value> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/chat_templates.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn renders_as_transformers_does() {
        let cases = golden();
        assert!(!cases.is_empty());
        for (i, case) in cases.iter().enumerate() {
            let token = |key: &str| (key.to_string(), case[key].as_str().unwrap_or_default().to_string());
            let template = ChatTemplate::new(
                case["template"].as_str().unwrap(),
                vec![token("bos_token"), token("eos_token")],
                &Zoned::now(),
            );
            let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = template.unwrap().render(case["messages"].as_array().unwrap(), add_generation_prompt);
            let text = rendered.as_ref().ok().map(|r| r.text.as_str());
            assert_eq!(text, case["rendered"].as_str(), "case {i}, {}", case["name"]);
        }
    }

    #[test]
    fn generation_blocks_keep_whitespace_control() {
        let messages = [json!({"role": "assistant", "content": "é!"})];
        for (source, before, said) in [
            ("a{% generation %}\n  {{ messages[0].content }}{% endgeneration %}\nz", "a", "  é!"),
            ("a\n  {%- generation -%}\n  {{ messages[0].content }}\n  {%- endgeneration -%}\n z", "a", "é!"),
            ("a\n  {% generation %}\n{{ messages[0].content }}\n  {% endgeneration %}\nz", "a\n", "é!\n"),
        ] {
            let template = template(source);
            assert!(template.marks_generation());
            let rendered = template.render(&messages, false).unwrap();
            assert_eq!(rendered.text, format!("{before}{said}z"), "{source:?}");
            assert_eq!(rendered.assistant_spans, vec![before.len()..before.len() + said.len()], "{source:?}");
        }
    }

    #[test]
    fn to_json_is_pythons() {
        let messages = [json!({"b": [1, "<ü>"], "a": {}})];
        let plain = template("{{ messages[0] | tojson }}").render(&messages, false).unwrap().text;
        assert_eq!(plain, r#"{"b": [1, "<ü>"], "a": {}}"#);
        let indented = template("{{ messages[0] | tojson(indent=1, ensure_ascii=false) }}").render(&messages, false);
        assert_eq!(indented.unwrap().text, "{\n \"b\": [\n  1,\n  \"<ü>\"\n ],\n \"a\": {}\n}");
        let ascii = template("{{ messages[0] | tojson(ensure_ascii=true) }}").render(&messages, false);
        assert!(format!("{:#}", ascii.unwrap_err()).contains("ensure_ascii"));
    }

    #[test]
    fn variables_of_a_row() {
        let source =
            "{% if tools is none %}none{% else %}{{ tools | length }}{% endif %} {{ date_string }} {{ bos_token }}";
        let template = template(source);
        let variables = json!({"tools": [{}, {}], "date_string": "1 May 2025", "bos_token": "<b>"});
        let rendered = template.render_with(&[], variables.as_object().unwrap(), false).unwrap();
        assert_eq!(rendered.text, "2 1 May 2025 <b>");
        assert_eq!(template.render(&[], false).unwrap().text, "none  <s>");
        assert!(template.mentions("date_string") && !template.mentions("date"));
    }

    #[test]
    fn what_is_iterable_is_pythons() {
        let source = "{{ tools is iterable }} {{ nothing is iterable }} {{ messages is iterable }} {{ 1 is iterable }}";
        let rendered = template(source).render(&[], false).unwrap();
        assert_eq!(rendered.text.to_lowercase(), "false true true false");
    }

    #[test]
    fn refusals_say_why() {
        let error = template("{{ raise_exception('no system role') }}").render(&[], false).unwrap_err();
        assert!(format!("{error:#}").contains("no system role"));
        let marked = template("{{ messages[0].content }}").render(&[json!({"content": "\u{FDD0}"})], false);
        assert!(format!("{:#}", marked.unwrap_err()).contains("U+FDD0"));
        assert!(ChatTemplate::new("{% if %}", Vec::new(), &Zoned::now()).is_err());
    }

    #[test]
    fn special_tokens_and_crlf() {
        let rendered =
            template("{{ bos_token }}\r\n{% if tools is none %}\r\nx{% endif %}").render(&[], false).unwrap();
        assert_eq!(rendered, Rendered { text: "<s>\nx".into(), assistant_spans: vec![] });
        let year = template("{{ strftime_now('%Y') }}").render(&[], false).unwrap().text;
        assert!(year.parse::<u32>().is_ok_and(|y| y >= 2026), "{year}");
    }
}
