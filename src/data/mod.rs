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

use anyhow::{Result, bail, ensure};
use xxhash_rust::xxh3::xxh3_64;

use crate::choices::choices;

pub use sampler::{Sampler, eval_micro_batches, step_micro_batches};
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
        Off = "false",
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
    pub truncated: usize,
    pub split: usize,
    /// Over max_length, with `overlong: drop`.
    pub dropped: usize,
    /// Fewer than two tokens, or none that counts in the loss.
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
    /// in both.
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
        let part = |rows: &[Row], options| Dataset::from_rows(rows, tokenizer, vocab_size, options);
        Ok((part(&train, options)?, part(&held_out, options)?))
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
