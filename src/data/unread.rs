//! Counts the columns and keys of rows that nothing reads, so that each is told once.

use std::collections::BTreeMap;

use super::row::{Columns, Content};
use super::{Format, TextTokenizer};
use crate::files::{counted, shown};

/// Names that one sentence lists.
const MAX_NAMES: usize = 20;
/// Under these three names transformers hands reasoning to a template that reads any of the first two.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Number of rows or messages that have each name.
type Counts = BTreeMap<String, usize>;

/// Names in the rows that have been read so far.
#[derive(Default)]
pub struct Unread {
    columns: Counts,
    /// Keys of messages besides role and content; whether the template reads them is asked at the end.
    message_keys: Counts,
    /// Variables of the template.
    variables: Counts,
    /// Rows that could be read in several formats.
    several_forms: usize,
    /// A sentence about the first of these rows: the columns that were read and those that were not.
    first_forms: String,
}

impl Unread {
    /// Looks at all columns of a row, of which `format` will be read.
    pub fn count_forms(&mut self, columns: &Columns<'_>, format: Format) {
        let names = |columns: &[&str]| columns.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(", ");
        let (read, others): (Vec<_>, Vec<_>) = columns.forms().partition(|(form, _)| *form == format);
        let (Some((_, read)), false) = (read.first(), others.is_empty()) else { return };
        self.several_forms += 1;
        if self.several_forms == 1 {
            let others: Vec<String> = others.iter().map(|(_, columns)| names(columns)).collect();
            self.first_forms = format!("{} are read, as by TRL, and {} are not", names(read), others.join(" and "));
        }
    }

    /// Looks at the columns that a row has left, and at its messages.
    pub fn count(&mut self, rest: &Columns<'_>, content: &Content) {
        rest.names().for_each(|name| count(&mut self.columns, name));
        let (prompt, messages, variables) = match content {
            Content::Messages { messages, variables } => (&[][..], &messages[..], variables),
            Content::Conversation { prompt, completion, variables } => (&prompt[..], &completion[..], variables),
            _ => return,
        };
        variables.keys().for_each(|name| count(&mut self.variables, name));
        let keys = prompt.iter().chain(messages).filter_map(|m| m.keys.as_object()).flat_map(|m| m.keys());
        keys.filter(|key| *key != "role" && *key != "content").for_each(|key| count(&mut self.message_keys, key));
    }

    /// Returns a sentence about each kind of name.
    pub fn notes(&self, tokenizer: Option<&TextTokenizer>) -> Vec<String> {
        let mut notes = Vec::new();
        if self.several_forms > 0 {
            let (rows, forms) = (counted(self.several_forms, "row"), &self.first_forms);
            notes.push(format!("{rows} can be read in several formats: {forms}; data.format can name another one"));
        }
        let ignored = |name: &str| tokenizer.is_some_and(|t| !t.template_mentions(name));
        let unread_key = |key: &str| match REASONING.contains(&key) {
            true => ignored(key) && ignored(REASONING[0]) && ignored(REASONING[1]),
            false => ignored(key),
        };
        for (counts, unit, sentence, is_unread) in [
            (&self.columns, "row", "columns that nothing reads", &(|_: &str| true) as &dyn Fn(&str) -> bool),
            (&self.message_keys, "message", "keys of messages that the chat template does not mention", &unread_key),
            (&self.variables, "row", "variables that the chat template does not mention", &ignored),
        ] {
            let unread: Vec<String> = counts
                .iter()
                .filter(|(name, _)| is_unread(name))
                .map(|(name, n)| format!("`{}` in {}", shown(name), counted(*n, unit)))
                .collect();
            match unread.len() {
                0 => {}
                n if n > MAX_NAMES => {
                    notes.push(format!("{sentence}: {} and {} more", unread[..MAX_NAMES].join(", "), n - MAX_NAMES));
                }
                _ => notes.push(format!("{sentence}: {}", unread.join(", "))),
            }
        }
        notes
    }
}

fn count(counts: &mut Counts, name: &str) {
    match counts.get_mut(name) {
        Some(n) => *n += 1,
        None => drop(counts.insert(name.to_string(), 1)),
    }
}
