//! Messages of a conversation, checked and made plain before the chat template reads them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::files::shown;

/// Keys that say whether a message counts in the loss: OpenAI's `weight`, axolotl's `train` and `training`, ms-swift's
/// `loss`.
const COUNTS: [&str; 4] = ["loss", "train", "training", "weight"];

/// Key of axolotl that says which parts of a message count.
const TRAIN_DETAIL: &str = "train_detail";

/// Roles of what a tool returned; their content may be any JSON value, which the template writes.
const TOOL_ROLES: [&str; 4] = ["function", "ipython", "observation", "tool"];

/// Roles of ShareGPT, LLaMA-Factory and axolotl (`from`), and the roles of messages.
const ROLES: [(&str, &str); 13] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("bot", "assistant"),
    ("chatgpt", "assistant"),
    ("model", "assistant"),
    ("function_call", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("tool_response", "tool"),
    ("function", "tool"),
    ("observation", "tool"),
];

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The object that the chat template reads.
    pub keys: Value,
    /// True if the message counts in the loss, false if it does not; `None` leaves that to data.loss_on.
    pub counts: Option<bool>,
}

impl Message {
    /// A message that says nothing about the loss.
    pub fn new(role: &str, content: &str) -> Message {
        Message { keys: json!({"role": role, "content": content}), counts: None }
    }

    pub fn role(&self) -> &str {
        self.keys.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content where it is text.
    pub fn content(&self) -> Option<&str> {
        self.keys.get("content").and_then(Value::as_str)
    }
}

/// Checks a list of messages, which are objects with a role. As in transformers, keys whose value is null are
/// dropped, and a message without content is one. Content that is a list of text parts becomes their text. As in TRL,
/// `from` and `value` are role and content; the names of roles that ShareGPT has become those that templates know.
pub fn list(column: &str, value: Value) -> Result<Vec<Message>> {
    let Value::Array(messages) = value else {
        bail!("{column}: found {}; allowed: a list of messages", shown(&value.to_string()))
    };
    ensure!(!messages.is_empty(), "{column}: the list is empty");
    let checked = |(i, message): (usize, Value)| plain(message).with_context(|| format!("{column}[{i}]"));
    messages.into_iter().enumerate().map(checked).collect()
}

/// Puts a system prompt, if there is one, before the messages.
pub fn with_system(system: String, mut messages: Vec<Message>) -> Result<Vec<Message>> {
    if !system.is_empty() {
        let has_one = messages.first().is_some_and(|message| message.role() == "system");
        ensure!(!has_one, "system: the conversation begins with a system message too; allowed: one of them");
        messages.insert(0, Message::new("system", &system));
    }
    Ok(messages)
}

fn plain(message: Value) -> Result<Message> {
    let Value::Object(mut keys) = message else {
        bail!("found {}; allowed: {{\"role\": …, \"content\": …}}", shown(&message.to_string()))
    };
    keys.retain(|_, value| !value.is_null());
    if keys.contains_key("from") {
        keys = of_sharegpt(keys)?;
    }
    let has_role = keys.get("role").is_some_and(Value::is_string);
    ensure!(has_role, "found {}; allowed: {{\"role\": …, \"content\": …}}", shown(&Value::Object(keys).to_string()));
    let counts = take_counts(&mut keys)?;
    let may_be_any = keys.get("role").and_then(Value::as_str).is_some_and(|role| TOOL_ROLES.contains(&role));
    if let Some(content) = keys.get_mut("content") {
        match content {
            Value::String(_) => {}
            Value::Array(parts) if is_parts(parts) || !may_be_any => *content = Value::String(text_of_parts(parts)?),
            _ if may_be_any => {}
            other => bail!("content: found {}; allowed: a string or a list of parts", shown(&other.to_string())),
        }
    }
    Ok(Message { keys: Value::Object(keys), counts })
}

/// Makes role and content of `from` and `value`. Calls of LLaMA-Factory's `function_call` become `tool_calls`.
fn of_sharegpt(mut keys: Map<String, Value>) -> Result<Map<String, Value>> {
    let found = shown(&Value::Object(keys.clone()).to_string());
    ensure!(
        !keys.contains_key("role") && !keys.contains_key("content"),
        "found {found}; allowed: either from and value, or role and content"
    );
    let (from, value) = (keys.remove("from").unwrap_or_default(), keys.remove("value"));
    let from = from.as_str().unwrap_or_default();
    let role = ROLES.iter().find(|(name, _)| *name == from).map(|(_, role)| *role);
    let role = role.with_context(|| {
        let allowed: Vec<&str> = ROLES.iter().map(|(name, _)| *name).collect();
        format!("found {found}; allowed as from: {}", allowed.join(", "))
    })?;
    // Role and content come first, where a message has them.
    let mut message = Map::from_iter([("role".to_string(), json!(role))]);
    match value {
        Some(value) if from == "function_call" => drop(message.insert("tool_calls".into(), tool_calls(&value)?)),
        Some(value) => drop(message.insert("content".into(), value)),
        None => {}
    }
    message.extend(keys);
    Ok(message)
}

/// Reads the JSON of one call, or of a list of calls: `{"name": …, "arguments": …}`.
fn tool_calls(value: &Value) -> Result<Value> {
    let text = value.as_str().unwrap_or_default();
    let read: Option<Value> =
        super::python::keep_long_integers(text.as_bytes()).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let calls = read.map(|read| if read.is_array() { read } else { json!([read]) });
    let is_call = |call: &Value| call.get("name").is_some_and(Value::is_string) && call.get("arguments").is_some();
    let calls = calls.as_ref().and_then(Value::as_array).filter(|calls| calls.iter().all(is_call));
    let calls = calls.with_context(|| {
        format!(
            "value: found {}; allowed after from: function_call: the JSON text of {{\"name\": …, \"arguments\": …}}",
            shown(&value.to_string())
        )
    })?;
    Ok(calls.iter().map(|call| json!({"type": "function", "function": call})).collect())
}

/// Takes the keys that say whether the message counts.
fn take_counts(keys: &mut Map<String, Value>) -> Result<Option<bool>> {
    if let Some(found) = keys.get(TRAIN_DETAIL) {
        bail!(
            "{TRAIN_DETAIL}: found {}; allowed: no such key, for a message counts wholly or not at all; help: {{\"train\": false}}, \
             or write input_ids and labels",
            shown(&found.to_string())
        );
    }
    let mut counts = None;
    for name in COUNTS {
        let Some(found) = keys.remove(name) else { continue };
        let said = match &found {
            Value::Bool(flag) => Some(*flag),
            Value::Number(number) if number.as_f64() == Some(0.0) => Some(false),
            Value::Number(number) if number.as_f64() == Some(1.0) => Some(true),
            _ => None,
        };
        let said = said.with_context(|| {
            let found = shown(&found.to_string());
            format!("{name}: found {found}; allowed: true or 1, false or 0, for a message counts wholly or not at all")
        })?;
        ensure!(
            counts.is_none_or(|before| before == said),
            "{name}: found {found}, which contradicts another key of this message; allowed: one of {}",
            COUNTS.join(", ")
        );
        counts = Some(said);
    }
    Ok(counts)
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
            assert_eq!(list("messages", json!([message])).unwrap(), [Message { keys: expected, counts: None }]);
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
        for (key, value, said) in [
            ("train_detail", json!([]), "train_detail: found []; allowed: no such key"),
            ("weight", json!(0.5), "weight: found 0.5; allowed: true or 1, false or 0"),
            ("train", json!("no"), "train: found \"no\"; allowed"),
            ("role", json!(null), "allowed: {\"role\": …"),
            ("from", json!("human"), "allowed: either from and value, or role and content"),
        ] {
            let mut message = user(json!("a"));
            message[key] = value;
            let error = format!("{:#}", list("messages", json!([message])).unwrap_err());
            assert!(error.contains("messages[0]: ") && error.contains(said), "{error}");
        }
        let both = json!([{"role": "user", "content": "a", "train": true, "weight": 0}]);
        assert!(format!("{:#}", list("messages", both).unwrap_err()).contains("weight: found 0, which contradicts"));
    }

    #[test]
    fn keys_say_whether_a_message_counts() {
        for (key, value, expected) in [
            ("weight", json!(0), Some(false)),
            ("weight", json!(1.0), Some(true)),
            ("train", json!(false), Some(false)),
            ("training", json!(true), Some(true)),
            ("loss", json!(null), None),
        ] {
            let found = list("messages", json!([{"role": "user", "content": "a", key: value}])).unwrap();
            assert_eq!(found, [Message { counts: expected, ..Message::new("user", "a") }], "{key}");
        }
    }

    #[test]
    fn conversations_of_sharegpt_become_messages() {
        for (turn, expected) in [
            (json!({"from": "human", "value": "a"}), json!({"role": "user", "content": "a"})),
            (json!({"from": "gpt", "value": "b", "weight": null}), json!({"role": "assistant", "content": "b"})),
            (json!({"from": "observation", "value": {"x": 1}}), json!({"role": "tool", "content": {"x": 1}})),
            (
                json!({"from": "gpt", "value": [{"type": "text", "text": "b"}], "thinking": "t"}),
                json!({"role": "assistant", "content": "b", "thinking": "t"}),
            ),
            (
                json!({"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}),
                json!({"role": "assistant", "tool_calls":
                    [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}),
            ),
        ] {
            assert_eq!(list("conversations", json!([turn])).unwrap()[0].keys, expected);
        }
        for (turn, said) in [
            (json!({"from": "critic", "value": "a"}), "allowed as from: human, user, gpt"),
            (json!({"from": 1, "value": "a"}), "found {\"from\":1"),
            (json!({"from": "function_call", "value": "f(1)"}), "value: found \"f(1)\""),
            (json!({"from": "human", "value": 7}), "content: found 7"),
        ] {
            let error = format!("{:#}", list("conversations", json!([turn])).unwrap_err());
            assert!(error.contains("conversations[0]: ") && error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_system_prompt_goes_first() {
        let user = vec![Message::new("user", "a")];
        let both = with_system("s".into(), user.clone()).unwrap();
        assert_eq!(both, [Message::new("system", "s"), user[0].clone()]);
        assert_eq!(with_system(String::new(), user.clone()).unwrap(), user);
        assert!(with_system("t".into(), both).unwrap_err().to_string().contains("one of them"));
    }
}
