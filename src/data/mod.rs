//! From rows of files to micro-batches: [`source`] reads rows, [`tokenize`] makes documents of them, [`pack`] puts
//! documents into sequences, [`sampler`] deals sequences to steps and ranks.

pub mod chat_template;
pub mod pack;
pub mod sampler;
pub mod source;
pub mod tokenize;
pub mod tokenizer;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::choices::choices;

pub use sampler::{Sampler, eval_micro_batches, num_step_target_tokens, step_micro_batches};
pub use tokenizer::TextTokenizer;

use source::Row;
use tokenize::Tokenized;

choices! {
    /// What the rows of a file are.
    Format {
        /// By the keys of the first row.
        Auto = "auto",
        Text = "text",
        Messages = "messages",
        PromptCompletion = "prompt_completion",
        Alpaca = "alpaca",
        Tokenized = "tokenized",
    }
}

choices! {
    /// How documents make sequences; they never attend to each other.
    Packing {
        /// Whole documents, as many as fit.
        BestFit = "true",
        /// End to end, cut where a sequence is full.
        Wrapped = "wrapped",
        /// One document a sequence.
        None = "false",
    }
}

choices! {
    /// What becomes of rows over max_length.
    Overlong {
        Truncate = "truncate",
        Split = "split",
        Drop = "drop",
        Error = "error",
    }
}

choices! {
    /// Which tokens count in the loss.
    LossOn {
        /// The completion where there is a prompt, else all.
        Auto = "auto",
        All = "all",
        Completion = "completion",
        /// What the chat template marks as generated.
        Assistant = "assistant",
    }
}

/// The recipe's data section, as far as it says how rows become documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DataOptions {
    pub format: Format,
    pub max_length: usize,
    pub packing: Packing,
    pub overlong: Overlong,
    pub loss_on: LossOn,
}

impl DataOptions {
    /// Documents are evaluated whole: what would be cut to fill sequences is packed by best fit.
    pub fn for_evaluation(self) -> DataOptions {
        match self.packing {
            Packing::Wrapped => DataOptions { packing: Packing::BestFit, ..self },
            Packing::BestFit | Packing::None => self,
        }
    }
}

/// Tokens that may attend to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Unique in the data set; it seeds dropout.
    pub sample_idx: u64,
    pub input_ids: Vec<u32>,
    /// Which tokens count in the loss when they are predicted.
    pub is_target: Vec<bool>,
}

impl Document {
    /// The first token is never predicted.
    pub fn num_target_tokens(&self) -> usize {
        self.is_target.iter().skip(1).filter(|&&t| t).count()
    }
}

/// What happened to the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub rows: usize,
    /// Rows over max_length, with `overlong: truncate`.
    pub truncated: usize,
    /// Rows over max_length, with `overlong: split`.
    pub split: usize,
    /// Rows over max_length, with `overlong: drop`.
    pub dropped: usize,
    /// Documents of fewer than two tokens, or with none that counts in the loss.
    pub without_target: usize,
    pub sequences: usize,
    pub tokens: usize,
    pub target_tokens: usize,
    pub max_length: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} rows, {} sequences, {} tokens, {} of them targets",
            self.rows, self.sequences, self.tokens, self.target_tokens
        )?;
        let limit = self.max_length;
        for (n, what) in [
            (self.truncated, format!("truncated to {limit} tokens")),
            (self.split, format!("over {limit} tokens and split")),
            (self.dropped, format!("over {limit} tokens and dropped")),
            (self.without_target, "dropped because no token of them counts in the loss".into()),
        ] {
            if n > 0 {
                write!(f, "; {n} {what}")?;
            }
        }
        Ok(())
    }
}

/// Documents, and which of them make each sequence.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub documents: Vec<Document>,
    pub sequences: Vec<Vec<usize>>,
    pub counts: Counts,
}

impl Dataset {
    /// Reads files and folders. `tokenizer` may be missing where all rows are tokenized.
    pub fn load(
        paths: &[PathBuf],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
    ) -> Result<Dataset> {
        let rows = source::read(paths, options.format)?;
        Dataset::from_rows(&rows, tokenizer, vocab_size, options)
    }

    /// The same in two parts, training and held out. Rows are told apart by a hash of their answer, so that no answer is
    /// in both. Held-out rows are never cut by packing: `wrapped` packs them as `true` does.
    pub fn load_with_held_out(
        paths: &[PathBuf],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
        fraction: f64,
    ) -> Result<(Dataset, Dataset)> {
        let rows = source::read(paths, options.format)?;
        let is_held_out = |row: &Row| (xxh3_64(row.answer().as_bytes()) as f64 / u64::MAX as f64) < fraction;
        let (held_out, train): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(is_held_out);
        ensure!(
            !held_out.is_empty() && !train.is_empty(),
            "data.eval: {fraction} of the rows leaves {} for training and {} for evaluation; give a file, or another fraction",
            train.len(),
            held_out.len()
        );
        let whole = options.for_evaluation();
        let part = |rows: &[Row], options| Dataset::from_rows(rows, tokenizer, vocab_size, options);
        Ok((part(&train, options)?, part(&held_out, &whole).context("data.eval: the held-out rows")?))
    }

    fn from_rows(
        rows: &[Row],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
    ) -> Result<Dataset> {
        let mut counts = Counts { rows: rows.len(), max_length: options.max_length, ..Counts::default() };
        let mut documents = Vec::new();
        let mut overlong = Vec::new();
        for row in rows {
            let Tokenized { input_ids, is_target } = tokenize::tokenize(row, tokenizer, vocab_size, options.loss_on)?;
            if input_ids.len() > options.max_length {
                overlong.push(row.place());
            }
            let pieces = cut(input_ids, is_target, options, &mut counts);
            for (input_ids, is_target) in pieces {
                let document = Document { sample_idx: documents.len() as u64, input_ids, is_target };
                match document.num_target_tokens() {
                    0 => counts.without_target += 1,
                    _ => documents.push(document),
                }
            }
        }
        if options.overlong == Overlong::Error && !overlong.is_empty() {
            let shown = overlong.len().min(5);
            bail!(
                "{} rows are longer than data.max_length ({}), and data.overlong is error: {}{}",
                overlong.len(),
                options.max_length,
                overlong[..shown].join(", "),
                if overlong.len() > shown { ", …" } else { "" }
            );
        }
        ensure!(
            !documents.is_empty(),
            "no token of the {} rows counts in the loss (data.loss_on, data.max_length {})",
            rows.len(),
            options.max_length
        );
        let sequences = pack::pack(&mut documents, options.packing, options.max_length);
        counts.sequences = sequences.len();
        counts.tokens = documents.iter().map(|d| d.input_ids.len()).sum();
        counts.target_tokens = documents.iter().map(Document::num_target_tokens).sum();
        ensure!(counts.target_tokens > 0, "no token counts in the loss");
        Ok(Dataset { documents, sequences, counts })
    }

    /// Tokens of each sequence.
    pub fn sequence_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.sequences.iter().map(|s| s.iter().map(|&d| self.documents[d].input_ids.len()).sum())
    }

    /// An xxh3 hash of all that training reads: the sequences in order, and the sample index, token ids and targets of each
    /// of their documents. Two ranks with equal digests see the same data.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for sequence in &self.sequences {
            hash.update(&(sequence.len() as u64).to_le_bytes());
            for &Document { sample_idx, ref input_ids, ref is_target } in sequence.iter().map(|&d| &self.documents[d]) {
                hash.update(&sample_idx.to_le_bytes());
                hash.update(&(input_ids.len() as u64).to_le_bytes());
                input_ids.iter().for_each(|id| hash.update(&id.to_le_bytes()));
                is_target.iter().for_each(|&t| hash.update(&[u8::from(t)]));
            }
        }
        hash.digest()
    }

    /// Host memory that the documents and sequences take, for as long as the data set lives.
    pub fn host_bytes(&self) -> usize {
        let of_document = |d: &Document| d.input_ids.capacity() * size_of::<u32>() + d.is_target.capacity();
        let of_sequence = |s: &Vec<usize>| s.capacity() * size_of::<usize>();
        self.documents.capacity() * size_of::<Document>()
            + self.documents.iter().map(of_document).sum::<usize>()
            + self.sequences.capacity() * size_of::<Vec<usize>>()
            + self.sequences.iter().map(of_sequence).sum::<usize>()
    }
}

/// What is left of a row of more than max_length tokens.
fn cut(
    mut input_ids: Vec<u32>,
    mut is_target: Vec<bool>,
    options: &DataOptions,
    counts: &mut Counts,
) -> Vec<(Vec<u32>, Vec<bool>)> {
    let limit = options.max_length;
    if input_ids.len() <= limit {
        return vec![(input_ids, is_target)];
    }
    match options.overlong {
        Overlong::Truncate => {
            counts.truncated += 1;
            input_ids.truncate(limit);
            is_target.truncate(limit);
            vec![(input_ids, is_target)]
        }
        Overlong::Split => {
            counts.split += 1;
            input_ids.chunks(limit).zip(is_target.chunks(limit)).map(|(i, t)| (i.to_vec(), t.to_vec())).collect()
        }
        Overlong::Drop | Overlong::Error => {
            counts.dropped += 1;
            Vec::new()
        }
    }
}

/// A document as text, its runs of target tokens between 【 and 】; as ids where there is no tokenizer.
pub fn describe_sample(tokenizer: Option<&TextTokenizer>, document: &Document, max_chars: usize) -> String {
    let mut text = String::new();
    // What is predicted is marked, so not the first token.
    let marked = |i: usize| i > 0 && document.is_target[i];
    let mut begin = 0;
    while begin < document.input_ids.len() {
        let is_target = marked(begin);
        let end =
            (begin..document.input_ids.len()).find(|&i| marked(i) != is_target).unwrap_or(document.input_ids.len());
        let ids = &document.input_ids[begin..end];
        let run = match tokenizer.map(|t| t.decode(ids, false)) {
            Some(Ok(run)) => run,
            _ => format!("{ids:?}"),
        };
        text += &if is_target { format!("【{run}】") } else { run };
        begin = end;
    }
    match text.char_indices().nth(max_chars) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const OPTIONS: DataOptions = DataOptions {
        format: Format::Auto,
        max_length: 4,
        packing: Packing::None,
        overlong: Overlong::Truncate,
        loss_on: LossOn::Auto,
    };

    fn load(text: &str, options: DataOptions) -> Result<Dataset> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, text)?;
        Dataset::load(&[path], None, 100, &options)
    }

    fn ids(dataset: &Dataset) -> Vec<&[u32]> {
        dataset.documents.iter().map(|d| &d.input_ids[..]).collect()
    }

    fn error(text: &str, options: DataOptions) -> String {
        format!("{:#}", load(text, options).unwrap_err())
    }

    const ROWS: &str =
        "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n\n{\"input_ids\": [10, 11]}\n{\"input_ids\": [12]}\n";

    #[test]
    fn overlong_rows_are_counted() {
        let of = |overlong| load(ROWS, DataOptions { overlong, ..OPTIONS });
        let truncated = of(Overlong::Truncate).unwrap();
        assert_eq!(ids(&truncated), [&[1, 2, 3, 4][..], &[10, 11]]);
        let said = "3 rows, 2 sequences, 6 tokens, 4 of them targets; 1 truncated to 4 tokens; \
                    1 dropped because no token of them counts in the loss";
        assert_eq!(truncated.counts.to_string(), said);
        let split = of(Overlong::Split).unwrap();
        // The last piece, [9], predicts nothing.
        assert_eq!(ids(&split), [&[1, 2, 3, 4][..], &[5, 6, 7, 8], &[10, 11]]);
        assert_eq!((split.counts.split, split.counts.without_target), (1, 2));
        assert_eq!(split.documents.iter().map(|d| d.sample_idx).collect::<Vec<_>>(), [0, 1, 2]);
        let dropped = of(Overlong::Drop).unwrap();
        assert_eq!((ids(&dropped), dropped.counts.dropped), (vec![&[10, 11][..]], 1));
        let refused = format!("{:#}", of(Overlong::Error).unwrap_err());
        assert!(refused.contains("1 rows are longer") && refused.contains("rows.jsonl:1"), "{refused}");
    }

    #[test]
    fn the_digest_covers_all_that_training_reads() {
        let data = load(ROWS, OPTIONS).unwrap();
        let digest_after = |change: &dyn Fn(&mut Dataset)| {
            let mut changed = data.clone();
            change(&mut changed);
            changed.digest()
        };
        let digests = [
            data.digest(),
            digest_after(&|d| d.documents[0].input_ids[3] = 5),
            digest_after(&|d| d.documents[1].is_target[1] = false),
            digest_after(&|d| d.documents[1].sample_idx = 7),
            digest_after(&|d| d.sequences.swap(0, 1)),
            digest_after(&|d| d.sequences = vec![vec![0, 1]]),
            digest_after(&|d| drop(d.sequences.pop())),
        ];
        assert_eq!(load(ROWS, OPTIONS).unwrap().digest(), digests[0]);
        let different: std::collections::BTreeSet<u64> = digests.into();
        assert_eq!(different.len(), digests.len());
    }

    #[test]
    fn host_memory_follows_the_tokens() {
        let row = |n: usize| format!("{{\"input_ids\": {:?}}}\n", vec![1; n]);
        let of = |n| load(&row(n), DataOptions { max_length: 100_000, ..OPTIONS }).unwrap().host_bytes();
        let added = of(20_000) - of(10_000);
        assert!((50_000..100_000).contains(&added), "{added} bytes for 10000 tokens");
    }

    #[test]
    fn labels_and_padding() {
        let row = r#"{"input_ids": [0, 5, 6, 7], "labels": [-100, -100, -100, 7], "attention_mask": [0, 1, 1, 1]}"#;
        let data = load(row, OPTIONS).unwrap();
        assert_eq!((ids(&data)[0], &data.documents[0].is_target), (&[5, 6, 7][..], &vec![false, false, true]));
        assert_eq!(describe_sample(None, &data.documents[0], 100), "[5, 6]【[7]】");
        assert_eq!(describe_sample(None, &data.documents[0], 3), "[5,…");
    }

    #[test]
    fn bad_rows_are_refused_with_their_place() {
        for (text, said) in [
            ("{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 100]}", "rows.jsonl:2: token id 100"),
            (r#"{"input_ids": [1, -2]}"#, "rows.jsonl:1: token id -2"),
            (r#"{"input_ids": [1, 2], "labels": [1, 3]}"#, "rows.jsonl:1: labels[1] is 3"),
            (r#"{"input_ids": [1, 2], "labels": [1]}"#, "rows.jsonl:1: labels: 1 entries for 2"),
            (r#"{"input_ids": [1, 2], "labels": [1, -100]}"#, "no token of the 1 rows counts"),
            (r#"{"text": "x"}"#, "rows.jsonl:1: the row is text, but there is no tokenizer"),
        ] {
            assert!(error(text, OPTIONS).contains(said), "{text}: {}", error(text, OPTIONS));
        }
        let completion = DataOptions { loss_on: LossOn::Completion, ..OPTIONS };
        assert!(error(r#"{"input_ids": [1, 2]}"#, completion).contains("data.loss_on"));
    }

    #[test]
    fn no_answer_is_in_both_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = |i: usize| format!(r#"{{"prompt": "question {i}", "completion": "answer {}"}}"#, i % 40);
        std::fs::write(&path, (0..200).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let tokenizer = TextTokenizer::load(Path::new(tokenizer::tests::GOLDEN), &jiff::Zoned::now()).unwrap();
        let options = DataOptions { max_length: 64, ..OPTIONS };
        let split = |fraction| {
            Dataset::load_with_held_out(std::slice::from_ref(&path), Some(&tokenizer), 320, &options, fraction)
        };
        let (train, held_out) = split(0.3).unwrap();
        assert_eq!(train.documents.len() + held_out.documents.len(), 200);
        let answer = |d: &Document| d.input_ids.iter().zip(&d.is_target).filter(|x| *x.1).map(|x| *x.0).collect();
        let answers: Vec<Vec<u32>> = train.documents.iter().map(answer).collect();
        assert!(held_out.documents.iter().all(|d| !answers.contains(&answer(d))));
        assert!((20..100).contains(&held_out.documents.len()), "{}", held_out.documents.len());
        assert!(split(0.0).unwrap_err().to_string().contains("data.eval"));
    }

    #[test]
    fn a_sample_shows_its_targets() {
        let tokenizer = TextTokenizer::load(Path::new(tokenizer::tests::GOLDEN), &jiff::Zoned::now()).unwrap();
        let input_ids = tokenizer.encode("the quick fox", false).unwrap();
        let is_target = (0..input_ids.len()).map(|i| i == 0 || i + 1 == input_ids.len()).collect();
        let document = Document { sample_idx: 0, is_target, input_ids };
        let last = tokenizer.decode(&document.input_ids[document.input_ids.len() - 1..], false).unwrap();
        let expected = format!("{}【{last}】", "the quick fox".strip_suffix(&last).unwrap());
        assert_eq!(describe_sample(Some(&tokenizer), &document, 100), expected);
    }
}
