//! Chat templates, rendered as transformers 5.24 renders them: Jinja through minijinja, values as Python has them
//! ([`python`]).
//!
//! A template comes with a model, so it is not trusted. It renders on a thread of its own with a large stack, because
//! syntax trees and values are walked recursively; with fuel, which counts instructions, and bytes and items that
//! they produce; and for a limited time and in limited memory, for work that fuel does not count: comparing strings,
//! and adding up lists, which minijinja does when their items are asked for. What passes a limit is refused; it
//! neither hangs nor takes all memory.
//!
//! Differences from Jinja2 that are known: `~` prints a float that the template itself computed as Rust does
//! (`0.00000001`, where Python has `1e-08`), and a list or dict prints characters that Python escapes as not
//! printable (U+00A0) as they are.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;
use serde_json::{Map, Value as Json};

use super::python;
use crate::files::shown;
use crate::guarded::guarded;

/// The filter `safe` where `+` follows.
const JOINED_SAFE: &str = "safe_before_plus";

/// Mark the assistant's spans in rendered text: noncharacters of Unicode, refused in messages.
const SPAN_BEGIN: char = '\u{FDD0}';
const SPAN_END: char = '\u{FDD1}';

/// Longest template. The longest of the 73 that TRL 1.16 has is of 20 kB.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Operators of a template: a chain of them is a syntax tree as deep as it is long. TRL's have up to 1,400.
const MAX_OPERATORS: usize = 10_000;
/// Instructions of one rendering; 64 bytes that it writes count as one, and so do 4 bytes of JSON.
const FUEL: u64 = 5_000_000;
/// Room for the deepest value that the fuel can build (0.7 million levels). Only what is used of it takes memory.
const STACK_BYTES: usize = 512 << 20;
/// Longest time of a rendering, which usually takes milliseconds.
const MAX_TIME: Duration = Duration::from_secs(30);
/// Memory that the process may gain during a rendering. Fuel pays for 320 MB of text, which may be there twice while
/// it grows.
const MAX_GROWTH_BYTES: u64 = 1 << 30;
/// Time between two looks at the clock and at memory.
const LOOK: Duration = Duration::from_millis(20);

/// Names under which a message's reasoning goes, by precedence.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A compiled template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
    source: String,
    now: Zoned,
}

/// Rendered text and the byte ranges that the assistant generates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub assistant_spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// `special_tokens` are variables of the template: `bos_token`, `eos_token`, …; `now` is what `strftime_now`
    /// formats.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>, now: &Zoned) -> Result<ChatTemplate> {
        check_size(source)?;
        let (source, marks_generation) = rewrite_generation(&mark_joins(&source.replace("\r\n", "\n")));
        let (text, time) = (source.clone(), now.clone());
        let environment = on_own_thread(move || {
            let mut environment = environment(time)?;
            environment
                .add_template_owned("chat", text)
                .map_err(|e| anyhow!("the chat template is not valid: {}", described(&e)))?;
            Ok(environment)
        })?;
        Ok(ChatTemplate {
            environment: Arc::new(environment),
            special_tokens,
            marks_generation,
            source,
            now: now.clone(),
        })
    }

    /// Returns true if the template says which text the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Returns true if this word stands anywhere in the template. A message's key that does not stand there is never
    /// read.
    pub fn mentions(&self, word: &str) -> bool {
        let is_there = |word: &str| self.source.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word);
        // Reasoning goes under two more names.
        is_there(word) || (REASONING.contains(&word) && REASONING[..2].iter().any(|name| is_there(name)))
    }

    /// Returns the time as far as the template may write it: a date where all formats that it gives to `strftime_now`
    /// are literals of days, months and years, else the time to the second; `None` if it never asks for the time.
    pub fn visible_time(&self) -> Option<String> {
        let mut uses = self.source.split("strftime_now").skip(1).map(str::trim_start).peekable();
        uses.peek()?;
        let is_date = |text: &str| text.starts_with("is defined") || python::is_of_dates(text);
        let format = if uses.all(is_date) { "%Y-%m-%d" } else { "%Y-%m-%dT%H:%M:%S%z" };
        Some(self.now.strftime(format).to_string())
    }

    /// Renders a conversation; `add_generation_prompt` ends it where the assistant begins to speak.
    ///
    /// Errors: what the template refuses with `raise_exception`, cannot do, or does beyond the limits of this module.
    pub fn render(&self, messages: &[Json], add_generation_prompt: bool) -> Result<Rendered> {
        self.render_with(messages, &Map::new(), add_generation_prompt)
    }

    /// Renders a conversation with further variables: `tools`, `documents`, and any others that the template reads.
    /// They replace special tokens of the same name.
    pub fn render_with(
        &self,
        messages: &[Json],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        for text in [serde_json::to_string(messages)?, serde_json::to_string(variables)?] {
            ensure!(
                !text.contains([SPAN_BEGIN, SPAN_END]),
                "a message holds U+FDD0 or U+FDD1, which mark what the assistant says; allowed: characters of Unicode"
            );
        }
        let mut context = Map::new();
        context.insert("messages".into(), messages.iter().map(prepared).collect());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        for key in ["tools", "documents"] {
            context.insert(key.into(), Json::Null);
        }
        for (name, token) in &self.special_tokens {
            context.insert(name.clone(), token.clone().into());
        }
        context.extend(variables.clone());
        let environment = self.environment.clone();
        let marked = on_own_thread(move || {
            let template = environment.get_template("chat").map_err(|e| anyhow!("{}", described(&e)))?;
            template.render(python::from_json(&Json::Object(context))).map_err(|e| match is_out_of_fuel(&e) {
                true => anyhow!(
                    "the chat template does too much: more than {FUEL} instructions, of which 64 bytes of text count as one"
                ),
                false => anyhow!("the chat template refuses: {}", described(&e)),
            })
        })?;
        Ok(take_spans(&marked))
    }
}

/// Filters, tests and functions that transformers has, and those of Jinja2 that minijinja has otherwise.
fn environment(now: Zoned) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| anyhow!("{e:#}"))?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(call_method);
    environment.set_formatter(|out: &mut Output, _: &mut State, value: &Value| {
        out.write_str(&python::str(value)).map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    environment.add_filter("string", |value: &Value| python::str(value));
    environment
        .add_filter("tojson", |state: &State, value: &Value, kwargs: Kwargs| python::to_json(state, value, kwargs));
    environment.add_filter("mark_generation", |text: String| format!("{SPAN_BEGIN}{text}{SPAN_END}"));
    environment.add_filter(JOINED_SAFE, |_: &Value| -> Result<Value, Error> {
        let help = "safe: + behind it, where Python escapes what follows as HTML; allowed: ~ in its place";
        Err(Error::new(ErrorKind::InvalidOperation, help))
    });
    environment.add_test("number", |value: &Value| python::is_number(value, true, true));
    environment.add_test("integer", |value: &Value| python::is_number(value, true, false));
    environment.add_test("float", |value: &Value| python::is_number(value, false, true));
    // To minijinja none is iterable, to Jinja not; undefined is to both. Templates ask it of `tools`, which is none.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| python::strftime(&format, &now));
    Ok(environment)
}

/// Methods of Python's types. A width in `format` is not paid for in fuel before the text is there.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if method == "format" {
        let text = value.as_str().unwrap_or_default();
        if text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4) {
            return Err(Error::new(ErrorKind::InvalidOperation, "format: a width or precision of more than 4 digits"));
        }
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

fn check_size(source: &str) -> Result<()> {
    let (bytes, allowed) = (source.len(), MAX_SOURCE_BYTES);
    ensure!(bytes <= allowed, "the chat template is of {bytes} bytes; allowed: at most {allowed}");
    let words = source.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| ["and", "not", "or"].contains(w));
    let operators = source.matches(['+', '-', '*', '/', '%', '~']).count() + words.count();
    ensure!(
        operators <= MAX_OPERATORS,
        "the chat template has {operators} operators (+ - * / % ~ and or not); allowed: at most {MAX_OPERATORS}"
    );
    Ok(())
}

/// Runs what a template can make deep or long on a thread with a large stack. A thread past a limit is left behind:
/// the program ends with the error.
fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = sync_channel(1);
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
    let (started, mut resident) = (Instant::now(), None);
    thread
        .spawn(move || {
            // Nobody listens after a limit.
            let _ = sender.send(guarded("the chat template", work));
        })
        .context("the thread that renders the chat template")?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => bail!("the thread that renders the chat template is gone"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        ensure!(
            started.elapsed() < MAX_TIME,
            "the chat template takes more than {} s for one conversation",
            MAX_TIME.as_secs()
        );
        let now = resident_bytes()?;
        ensure!(
            now.saturating_sub(*resident.get_or_insert(now)) < MAX_GROWTH_BYTES,
            "the chat template takes more than {} GiB of memory for one conversation",
            MAX_GROWTH_BYTES >> 30
        );
    }
}

/// Memory of this process.
fn resident_bytes() -> Result<u64> {
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).context(path)?;
    let kib = text.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("{path}: no VmRSS"))? * 1024)
}

/// An error of minijinja and its causes in one line, without the source text that it would show.
fn described(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    shown(&text)
}

fn is_out_of_fuel(error: &Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if cause.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return true;
        }
        source = cause.source();
    }
    false
}

/// A message as transformers hands it to a template: without keys whose value is null, and with its reasoning as
/// `reasoning_content` and `thinking`, whichever of the names it came under.
fn prepared(message: &Json) -> Json {
    let Json::Object(keys) = message else { return message.clone() };
    let mut keys: Map<String, Json> = keys.clone().into_iter().filter(|(_, value)| !value.is_null()).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|&name| keys.get(name).cloned()) {
        if !keys.contains_key("thinking") {
            keys.shift_insert(0, "thinking".into(), reasoning.clone());
        }
        keys.insert("reasoning_content".into(), reasoning);
    }
    Json::Object(keys)
}

/// Gives the filter `safe` another name where `+` follows. Python escapes as HTML what is joined to safe text so.
fn mark_joins(source: &str) -> String {
    let mut parts = source.split('|');
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |out, filter| {
        let joins = filter.trim_start().strip_prefix("safe").is_some_and(|rest| rest.trim_start().starts_with('+'));
        out + "|" + &if joins { filter.replacen("safe", JOINED_SAFE, 1) } else { filter.into() }
    })
}

/// `{% generation %}` is transformers' own tag. It becomes a filter block, a block tag too, so that whitespace
/// control (`-`, trim_blocks, lstrip_blocks) acts on it as on the original.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut out = String::new();
    let mut rest = source;
    let mut found = false;
    while let Some(begin) = rest.find("{%") {
        let Some(len) = rest[begin + 2..].find("%}") else { break };
        let end = begin + 2 + len + 2;
        let tag = &rest[begin..end];
        let word = tag[2..2 + len].trim_matches(['-', '+']).trim();
        out += &rest[..begin];
        match word {
            "generation" => {
                found = true;
                out += &tag.replacen(word, "filter mark_generation", 1);
            }
            "endgeneration" => out += &tag.replacen(word, "endfilter", 1),
            _ => out += tag,
        }
        rest = &rest[end..];
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

#[cfg(test)]
mod tests;
