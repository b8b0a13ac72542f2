//! Chat templates, rendered as transformers renders them: Jinja through minijinja.

use std::ops::Range;

use anyhow::{Result, anyhow};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Mark the assistant's spans in rendered text; private-use characters that no text holds.
const SPAN_BEGIN: char = '\u{F8F0}';
const SPAN_END: char = '\u{F8F1}';

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
}

/// Rendered text and the byte ranges that the assistant generates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub assistant_spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// `special_tokens` are variables of the template: `bos_token`, `eos_token`, …
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<ChatTemplate> {
        let (source, marks_generation) = mark_generation(&source.replace("\r\n", "\n"));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| anyhow!("{e:#}"))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
            let now = jiff::Zoned::now();
            jiff::fmt::strtime::format(&format, &now)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        environment.add_template_owned("chat", source).map_err(|e| anyhow!("the chat template is not valid: {e:#}"))?;
        Ok(ChatTemplate { environment, special_tokens, marks_generation })
    }

    /// Whether it says which text the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders a conversation; `add_generation_prompt` ends it where the assistant begins to speak.
    pub fn render(&self, messages: &[serde_json::Value], add_generation_prompt: bool) -> Result<Rendered> {
        let mut context = serde_json::Map::new();
        context.insert("messages".into(), messages.into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        for key in ["tools", "documents"] {
            context.insert(key.into(), serde_json::Value::Null);
        }
        for (name, token) in &self.special_tokens {
            context.insert(name.clone(), token.clone().into());
        }
        let template = self.environment.get_template("chat").map_err(|e| anyhow!("{e:#}"))?;
        let marked = template.render(Serde(&context)).map_err(|e| anyhow!("the chat template refuses: {e:#}"))?;
        Ok(take_spans(&marked))
    }
}

/// `{% generation %}` is transformers' own tag: it becomes a block that marks its output.
fn mark_generation(source: &str) -> (String, bool) {
    let mut out = String::new();
    let mut rest = source;
    let mut found = false;
    while let Some(begin) = rest.find("{%") {
        let Some(len) = rest[begin..].find("%}") else { break };
        let tag = &rest[begin..begin + len + 2];
        let inner = &tag[2..tag.len() - 2];
        let (left, right) =
            (if inner.starts_with('-') { "-" } else { "" }, if inner.ends_with('-') { "-" } else { "" });
        out += &rest[..begin];
        match inner.trim_matches('-').trim() {
            "generation" => {
                found = true;
                out += &format!("{{%{left} if true {right}%}}{{{{ '{SPAN_BEGIN}' }}}}");
            }
            "endgeneration" => out += &format!("{{{{ '{SPAN_END}' }}}}{{%{left} endif {right}%}}"),
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

/// `json.dumps(value, ensure_ascii=False, indent=…)`.
fn to_json(_: &State, value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
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
