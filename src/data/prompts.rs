//! Prompts to be continued, from the command line and from files of rows.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::TextTokenizer;
use super::column_names::ColumnNames;
use super::message::{self, Message};
use super::row::{Columns, OF_TEMPLATE};
use super::source;
use super::variables::{self, Variables};
use crate::files::shown;

/// The columns that a prompt may be in, as a text or as messages. A row has one of them.
const COLUMNS: [&str; 3] = ["prompt", "messages", "text"];

/// The way from a prompt to tokens.
pub struct Prompts<'a> {
    pub tokenizer: &'a TextTokenizer,
    /// True if a text is given to the model as it is, false if it becomes the message of a user, where the model has a
    /// chat template.
    pub raw: bool,
}

impl Prompts<'_> {
    /// Returns the tokens of a text.
    pub fn of_text(&self, text: &str) -> Result<Vec<u32>> {
        match self.tokenizer.has_chat_template() && !self.raw {
            true => self.of_messages(&[Message::new("user", text)], &Variables::new()),
            false => self.encode(text, true),
        }
    }

    fn of_messages(&self, messages: &[Message], variables: &Variables) -> Result<Vec<u32>> {
        let keys: Vec<Value> = messages.iter().map(|message| message.keys.clone()).collect();
        self.encode(&self.tokenizer.render_with(&keys, variables, true)?.text, false)
    }

    fn encode(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(text, special_tokens)?;
        ensure!(!tokens.is_empty(), "the prompt has no token");
        Ok(tokens)
    }

    /// Returns the tokens of each row of a file, and a sentence about the columns that are not read.
    ///
    /// # Errors
    /// The file has no row, or a row is no prompt; the error names the row.
    pub fn of_file(&self, path: &Path) -> Result<(Vec<Vec<u32>>, Option<String>)> {
        let (mut prompts, mut unread) = (Vec::new(), BTreeSet::new());
        let names = ColumnNames::default();
        for object in source::objects(path)? {
            let (place, object) = object?;
            let mut columns = Columns::new(object, &names);
            prompts.push(self.of_row(&mut columns).with_context(|| place.to_string())?);
            unread.extend(columns.names().map(str::to_string));
        }
        ensure!(!prompts.is_empty(), "{}: has no rows", path.display());
        let names: Vec<String> = unread.iter().map(|name| shown(name)).collect();
        let note = format!("{}: these columns are not read: {}", path.display(), names.join(", "));
        Ok((prompts, (!names.is_empty()).then_some(note)))
    }

    fn of_row(&self, columns: &mut Columns<'_>) -> Result<Vec<u32>> {
        let found =
            COLUMNS.into_iter().filter(|column| columns.names().any(|name| name == *column)).collect::<Vec<_>>();
        let [column] = found[..] else {
            let names: Vec<&str> = columns.names().collect();
            bail!("found the columns {}; allowed: one of {}", shown(&format!("{names:?}")), COLUMNS.join(", "))
        };
        let value = columns.need(column)?;
        let variables = variables::take(columns)?;
        match value {
            Value::String(text) if column != "messages" => {
                if let Some(name) = variables.keys().next() {
                    bail!("{name}: {OF_TEMPLATE}");
                }
                self.of_text(&text)
            }
            Value::Array(_) if column != "text" => {
                ensure!(
                    !self.raw,
                    "{column}: found messages, and --raw leaves out the chat template that would write them"
                );
                let messages = message::list(column, value)?;
                let last = messages.last().map_or("", Message::role);
                ensure!(
                    last != "assistant",
                    "{column}: the last message is the assistant's; allowed: one to be answered"
                );
                self.of_messages(&messages, &variables)
            }
            other => {
                let allowed = match column {
                    "messages" => "a list of messages",
                    "text" => "a string",
                    _ => "a string or a list of messages",
                };
                bail!("{column}: found {}; allowed: {allowed}", shown(&other.to_string()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::GOLDEN;
    use super::*;

    #[test]
    fn rows_of_all_forms() {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let prompts = Prompts { tokenizer: &tokenizer, raw: false };
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = place.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let texts = |(rows, _): (Vec<Vec<u32>>, Option<String>)| -> Vec<String> {
            rows.iter().map(|ids| tokenizer.decode(ids, false).unwrap()).collect()
        };
        let rows = file(
            "rows.jsonl",
            r#"{"prompt": "fox", "id": 7}
               {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
               {"prompt": [{"role": "user", "content": "v"}], "tools": [{"name": "f"}]}
               {"text": "dog"}"#,
        );
        let (tokens, note) = prompts.of_file(&rows).unwrap();
        assert!(note.unwrap().ends_with("these columns are not read: id"));
        let rendered = |messages: &[(&str, &str)]| {
            let keys: Vec<Value> = messages.iter().map(|(role, content)| Message::new(role, content).keys).collect();
            tokenizer.render(&keys, true).unwrap().text
        };
        let expected =
            [&[("user", "fox")][..], &[("system", "s"), ("user", "u")], &[("user", "v")], &[("user", "dog")]];
        assert_eq!(texts((tokens, None)), expected.map(rendered));
        let raw = Prompts { raw: true, ..prompts };
        assert_eq!(texts(raw.of_file(&file("lines.txt", "one\n\ntwo\n")).unwrap()), ["one", "two"]);
        for (row, expected) in [
            (r#"{"prompt": "a", "text": "b"}"#, "rows.jsonl:1: found the columns"),
            (r#"{"question": "a"}"#, "allowed: one of prompt, messages, text"),
            (r#"{"prompt": 5}"#, "prompt: found 5; allowed: a string or a list of messages"),
            (r#"{"messages": "a"}"#, "messages: found \"a\"; allowed: a list of messages"),
            (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "the last message is the assistant's"),
            (r#"{"prompt": "a", "tools": [{"name": "f"}]}"#, "tools: it is for the chat template"),
            ("", "has no rows"),
        ] {
            let error = prompts.of_file(&file("rows.jsonl", row)).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
        let error = raw.of_file(&file("rows.jsonl", "{\"text\": \"a\"}\n{\"text\": \"\"}")).unwrap_err();
        assert!(format!("{error:#}").ends_with("rows.jsonl:2: the prompt has no token"), "{error:#}");
        let error =
            raw.of_file(&file("rows.jsonl", r#"{"messages": [{"role": "user", "content": "a"}]}"#)).unwrap_err();
        assert!(format!("{error:#}").contains("--raw leaves out"), "{error:#}");
    }
}
