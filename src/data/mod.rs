//! Turns rows of files into micro-batches: [`source`] reads rows, [`row`] says which of their columns are read,
//! [`tokenize`] makes documents of them, [`parallel`] does so on several threads, [`tokens`] writes them to a file
//! ([`store`]), [`dataset`] maps it and cuts documents, [`pack`] puts them into sequences, [`epochs`] divides sequences
//! among steps, [`sampler`] deals them to ranks, [`preview`] shows what has become of rows.

pub mod chat_template;
pub mod column_names;
pub mod counts;
mod cut;
pub mod dataset;
pub mod epochs;
mod growth;
pub mod made_up;
pub mod message;
pub mod pack;
mod parallel;
mod place;
pub mod preview;
pub mod prompts;
pub mod python;
pub mod row;
pub mod sampler;
pub mod source;
mod special_tokens;
pub mod store;
pub mod text_stream;
pub mod tokenize;
pub mod tokenized;
pub mod tokenizer;
pub mod tokens;
pub mod unread;
pub mod variables;

use crate::choices::choices;

pub use column_names::ColumnNames;
pub use dataset::Dataset;
pub use epochs::Epochs;
pub use sampler::{Sampler, eval_documents, eval_micro_batches, step_micro_batches};
pub use source::Source;
pub use tokenizer::TextTokenizer;

choices! {
    /// Forms that the rows of a file can have.
    Format {
        /// The form is decided by the columns of a file's first row; see [`row`].
        Auto = "auto",
        Text = "text",
        Messages = "messages",
        PromptCompletion = "prompt_completion",
        Alpaca = "alpaca",
        Sharegpt = "sharegpt",
        Tokenized = "tokenized",
    }
}

choices! {
    /// Ways to put documents into sequences. Documents never attend to each other.
    Packing {
        /// A sequence holds whole documents, as many as fit.
        BestFit = "true",
        /// Documents stand end to end and are cut where a sequence is full.
        Wrapped = "wrapped",
        /// A sequence holds one document.
        None = "false",
    }
}

choices! {
    /// Ways to treat rows over max_length. Wrapped packing cuts rows where a sequence is full: there `split`, which
    /// is then the default, leaves rows as long as they are, and a recipe with `truncate` is refused.
    Overlong {
        Truncate = "truncate",
        Split = "split",
        Drop = "drop",
        Error = "error",
    }
}

choices! {
    /// Choices of the tokens that count in the loss.
    LossOn {
        /// The completion counts where there is a prompt, else all tokens; masks and labels of tokenized rows apply.
        Auto = "auto",
        All = "all",
        Completion = "completion",
        /// The text counts that the chat template marks as generated.
        Assistant = "assistant",
    }
}

/// The part of the recipe's data section that says how rows become documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DataOptions {
    pub max_length: usize,
    pub packing: Packing,
    pub overlong: Overlong,
    pub loss_on: LossOn,
}

impl DataOptions {
    /// Returns the options for evaluation: documents that would be cut to fill sequences are packed by best fit
    /// instead.
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
    /// True for each token that counts in the loss when it is predicted.
    pub is_target: Vec<bool>,
}

impl Document {
    /// Counts the tokens that are predicted and count in the loss. The first token is never predicted.
    pub fn num_target_tokens(&self) -> usize {
        self.is_target.iter().skip(1).filter(|&&t| t).count()
    }
}

/// Shows a document as text with its target tokens between 【 and 】, or as ids where there is no tokenizer.
pub fn describe_sample(tokenizer: Option<&TextTokenizer>, document: &Document, max_chars: usize) -> String {
    let mut text = String::new();
    // Tokens that are predicted are marked, so the first one never is.
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

    #[test]
    fn targets_are_marked() {
        let input_ids = vec![5, 6, 7];
        let document = Document { sample_idx: 0, input_ids, is_target: vec![true, false, true] };
        assert_eq!(describe_sample(None, &document, 100), "[5, 6]【[7]】");
        assert_eq!(describe_sample(None, &document, 3), "[5,…");
    }

    #[test]
    fn a_sample_shows_its_targets() {
        let tokenizer = TextTokenizer::load(Path::new(tokenizer::tests::GOLDEN), &jiff::Zoned::now()).unwrap();
        let input_ids = tokenizer.encode("the quick fox", false).unwrap();
        let is_target = (0..input_ids.len()).map(|i| i == 0 || i + 1 == input_ids.len()).collect();
        let document = Document { sample_idx: 0, input_ids, is_target };
        let last = tokenizer.decode(&document.input_ids[document.input_ids.len() - 1..], false).unwrap();
        let expected = format!("{}【{last}】", "the quick fox".strip_suffix(&last).unwrap());
        assert_eq!(describe_sample(Some(&tokenizer), &document, 100), expected);
    }
}
