//! A data set: documents, and the sequences that they make.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::Xxh3;

use super::counts::{Counts, Places};
use super::cut::Builder;
use super::pack::{Piece, Sequences};
use super::place::Place;
use super::source::{Files, Source};
use super::store::{Entry, Store, TARGET};
use super::tokens::{HELD_OUT, Making, Tokens, is_held_out};
use super::{DataOptions, Document, TextTokenizer};

/// Number of rows that a data set can show.
pub const MAX_FIRST_ROWS: usize = 1000;

/// Documents in a store of tokens, and for each sequence the indices of its documents.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub(super) store: Arc<Store>,
    pub(super) documents: Vec<Piece>,
    pub sequences: Sequences,
    pub counts: Counts,
    /// Sentences about the rows that would surprise whoever wrote them, to be told before training.
    pub notes: Vec<String>,
    /// Rows with a document over max_length, and rows with a document, or a piece of one, that has no target.
    pub overlong: Places,
    pub without_target: Places,
    /// The first rows, at most [`MAX_FIRST_ROWS`].
    pub first_rows: Vec<FirstRow>,
}

/// A row of a data set.
#[derive(Clone, Debug)]
pub struct FirstRow {
    pub place: Place,
    /// Its tokens among those of all rows, before anything is cut.
    pub tokens: Range<usize>,
}

/// Tells which rows of a store a data set has: all, or those on one side of the fraction that is held out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    All,
    Training(f64),
    HeldOut(f64),
}

impl Part {
    /// Returns the number of times that an epoch has a row of this entry. A held-out row is there once, whatever its
    /// weight.
    pub(super) fn times(self, entry: &Entry) -> u32 {
        match self {
            Part::All => entry.times,
            Part::Training(fraction) if is_held_out(entry.answer, fraction) => 0,
            Part::Training(_) => entry.times,
            Part::HeldOut(fraction) if is_held_out(entry.answer, fraction) => entry.times.min(1),
            Part::HeldOut(_) => 0,
        }
    }
}

impl Dataset {
    /// Reads files and folders into a temporary store. `tokenizer` may be missing where all rows are tokenized.
    pub fn load(
        sources: &[Source],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
    ) -> Result<Dataset> {
        let making = Making { tokenizer, vocab_size, loss_on: options.loss_on, held_out: 0.0 };
        Dataset::of(Tokens::temporary(&making, Files::find(sources)?, &mut |_| {})?, options)
    }

    /// Reads files and folders like [`Dataset::load`], into two parts as [`Dataset::parts`] makes them.
    pub fn load_with_held_out(
        sources: &[Source],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
        fraction: f64,
    ) -> Result<(Dataset, Dataset)> {
        let making = Making { tokenizer, vocab_size, loss_on: options.loss_on, held_out: fraction };
        Dataset::parts(Tokens::temporary(&making, Files::find(sources)?, &mut |_| {})?, options, fraction)
    }

    /// Cuts and packs the documents of all rows.
    pub fn of(tokens: Tokens, options: &DataOptions) -> Result<Dataset> {
        let Tokens { store, files } = tokens;
        let store = Arc::new(store);
        let mut dataset = Builder::read(&store, &files, Part::All, *options)?.finish()?;
        dataset.notes.extend([files.notes(), &store.meta.notes].concat());
        Ok(dataset)
    }

    /// Makes two parts of the rows, training and held out. Rows are told apart by a hash of their answer, so that no
    /// answer is in both. Held-out rows are never cut by packing: `wrapped` packs them as `true` does.
    pub fn parts(tokens: Tokens, options: &DataOptions, fraction: f64) -> Result<(Dataset, Dataset)> {
        let Tokens { store, files } = tokens;
        let store = Arc::new(store);
        let train = Builder::read(&store, &files, Part::Training(fraction), *options)?;
        let held_out = Builder::read(&store, &files, Part::HeldOut(fraction), options.for_evaluation())?;
        let (num_train, num_held_out) = (train.counts.rows, held_out.counts.rows);
        ensure!(
            num_train > 0 && num_held_out > 0,
            "data.eval: {fraction} of the rows leaves {num_train} for training and {num_held_out} for evaluation; give a file, \
             or another fraction"
        );
        let (mut train, held_out) = (train.finish()?, held_out.finish().context(HELD_OUT)?);
        train.notes.extend([files.notes(), &store.meta.notes].concat());
        Ok((train, held_out))
    }

    /// Makes a data set of the rows of a store, each of which is a document, and sequences of them.
    pub(super) fn of_store(store: Store, documents: Vec<Piece>, sequences: Sequences, counts: Counts) -> Dataset {
        Dataset {
            store: Arc::new(store),
            documents,
            sequences,
            counts,
            notes: Vec::new(),
            overlong: Places::default(),
            without_target: Places::default(),
            first_rows: Vec::new(),
        }
    }

    pub fn num_documents(&self) -> usize {
        self.documents.len()
    }

    /// Returns a document by its index, which is its sample index too.
    pub fn document(&self, document: usize) -> Document {
        let words = &self.store.words()[self.documents[document].range()];
        Document {
            sample_idx: document as u64,
            input_ids: words.iter().map(|word| word & !TARGET).collect(),
            is_target: words.iter().map(|word| word & TARGET != 0).collect(),
        }
    }

    pub fn documents(&self) -> impl Iterator<Item = Document> + '_ {
        (0..self.documents.len()).map(|document| self.document(document))
    }

    /// Counts the tokens of a document.
    pub fn document_length(&self, document: usize) -> usize {
        self.documents[document].len()
    }

    /// Returns the index of a document's first token among the tokens of all rows.
    pub fn document_begin(&self, document: usize) -> usize {
        self.documents[document].begin()
    }

    /// Returns, for each document, the index of its row, counted from 0 over all files, and the index of its first
    /// token among the tokens of the row. A row that was split, or that says where documents begin, makes several.
    pub fn origins(&self) -> Result<Vec<(usize, usize)>> {
        let mut origins = Vec::with_capacity(self.documents.len());
        each_row(&self.store, |row| {
            let tokens = tokens_of(row);
            while let Some(piece) = self.documents.get(origins.len()).filter(|piece| tokens.contains(&piece.begin())) {
                origins.push((row[0].0.row_idx as usize, piece.begin() - tokens.start));
            }
            Ok(())
        })?;
        Ok(origins)
    }

    /// Counts the tokens of the longest document.
    pub fn longest_document(&self) -> usize {
        self.documents.iter().map(|d| d.len()).max().unwrap_or(0)
    }

    /// Counts the tokens of each sequence.
    pub fn sequence_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.sequences.iter().map(|documents| documents.map(|d| self.documents[d].len()).sum())
    }

    /// Returns an xxh3 hash of all that training reads: tokens and targets of all rows, the sequences in order, and
    /// the place of each of their documents among the tokens. Two ranks with equal digests see the same data.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        let mut add = |number: usize| hash.update(&(number as u64).to_le_bytes());
        add(self.store.words_digest() as usize);
        for sequence in self.sequences.iter() {
            for document in sequence {
                let piece = self.documents[document];
                [document, piece.begin(), piece.len()].into_iter().for_each(&mut add);
            }
            add(usize::MAX);
        }
        hash.digest()
    }

    /// Counts the host memory that documents and sequences take for as long as the data set lives.
    pub fn host_bytes(&self) -> usize {
        self.store.host_bytes() + self.documents.capacity() * size_of::<Piece>() + self.sequences.host_bytes()
    }

    /// Counts the bytes of the mapped file of tokens.
    pub fn mapped_bytes(&self) -> usize {
        self.store.mapped_bytes()
    }
}

/// Calls `take` for the entries of each row, each with the index of its first word.
pub(super) fn each_row(store: &Store, mut take: impl FnMut(&[(Entry, usize)]) -> Result<()>) -> Result<()> {
    let mut row: Vec<(Entry, usize)> = Vec::new();
    store.each_entry(|entry, begin| {
        if row.first().is_some_and(|(first, _)| first.row_idx != entry.row_idx) {
            take(&row)?;
            row.clear();
        }
        row.push((*entry, begin));
        Ok(())
    })?;
    if row.is_empty() { Ok(()) } else { take(&row) }
}

/// Returns the range of the words of a row.
pub(super) fn tokens_of(row: &[(Entry, usize)]) -> Range<usize> {
    let (first, last) = (row[0], row[row.len() - 1]);
    first.1..last.1 + last.0.num_tokens as usize
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{LossOn, Overlong, Packing, tokenizer};
    use super::*;

    const OPTIONS: DataOptions =
        DataOptions { max_length: 4, packing: Packing::None, overlong: Overlong::Truncate, loss_on: LossOn::Auto };

    fn load(text: &str, options: DataOptions) -> Result<Dataset> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, text)?;
        Dataset::load(&[Source::new(path)], None, 100, &options)
    }

    fn ids(dataset: &Dataset) -> Vec<Vec<u32>> {
        dataset.documents().map(|d| d.input_ids).collect()
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
        assert_eq!(split.origins().unwrap(), [(0, 0), (0, 4), (1, 0)]);
        let dropped = of(Overlong::Drop).unwrap();
        assert_eq!((ids(&dropped), dropped.counts.dropped), (vec![vec![10, 11]], 1));
        let refused = format!("{:#}", of(Overlong::Error).unwrap_err());
        assert!(
            refused.contains("1 row with more than data.max_length (4) tokens") && refused.contains("rows.jsonl:1"),
            "{refused}"
        );
    }

    #[test]
    fn the_digest_covers_all_that_training_reads() {
        let packed = DataOptions { packing: Packing::BestFit, max_length: 5, ..OPTIONS };
        let of = |rows: &str, options| load(rows, options).unwrap().digest();
        let rows = "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5]}\n";
        let digests = [
            of(rows, OPTIONS),
            of(&rows.replace("3]", "6]"), OPTIONS),
            of(&rows.replace("3]", "3], \"labels\": [1, -100, 3]"), OPTIONS),
            of(&rows.replace("5]", "5, 5]"), OPTIONS),
            of(rows, packed),
            of(rows, DataOptions { max_length: 2, ..OPTIONS }),
            of("{\"input_ids\": [4, 5]}\n{\"input_ids\": [1, 2, 3]}\n", OPTIONS),
        ];
        assert_eq!(of(rows, OPTIONS), digests[0]);
        let mut other_order = load(rows, OPTIONS).unwrap();
        other_order.sequences = [[1], [0]].into_iter().collect();
        assert_ne!(other_order.digest(), digests[0]);
        let different: std::collections::BTreeSet<u64> = digests.into();
        assert_eq!(different.len(), digests.len());
    }

    #[test]
    fn host_memory_follows_the_documents_and_not_their_tokens() {
        let of = |rows: usize, n: usize| {
            let text = format!("{{\"input_ids\": {:?}}}\n", vec![1; n]).repeat(rows);
            load(&text, DataOptions { max_length: 100_000, ..OPTIONS }).unwrap()
        };
        assert_eq!(of(100, 10).host_bytes(), of(100, 1000).host_bytes());
        let of_9000 = of(10_000, 10).host_bytes() - of(1000, 10).host_bytes();
        assert!((9000 * 20..9000 * 28).contains(&of_9000), "{of_9000} bytes for 9000 documents");
        assert_eq!(of(100, 1000).mapped_bytes() - of(100, 10).mapped_bytes(), 100 * 990 * 4);
    }

    #[test]
    fn labels_and_padding() {
        let row = r#"{"input_ids": [0, 5, 6, 7], "labels": [-100, -100, -100, 7], "attention_mask": [0, 1, 1, 1]}"#;
        let data = load(row, OPTIONS).unwrap();
        assert_eq!((&ids(&data)[0], data.document(0).is_target), (&vec![5, 6, 7], vec![false, false, true]));
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
        let split =
            |fraction| Dataset::load_with_held_out(&[Source::new(&path)], Some(&tokenizer), 320, &options, fraction);
        let (train, held_out) = split(0.3).unwrap();
        assert_eq!(train.num_documents() + held_out.num_documents(), 200);
        let answer =
            |d: Document| d.input_ids.iter().zip(&d.is_target).filter(|x| *x.1).map(|x| *x.0).collect::<Vec<u32>>();
        let answers: Vec<Vec<u32>> = train.documents().map(answer).collect();
        assert!(held_out.documents().all(|d| !answers.contains(&answer(d))));
        assert!((20..100).contains(&held_out.num_documents()), "{}", held_out.num_documents());
        assert!(split(0.0).unwrap_err().to_string().contains("data.eval"));
    }

    #[test]
    fn wrapping_cuts_nothing_off() {
        let of = |overlong| load(ROWS, DataOptions { overlong, packing: Packing::Wrapped, ..OPTIONS });
        let all = of(Overlong::Split).unwrap();
        // The second document begins where the first one ends, in the third sequence.
        assert_eq!(ids(&all), [&[1, 2, 3, 4][..], &[5, 6, 7, 8], &[9], &[10, 11]]);
        assert_eq!((all.sequences.len(), all.counts.split, all.counts.truncated), (3, 1, 0));
        assert_eq!(ids(&of(Overlong::Drop).unwrap()), [&[10, 11]]);
        assert!(of(Overlong::Error).is_err());
    }

    #[test]
    fn documents_of_a_row_stay_apart() {
        let row = r#"{"input_ids": [5, 6, 7, 8, 9, 10], "position_ids": [0, 1, 2, 0, 1, 2]}"#;
        let data = load(row, DataOptions { packing: Packing::BestFit, ..OPTIONS }).unwrap();
        assert_eq!((ids(&data), data.counts.target_tokens), (vec![vec![5, 6, 7], vec![8, 9, 10]], 4));
        assert_eq!(data.origins().unwrap(), [(0, 0), (0, 3)]);
        // Neither is longer than max_length, though the row is.
        assert_eq!((data.counts.rows, data.counts.truncated), (1, 0));
    }

    #[test]
    fn what_nothing_reads_is_told_once_with_a_count() {
        let rows = [
            r#"{"input_ids": [1, 2], "topic": "a", "id": 1, "text": "a"}"#,
            r#"{"input_ids": [3, 4], "topic": "b", "special_tokens_mask": [0, 0]}"#,
            r#"{"input_ids": [5, 6], "topic": null, "\u001b[2J": 1}"#,
        ];
        let notes = load(&rows.join("\n"), OPTIONS).unwrap().notes;
        assert_eq!(
            notes,
            [
                "1 row can be read in several formats: `input_ids` are read, as by TRL, and `text` are not; data.format can \
                 name another one",
                "columns that nothing reads: `\\u{1b}[2J` in 1 row, `id` in 1 row, `special_tokens_mask` in 1 row, `text` in \
                 1 row, `topic` in 2 rows",
            ]
        );
        let many: Vec<String> = (0..50).map(|i| format!("\"c{i:02}\": 1")).collect();
        let notes = load(&format!("{{\"input_ids\": [1, 2], {}}}", many.join(", ")), OPTIONS).unwrap().notes;
        assert!(notes[0].contains("`c19` in 1 row and 30 more") && !notes[0].contains("c20"), "{notes:?}");
    }

    #[test]
    fn what_the_template_and_the_prompt_do_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let tokenizer = TextTokenizer::load(Path::new(tokenizer::tests::GOLDEN), &jiff::Zoned::now()).unwrap();
        let options = DataOptions { max_length: 64, ..OPTIONS };
        let notes = |rows: &str| {
            std::fs::write(&path, rows).unwrap();
            Dataset::load(&[Source::new(&path)], Some(&tokenizer), 320, &options).unwrap().notes
        };
        let row = r#"{"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "thinking": "c"}],
                      "tools": [{"name": "f"}]}"#;
        let told = notes(&row.replace('\n', ""));
        assert_eq!(
            told,
            [
                "keys of messages that the chat template does not mention: `name` in 1 message, `thinking` in 1 message",
                "variables that the chat template does not mention: `tools` in 1 row",
            ]
        );
        let plain = r#"{"prompt": "Wait for", "completion": " the land."}"#;
        let told = notes(&format!(
            "{plain}\n{}",
            plain.replace("for\", \"completion\": \" the", "for \", \"completion\": \"the")
        ));
        assert!(
            told.len() == 1
                && told[0].contains("1 row with a prompt that has other tokens by itself")
                && told[0].ends_with("rows.jsonl:2"),
            "{told:?}"
        );
        assert_eq!(notes(plain), Vec::<String>::new());
    }
}
