//! Variables of the chat template that a row gives.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::python;
use super::row::{Columns, is_empty};
use crate::files::shown;

/// Variables of the chat template: `tools`, and what `chat_template_kwargs` holds.
pub type Variables = Map<String, Value>;

/// Arguments of transformers' `apply_chat_template` that are no variables of the template, and those that are decided
/// here.
const NO_VARIABLES: [&str; 13] = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
];

/// Takes `chat_template_kwargs` and `tools`. An empty list of tools is as good as none, though TRL hands it to the
/// template, and where tools are in both TRL takes the former; here that is refused.
pub fn take(columns: &mut Columns<'_>) -> Result<Variables> {
    let mut variables = match columns.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(variables)) => variables,
        Some(found) => bail!("chat_template_kwargs: found {}; allowed: an object", shown(&found.to_string())),
    };
    variables.retain(|_, value| !value.is_null());
    if let Some(name) = variables.keys().find(|name| NO_VARIABLES.contains(&name.as_str())) {
        bail!("chat_template_kwargs: found {name}; allowed: variables of the chat template");
    }
    let tools = columns.take("tools").filter(|tools| !is_empty(tools)).map(list_of_tools).transpose()?;
    if let Some(tools) = tools.filter(|tools| !is_empty(tools)) {
        let is_new = variables.insert("tools".into(), tools).is_none();
        ensure!(is_new, "tools: found here and in chat_template_kwargs; allowed: one of them");
    }
    Ok(variables)
}

/// Tools are a list, or the JSON text of one: files whose tools differ in their columns are written that way.
fn list_of_tools(found: Value) -> Result<Value> {
    let tools = match &found {
        Value::String(text) => {
            let text = python::keep_long_integers(text.as_bytes()).context("tools")?;
            serde_json::from_slice(&text).unwrap_or_default()
        }
        _ => found.clone(),
    };
    let is_list = tools.as_array().is_some_and(|tools| tools.iter().all(Value::is_object));
    ensure!(is_list, "tools: found {}; allowed: a list of objects, or its JSON as a string", shown(&found.to_string()));
    Ok(tools)
}
