//! Messages of a conversation, checked and made plain before the chat template reads them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::files::shown;

/// Keys that say whether a message counts in the loss: OpenAI's `weight`, axolotl's `train`, `training` and
/// `train_detail`, ms-swift's `loss`.
const REFUSED: [&str; 5] = ["loss", "train", "train_detail", "training", "weight"];

/// Roles of what a tool returned; their content may be any JSON value, which the template writes.
const TOOL_ROLES: [&str; 4] = ["function", "ipython", "observation", "tool"];

/// Checks a list of messages, which are objects with a role. As in transformers, keys whose value is null are
/// dropped, and a message without content is one. Content that is a list of text parts becomes their text.
pub fn list(column: &str, value: Value) -> Result<Vec<Value>> {
    let Value::Array(messages) = value else {
        bail!("{column}: found {}; allowed: a list of messages", shown(&value.to_string()))
    };
    ensure!(!messages.is_empty(), "{column}: the list is empty");
    let checked = |(i, message): (usize, Value)| plain(message).with_context(|| format!("{column}[{i}]"));
    messages.into_iter().enumerate().map(checked).collect()
}

fn plain(message: Value) -> Result<Value> {
    let has_role = message.get("role").is_some_and(Value::is_string);
    let help = if message.get("from").is_some() { "; help: rename from to role, value to content" } else { "" };
    ensure!(has_role, "found {}; allowed: {{\"role\": …, \"content\": …}}{help}", shown(&message.to_string()));
    let Value::Object(mut keys) = message else { bail!("a message is an object") };
    keys.retain(|_, value| !value.is_null());
    if let Some((name, value)) = keys.iter().find(|(name, _)| REFUSED.contains(&name.as_str())) {
        bail!(
            "{name}: found {}; allowed: no such key, for data.loss_on says what counts in the loss; help: remove it, or write \
             input_ids and labels",
            shown(&value.to_string())
        );
    }
    let may_be_any = keys.get("role").and_then(Value::as_str).is_some_and(|role| TOOL_ROLES.contains(&role));
    if let Some(content) = keys.get_mut("content") {
        match content {
            Value::String(_) => {}
            Value::Array(parts) if is_parts(parts) || !may_be_any => *content = Value::String(text_of_parts(parts)?),
            _ if may_be_any => {}
            other => bail!("content: found {}; allowed: a string or a list of parts", shown(&other.to_string())),
        }
    }
    Ok(Value::Object(keys))
}

fn is_parts(list: &[Value]) -> bool {
    !list.is_empty() && list.iter().all(|part| part.get("type").is_some_and(Value::is_string))
}

/// Joins the texts of `{"type": "text", "text": …}`, one after the other.
fn text_of_parts(parts: &[Value]) -> Result<String> {
    let text = |part: &Value| {
        let keys: Option<Map<String, Value>> =
            part.as_object().map(|keys| keys.clone().into_iter().filter(|(_, value)| !value.is_null()).collect());
        match keys {
            Some(keys) if keys.len() == 2 && keys.get("type").is_some_and(|t| t == "text") => {
                keys.get("text").and_then(Value::as_str).map(str::to_string)
            }
            _ => None,
        }
    };
    let refused = |i: usize, part: &Value| {
        let found = shown(&part.to_string());
        format!(
            "content[{i}]: found {found}; allowed: {{\"type\": \"text\", \"text\": …}}, for other parts are not read"
        )
    };
    parts.iter().enumerate().map(|(i, part)| text(part).with_context(|| refused(i, part))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn null_is_no_key_and_parts_are_text() {
        let calls = json!([{"function": {"name": "f", "arguments": {"x": null}}}]);
        for (message, expected) in [
            (
                json!({"role": "assistant", "content": null, "tool_calls": calls, "name": null}),
                json!({"role": "assistant", "tool_calls": calls}),
            ),
            (json!({"role": "assistant"}), json!({"role": "assistant"})),
            (
                json!({"role": "user", "content": [{"type": "text", "text": "a", "image": null}, {"type": "text", "text": "b"}]}),
                json!({"role": "user", "content": "ab"}),
            ),
            (json!({"role": "user", "content": []}), json!({"role": "user", "content": ""})),
            (json!({"role": "tool", "content": {"x": [1]}}), json!({"role": "tool", "content": {"x": [1]}})),
            (json!({"role": "tool", "content": [1, 2]}), json!({"role": "tool", "content": [1, 2]})),
            (
                json!({"role": "tool", "content": [{"type": "text", "text": "a"}]}),
                json!({"role": "tool", "content": "a"}),
            ),
        ] {
            assert_eq!(list("messages", json!([message])).unwrap(), [expected]);
        }
    }

    #[test]
    fn keys_and_content_that_cannot_be_honoured_are_refused() {
        let user = |content: Value| json!({"role": "user", "content": content});
        for (message, said) in [
            (
                user(json!([{"type": "text", "text": "a"}, {"type": "image", "url": "x"}])),
                "content[1]: found {\"type\":\"image\"",
            ),
            (user(json!([{"type": "text", "text": "a", "cache_control": {}}])), "content[0]: found"),
            (user(json!([{"type": "text", "text": 1}])), "content[0]: found"),
            (user(json!(["a"])), "content[0]: found \"a\""),
            (user(json!(5)), "content: found 5"),
            (user(json!({"a": 1})), "content: found {\"a\":1}"),
            (json!({"role": 1, "content": "a"}), "found {\"role\":1"),
            (json!("a"), "found \"a\""),
        ] {
            let error = format!("{:#}", list("prompt", json!([user(json!("a")), message])).unwrap_err());
            assert!(error.contains("prompt[1]: ") && error.contains(said), "{error}");
        }
        for key in REFUSED {
            let mut message = user(json!("a"));
            message[key] = json!(1);
            let error = format!("{:#}", list("messages", json!([message])).unwrap_err());
            assert!(error.contains(&format!("messages[0]: {key}: found 1; allowed: no such key")), "{error}");
        }
    }
}
