//! Cuts the documents of a store to at most max_length tokens, and counts what becomes of rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::counts::{Counts, Places};
use super::dataset::{Dataset, FirstRow, MAX_FIRST_ROWS, Part, each_row, tokens_of};
use super::pack::{self, Piece};
use super::source::Files;
use super::store::{Entry, Store, TARGET};
use super::{DataOptions, Overlong, Packing};
use crate::files::{counted, shown};

/// A data set whose documents are being cut.
pub struct Builder<'a> {
    store: &'a Arc<Store>,
    files: &'a Files,
    options: DataOptions,
    documents: Vec<Piece>,
    pub counts: Counts,
    overlong: Places,
    without_target: Places,
    first_rows: Vec<FirstRow>,
    /// Rows whose prompt has other tokens by itself than before its completion.
    other_prompt: Places,
    /// Rows with a message that the chat template leaves out or changes, by the message's role.
    unwritten: BTreeMap<String, Places>,
}

impl<'a> Builder<'a> {
    /// Cuts the documents of a part of the rows of a store. `files` tells their places.
    pub fn read(store: &'a Arc<Store>, files: &'a Files, part: Part, options: DataOptions) -> Result<Builder<'a>> {
        let mut builder = Builder {
            store,
            files,
            options,
            documents: Vec::new(),
            counts: Counts { max_length: options.max_length, ..Counts::default() },
            overlong: Places::default(),
            without_target: Places::default(),
            first_rows: Vec::new(),
            other_prompt: Places::default(),
            unwritten: BTreeMap::new(),
        };
        each_row(store, |row| match part.times(&row[0].0) {
            0 => Ok(()),
            times => builder.add(row, times),
        })?;
        Ok(builder)
    }

    /// Adds a row as often as it is in an epoch.
    fn add(&mut self, row: &[(Entry, usize)], times: u32) -> Result<()> {
        let first = row[0].0;
        let place = self.files.place(first.file as usize, first.number as usize, first.has(Entry::IS_LINE));
        let place = place.context("the tokens are those of more files")?;
        let documents = if first.has(Entry::IS_EMPTY) { &[] } else { row };
        if self.first_rows.len() < MAX_FIRST_ROWS {
            self.first_rows.push(FirstRow { place: place.clone(), tokens: tokens_of(row) });
        }
        if documents.iter().any(|(document, _)| document.num_tokens as usize > self.options.max_length) {
            self.overlong.add(&place);
        }
        for (document, _) in documents {
            let remark = self.store.meta.remarks.get(document.remark as usize).context("a remark is missing")?;
            if remark.other_prompt {
                self.other_prompt.add(&place);
            }
            for role in &remark.unwritten {
                self.unwritten.entry(role.clone()).or_default().add(&place);
            }
        }
        let without_target = self.counts.without_target;
        for _ in 0..times {
            self.counts.rows += 1;
            for &(document, begin) in documents {
                self.cut(&document, begin);
            }
        }
        if self.counts.without_target > without_target {
            self.without_target.add(&place);
        }
        Ok(())
    }

    /// Adds the pieces that are left of a document after `overlong` has been applied.
    fn cut(&mut self, document: &Entry, begin: usize) {
        let (len, limit) = (document.num_tokens as usize, self.options.max_length);
        if len <= limit {
            return self.push(Piece::new(begin, len), document.num_targets as usize);
        }
        match (self.options.overlong, self.options.packing) {
            (Overlong::Truncate, _) => {
                self.counts.truncated += 1;
                let piece = Piece::new(begin, limit);
                self.push(piece, self.num_targets(document, piece));
            }
            // Packing will cut it where sequences end.
            (Overlong::Split, Packing::Wrapped) => {
                self.counts.split += 1;
                self.push(Piece::new(begin, len), document.num_targets as usize);
            }
            (Overlong::Split, _) => {
                self.counts.split += 1;
                for at in (0..len).step_by(limit) {
                    let piece = Piece::new(begin + at, limit.min(len - at));
                    self.push(piece, self.num_targets(document, piece));
                }
            }
            (Overlong::Drop | Overlong::Error, _) => self.counts.dropped += 1,
        }
    }

    /// Counts the targets of a piece of a document. Where all tokens are targets, none of them is looked at.
    fn num_targets(&self, document: &Entry, piece: Piece) -> usize {
        match document.num_targets + 1 == document.num_tokens {
            true => piece.len() - 1,
            false => num_targets(self.store, piece),
        }
    }

    fn push(&mut self, piece: Piece, num_targets: usize) {
        match num_targets {
            0 => self.counts.without_target += 1,
            _ => {
                self.counts.target_tokens += num_targets;
                self.documents.push(piece);
            }
        }
    }

    /// Packs the documents.
    pub fn finish(self) -> Result<Dataset> {
        let Builder { store, options, mut documents, mut counts, overlong, without_target, .. } = self;
        ensure!(
            options.overlong != Overlong::Error || overlong.rows == 0,
            "{} with more than data.max_length ({}) tokens, and data.overlong is error: {overlong}",
            counted(overlong.rows, "row"),
            options.max_length
        );
        ensure!(
            !documents.is_empty(),
            "no token of the {} rows counts in the loss (data.loss_on, data.max_length {})",
            counts.rows,
            options.max_length
        );
        let has_target = |piece: Piece| store.words()[piece.range()].iter().skip(1).any(|word| word & TARGET != 0);
        let sequences = pack::pack(&mut documents, options.packing, options.max_length, has_target);
        ensure!(!sequences.is_empty(), "no token counts in the loss of a sequence (data.packing)");
        ensure!(documents.len() < u32::MAX as usize, "{} documents; allowed: {}", documents.len(), u32::MAX);
        documents.shrink_to_fit();
        counts.sequences = sequences.len();
        counts.tokens = documents.iter().map(|d| d.len()).sum();
        if options.packing == Packing::Wrapped {
            // Where a document was cut, the first token of the second piece is not predicted.
            counts.target_tokens = documents.iter().map(|&piece| num_targets(store, piece)).sum();
        }
        let mut notes = Vec::new();
        if self.other_prompt.rows > 0 {
            notes.push(format!(
                "{} with a prompt that has other tokens by itself than before its completion; the first token that differs is \
                 the first that counts, and after such a prompt alone a text begins otherwise than in training: {}",
                counted(self.other_prompt.rows, "row"),
                self.other_prompt
            ));
        }
        for (role, places) in self.unwritten {
            notes.push(format!(
                "{} of the role {} that the chat template leaves out or changes: {places}",
                counted(places.rows, "message"),
                shown(&role)
            ));
        }
        let (store, first_rows) = (store.clone(), self.first_rows);
        Ok(Dataset { store, documents, sequences, counts, notes, overlong, without_target, first_rows })
    }
}

/// Counts the tokens of a piece that are predicted and count in the loss.
fn num_targets(store: &Store, piece: Piece) -> usize {
    store.words()[piece.range()].iter().skip(1).filter(|&word| word & TARGET != 0).count()
}
