//! JSONL files, row by row, checked against their format.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::Format;

/// One row and where it stands.
#[derive(Clone, Debug)]
pub struct Row {
    pub content: Content,
    file: Arc<PathBuf>,
    /// Counted from 1.
    line: usize,
}

/// A row by its format.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Text(String),
    Messages(Vec<Value>),
    PromptCompletion {
        prompt: String,
        completion: String,
    },
    /// Both are lists of messages.
    Conversation {
        prompt: Vec<Value>,
        completion: Vec<Value>,
    },
    Alpaca {
        instruction: String,
        input: String,
        output: String,
    },
    /// `labels` with −100 for what does not count; padding has been dropped.
    Tokenized {
        input_ids: Vec<i64>,
        labels: Option<Vec<i64>>,
    },
}

impl Row {
    /// `file:line`
    pub fn place(&self) -> String {
        format!("{}:{}", self.file.display(), self.line)
    }

    /// What a model should learn to say: rows with the same answer are held out together.
    pub fn answer(&self) -> String {
        let content = |messages: &[Value]| {
            let of_assistant = |m: &&Value| m.get("role").is_some_and(|r| r == "assistant");
            messages
                .iter()
                .rev()
                .find(of_assistant)
                .or(messages.last())
                .map(|m| m["content"].as_str().map_or_else(|| m["content"].to_string(), str::to_string))
                .unwrap_or_default()
        };
        match &self.content {
            Content::Text(text) => text.clone(),
            Content::Messages(messages) => content(messages),
            Content::PromptCompletion { completion, .. } => completion.clone(),
            Content::Conversation { completion, .. } => content(completion),
            Content::Alpaca { output, .. } => output.clone(),
            Content::Tokenized { input_ids, .. } => format!("{input_ids:?}"),
        }
    }
}

/// All rows of files and folders (their *.jsonl, by name). Errors name file and line.
pub fn read(paths: &[PathBuf], format: Format) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut files: Vec<PathBuf> = std::fs::read_dir(path)
                .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
                .with_context(|| path.display().to_string())?;
            files.retain(|f| f.extension().is_some_and(|e| e == "jsonl"));
            files.sort();
            ensure!(!files.is_empty(), "{}: holds no *.jsonl file", path.display());
            for file in files {
                read_file(&file, format, &mut rows)?;
            }
        } else {
            read_file(path, format, &mut rows)?;
        }
    }
    Ok(rows)
}

fn read_file(path: &Path, mut format: Format, rows: &mut Vec<Row>) -> Result<()> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ensure!(
        extension == "jsonl",
        "{}: found .{extension}; allowed: .jsonl (json, parquet and txt are not supported yet)",
        path.display()
    );
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let file = Arc::new(path.to_path_buf());
    let before = rows.len();
    // Not as text: what is no UTF-8 is refused with its line too.
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    for (i, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        let place = || format!("{}:{}", path.display(), i + 1);
        let object: Map<String, Value> =
            serde_json::from_slice(line).with_context(|| format!("{}: not a JSON object", place()))?;
        if format == Format::Auto {
            format = detect(&object).with_context(place)?;
        }
        let content = content(object, format).with_context(place)?;
        rows.push(Row { content, file: file.clone(), line: i + 1 });
    }
    ensure!(rows.len() > before, "{}: has no rows", path.display());
    Ok(())
}

fn detect(row: &Map<String, Value>) -> Result<Format> {
    let has = |key: &str| row.contains_key(key);
    Ok(match () {
        _ if has("input_ids") => Format::Tokenized,
        _ if has("messages") => Format::Messages,
        _ if has("prompt") && has("completion") => Format::PromptCompletion,
        _ if has("instruction") && has("output") => Format::Alpaca,
        _ if has("text") => Format::Text,
        _ => bail!(
            "found the keys {:?}; allowed: text | messages | prompt, completion | instruction, input, output | input_ids, \
             labels, attention_mask",
            row.keys().collect::<Vec<_>>()
        ),
    })
}

fn content(mut row: Map<String, Value>, format: Format) -> Result<Content> {
    if let Some(tools) = row.get("tools").filter(|t| !t.is_null() && **t != json!([])) {
        bail!("tools: found {tools}; allowed: none (tools are not given to the chat template)");
    }
    let mut field = |key: &str| row.remove(key).with_context(|| format!("the field {key:?} is missing"));
    Ok(match format {
        Format::Text => Content::Text(string("text", field("text")?)?),
        Format::Messages => Content::Messages(messages("messages", field("messages")?)?),
        Format::PromptCompletion => match (field("prompt")?, field("completion")?) {
            (prompt @ Value::Array(_), completion) => Content::Conversation {
                prompt: messages("prompt", prompt)?,
                completion: messages("completion", completion)?,
            },
            (prompt, completion) => Content::PromptCompletion {
                prompt: string("prompt", prompt)?,
                completion: string("completion", completion)?,
            },
        },
        Format::Alpaca => Content::Alpaca {
            instruction: string("instruction", field("instruction")?)?,
            output: string("output", field("output")?)?,
            input: match field("input") {
                Ok(Value::Null) | Err(_) => String::new(),
                Ok(input) => string("input", input)?,
            },
        },
        Format::Tokenized => {
            let input_ids = integers("input_ids", field("input_ids")?)?;
            let labels = field("labels").ok().map(|v| integers("labels", v)).transpose()?;
            let mask = field("attention_mask").ok().map(|v| integers("attention_mask", v)).transpose()?;
            without_padding(input_ids, labels, mask)?
        }
        Format::Auto => bail!("the format has not been decided"),
    })
}

fn string(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => bail!("{key}: found {other}; allowed: a string"),
    }
}

fn messages(key: &str, value: Value) -> Result<Vec<Value>> {
    let Value::Array(messages) = value else { bail!("{key}: found {value}; allowed: a list of messages") };
    ensure!(!messages.is_empty(), "{key}: the list is empty");
    for message in &messages {
        let has_role = message.get("role").is_some_and(Value::is_string);
        ensure!(
            has_role && message.get("content").is_some(),
            "{key}: found {message}; allowed: {{\"role\": …, \"content\": …}}"
        );
    }
    Ok(messages)
}

fn integers(key: &str, value: Value) -> Result<Vec<i64>> {
    let list = value.as_array().and_then(|list| list.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
    list.with_context(|| format!("{key}: found {}; allowed: a list of whole numbers", json!(value)))
}

fn without_padding(input_ids: Vec<i64>, labels: Option<Vec<i64>>, mask: Option<Vec<i64>>) -> Result<Content> {
    for (key, other) in [("labels", &labels), ("attention_mask", &mask)] {
        let len = other.as_ref().map_or(input_ids.len(), Vec::len);
        ensure!(len == input_ids.len(), "{key}: {len} entries for {} input_ids", input_ids.len());
    }
    let Some(mask) = mask else { return Ok(Content::Tokenized { input_ids, labels }) };
    let keep = |values: Vec<i64>| values.into_iter().zip(&mask).filter(|&(_, &m)| m != 0).map(|(v, _)| v).collect();
    Ok(Content::Tokenized { input_ids: keep(input_ids), labels: labels.map(keep) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, format: Format) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, text)?;
        read(&[path], format)
    }

    #[test]
    fn the_format_is_that_of_the_first_row() {
        for (text, expected) in [
            (r#"{"text": "a"}"#, Content::Text("a".into())),
            (
                r#"{"prompt": "a", "completion": "b", "text": "c"}"#,
                Content::PromptCompletion { prompt: "a".into(), completion: "b".into() },
            ),
            (
                r#"{"instruction": "a", "input": null, "output": "b"}"#,
                Content::Alpaca { instruction: "a".into(), input: String::new(), output: "b".into() },
            ),
            (r#"{"input_ids": [1, 2]}"#, Content::Tokenized { input_ids: vec![1, 2], labels: None }),
        ] {
            assert_eq!(read_text(text, Format::Auto).unwrap()[0].content, expected);
        }
        let rows = read_text("{\"text\": \"a\"}\n{\"instruction\": \"a\", \"output\": \"b\"}", Format::Auto);
        assert!(format!("{:#}", rows.unwrap_err()).contains("rows.jsonl:2: the field \"text\" is missing"));
    }

    #[test]
    fn errors_name_file_and_line() {
        for (text, said) in [
            ("{\"text\": \"a\"}\n\n{\"text\": ", "rows.jsonl:3: not a JSON object"),
            ("[1]", "rows.jsonl:1: not a JSON object"),
            ("{\"text\": \"a\"}\r\n{\"text\": ", "rows.jsonl:2: not a JSON object"),
            (r#"{"text": 1}"#, "rows.jsonl:1: text: found 1; allowed: a string"),
            (r#"{"body": "a"}"#, "rows.jsonl:1: found the keys [\"body\"]"),
            (r#"{"messages": []}"#, "rows.jsonl:1: messages: the list is empty"),
            (r#"{"messages": [{"content": "a"}]}"#, "rows.jsonl:1: messages: found"),
            (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, "rows.jsonl:1: completion: found"),
            (r#"{"input_ids": [1.5]}"#, "rows.jsonl:1: input_ids: found [1.5]"),
            (r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}"#, "rows.jsonl:1: tools: found"),
            ("\n \n", "rows.jsonl: has no rows"),
            ("", "rows.jsonl: has no rows"),
        ] {
            let error = format!("{:#}", read_text(text, Format::Auto).unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n").unwrap();
        let error = read(&[path], Format::Auto).unwrap_err();
        assert!(format!("{error:#}").contains("rows.jsonl:2"), "{error:#}");
    }

    #[test]
    fn folders_are_read_by_name_and_other_files_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(&[dir.path().into()], Format::Auto).unwrap_err().to_string().contains("no *.jsonl"));
        for (name, text) in [("b.jsonl", r#"{"text": "2"}"#), ("a.jsonl", r#"{"text": "1"}"#), ("c.csv", "x")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let answers: Vec<String> = read(&[dir.path().into()], Format::Auto).unwrap().iter().map(Row::answer).collect();
        assert_eq!(answers, ["1", "2"]);
        let error = read(&[dir.path().join("c.csv")], Format::Auto).unwrap_err().to_string();
        assert!(error.contains("c.csv") && error.contains(".jsonl"), "{error}");
    }

    #[test]
    fn the_answer_is_the_same_in_each_format() {
        let answers = [
            r#"{"prompt": "q", "completion": "a"}"#,
            r#"{"instruction": "q", "output": "a"}"#,
            r#"{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}]}"#,
            r#"{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}"#,
        ];
        for text in answers {
            assert_eq!(read_text(text, Format::Auto).unwrap()[0].answer(), "a", "{text}");
        }
    }
}
