//! Rows that hold token ids: which of them count in the loss, and where documents begin.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::LossOn;
use super::row::Columns;
use super::tokenize::Tokenized;
use crate::files::shown;

/// A label that does not count.
const IGNORED: i64 = -100;

/// Padding has been dropped; all lists but `lengths` have one entry a token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizedRow {
    pub input_ids: Vec<i64>,
    labels: Option<Vec<i64>>,
    assistant_masks: Option<Vec<i64>>,
    completion_mask: Option<Vec<i64>>,
    /// Tokens of each document.
    lengths: Vec<usize>,
}

impl TokenizedRow {
    /// Takes `input_ids`, `labels` or `assistant_masks` and `completion_mask` (TRL), `attention_mask`, which tells
    /// padding, and `position_ids` or `seq_lengths` (TRL), which tell where documents begin.
    pub fn take(columns: &mut Columns<'_>) -> Result<TokenizedRow> {
        let found = columns.need("input_ids")?;
        let input_ids = integers("input_ids", found)?;
        let num_tokens = input_ids.len();
        if let Some(length) = columns.take("length") {
            ensure!(length == num_tokens, "length: found {length}; allowed: the number of input_ids, {num_tokens}");
        }
        let mut each_token = |name: &str| -> Result<Option<Vec<i64>>> {
            let Some(found) = columns.take(name) else { return Ok(None) };
            let values = integers(name, found)?;
            ensure!(values.len() == num_tokens, "{name}: {} entries for {num_tokens} input_ids", values.len());
            Ok(Some(values))
        };
        let no_padding = match each_token("attention_mask")? {
            Some(mask) => without_padding(&mask)?,
            None => 0..num_tokens,
        };
        let mut kept = |name: &str| -> Result<Option<Vec<i64>>> {
            Ok(each_token(name)?.map(|values| values[no_padding.clone()].to_vec()))
        };
        let (labels, position_ids, token_types) = (kept("labels")?, kept("position_ids")?, kept("token_type_ids")?);
        let (assistant_masks, completion_mask) = (kept("assistant_masks")?, kept("completion_mask")?);
        for (name, mask) in [("assistant_masks", &assistant_masks), ("completion_mask", &completion_mask)] {
            only(name, mask.as_deref(), &[0, 1])?;
            ensure!(mask.is_none() || labels.is_none(), "{name}: the row has labels too; allowed: one of them");
        }
        only("token_type_ids", token_types.as_deref(), &[0])?;
        let input_ids = input_ids[no_padding].to_vec();
        let by_position = position_ids.map(|ids| lengths_by_position(&ids)).transpose()?;
        let by_length = columns.take("seq_lengths").map(|found| lengths_of(found, input_ids.len())).transpose()?;
        if let (Some(a), Some(b)) = (&by_position, &by_length) {
            ensure!(a == b, "seq_lengths: found {b:.5?}, but the position_ids make documents of {a:.5?} tokens");
        }
        let lengths = by_position.or(by_length).unwrap_or_else(|| vec![input_ids.len()]);
        Ok(TokenizedRow { input_ids, labels, assistant_masks, completion_mask, lengths })
    }

    /// Returns the documents of the row. As in TRL, `assistant_masks` always apply; `completion_mask` applies where a
    /// completion may be asked for, which in TRL is `completion_only_loss`.
    pub fn documents(&self, loss_on: LossOn) -> Result<Vec<Tokenized>> {
        let (labels, assistant, completion) = (&self.labels, &self.assistant_masks, &self.completion_mask);
        let counting = labels.as_ref().map(|_| "labels").or(assistant.as_ref().map(|_| "assistant_masks"));
        match (loss_on, counting) {
            (LossOn::Auto, _) | (LossOn::All, None) | (LossOn::Assistant, Some("assistant_masks")) => {}
            (LossOn::Completion, _) if completion.is_some() => {}
            (LossOn::All | LossOn::Completion | LossOn::Assistant, Some(column)) => {
                bail!("data.loss_on: found {}, but the row's {column} say what counts; use auto", loss_on.word())
            }
            (LossOn::Completion, None) => {
                bail!("data.loss_on: found completion, but the row has no completion_mask; use auto")
            }
            (LossOn::Assistant, None) => {
                bail!("data.loss_on: found assistant, but the row has no assistant_masks; use auto")
            }
        }
        let ids = self.input_ids.iter().map(|&id| u32::try_from(id).ok().with_context(|| format!("token id {id}")));
        let ids = ids.collect::<Result<Vec<u32>>>()?;
        if let Some(labels) = labels {
            for (i, (&label, &id)) in labels.iter().zip(&self.input_ids).enumerate() {
                ensure!(
                    label == IGNORED || label == id,
                    "labels[{i}] is {label}; allowed: {IGNORED} or the input id there, {id}"
                );
            }
        }
        let completion = completion.as_ref().filter(|_| matches!(loss_on, LossOn::Auto | LossOn::Completion));
        let is_target = |i: usize| {
            labels.as_ref().is_none_or(|labels| labels[i] != IGNORED)
                && assistant.as_ref().is_none_or(|mask| mask[i] == 1)
                && completion.is_none_or(|mask| mask[i] == 1)
        };
        let mut begin = 0;
        let document = |&length: &usize| {
            let tokens = begin..begin + length;
            begin = tokens.end;
            Tokenized::new(ids[tokens.clone()].to_vec(), tokens.map(is_target).collect())
        };
        Ok(self.lengths.iter().map(document).collect())
    }
}

fn integers(name: &str, value: Value) -> Result<Vec<i64>> {
    let list = value.as_array().and_then(|list| list.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
    list.with_context(|| format!("{name}: found {}; allowed: a list of whole numbers", shown(&value.to_string())))
}

fn only(name: &str, values: Option<&[i64]>, allowed: &[i64]) -> Result<()> {
    let wrong = values.and_then(|values| values.iter().enumerate().find(|(_, value)| !allowed.contains(value)));
    let Some((i, value)) = wrong else { return Ok(()) };
    bail!("{name}[{i}] is {value}; allowed: {}", allowed.iter().map(i64::to_string).collect::<Vec<_>>().join(" or "))
}

/// Returns the range of tokens between the padding at both ends.
fn without_padding(mask: &[i64]) -> Result<std::ops::Range<usize>> {
    only("attention_mask", Some(mask), &[0, 1])?;
    let begin = mask.iter().position(|&m| m == 1).unwrap_or(mask.len());
    let end = mask.iter().rposition(|&m| m == 1).map_or(begin, |last| last + 1);
    if let Some(hole) = mask[begin..end].iter().position(|&m| m == 0) {
        bail!(
            "attention_mask[{}] is 0 between tokens that are 1; allowed: 0 for padding at the beginning and at the end",
            begin + hole
        );
    }
    Ok(begin..end)
}

/// Returns the lengths of documents: positions count up from 0 and begin again with each document.
fn lengths_by_position(positions: &[i64]) -> Result<Vec<usize>> {
    let mut lengths: Vec<usize> = Vec::new();
    for (i, &position) in positions.iter().enumerate() {
        match lengths.last_mut() {
            Some(length) if position == *length as i64 => *length += 1,
            _ if position == 0 => lengths.push(1),
            Some(next) => bail!("position_ids[{i}] is {position}; allowed: {next}, or 0 where a document begins"),
            None => bail!("position_ids[{i}] is {position}; allowed: 0, for a document begins"),
        }
    }
    Ok(lengths)
}

fn lengths_of(found: Value, num_tokens: usize) -> Result<Vec<usize>> {
    let lengths = integers("seq_lengths", found)?;
    let lengths: Option<Vec<usize>> =
        lengths.iter().map(|&n| usize::try_from(n).ok().filter(|n| (1..=num_tokens).contains(n))).collect();
    lengths.filter(|lengths| lengths.iter().sum::<usize>() == num_tokens).with_context(|| {
        format!("seq_lengths: allowed: lengths of documents whose sum is {num_tokens}, the number of input_ids")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::column_names::ColumnNames;
    use super::*;

    fn documents(row: Value, loss_on: LossOn) -> Result<Vec<Tokenized>> {
        let Value::Object(row) = row else { panic!("a row is an object") };
        TokenizedRow::take(&mut Columns::new(row, &ColumnNames::default()))?.documents(loss_on)
    }

    /// Labels of each document, as TRL builds them.
    fn labels(row: Value, loss_on: LossOn) -> Vec<Vec<i64>> {
        let label = |document: &Tokenized| {
            let label = |(&id, &counts): (&u32, &bool)| if counts { i64::from(id) } else { IGNORED };
            document.input_ids.iter().zip(&document.is_target).map(label).collect()
        };
        documents(row.clone(), loss_on).unwrap_or_else(|e| panic!("{row}: {e:#}")).iter().map(label).collect()
    }

    #[test]
    fn masks_are_labels() {
        use LossOn::*;
        let (ids, assistant, completion) = ([5, 6, 7, 8], [0, 1, 1, 0], [0, 0, 1, 1]);
        for (columns, loss_on, expected) in [
            (json!({}), Auto, [5, 6, 7, 8]),
            (json!({"labels": [-100, 6, 7, -100]}), Auto, [-100, 6, 7, -100]),
            (json!({"assistant_masks": assistant}), Auto, [-100, 6, 7, -100]),
            (json!({"assistant_masks": assistant}), Assistant, [-100, 6, 7, -100]),
            (json!({"completion_mask": completion}), Auto, [-100, -100, 7, 8]),
            (json!({"completion_mask": completion}), Completion, [-100, -100, 7, 8]),
            (json!({"completion_mask": completion}), All, [5, 6, 7, 8]),
            (json!({"assistant_masks": assistant, "completion_mask": completion}), Auto, [-100, -100, 7, -100]),
            (json!({"token_type_ids": [0, 0, 0, 0], "length": 4}), Auto, [5, 6, 7, 8]),
        ] {
            let mut row = json!({"input_ids": ids});
            row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
            assert_eq!(labels(row.clone(), loss_on), [expected], "{row}");
        }
    }

    #[test]
    fn padding_is_dropped_from_all_columns() {
        let row = json!({
            "input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0], "position_ids": [1, 0, 1, 0, 1],
            "assistant_masks": [0, 0, 1, 1, 0],
        });
        assert_eq!(labels(row, LossOn::Auto), [vec![-100, 6], vec![7]]);
        assert_eq!(labels(json!({"input_ids": [0], "attention_mask": [0]}), LossOn::Auto), [Vec::<i64>::new()]);
    }

    #[test]
    fn positions_and_lengths_tell_documents() {
        for columns in [
            json!({"position_ids": [0, 1, 2, 0, 1, 0]}),
            json!({"seq_lengths": [3, 2, 1]}),
            json!({"position_ids": [0, 1, 2, 0, 1, 0], "seq_lengths": [3, 2, 1]}),
        ] {
            let mut row = json!({"input_ids": [5, 6, 7, 8, 9, 10]});
            row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
            assert_eq!(labels(row, LossOn::Auto), [vec![5, 6, 7], vec![8, 9], vec![10]]);
        }
    }

    #[test]
    fn contradictions_and_other_values_are_refused() {
        let ids = [5, 6, 7, 8];
        for (columns, said) in [
            (json!({"attention_mask": [1, 0, 1, 1]}), "attention_mask[1] is 0 between"),
            (json!({"attention_mask": [1, 1, 2, 2]}), "attention_mask[2] is 2; allowed: 0 or 1"),
            (json!({"attention_mask": [1, 1]}), "attention_mask: 2 entries for 4 input_ids"),
            (json!({"labels": ids, "assistant_masks": [0, 0, 1, 1]}), "assistant_masks: the row has labels too"),
            (json!({"labels": ids, "completion_mask": [0, 0, 1, 1]}), "completion_mask: the row has labels too"),
            (json!({"assistant_masks": [0, 0, 1, 3]}), "assistant_masks[3] is 3; allowed: 0 or 1"),
            (json!({"assistant_masks": [0, 1]}), "assistant_masks: 2 entries"),
            (json!({"completion_mask": [true, true, true, true]}), "completion_mask: found [true"),
            (json!({"position_ids": [1, 2, 3, 4]}), "position_ids[0] is 1; allowed: 0"),
            (json!({"position_ids": [0, 1, 3, 4]}), "position_ids[2] is 3; allowed: 2, or 0"),
            (json!({"seq_lengths": [2, 1]}), "seq_lengths: allowed: lengths of documents whose sum is 4"),
            (json!({"seq_lengths": [4, 0]}), "seq_lengths: allowed"),
            (json!({"seq_lengths": [5, -1]}), "seq_lengths: allowed"),
            (json!({"seq_lengths": [2, 2], "position_ids": [0, 1, 2, 0]}), "seq_lengths: found [2, 2], but"),
            (json!({"token_type_ids": [0, 0, 1, 1]}), "token_type_ids[2] is 1; allowed: 0"),
            (json!({"length": 5}), "length: found 5; allowed: the number of input_ids, 4"),
        ] {
            let mut row = json!({"input_ids": ids});
            row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
            let error = format!("{:#}", documents(row, LossOn::Auto).unwrap_err());
            assert!(error.contains(said), "{columns}: {error}");
        }
    }

    #[test]
    fn loss_on_must_be_what_the_columns_say() {
        use LossOn::*;
        for (columns, loss_on, said) in [
            (json!({}), Completion, "no completion_mask"),
            (json!({}), Assistant, "no assistant_masks"),
            (json!({"labels": [5, 6]}), All, "the row's labels say"),
            (json!({"labels": [5, 6]}), Completion, "the row's labels say"),
            (json!({"assistant_masks": [0, 1]}), All, "the row's assistant_masks say"),
            (json!({"completion_mask": [0, 1]}), Assistant, "no assistant_masks"),
        ] {
            let mut row = json!({"input_ids": [5, 6]});
            row.as_object_mut().unwrap().extend(columns.as_object().unwrap().clone());
            let error = format!("{:#}", documents(row, loss_on).unwrap_err());
            assert!(error.contains("data.loss_on: found") && error.contains(said), "{columns} {loss_on:?}: {error}");
        }
    }
}
