//! Rows to token ids and what counts in the loss, as TRL's SFTTrainer does it.

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
        (_, None) => bail!("{}: text needs a tokenizer.json in the model's folder", row.place()),
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

/// A prompt, and the same with its completion; the completion begins where the prompt's tokens end.
fn strings(prompt: &str, whole: &str, special: bool, tokenizer: &TextTokenizer, loss_on: LossOn) -> Result<Tokenized> {
    ensure!(
        loss_on != LossOn::Assistant,
        "data.loss_on is assistant, but the rows are prompt and completion: use completion"
    );
    let prompt_ids = tokenizer.encode(prompt, special)?;
    let input_ids = tokenizer.encode(whole, special)?;
    // A tokenizer that ends a text with a special token ends the prompt with one too, which the whole does not have.
    let same = prompt_ids.iter().zip(&input_ids).take_while(|(a, b)| a == b).count();
    let begin = if same + 1 == prompt_ids.len() && special { same } else { prompt_ids.len().min(input_ids.len()) };
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
    ensure!(
        whole.starts_with(&prompt),
        "the chat template renders the prompt differently when an answer follows: {prompt:?}"
    );
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
    let in_span = |token: &std::ops::Range<usize>| {
        token.start < token.end
            && rendered.assistant_spans.iter().any(|s| s.start <= token.start && token.start < s.end)
    };
    Ok(Tokenized { is_target: offsets.iter().map(in_span).collect(), input_ids })
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
