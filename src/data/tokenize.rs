//! Rows to token ids and what counts in the loss, as TRL's SFTTrainer does it.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::LossOn;
use super::source::{Content, Row};
use super::tokenizer::TextTokenizer;

/// In `labels`: does not count.
const IGNORED: i64 = -100;

/// A row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenized {
    pub input_ids: Vec<u32>,
    pub is_target: Vec<bool>,
}

/// Errors name the row's place.
pub fn tokenize(row: &Row, tokenizer: Option<&TextTokenizer>, vocab_size: usize, loss_on: LossOn) -> Result<Tokenized> {
    let tokenized = match (&row.content, tokenizer) {
        (Content::Tokenized { input_ids, labels }, _) => labelled(input_ids, labels.as_deref(), loss_on),
        (_, None) => {
            bail!("{}: the row is text, but there is no tokenizer (tokenizer.json in the model's folder)", row.place())
        }
        (content, Some(tokenizer)) => text(content, tokenizer, loss_on),
    }
    .with_context(|| row.place())?;
    if let Some(id) = tokenized.input_ids.iter().find(|&&id| id as usize >= vocab_size) {
        bail!("{}: token id {id}; the model's vocabulary has {vocab_size}", row.place());
    }
    Ok(tokenized)
}

fn text(content: &Content, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
    match content {
        Content::Text(text) => {
            ensure!(
                matches!(loss_on, LossOn::Auto | LossOn::All),
                "data.loss_on: text rows have neither prompt nor assistant"
            );
            let input_ids = tokenizer.encode(&with_eos(text, tokenizer), true)?;
            Ok(Tokenized { is_target: vec![true; input_ids.len()], input_ids })
        }
        Content::Messages(messages) => conversation(messages, tokenizer, loss_on),
        Content::Conversation { prompt, completion } => after_prompt(prompt, completion, tokenizer, loss_on),
        Content::PromptCompletion { prompt, completion } => {
            strings(prompt, &format!("{prompt}{}", with_eos(completion, tokenizer)), true, tokenizer, loss_on)
        }
        Content::Alpaca { instruction, input, output } if tokenizer.has_chat_template() => {
            let request = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
            let (prompt, completion) =
                (json!({"role": "user", "content": request}), json!({"role": "assistant", "content": output}));
            after_prompt(&[prompt], &[completion], tokenizer, loss_on)
        }
        Content::Alpaca { instruction, input, output } => {
            let prompt = alpaca_prompt(instruction, input);
            strings(&prompt, &format!("{prompt}{}", with_eos(output, tokenizer)), true, tokenizer, loss_on)
        }
        Content::Tokenized { .. } => bail!("tokenized already"),
    }
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

/// A prompt, and the same with its completion. TRL 1.16 masks the tokens that both begin with (`common_prefix_length`).
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
    Ok(Tokenized { input_ids, is_target })
}

fn after_prompt(
    prompt: &[Value],
    completion: &[Value],
    tokenizer: &TextTokenizer,
    loss_on: LossOn,
) -> Result<Tokenized> {
    let messages: Vec<Value> = prompt.iter().chain(completion).cloned().collect();
    if loss_on == LossOn::Assistant {
        return conversation(&messages, tokenizer, loss_on);
    }
    let prompt = tokenizer.render(prompt, true)?.text;
    let whole = tokenizer.render(&messages, false)?.text;
    strings(&prompt, &whole, false, tokenizer, loss_on)
}

fn conversation(messages: &[Value], tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
    ensure!(
        loss_on != LossOn::Completion,
        "data.loss_on is completion, but the rows have no prompt: use assistant or all"
    );
    let rendered = tokenizer.render(messages, false)?;
    let (input_ids, offsets) = tokenizer.encode_with_offsets(&rendered.text, false)?;
    if loss_on != LossOn::Assistant {
        return Ok(Tokenized { is_target: vec![true; input_ids.len()], input_ids });
    }
    ensure!(
        tokenizer.marks_generation(),
        "data.loss_on is assistant, but the chat template has no {{% generation %}} block that says what the assistant says"
    );
    let counts = |token| rendered.assistant_spans.iter().any(|span| is_in(token, span));
    Ok(Tokenized { is_target: offsets.iter().map(counts).collect(), input_ids })
}

/// Whether any byte of a token is in a span. Tokenizers with `trim_offsets` give whitespace an empty range at its end.
fn is_in(token: &Range<usize>, span: &Range<usize>) -> bool {
    match token.is_empty() {
        true => span.start < token.start && token.start <= span.end,
        false => token.start < span.end && span.start < token.end,
    }
}

fn labelled(input_ids: &[i64], labels: Option<&[i64]>, loss_on: LossOn) -> Result<Tokenized> {
    ensure!(
        matches!(loss_on, LossOn::Auto | LossOn::All),
        "data.loss_on: tokenized rows have their labels instead; use auto"
    );
    let ids = input_ids.iter().map(|&id| u32::try_from(id).ok().with_context(|| format!("token id {id}")));
    let ids = ids.collect::<Result<Vec<u32>>>()?;
    let Some(labels) = labels else { return Ok(Tokenized { is_target: vec![true; ids.len()], input_ids: ids }) };
    for (i, (&label, &id)) in labels.iter().zip(input_ids).enumerate() {
        ensure!(
            label == IGNORED || label == id,
            "labels[{i}] is {label}; allowed: {IGNORED} or the input id there, {id}"
        );
    }
    Ok(Tokenized { is_target: labels.iter().map(|&l| l != IGNORED).collect(), input_ids: ids })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tokenizer::tests::{GOLDEN, with_generation};
    use super::super::{Format, source};
    use super::*;

    fn prepare(row: &Value, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, row.to_string())?;
        tokenize(&source::read(&[path], Format::Auto)?[0], Some(tokenizer), 320, loss_on)
    }

    fn labels(tokenized: &Tokenized) -> Vec<i64> {
        let label = |(&id, &t): (&u32, &bool)| if t { i64::from(id) } else { IGNORED };
        tokenized.input_ids.iter().zip(&tokenized.is_target).map(label).collect()
    }

    #[test]
    fn rows_are_what_trl_makes_of_them() {
        let golden = std::fs::read(Path::new(GOLDEN).join("tokenized.json")).unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        let (plain, generation) =
            (TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap(), with_generation());
        let rows = golden["rows"].as_array().unwrap();
        assert!(!rows.is_empty());
        for case in rows {
            let tokenizer = if case["template"] == "generation" { &generation } else { &plain };
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
    fn tokens_of_a_span() {
        let span = 4..8;
        let cases =
            [(3..4, false), (3..5, true), (7..9, true), (8..9, false), (4..4, false), (5..5, true), (8..8, true)];
        for (token, expected) in cases {
            assert_eq!(is_in(&token, &span), expected, "{token:?}");
        }
    }
}
