//! Names of columns that a recipe gives (`data.columns`).

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::files::shown;

/// Names that the columns of a file have in the place of those that are read, by the latter: `prompt` → `question`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ColumnNames(BTreeMap<String, String>);

impl ColumnNames {
    /// Columns that can have another name in a file.
    pub const ALLOWED: [&str; 18] = [
        "text",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "tools",
        "chat_template_kwargs",
        "input_ids",
        "labels",
        "attention_mask",
        "position_ids",
        "assistant_masks",
        "completion_mask",
    ];

    /// Reads an object of strings whose keys are columns that are read, and whose values differ. Returns `None` for
    /// anything else.
    pub fn read(value: &Value) -> Option<ColumnNames> {
        let name = |(column, name): (&String, &Value)| {
            let is_known = ColumnNames::ALLOWED.contains(&column.as_str());
            Some((column.clone(), name.as_str()?.to_string())).filter(|(_, name)| is_known && !name.is_empty())
        };
        let names = value.as_object()?.iter().map(name).collect::<Option<BTreeMap<_, _>>>()?;
        let mut theirs: Vec<&String> = names.values().collect();
        theirs.sort();
        let is_unique = theirs.windows(2).all(|pair| pair[0] != pair[1]);
        is_unique.then_some(ColumnNames(names))
    }

    /// Name that a column has in the file.
    pub fn of<'a>(&'a self, column: &'a str) -> &'a str {
        self.0.get(column).map_or(column, String::as_str)
    }

    /// `conversations`, or `conversations (here turns)`
    pub fn shown(&self, column: &str) -> String {
        self.0.get(column).map_or(column.to_string(), |name| format!("{column} (here {})", shown(name)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::row::{Columns, Content};
    use super::*;

    #[test]
    fn columns_have_the_names_that_a_recipe_gives() {
        let names = |names: Value| ColumnNames::read(&names).unwrap();
        let of = |row: Value, names: &ColumnNames| {
            let Value::Object(row) = row else { panic!() };
            let mut columns = Columns::new(row, names);
            let content = columns.detect().and_then(|format| columns.content(format));
            content.map(|content| (content, columns.names().map(str::to_string).collect::<Vec<_>>()))
        };
        let row = json!({"question": "q", "answer": "a", "prompt": "p"});
        let (content, rest) = of(row.clone(), &names(json!({"prompt": "question", "completion": "answer"}))).unwrap();
        let expected = Content::PromptCompletion { prompt: "q".into(), completion: "a".into() };
        assert_eq!((content, rest), (expected, vec!["prompt".to_string()]));
        let error = format!("{:#}", of(row, &names(json!({"text": "body"}))).unwrap_err());
        assert!(error.contains("found the columns [\"question\"") && error.contains("help: data.columns"), "{error}");
        for wrong in [
            json!({"prompts": "q"}),
            json!({"prompt": 1}),
            json!({"prompt": ""}),
            json!("x"),
            json!({"prompt": "a", "text": "a"}),
        ] {
            assert_eq!(ColumnNames::read(&wrong), None, "{wrong}");
        }
    }
}
