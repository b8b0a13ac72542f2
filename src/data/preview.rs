//! Shows a data set as training will see it: the first rows token by token, and counts and lengths of all.

use serde::Serialize;

use super::counts::{Counts, Places};
use super::dataset::Dataset;
use super::{Document, TextTokenizer};

/// A data set as a person or a program reads it.
#[derive(Debug, Serialize)]
pub struct Preview {
    #[serde(flatten)]
    pub counts: Counts,
    pub documents: usize,
    /// Numbers of tokens of the documents.
    pub lengths: Lengths,
    /// Fraction of the places of sequences of `max_length` tokens that have a token.
    pub filled: f64,
    /// Places of the first rows with a document over `max_length`, and of those with a document that has no target.
    pub overlong_at: Places,
    pub without_target_at: Places,
    pub notes: Vec<String>,
    pub first_rows: Vec<RowPreview>,
}

/// A distribution; a percentile is the smallest value that so many percent of the values do not exceed.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Lengths {
    pub shortest: usize,
    pub median: usize,
    pub percentile_90: usize,
    pub percentile_99: usize,
    pub longest: usize,
}

/// A row, with the documents that are left of it.
#[derive(Debug, Serialize)]
pub struct RowPreview {
    pub place: String,
    pub documents: Vec<DocumentPreview>,
}

/// A document of a row.
#[derive(Debug, Serialize)]
pub struct DocumentPreview {
    /// Index of the sequence that it is in.
    pub sequence: usize,
    pub targets: usize,
    pub text: Option<String>,
    pub tokens: Vec<TokenPreview>,
}

/// A token of a document.
#[derive(Debug, Serialize)]
pub struct TokenPreview {
    pub id: u32,
    /// The token as the vocabulary has it; `None` without a tokenizer.
    pub token: Option<String>,
    /// True if its prediction counts in the loss.
    pub target: bool,
}

impl Preview {
    /// Describes a data set and the first of its rows, at most [`super::dataset::MAX_FIRST_ROWS`].
    pub fn new(dataset: &Dataset, tokenizer: Option<&TextTokenizer>, num_rows: usize) -> Preview {
        // The data set has no rows that are held out for evaluation or left out by a weight.
        let first = &dataset.first_rows[..num_rows.min(dataset.first_rows.len())];
        let mut rows: Vec<RowPreview> =
            first.iter().map(|row| RowPreview { place: row.place.to_string(), documents: Vec::new() }).collect();
        let mut shown = Vec::new();
        for (sequence, documents) in dataset.sequences.iter().enumerate() {
            for document in documents {
                let begin = dataset.document_begin(document);
                let row = first.partition_point(|row| row.tokens.end <= begin);
                if first.get(row).is_some_and(|row| row.tokens.contains(&begin)) {
                    shown.push((document, row, sequence));
                }
            }
        }
        // The pieces of a row that was split may be in sequences of another order.
        shown.sort_unstable();
        for (document, row, sequence) in shown {
            rows[row].documents.push(DocumentPreview::new(&dataset.document(document), sequence, tokenizer));
        }
        let places = dataset.sequences.len() * dataset.counts.max_length;
        Preview {
            counts: dataset.counts,
            documents: dataset.num_documents(),
            lengths: Lengths::of((0..dataset.num_documents()).map(|d| dataset.document_length(d) as u32).collect()),
            filled: dataset.counts.tokens as f64 / places.max(1) as f64,
            overlong_at: dataset.overlong.clone(),
            without_target_at: dataset.without_target.clone(),
            notes: dataset.notes.clone(),
            first_rows: rows,
        }
    }
}

impl Lengths {
    fn of(mut values: Vec<u32>) -> Lengths {
        values.sort_unstable();
        let percentile = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100).max(1);
            values.get(rank - 1).map_or(0, |&value| value as usize)
        };
        Lengths {
            shortest: percentile(0),
            median: percentile(50),
            percentile_90: percentile(90),
            percentile_99: percentile(99),
            longest: percentile(100),
        }
    }
}

impl DocumentPreview {
    fn new(document: &Document, sequence: usize, tokenizer: Option<&TextTokenizer>) -> DocumentPreview {
        let token = |(i, &id): (usize, &u32)| TokenPreview {
            id,
            token: tokenizer.and_then(|t| t.token(id)),
            // The first token of a document is never predicted.
            target: i > 0 && document.is_target[i],
        };
        DocumentPreview {
            sequence,
            targets: document.num_target_tokens(),
            text: tokenizer.and_then(|t| t.decode(&document.input_ids, false).ok()),
            tokens: document.input_ids.iter().enumerate().map(token).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DataOptions, LossOn, Overlong, Packing, Source};
    use super::*;

    #[test]
    fn lengths_are_percentiles() {
        let lengths = Lengths::of((1..=200).rev().collect());
        let expected = Lengths { shortest: 1, median: 100, percentile_90: 180, percentile_99: 198, longest: 200 };
        assert_eq!(lengths, expected);
        assert_eq!(Lengths::of(vec![7]).median, 7);
        assert_eq!(Lengths::of(Vec::new()).longest, 0);
    }

    #[test]
    fn the_first_rows_are_those_that_training_sees() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let rows = "{\"input_ids\": [1, 2, 3], \"labels\": [1, -100, 3]}\n{\"input_ids\": [4]}\n\
                    {\"input_ids\": [5, 6, 7, 8, 9, 10]}\n{\"input_ids\": [11, 12]}\n";
        std::fs::write(&path, rows).unwrap();
        let options =
            DataOptions { max_length: 4, packing: Packing::BestFit, overlong: Overlong::Split, loss_on: LossOn::Auto };
        let preview = |source: Source| {
            let dataset = Dataset::load(std::slice::from_ref(&source), None, 100, &options).unwrap();
            Preview::new(&dataset, None, 3)
        };
        let whole = preview(Source::new(&path));
        assert_eq!((whole.documents, whole.counts.rows, whole.counts.sequences), (4, 4, 3));
        assert_eq!((whole.overlong_at.rows, whole.without_target_at.rows), (1, 1));
        assert!(whole.without_target_at.to_string().ends_with("rows.jsonl:2"), "{}", whole.without_target_at);
        let ids = |row: &RowPreview| {
            let of = |d: &DocumentPreview| d.tokens.iter().map(|t| (t.id, t.target)).collect::<Vec<_>>();
            row.documents.iter().map(of).collect::<Vec<_>>()
        };
        let expected = [
            vec![vec![(1, false), (2, false), (3, true)]],
            vec![],
            vec![vec![(5, false), (6, true), (7, true), (8, true)], vec![(9, false), (10, true)]],
        ];
        assert_eq!(whole.first_rows.iter().map(ids).collect::<Vec<_>>(), expected);
        // 11 tokens in three sequences of at most 4.
        assert_eq!((whole.filled, whole.lengths.longest), (11.0 / 12.0, 4));
        let twice = preview(Source { weight: 2.0, ..Source::new(&path) });
        assert_eq!((twice.counts.without_target, twice.without_target_at.rows), (2, 1), "a place is told once");
        let half = preview(Source { weight: 0.5, ..Source::new(&path) });
        assert_eq!(half.first_rows.len(), 2);
        assert!(half.first_rows[0].place.ends_with("rows.jsonl:2") && half.first_rows[1].place.ends_with(":4"));
    }

    #[test]
    fn the_pieces_of_a_row_are_shown_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "{\"input_ids\": [1, 2]}\n{\"input_ids\": [5, 6, 7, 8, 9, 10]}\n").unwrap();
        let options =
            DataOptions { max_length: 4, packing: Packing::BestFit, overlong: Overlong::Split, loss_on: LossOn::Auto };
        let dataset = Dataset::load(&[Source::new(&path)], None, 100, &options).unwrap();
        let preview = Preview::new(&dataset, None, 2);
        let pieces = preview.first_rows[1].documents.iter().map(|d| (d.tokens[0].id, d.sequence));
        assert_eq!(pieces.collect::<Vec<_>>(), [(5, 1), (9, 0)], "the second piece is beside the first row");
    }
}
