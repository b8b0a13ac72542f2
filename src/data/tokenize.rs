//! Turns rows into token ids and targets, as TRL's SFTTrainer (1.16) does.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::LossOn;
use super::chat_template::Rendered;
use super::message::Message;
use super::row::{Alpaca, Content, Row};
use super::tokenizer::TextTokenizer;
use super::variables::Variables;

/// A document as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenized {
    pub input_ids: Vec<u32>,
    pub is_target: Vec<bool>,
    /// False where the tokens of the prompt alone are not those that the document begins with.
    pub prompt_is_prefix: bool,
    /// Roles of messages whose text the chat template does not write, or not as it is.
    pub unwritten: Vec<String>,
}

impl Tokenized {
    /// A document of which all tokens count.
    fn all_targets(input_ids: Vec<u32>) -> Tokenized {
        let is_target = vec![true; input_ids.len()];
        Tokenized::new(input_ids, is_target)
    }

    /// A document without a prompt, or with one that is its prefix.
    pub fn new(input_ids: Vec<u32>, is_target: Vec<bool>) -> Tokenized {
        Tokenized { input_ids, is_target, prompt_is_prefix: true, unwritten: Vec::new() }
    }
}

/// Returns the documents of a row: one, or several where a tokenized row tells them apart. Errors name the row's
/// place.
pub fn tokenize(
    row: &Row,
    tokenizer: Option<&TextTokenizer>,
    vocab_size: usize,
    loss_on: LossOn,
) -> Result<Vec<Tokenized>> {
    let documents = match (&row.content, tokenizer) {
        (Content::Tokenized(row), _) => row.documents(loss_on),
        (_, None) => {
            bail!("{}: the row is text, but there is no tokenizer (tokenizer.json in the model's folder)", row.place)
        }
        (content, Some(tokenizer)) => text(content, tokenizer, loss_on).map(|document| vec![document]),
    }
    .with_context(|| row.place.to_string())?;
    if let Some(id) = documents.iter().flat_map(|d| &d.input_ids).find(|&&id| id as usize >= vocab_size) {
        bail!("{}: token id {id}; the model's vocabulary has {vocab_size}", row.place);
    }
    Ok(documents)
}

fn text(content: &Content, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
    match content {
        Content::Text(text) => {
            ensure!(
                matches!(loss_on, LossOn::Auto | LossOn::All),
                "data.loss_on: found {}, but text rows have neither prompt nor assistant; use auto",
                loss_on.word()
            );
            Ok(Tokenized::all_targets(tokenizer.encode(&with_eos(text, tokenizer), true)?))
        }
        Content::Messages { messages, variables } => conversation(messages, variables, tokenizer, loss_on),
        Content::Conversation { prompt, completion, variables } => {
            after_prompt(prompt, completion, variables, tokenizer, loss_on)
        }
        // TRL 1.16 adds the end of sequence to `text`, if the row has that column too, in the place of the
        // completion: an oversight that is not followed.
        Content::PromptCompletion { prompt, completion } => {
            strings(prompt, &format!("{prompt}{}", with_eos(completion, tokenizer)), true, tokenizer, loss_on)
        }
        Content::Alpaca(alpaca) if tokenizer.has_chat_template() => {
            let (prompt, completion) = alpaca_messages(alpaca);
            after_prompt(&prompt, &[completion], &Variables::new(), tokenizer, loss_on)
        }
        Content::Alpaca(Alpaca { system, history, instruction, input, output }) => {
            ensure!(system.is_empty(), "system: it needs a chat template, and the model has none");
            ensure!(history.is_empty(), "history: it needs a chat template, and the model has none");
            let prompt = alpaca_prompt(instruction, input);
            strings(&prompt, &format!("{prompt}{}", with_eos(output, tokenizer)), true, tokenizer, loss_on)
        }
        Content::Tokenized(_) => bail!("tokenized already"),
    }
}

/// Returns the prompt as LLaMA-Factory makes it (system, earlier turns, and the instruction with its input on the
/// next line) and the answer. LLaMA-Factory counts the answers of earlier turns in the loss too; here they are part
/// of the prompt.
fn alpaca_messages(alpaca: &Alpaca) -> (Vec<Message>, Message) {
    let Alpaca { system, history, instruction, input, output } = alpaca;
    let mut prompt = Vec::new();
    if !system.is_empty() {
        prompt.push(Message::new("system", system));
    }
    for (user, assistant) in history {
        prompt.extend([Message::new("user", user), Message::new("assistant", assistant)]);
    }
    match input.is_empty() {
        true => prompt.push(Message::new("user", instruction)),
        false => prompt.push(Message::new("user", &format!("{instruction}\n{input}"))),
    }
    (prompt, Message::new("assistant", output))
}

/// The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca).
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    match input.is_empty() {
        true => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        false => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
             ### Response:\n"
        ),
    }
}

fn with_eos(text: &str, tokenizer: &TextTokenizer) -> String {
    match tokenizer.eos_token() {
        Some(eos) if !text.ends_with(eos) => format!("{text}{eos}"),
        _ => text.to_string(),
    }
}

/// Tokenizes a prompt alone and with its completion. TRL masks the tokens that both begin with
/// (`common_prefix_length`).
fn strings(prompt: &str, whole: &str, special: bool, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
    ensure!(
        loss_on != LossOn::Assistant,
        "data.loss_on is assistant, but the rows are prompt and completion: use completion"
    );
    let prompt_ids = tokenizer.encode(prompt, special)?;
    let input_ids = tokenizer.encode(whole, special)?;
    // The prompt's last token may be another one when the completion follows (" the" after "for "): the first token
    // that differs is the completion's.
    let begin = prompt_ids.iter().zip(&input_ids).take_while(|(a, b)| a == b).count();
    let is_target = (0..input_ids.len()).map(|i| loss_on == LossOn::All || i >= begin).collect();
    let prompt_is_prefix = begin == prompt_ids.len();
    Ok(Tokenized { prompt_is_prefix, ..Tokenized::new(input_ids, is_target) })
}

fn after_prompt(
    prompt: &[Message],
    completion: &[Message],
    variables: &Variables,
    tokenizer: &TextTokenizer,
    loss_on: LossOn,
) -> Result<Tokenized> {
    let messages = [prompt, completion].concat();
    if loss_on == LossOn::Assistant {
        return conversation(&messages, variables, tokenizer, loss_on);
    }
    let prompt = tokenizer.render_with(&keys(prompt), variables, true)?.text;
    let whole = tokenizer.render_with(&keys(&messages), variables, false)?;
    let tokenized = strings(&prompt, &whole.text, false, tokenizer, loss_on)?;
    finished(tokenized, &messages, variables, tokenizer, &whole)
}

fn conversation(
    messages: &[Message],
    variables: &Variables,
    tokenizer: &TextTokenizer,
    loss_on: LossOn,
) -> Result<Tokenized> {
    ensure!(
        loss_on != LossOn::Completion,
        "data.loss_on is completion, but the rows have no prompt: use assistant or all"
    );
    let rendered = tokenizer.render_with(&keys(messages), variables, false)?;
    if loss_on != LossOn::Assistant {
        let tokenized = Tokenized::all_targets(tokenizer.encode(&rendered.text, false)?);
        return finished(tokenized, messages, variables, tokenizer, &rendered);
    }
    ensure!(
        tokenizer.marks_generation(),
        "data.loss_on is assistant, but the chat template has no {{% generation %}} block that says what the assistant says"
    );
    let (input_ids, offsets) = tokenizer.encode_with_offsets(&rendered.text, false)?;
    let counts = |token| rendered.assistant_spans.iter().any(|span| is_in(token, span));
    let tokenized = Tokenized::new(input_ids, offsets.iter().map(counts).collect());
    finished(tokenized, messages, variables, tokenizer, &rendered)
}

fn keys(messages: &[Message]) -> Vec<Value> {
    messages.iter().map(|message| message.keys.clone()).collect()
}

/// Does what messages themselves say about the loss, and notes those that the template leaves out.
fn finished(
    mut tokenized: Tokenized,
    messages: &[Message],
    variables: &Variables,
    tokenizer: &TextTokenizer,
    rendered: &Rendered,
) -> Result<Tokenized> {
    if messages.iter().any(|message| message.counts.is_some()) {
        let (_, offsets) = tokenizer.encode_with_offsets(&rendered.text, false)?;
        for (span, counts) in spans(messages, variables, tokenizer, rendered)? {
            for (is_target, token) in tokenized.is_target.iter_mut().zip(&offsets) {
                *is_target = if is_in(token, &span) { counts } else { *is_target };
            }
        }
    }
    let is_written = |text: &str| {
        // Templates trim texts, and write some as JSON.
        rendered.text.contains(text) || rendered.text.contains(Value::from(text).to_string().trim_matches('"'))
    };
    let is_left_out = |message: &&Message| message.content().is_some_and(|content| !is_written(content.trim()));
    tokenized.unwritten = messages.iter().filter(is_left_out).map(|message| message.role().to_string()).collect();
    Ok(tokenized)
}

/// Returns the bytes of each message that says whether it counts: those of the template's mark where it marks what
/// the assistant says, else those that are added when the message is. What the assistant says begins after the
/// generation prompt; the first message has all that the template writes before it.
fn spans(
    messages: &[Message],
    variables: &Variables,
    tokenizer: &TextTokenizer,
    rendered: &Rendered,
) -> Result<Vec<(Range<usize>, bool)>> {
    let is_assistant = |message: &&Message| message.role() == "assistant";
    let marks = &rendered.assistant_spans;
    let only_assistant = messages.iter().filter(|message| message.counts.is_some()).all(|m| is_assistant(&m));
    if only_assistant && marks.len() == messages.iter().filter(is_assistant).count() {
        let marked = messages.iter().filter(is_assistant).zip(marks);
        return Ok(marked.filter_map(|(message, span)| Some((span.clone(), message.counts?))).collect());
    }
    let mut spans = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        let Some(counts) = message.counts else { continue };
        let until = |end: usize, prompt: bool| {
            let text = tokenizer.render_with(&keys(&messages[..end]), variables, prompt)?.text;
            Ok::<_, anyhow::Error>(rendered.text.starts_with(&text).then_some(text.len()))
        };
        let begin = match (i, is_assistant(&message)) {
            (0, _) => Some(0),
            (_, false) => until(i, false)?,
            (_, true) => until(i, true)?.map_or_else(|| until(i, false), |at| Ok(Some(at)))?,
        };
        let (Some(begin), Some(end)) = (begin, until(i + 1, false)?) else {
            bail!(
                "messages[{i}]: it says whether it counts, but the chat template writes the conversation up to it otherwise when \
                 more follows; help: a template that marks {{% generation %}}, or input_ids and labels"
            )
        };
        spans.push((begin..end, counts));
    }
    Ok(spans)
}

/// Tells if a token is in a span, as transformers 5.24 does for `return_assistant_tokens_mask`: it begins before the
/// span's end and ends after its beginning. Whitespace, to which a tokenizer with `trim_offsets` gives an empty range
/// at its end, is therefore not in a span that it ends.
fn is_in(token: &Range<usize>, span: &Range<usize>) -> bool {
    token.start < span.end && span.start < token.end
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::source::{Files, Rows, Source};
    use super::super::tokenizer::tests::{GOLDEN, with_template};
    use super::*;

    fn prepare(row: &Value, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, row.to_string())?;
        let (row, _) = Rows::of(&Files::find(&[Source::new(path)])?).next().unwrap()?;
        Ok(tokenize(&row, Some(tokenizer), 320, loss_on)?.remove(0))
    }

    fn labels(tokenized: &Tokenized) -> Vec<i64> {
        let label = |(&id, &t): (&u32, &bool)| if t { i64::from(id) } else { -100 };
        tokenized.input_ids.iter().zip(&tokenized.is_target).map(label).collect()
    }

    #[test]
    fn rows_are_what_trl_makes_of_them() {
        let golden = std::fs::read(Path::new(GOLDEN).join("tokenized.json")).unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        let plain = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let (generation, variables) = (with_template("generation"), with_template("variables"));
        let rows = golden["rows"].as_array().unwrap();
        assert!(!rows.is_empty());
        for case in rows {
            let tokenizer = match case["template"].as_str() {
                Some("generation") => &generation,
                Some("variables") => &variables,
                _ => &plain,
            };
            let loss_on = case["loss_on"].as_str().unwrap().parse().unwrap();
            let tokenized = prepare(&case["row"], tokenizer, loss_on).unwrap();
            assert_eq!(json!(tokenized.input_ids), case["input_ids"], "{}", case["row"]);
            assert_eq!(json!(labels(&tokenized)), case["labels"], "{} {loss_on:?}", case["row"]);
        }
    }

    #[test]
    fn alpaca_is_a_user_and_an_assistant() {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let alpaca = json!({"instruction": "Add.", "input": "2 + 2", "output": "4"});
        let (user, assistant) =
            (json!({"role": "user", "content": "Add.\n2 + 2"}), json!({"role": "assistant", "content": "4"}));
        let chat = json!({"prompt": [user], "completion": [assistant]});
        let of = |row| prepare(row, &tokenizer, LossOn::Auto).unwrap();
        assert_eq!(of(&alpaca), of(&chat));
        assert_eq!(of(&alpaca).is_target.iter().filter(|&&t| t).count(), 3, "4, <|im_end|> and the line's end");
    }

    #[test]
    fn system_and_history_of_alpaca_are_part_of_the_prompt() {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let alpaca = json!({"instruction": "a", "output": "b", "system": "be brief", "history": [["q1", "a1"]]});
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let (system, q1) = (message("system", "be brief"), message("user", "q1"));
        let prompt = json!([system, q1, message("assistant", "a1"), message("user", "a")]);
        let chat = json!({"prompt": prompt, "completion": [message("assistant", "b")]});
        let of = |row| prepare(row, &tokenizer, LossOn::Auto).unwrap();
        assert_eq!(of(&alpaca), of(&chat));
    }

    #[test]
    fn alpaca_without_a_template_is_stanfords_prompt() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(Path::new(GOLDEN).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<|im_end|>"}"#).unwrap();
        let tokenizer = TextTokenizer::load(dir.path(), &jiff::Zoned::now()).unwrap();
        let row = json!({"instruction": "Add.", "input": "2 + 2", "output": "four"});
        let tokenized = prepare(&row, &tokenizer, LossOn::Auto).unwrap();
        let text = tokenizer.decode(&tokenized.input_ids, false).unwrap();
        assert!(text.starts_with("Below is an instruction") && text.contains("### Input:\n2 + 2\n\n### Response:\n"));
        let target: Vec<u32> = labels(&tokenized).iter().filter_map(|&l| u32::try_from(l).ok()).collect();
        assert_eq!(tokenizer.decode(&target, false).unwrap(), "four<|im_end|>");
    }

    #[test]
    fn system_and_history_need_a_template() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(Path::new(GOLDEN).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let tokenizer = TextTokenizer::load(dir.path(), &jiff::Zoned::now()).unwrap();
        for (name, value) in [("system", json!("s")), ("history", json!([["q", "a"]]))] {
            let row = json!({"instruction": "a", "output": "b", name: value});
            let error = format!("{:#}", prepare(&row, &tokenizer, LossOn::Auto).unwrap_err());
            assert!(error.contains(&format!("rows.jsonl:1: {name}: it needs a chat template")), "{error}");
        }
    }

    /// The text of the tokens that count.
    fn counting(row: &Value, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<String> {
        let Tokenized { input_ids, is_target, .. } = prepare(row, tokenizer, loss_on)?;
        let counting: Vec<u32> =
            input_ids.iter().zip(is_target).filter(|token| token.1).map(|token| *token.0).collect();
        tokenizer.decode(&counting, false)
    }

    #[test]
    fn a_message_can_say_whether_it_counts() {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let with = |mut message: Value, key: &str, value: Value| {
            message[key] = value;
            message
        };
        let (user, first, second) = (message("user", "q"), message("assistant", "one"), message("assistant", "two"));
        let chat = |messages: [&Value; 4]| json!({ "messages": messages });
        let chatml = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let marked = with_template("generation");
        let no_first = with(first.clone(), "weight", json!(0));
        let (turn, reply) = ("<|im_start|>user\nq<|im_end|>\n", "<|im_start|>assistant\n");
        let rows = chat([&user, &no_first, &user, &second]);
        let rest = format!("{turn}{reply}{turn}{reply}two<|im_end|>\n");
        assert_eq!(counting(&rows, &chatml, LossOn::Auto).unwrap(), rest);
        assert_eq!(counting(&rows, &marked, LossOn::Assistant).unwrap(), "two<|im_end|>");
        // Without a mark of the template, what is added with the message counts for it.
        let no_user = with(user.clone(), "train", json!(false));
        let counted = counting(&chat([&user, &first, &no_user, &second]), &chatml, LossOn::All).unwrap();
        assert_eq!(counted, format!("{turn}{reply}one<|im_end|>\n{reply}two<|im_end|>\n"));
        let user_too = with(user.clone(), "train", json!(true));
        let counted = counting(&chat([&user, &no_first, &user_too, &second]), &marked, LossOn::Assistant).unwrap();
        assert_eq!(counted, format!("{turn}two<|im_end|>"));
        let prompt = json!({"prompt": [user, with(first, "train", json!(true)), user], "completion": [second]});
        assert_eq!(counting(&prompt, &chatml, LossOn::Auto).unwrap(), "one<|im_end|>\ntwo<|im_end|>\n");
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_cannot_say_where_a_message_is() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(Path::new(GOLDEN).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let template = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}";
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = TextTokenizer::load(dir.path(), &jiff::Zoned::now()).unwrap();
        let message = |content: &str, counts: bool| json!({"role": "user", "content": content, "train": counts});
        let row = json!({"messages": [message("a", true), message("b", false)]});
        let error = format!("{:#}", prepare(&row, &tokenizer, LossOn::Auto).unwrap_err());
        assert!(error.contains("rows.jsonl:1: messages[0]: it says whether it counts, but"), "{error}");
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let messages = json!({"messages": [{"role": "assistant", "content": "Hi"}]});
        let prompt = json!({"prompt": "a", "completion": "b"});
        for (row, loss_on, said) in [
            (&messages, LossOn::Assistant, "no {% generation %}"),
            (&messages, LossOn::Completion, "data.loss_on is completion"),
            (&json!({"text": "a"}), LossOn::Completion, "data.loss_on"),
            (&prompt, LossOn::Assistant, "data.loss_on is assistant"),
        ] {
            let error = format!("{:#}", prepare(row, &tokenizer, loss_on).unwrap_err());
            assert!(error.contains(said) && error.contains("rows.jsonl:1"), "{error}");
        }
    }

    #[test]
    fn trimmed_whitespace_that_ends_a_span_is_not_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::read(Path::new(GOLDEN).join("tokenizer.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&file).unwrap();
        json["post_processor"] =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
                        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' if loop.last else '<|im_end|>' }}{% endfor %}";
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = TextTokenizer::load(dir.path(), &jiff::Zoned::now()).unwrap();
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let (user, first, last) =
            (message("user", "Wait "), message("assistant", "the fox  "), message("assistant", " the dog "));
        let row = json!({"messages": [user, first, message("user", "the"), last]});
        let tokenized = prepare(&row, &tokenizer, LossOn::Assistant).unwrap();
        let text = tokenizer.decode(&tokenized.input_ids, false).unwrap();
        assert_eq!(
            text,
            "user: Wait <|im_end|>assistant: the fox  <|im_end|>user: the<|im_end|>assistant:  the dog \n"
        );
        // As transformers 5.24 masks it; 5.23 goes on to the end of the conversation.
        let targets: Vec<usize> = (0..36).filter(|&i| tokenized.is_target[i]).collect();
        assert_eq!(targets, [15, 16, 31, 32, 33]);
    }

    #[test]
    fn tokens_of_a_span() {
        let span = 4..8;
        let cases =
            [(3..4, false), (3..5, true), (7..9, true), (8..9, false), (4..4, false), (5..5, true), (8..8, false)];
        for (token, expected) in cases {
            assert_eq!(is_in(&token, &span), expected, "{token:?}");
        }
    }
}
