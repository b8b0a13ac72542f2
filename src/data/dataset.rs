//! A data set: documents, and the sequences that they make.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::comm::watch;
use crate::files::{counted, shown};

use super::counts::{Counts, Places};
use super::row::Row;
use super::source::{Rows, Source};
use super::tokenize::{self, Tokenized};
use super::{DataOptions, Document, Overlong, Packing, TextTokenizer, pack};

/// Number of rows that a data set can show.
pub const MAX_FIRST_ROWS: usize = 1000;

/// Documents, and for each sequence the indices of its documents.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub documents: Vec<Document>,
    pub sequences: Vec<Vec<usize>>,
    pub counts: Counts,
    /// Sentences about the rows that would surprise whoever wrote them, to be told before training.
    pub notes: Vec<String>,
    /// Rows with a document over max_length, and rows with a document that has no target.
    pub overlong: Places,
    pub without_target: Places,
    /// Indices of the first rows, see [`Document::row_idx`]; at most [`MAX_FIRST_ROWS`].
    pub first_rows: Vec<usize>,
}

impl Dataset {
    /// Reads files and folders. `tokenizer` may be missing where all rows are tokenized.
    pub fn load(
        sources: &[Source],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
    ) -> Result<Dataset> {
        let mut rows = Rows::open(sources)?;
        let mut builder = Builder::new(tokenizer, vocab_size, *options);
        for (row_idx, row) in rows.by_ref().enumerate() {
            watch::beat();
            let (row, times) = row?;
            builder.add(row_idx, &row, times)?;
        }
        let mut dataset = builder.finish()?;
        dataset.notes.extend(rows.notes(tokenizer));
        Ok(dataset)
    }

    /// Reads files and folders into two parts, training and held out. A held-out row is there once, whatever its weight. Rows are told apart by a hash of their answer,
    /// so that no answer is in both. Held-out rows are never cut by packing: `wrapped` packs them as `true` does.
    pub fn load_with_held_out(
        sources: &[Source],
        tokenizer: Option<&TextTokenizer>,
        vocab_size: usize,
        options: &DataOptions,
        fraction: f64,
    ) -> Result<(Dataset, Dataset)> {
        const HELD_OUT: &str = "data.eval: the held-out rows";
        let mut rows = Rows::open(sources)?;
        let mut train = Builder::new(tokenizer, vocab_size, *options);
        let mut held_out = Builder::new(tokenizer, vocab_size, options.for_evaluation());
        for (row_idx, row) in rows.by_ref().enumerate() {
            watch::beat();
            let (row, times) = row?;
            match (xxh3_64(row.answer().as_bytes()) as f64 / u64::MAX as f64) < fraction {
                true => held_out.add(row_idx, &row, times.min(1)).context(HELD_OUT)?,
                false => train.add(row_idx, &row, times)?,
            }
        }
        let (num_train, num_held_out) = (train.counts.rows, held_out.counts.rows);
        ensure!(
            num_train > 0 && num_held_out > 0,
            "data.eval: {fraction} of the rows leaves {num_train} for training and {num_held_out} for evaluation; give a file, \
             or another fraction"
        );
        let (mut train, held_out) = (train.finish()?, held_out.finish().context(HELD_OUT)?);
        train.notes.extend(rows.notes(tokenizer));
        Ok((train, held_out))
    }

    /// Counts the tokens of the longest document.
    pub fn longest_document(&self) -> usize {
        self.documents.iter().map(|d| d.input_ids.len()).max().unwrap_or(0)
    }

    /// Counts the tokens of each sequence.
    pub fn sequence_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.sequences.iter().map(|s| s.iter().map(|&d| self.documents[d].input_ids.len()).sum())
    }

    /// Returns an xxh3 hash of all that training reads: the sequences in order, and the sample index, token ids and
    /// targets of each of their documents. Two ranks with equal digests see the same data.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for sequence in &self.sequences {
            hash.update(&(sequence.len() as u64).to_le_bytes());
            for &Document { sample_idx, ref input_ids, ref is_target, .. } in
                sequence.iter().map(|&d| &self.documents[d])
            {
                hash.update(&sample_idx.to_le_bytes());
                hash.update(&(input_ids.len() as u64).to_le_bytes());
                input_ids.iter().for_each(|id| hash.update(&id.to_le_bytes()));
                is_target.iter().for_each(|&t| hash.update(&[u8::from(t)]));
            }
        }
        hash.digest()
    }

    /// Counts the host memory that documents and sequences take for as long as the data set lives.
    pub fn host_bytes(&self) -> usize {
        let of_document = |d: &Document| d.input_ids.capacity() * size_of::<u32>() + d.is_target.capacity();
        let of_sequence = |s: &Vec<usize>| s.capacity() * size_of::<usize>();
        self.documents.capacity() * size_of::<Document>()
            + self.documents.iter().map(of_document).sum::<usize>()
            + self.sequences.capacity() * size_of::<Vec<usize>>()
            + self.sequences.iter().map(of_sequence).sum::<usize>()
    }
}

/// A data set whose rows are still being read.
struct Builder<'a> {
    tokenizer: Option<&'a TextTokenizer>,
    vocab_size: usize,
    options: DataOptions,
    documents: Vec<Document>,
    counts: Counts,
    overlong: Places,
    without_target: Places,
    first_rows: Vec<usize>,
    /// Rows whose prompt has other tokens by itself than before its completion.
    other_prompt: Places,
    /// Rows with a message that the chat template leaves out or changes, by the message's role.
    unwritten: BTreeMap<String, Places>,
}

impl Builder<'_> {
    fn new(tokenizer: Option<&TextTokenizer>, vocab_size: usize, options: DataOptions) -> Builder<'_> {
        Builder {
            tokenizer,
            vocab_size,
            options,
            documents: Vec::new(),
            counts: Counts { max_length: options.max_length, ..Counts::default() },
            overlong: Places::default(),
            without_target: Places::default(),
            first_rows: Vec::new(),
            other_prompt: Places::default(),
            unwritten: BTreeMap::new(),
        }
    }

    /// Adds a row as often as it is in an epoch.
    fn add(&mut self, row_idx: usize, row: &Row, times: usize) -> Result<()> {
        if times == 0 {
            return Ok(());
        }
        if self.first_rows.len() < MAX_FIRST_ROWS {
            self.first_rows.push(row_idx);
        }
        let documents = tokenize::tokenize(row, self.tokenizer, self.vocab_size, self.options.loss_on)?;
        for document in &documents {
            if document.input_ids.len() > self.options.max_length {
                self.overlong.add(row);
            }
            if !document.prompt_is_prefix {
                self.other_prompt.add(row);
            }
            for role in &document.unwritten {
                self.unwritten.entry(role.clone()).or_default().add(row);
            }
        }
        for _ in 0..times {
            self.counts.rows += 1;
            let mut end = 0;
            for document in &documents {
                let mut first_position = end;
                end += document.input_ids.len();
                for (input_ids, is_target) in self.cut(document.clone()) {
                    let (sample_idx, len) = (self.documents.len() as u64, input_ids.len());
                    let document = Document { sample_idx, row_idx, first_position, input_ids, is_target };
                    first_position += len;
                    match document.num_target_tokens() {
                        0 => {
                            self.counts.without_target += 1;
                            self.without_target.add(row);
                        }
                        _ => self.documents.push(document),
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the pieces that are left of a document after `overlong` has been applied.
    fn cut(&mut self, document: Tokenized) -> Vec<(Vec<u32>, Vec<bool>)> {
        let Tokenized { mut input_ids, mut is_target, .. } = document;
        let limit = self.options.max_length;
        if input_ids.len() <= limit {
            return vec![(input_ids, is_target)];
        }
        match (self.options.overlong, self.options.packing) {
            (Overlong::Truncate, _) => {
                self.counts.truncated += 1;
                input_ids.truncate(limit);
                is_target.truncate(limit);
                vec![(input_ids, is_target)]
            }
            // Packing will cut it where sequences end.
            (Overlong::Split, Packing::Wrapped) => {
                self.counts.split += 1;
                vec![(input_ids, is_target)]
            }
            (Overlong::Split, _) => {
                self.counts.split += 1;
                input_ids.chunks(limit).zip(is_target.chunks(limit)).map(|(i, t)| (i.to_vec(), t.to_vec())).collect()
            }
            (Overlong::Drop | Overlong::Error, _) => {
                self.counts.dropped += 1;
                Vec::new()
            }
        }
    }

    fn finish(self) -> Result<Dataset> {
        let Builder { options, mut documents, mut counts, overlong, without_target, .. } = self;
        ensure!(
            options.overlong != Overlong::Error || overlong.rows == 0,
            "{} rows are longer than data.max_length ({}), and data.overlong is error: {overlong}",
            overlong.rows,
            options.max_length
        );
        ensure!(
            !documents.is_empty(),
            "no token of the {} rows counts in the loss (data.loss_on, data.max_length {})",
            counts.rows,
            options.max_length
        );
        let sequences = pack::pack(&mut documents, options.packing, options.max_length);
        ensure!(!sequences.is_empty(), "no token counts in the loss of a sequence (data.packing)");
        counts.sequences = sequences.len();
        counts.tokens = documents.iter().map(|d| d.input_ids.len()).sum();
        counts.target_tokens = documents.iter().map(Document::num_target_tokens).sum();
        let mut notes = Vec::new();
        if self.other_prompt.rows > 0 {
            notes.push(format!(
                "{} prompts have other tokens by themselves than before their completions; what counts begins at the first \
                 token that differs, and generating from such a prompt begins otherwise than in training: {}",
                self.other_prompt.rows, self.other_prompt
            ));
        }
        for (role, places) in self.unwritten {
            notes.push(format!(
                "{} of the role {} do not stand in what the chat template writes, or not as they are: {places}",
                counted(places.rows, "message"),
                shown(&role)
            ));
        }
        Ok(Dataset { documents, sequences, counts, notes, overlong, without_target, first_rows: self.first_rows })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{LossOn, tokenizer};
    use super::*;

    const OPTIONS: DataOptions =
        DataOptions { max_length: 4, packing: Packing::None, overlong: Overlong::Truncate, loss_on: LossOn::Auto };

    fn load(text: &str, options: DataOptions) -> Result<Dataset> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, text)?;
        Dataset::load(&[Source::new(path)], None, 100, &options)
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
        let places: Vec<_> = split.documents.iter().map(|d| (d.sample_idx, d.row_idx, d.first_position)).collect();
        assert_eq!(places, [(0, 0, 0), (1, 0, 4), (2, 1, 0)]);
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
        assert_eq!(train.documents.len() + held_out.documents.len(), 200);
        let answer = |d: &Document| d.input_ids.iter().zip(&d.is_target).filter(|x| *x.1).map(|x| *x.0).collect();
        let answers: Vec<Vec<u32>> = train.documents.iter().map(answer).collect();
        assert!(held_out.documents.iter().all(|d| !answers.contains(&answer(d))));
        assert!((20..100).contains(&held_out.documents.len()), "{}", held_out.documents.len());
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
        assert_eq!((ids(&data), data.counts.target_tokens), (vec![&[5, 6, 7][..], &[8, 9, 10]], 4));
        assert_eq!(data.documents.iter().map(|d| (d.row_idx, d.first_position)).collect::<Vec<_>>(), [(0, 0), (0, 3)]);
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
            told.len() == 1 && told[0].contains("1 prompts have other tokens") && told[0].ends_with("rows.jsonl:2"),
            "{told:?}"
        );
        assert_eq!(notes(plain), Vec::<String>::new());
    }
}
