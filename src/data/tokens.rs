//! Makes a store of tokens ([`super::store`]) of rows, and the name by which it is found again.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::ThreadPool;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::parallel::{Numbered, threads, work_on_rows};
use super::source::{Files, Rows};
use super::store::{MADE_BY, Store, Writer};
use super::tokenize::{self, Tokenized};
use super::{LossOn, TextTokenizer};
use crate::files;

/// Everything besides the rows that decides their tokens. Cutting and packing come later.
#[derive(Clone, Copy)]
pub struct Making<'a> {
    /// `None` is allowed where all rows hold token ids.
    pub tokenizer: Option<&'a TextTokenizer>,
    pub vocab_size: usize,
    pub loss_on: LossOn,
    /// Fraction of the rows that is held out. The error of such a row says that it is one.
    pub held_out: f64,
}

/// Rows that are tokenized.
pub struct Tokens {
    pub store: Store,
    pub files: Files,
}

/// The progress of making a store.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes that have been read, and bytes of all files, both as they are on disk, compressed or not.
    pub bytes_read: u64,
    pub bytes: u64,
    pub rows: u64,
    pub tokens: u64,
    pub since: Instant,
}

/// Tells whether a row is held out, by the hash of its answer: rows with the same answer are on the same side.
pub fn is_held_out(answer: u64, fraction: f64) -> bool {
    (answer as f64 / u64::MAX as f64) < fraction
}

pub const HELD_OUT: &str = "data.eval: the held-out rows";

impl Making<'_> {
    /// Returns the name of the store of these files, 32 hex digits: a digest of all that decides its content. All
    /// bytes of the files are read for it, which takes a hundredth of the time of tokenizing them, because sizes and
    /// times of files do not tell every change.
    pub fn key(&self, files: &Files) -> Result<String> {
        let mut digest = Xxh3Default::new();
        let mut add = |text: String| {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        };
        add(format!("{MADE_BY}, {} {:?}", self.vocab_size, self.loss_on));
        add(self.tokenizer.map_or("none".into(), TextTokenizer::identity));
        add(self.tokenizer.and_then(TextTokenizer::visible_time).unwrap_or_default());
        for (i, file) in files.list.iter().enumerate() {
            let (bytes, content) = files::digest(&file.path)?;
            let source = &file.source;
            add(format!("{} {:?} {:?} {:?}", source.weight.to_bits(), source.format, source.columns, file.form()));
            add(format!("{bytes} {content:016x}"));
            // A fraction of the rows is taken of all files of a source together.
            let goes_on = files.list[..i].last().is_some_and(|before| Arc::ptr_eq(&before.source, source));
            if goes_on && source.weight.fract() != 0.0 {
                add("of the same source".into());
            }
        }
        Ok(format!("{:032x}", digest.digest128()))
    }

    /// Reads all rows and writes their store to an empty file, which messages call `place`. `made_from` is for people;
    /// `tell` is called after each row. The error of the first bad row is returned.
    pub fn write(
        &self,
        files: &Files,
        made_from: Vec<String>,
        out: &mut File,
        place: &str,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        self.write_on(&threads()?, files, made_from, out, place, tell)
    }

    /// Does what [`Making::write`] does on the threads of `pool`.
    pub fn write_on(
        &self,
        pool: &ThreadPool,
        files: &Files,
        made_from: Vec<String>,
        out: &mut File,
        place: &str,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let mut rows = Rows::of(files);
        let mut writer = Writer::new(out, place)?;
        let mut progress = Progress { bytes_read: 0, bytes: files.bytes(), rows: 0, tokens: 0, since: Instant::now() };
        let bytes_read = rows.bytes_read();
        let work = |row: &Numbered| self.row(row);
        work_on_rows(pool, rows.by_ref(), work, |row, made| {
            progress.rows += 1;
            if let Some((answer, documents)) = made {
                writer.add(row, answer, documents)?;
            }
            progress = Progress { bytes_read: bytes_read.load(Relaxed), tokens: writer.num_tokens(), ..progress };
            tell(progress);
            Ok(())
        })?;
        writer.finish(rows.notes(self.tokenizer), made_from)
    }

    /// Returns the digest of a row's answer and its documents; `None` for a row that is in no epoch.
    fn row(&self, Numbered { row, times, .. }: &Numbered) -> Result<Option<(u64, Vec<Tokenized>)>> {
        if *times == 0 {
            return Ok(None);
        }
        let answer = xxh3_64(row.answer().as_bytes());
        let documents = tokenize::tokenize(row, self.tokenizer, self.vocab_size, self.loss_on);
        let documents = if is_held_out(answer, self.held_out) { documents.context(HELD_OUT) } else { documents };
        Ok(Some((answer, documents?)))
    }
}

impl Tokens {
    /// Tokenizes rows into a temporary file without a name.
    pub fn temporary(making: &Making, files: Files, tell: &mut dyn FnMut(Progress)) -> Result<Tokens> {
        let mut file = tempfile::tempfile().context("making a temporary file for tokens")?;
        making.write(&files, Vec::new(), &mut file, "a temporary file", tell)?;
        Ok(Tokens { store: Store::open(file)?, files })
    }
}
