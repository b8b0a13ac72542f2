//! Decides which columns of a row are read and which are refused.
//!
//! Where a row has the columns of several formats, `format: auto` reads those that TRL's SFTTrainer (1.16) reads:
//! `input_ids` before `prompt` and `completion`, before `messages`, before `text`. TRL does not know `instruction`
//! and `output`: they come last. A null is as good as no column. [`Columns::content`] takes the columns that it
//! reads; of the rest, those that have a meaning in TRL, LLaMA-Factory or axolotl are refused by name, and the others
//! are counted and told ([`super::unread`]).

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::Format;
use super::column_names::ColumnNames;
use super::message::{self, Message};
use super::place::Place;
use super::tokenized::TokenizedRow;
use super::variables::{self, Variables};
use crate::files::shown;

/// One row and where it stands.
#[derive(Clone, Debug)]
pub struct Row {
    pub content: Content,
    pub place: Place,
    /// Index of its file among those of all sources.
    pub file: usize,
    /// Bytes of its text and numbers, more or less.
    pub bytes: usize,
}

/// A row by its format.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Text(String),
    Messages {
        messages: Vec<Message>,
        variables: Variables,
    },
    PromptCompletion {
        prompt: String,
        completion: String,
    },
    /// A prompt and a completion that are lists of messages.
    Conversation {
        prompt: Vec<Message>,
        completion: Vec<Message>,
        variables: Variables,
    },
    Alpaca(Alpaca),
    Tokenized(TokenizedRow),
}

/// Empty strings stand for columns that are not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alpaca {
    pub system: String,
    /// Earlier turns: what the user said, and what the assistant answered. They belong to the prompt.
    pub history: Vec<(String, String)>,
    pub instruction: String,
    pub input: String,
    pub output: String,
}

impl Row {
    /// Returns the text that a model should learn to say: rows with the same answer are held out together.
    pub fn answer(&self) -> String {
        let content = |messages: &[Message]| {
            let of_assistant = |m: &&Message| m.role() == "assistant";
            let Some(message) = messages.iter().rev().find(of_assistant).or(messages.last()) else {
                return String::new();
            };
            message.content().map_or_else(|| message.keys.to_string(), str::to_string)
        };
        match &self.content {
            Content::Text(text) => text.clone(),
            Content::Messages { messages, .. } => content(messages),
            Content::PromptCompletion { completion, .. } => completion.clone(),
            Content::Conversation { completion, .. } => content(completion),
            Content::Alpaca(alpaca) => alpaca.output.clone(),
            Content::Tokenized(row) => format!("{:?}", row.input_ids),
        }
    }
}

/// Formats by the columns that tell them, in the order in which TRL looks for them. It makes messages of
/// conversations, so that these go before messages.
const FORMS: [(Format, &[&str]); 6] = [
    (Format::Tokenized, &["input_ids"]),
    (Format::PromptCompletion, &["prompt", "completion"]),
    (Format::Sharegpt, &["conversations"]),
    (Format::Messages, &["messages"]),
    (Format::Text, &["text"]),
    (Format::Alpaca, &["instruction", "output"]),
];

const MEDIA: &str = "images, videos and audio are not read; remove the rows that have them";
const PREFERENCE: &str =
    "preferences are not trained on; data.format messages or prompt_completion reads the other columns";
const OF_TOKENS: &str = "it tells of tokens, but the row has no input_ids";
pub const OF_TEMPLATE: &str = "it is for the chat template, which renders messages only";

/// Columns that have a meaning in TRL, LLaMA-Factory or axolotl, and why they are refused where they are not read.
const REFUSED: [(&str, &str); 24] = [
    ("assistant_masks", OF_TOKENS),
    ("attention_mask", OF_TOKENS),
    ("audio", MEDIA),
    ("audios", MEDIA),
    ("chat_template", "rows are rendered by the model's template; put another one into its chat_template.jinja"),
    ("chat_template_kwargs", OF_TEMPLATE),
    ("chosen", PREFERENCE),
    ("completion_mask", OF_TOKENS),
    ("documents", "write {\"documents\": …} into chat_template_kwargs"),
    ("history", "it belongs to instruction and output; write earlier turns as messages"),
    ("image", MEDIA),
    ("images", MEDIA),
    ("kto_tag", "what is undesirable is not trained on; keep the other rows and remove the column"),
    ("labels", OF_TOKENS),
    ("pixel_values", MEDIA),
    ("position_ids", OF_TOKENS),
    ("rejected", PREFERENCE),
    ("segments", "write input_ids and labels in their place"),
    ("seq_lengths", OF_TOKENS),
    ("system", "write it as the first message: {\"role\": \"system\", \"content\": …}"),
    ("token_type_ids", OF_TOKENS),
    ("tools", OF_TEMPLATE),
    ("video", MEDIA),
    ("videos", MEDIA),
];

/// `label` says in TRL's KTO whether a completion is desirable; in a set of texts it is a class, and harmless.
const KTO_LABEL: &str = "TRL's KTO marks undesirable completions with it; keep the other rows and remove the column";

/// The columns of a row that have not been read yet.
pub struct Columns<'a> {
    row: Map<String, Value>,
    names: &'a ColumnNames,
}

impl Columns<'_> {
    /// Columns that are null are left out.
    pub fn new(mut row: Map<String, Value>, names: &ColumnNames) -> Columns<'_> {
        row.retain(|_, value| !value.is_null());
        Columns { row, names }
    }

    /// Names of the columns that have not been read, as the file has them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.row.keys().map(String::as_str)
    }

    /// Formats whose columns are all there, each with these columns.
    pub fn forms(&self) -> impl Iterator<Item = (Format, &'static [&'static str])> + '_ {
        let is_there = |&column: &&str| self.row.contains_key(self.names.of(column));
        FORMS.into_iter().filter(move |(_, columns)| columns.iter().all(is_there))
    }

    /// Returns the format that TRL would read.
    pub fn detect(&self) -> Result<Format> {
        let form = self.forms().next().map(|(format, _)| format);
        form.with_context(|| {
            let names: Vec<&String> = self.row.keys().collect();
            format!(
                "found the columns {}; allowed: text | messages | conversations | prompt, completion | instruction, input, \
                 output, system, history | input_ids, labels, attention_mask, …; help: data.columns says which column is \
                 to be read as which: {{prompt: question, completion: answer}}",
                shown(&format!("{names:?}"))
            )
        })
    }

    /// Takes the columns of a format.
    pub fn content(&mut self, format: Format) -> Result<Content> {
        Ok(match format {
            Format::Text => Content::Text(self.string("text")?),
            Format::Messages => {
                Content::Messages { messages: self.messages("messages")?, variables: variables::take(self)? }
            }
            Format::Sharegpt => {
                let system = self.string_or_empty("system")?;
                let messages = message::with_system(system, self.messages("conversations")?)?;
                Content::Messages { messages, variables: variables::take(self)? }
            }
            Format::PromptCompletion if self.is_list("prompt") => Content::Conversation {
                prompt: self.messages("prompt")?,
                completion: self.messages("completion")?,
                variables: variables::take(self)?,
            },
            Format::PromptCompletion => {
                Content::PromptCompletion { prompt: self.string("prompt")?, completion: self.string("completion")? }
            }
            Format::Alpaca => Content::Alpaca(Alpaca {
                system: self.string_or_empty("system")?,
                history: self.history()?,
                instruction: self.string("instruction")?,
                input: self.string_or_empty("input")?,
                output: self.string("output")?,
            }),
            Format::Tokenized => Content::Tokenized(TokenizedRow::take(self)?),
            Format::Auto => bail!("the format has not been decided"),
        })
    }

    /// Refuses the columns that have a meaning but have not been read. Those of another format are let be where the
    /// recipe names the format, and so are empty ones.
    pub fn refuse_rest(&self, format: Format, is_auto: bool) -> Result<()> {
        for (name, value) in self.row.iter().filter(|(_, value)| !is_empty(value)) {
            let why = match name.as_str() {
                "label" if matches!(format, Format::PromptCompletion | Format::Messages) => Some(KTO_LABEL),
                name => REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, why)| *why),
            };
            if let Some(why) = why.filter(|why| is_auto || *why != PREFERENCE) {
                bail!(
                    "{name}: found {}; this column is not allowed in a row that is read as {}: {why}",
                    shown(&value.to_string()),
                    format.word()
                );
            }
        }
        Ok(())
    }

    /// Takes a column that may be missing.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.row.remove(self.names.of(name))
    }

    fn is_list(&self, name: &str) -> bool {
        self.row.get(self.names.of(name)).is_some_and(Value::is_array)
    }

    /// Takes a column that must be there.
    pub fn need(&mut self, name: &str) -> Result<Value> {
        self.take(name).with_context(|| {
            let name = self.names.shown(name);
            format!("the column {name:?} is missing; the rows of a file have one format, that of the first row or data.format")
        })
    }

    fn string(&mut self, name: &str) -> Result<String> {
        let value = self.need(name)?;
        string(name, value)
    }

    fn string_or_empty(&mut self, name: &str) -> Result<String> {
        self.take(name).map_or(Ok(String::new()), |value| string(name, value))
    }

    fn messages(&mut self, name: &str) -> Result<Vec<Message>> {
        let value = self.need(name)?;
        message::list(name, value)
    }

    fn history(&mut self) -> Result<Vec<(String, String)>> {
        let Some(value) = self.take("history") else { return Ok(Vec::new()) };
        let pair = |turn: &Value| match turn.as_array().map(Vec::as_slice) {
            Some([Value::String(user), Value::String(assistant)]) => Some((user.clone(), assistant.clone())),
            _ => None,
        };
        let turns = value.as_array().and_then(|turns| turns.iter().map(pair).collect());
        turns.with_context(|| {
            format!("history: found {}; allowed: a list of [instruction, output]", shown(&value.to_string()))
        })
    }
}

pub(super) fn is_empty(value: &Value) -> bool {
    *value == json!("") || *value == json!([]) || *value == json!({})
}

fn string(name: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => bail!("{name}: found {}; allowed: a string", shown(&other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::python;

    /// Reads a row and returns its content and the columns that nothing reads.
    fn read(row: Value, format: Format) -> Result<(Content, Vec<String>)> {
        let Value::Object(row) = row else { panic!("a row is an object") };
        let names = ColumnNames::default();
        let mut columns = Columns::new(row, &names);
        let is_auto = format == Format::Auto;
        let format = if is_auto { columns.detect()? } else { format };
        let content = columns.content(format)?;
        columns.refuse_rest(format, is_auto)?;
        let mut rest: Vec<String> = columns.names().map(str::to_string).collect();
        rest.sort();
        Ok((content, rest))
    }

    fn error(row: &Value, format: Format) -> String {
        match read(row.clone(), format) {
            Ok(read) => panic!("{row} is read as {read:?}"),
            Err(error) => format!("{error:#}"),
        }
    }

    fn user_and_assistant() -> [Value; 2] {
        [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "a"})]
    }

    #[test]
    fn of_several_formats_trls_is_read() {
        let all = json!({
            "input_ids": [1, 2], "prompt": "p", "completion": "c", "conversations": user_and_assistant(),
            "messages": user_and_assistant(), "text": "t", "instruction": "i", "output": "o",
        });
        let order = [
            &["input_ids"][..],
            &["completion", "prompt"],
            &["conversations"],
            &["messages"],
            &["text"],
            &["instruction", "output"],
        ];
        let mut row = all;
        for (i, columns) in order.iter().enumerate() {
            let (_, rest) = read(row.clone(), Format::Auto).unwrap();
            let mut expected: Vec<&str> = order[i + 1..].concat();
            expected.sort_unstable();
            assert_eq!(rest, expected);
            columns.iter().for_each(|c| drop(row.as_object_mut().unwrap().remove(*c)));
        }
        // A prompt alone is no format: the messages beside it are read (TRL fails).
        let (content, rest) = read(json!({"prompt": "p", "messages": user_and_assistant()}), Format::Auto).unwrap();
        assert!(matches!(content, Content::Messages { .. }) && rest == ["prompt"]);
    }

    #[test]
    fn null_is_no_column() {
        let row = json!({"messages": null, "tools": null, "images": null, "labels": null, "text": "t", "id": null});
        assert_eq!(read(row, Format::Auto).unwrap(), (Content::Text("t".into()), vec![]));
        let error = error(&json!({"text": null}), Format::Text);
        assert!(error.contains("\"text\" is missing"), "{error}");
    }

    #[test]
    fn columns_without_a_meaning_are_left() {
        let row = json!({"text": "t", "id": 7, "topic": "x", "label": 1, "images": [], "system": "", "tools": []});
        assert_eq!(read(row, Format::Auto).unwrap().1, ["id", "images", "label", "system", "tools", "topic"]);
    }

    #[test]
    fn columns_with_a_meaning_are_refused_by_name() {
        let text = json!({"text": "t"});
        let messages = json!({"messages": user_and_assistant()});
        let prompt = json!({"prompt": "p", "completion": "c"});
        let alpaca = json!({"instruction": "i", "output": "o"});
        let with = |row: &Value, name: &str| {
            let mut row = row.clone();
            row[name] = json!([1]);
            row
        };
        for (name, _) in REFUSED {
            let honoured = matches!(name, "history" | "system");
            for row in [&text, &messages, &prompt, &alpaca].into_iter().filter(|row| !(honoured && **row == alpaca)) {
                let error = error(&with(row, name), Format::Auto);
                assert!(error.contains(&format!("{name}: found [1]")), "{name}: {error}");
            }
        }
        for row in [&messages, &prompt] {
            assert!(error(&with(row, "label"), Format::Auto).contains("label: found [1]"));
        }
        // Preferences are another format: whoever names one is not asked about them.
        for name in ["chosen", "rejected"] {
            assert_eq!(read(with(&messages, name), Format::Messages).unwrap().1, [name]);
        }
        assert!(error(&with(&messages, "images"), Format::Messages).contains("images: found"));
    }

    #[test]
    fn conversations_are_messages() {
        let conversations = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
        let (messages, _) = read(json!({"messages": user_and_assistant()}), Format::Auto).unwrap();
        // TRL reads conversations in the place of messages.
        let others = json!([{"role": "user", "content": "other"}]);
        for row in
            [json!({"conversations": conversations}), json!({"conversations": conversations, "messages": others})]
        {
            assert_eq!(read(row, Format::Auto).unwrap().0, messages);
        }
        assert_eq!(read(json!({"messages": conversations}), Format::Auto).unwrap().0, messages);
        let with_system = json!({"conversations": conversations, "system": "s"});
        let Content::Messages { messages, .. } = read(with_system, Format::Auto).unwrap().0 else { panic!() };
        assert_eq!((messages.len(), messages[0].role(), messages[0].content()), (3, "system", Some("s")));
    }

    #[test]
    fn variables_of_the_template() {
        let with = |columns: Value| {
            let mut row = json!({"messages": user_and_assistant()});
            row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
            row
        };
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        for (columns, expected) in [
            (json!({"tools": tools}), json!({"tools": tools})),
            (json!({"tools": tools.to_string()}), json!({"tools": tools})),
            (json!({"tools": [], "chat_template_kwargs": {}}), json!({})),
            (json!({"tools": "[]"}), json!({})),
            // The very integer, behind the mark that the template takes away.
            (
                json!({"tools": r#"[{"x": 12345678901234567890123}]"#}),
                json!({"tools": [{"x": format!("{}12345678901234567890123", python::LONG_INTEGER)}]}),
            ),
            (
                json!({"chat_template_kwargs": {"enable_thinking": false, "date_string": null}, "tools": tools}),
                json!({"enable_thinking": false, "tools": tools}),
            ),
        ] {
            let Content::Messages { variables, .. } = read(with(columns), Format::Auto).unwrap().0 else { panic!() };
            assert_eq!(Value::Object(variables), expected);
        }
        for (columns, said) in [
            (json!({"tools": "f(x)"}), "tools: found \"f(x)\""),
            (json!({"tools": ["f"]}), "tools: found [\"f\"]"),
            (json!({"tools": "[{\"x\": \"\u{FDD2}1\"}]"}), "tools: found U+FDD2"),
            (json!({"tools": tools, "chat_template_kwargs": {"tools": tools}}), "tools: found here and in"),
            (json!({"chat_template_kwargs": "{}"}), "chat_template_kwargs: found \"{}\""),
            (json!({"chat_template_kwargs": {"chat_template": "x"}}), "chat_template_kwargs: found chat_template"),
        ] {
            let error = error(&with(columns), Format::Auto);
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn history_is_pairs() {
        let row = |history: Value| json!({"instruction": "i", "output": "o", "history": history});
        let (content, _) = read(row(json!([["q", "a"]])), Format::Auto).unwrap();
        let Content::Alpaca(alpaca) = content else { panic!("{content:?}") };
        assert_eq!(alpaca.history, [("q".to_string(), "a".to_string())]);
        for history in [json!([["q"]]), json!([{"q": "a"}]), json!("q"), json!([["q", 1]])] {
            assert!(error(&row(history), Format::Auto).contains("history: found"));
        }
    }

    #[test]
    fn the_answer_is_the_same_in_each_format() {
        let answers = [
            json!({"prompt": "q", "completion": "a"}),
            json!({"instruction": "q", "output": "a"}),
            json!({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}]}),
            json!({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}),
            json!({"prompt": [user_and_assistant()[0]], "completion": [user_and_assistant()[1]]}),
        ];
        let answer = |row: Value| {
            let content = read(row, Format::Auto).unwrap().0;
            Row { content, place: Place::line(&Arc::default(), 1), file: 0, bytes: 0 }.answer()
        };
        for row in answers {
            assert_eq!(answer(row.clone()), "a", "{row}");
        }
        let call = |name: &str| json!({"messages": [{"role": "assistant", "tool_calls": [{"name": name}]}]});
        assert_ne!(answer(call("f")), answer(call("g")), "the answer of a message without content is the message");
    }
}
