//! The loss of each target token of a data set, in a file of JSON lines.
//!
//! Rows come in their order, and the tokens of a row in theirs, whatever rank or sequence they were scored in.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::checkpoint::atomic;
use crate::comm::{Queue, watch};
use crate::data::source::Source;
use crate::data::{self, Dataset, Document};
use crate::device::Device;
use crate::files;

/// Losses that a rank sends in one message.
const PIECE: usize = 1 << 16;

/// Bytes of a line, roughly.
const LINE_BYTES: usize = 64;

/// One line; the names are part of the file's format.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct TokenLoss {
    /// Index of the row in the data set, counted from 0 over all files. A row of which several documents were made
    /// (it was split, or it says where documents begin) has the lines of all of them.
    row: usize,
    /// Index of the token among the tokens of its row, counted from 0, padding not counted. Tokens that were cut off
    /// have no line.
    position: usize,
    /// Id of the token that is predicted.
    token: u32,
    /// −log p of the token.
    loss: f32,
}

/// A file of losses that is not there yet.
pub struct LossFile {
    path: PathBuf,
    file: NamedTempFile,
}

impl LossFile {
    /// Makes a temporary file beside `path`. Fails if `path` is there, unless it is a file, `overwrite` is true, and no
    /// rows are read from it.
    pub fn create(path: &Path, overwrite: bool, sources: &[Source]) -> Result<LossFile> {
        if let Ok(found) = path.symlink_metadata() {
            let place = files::shown_path(path);
            ensure!(found.is_file(), "{place}: is there and is not a regular file; name another file");
            ensure!(overwrite, "{place}: is there already\nhelp: name another file, or add --overwrite");
            let real = path.canonicalize().with_context(|| place.clone())?;
            let is_read = |source: &Source| source.path.canonicalize().is_ok_and(|rows| real.starts_with(rows));
            ensure!(!sources.iter().any(is_read), "{place}: is a file of --dataset; name another file");
        }
        Ok(LossFile { path: path.into(), file: atomic::beside(path)? })
    }

    /// Fails if the disk has no room for the losses of these rows.
    pub fn check_room(&self, dataset: &Dataset) -> Result<()> {
        atomic::check_room(self.file.as_file(), &self.path, LINE_BYTES * dataset.counts.target_tokens)
    }

    /// Writes the losses that each rank has computed over its [`data::eval_micro_batches`] of `max_tokens`, and gives
    /// the file its name.
    pub fn write(mut self, dataset: &Dataset, max_tokens: usize, of_ranks: &[Vec<f32>]) -> Result<()> {
        let mut out = BufWriter::new(&mut self.file);
        for line in lines(dataset, max_tokens, of_ranks)? {
            serde_json::to_writer(&mut out, &line)
                .map_err(std::io::Error::from)
                .and_then(|()| out.write_all(b"\n"))
                .with_context(|| format!("{}: cannot be written", self.path.display()))?;
        }
        out.flush().with_context(|| format!("{}: cannot be written", self.path.display()))?;
        drop(out);
        atomic::rename(self.file, &self.path)
    }
}

/// Returns the losses of every rank in rank order, on each rank. Collective.
pub fn gather<D: Device, Q: Queue<D>>(queue: &mut Q, own: &[f32]) -> Result<Vec<Vec<f32>>> {
    let counts = queue.all_gather_f64("numbers of losses", &[own.len() as f64])?;
    let counts: Vec<usize> = counts.iter().map(|count| count[0] as usize).collect();
    let longest = counts.iter().copied().max().unwrap_or(0);
    let mut of_ranks = vec![Vec::new(); counts.len()];
    for begin in (0..longest).step_by(PIECE) {
        // Every rank sends as many values; those past a rank's last loss are dropped.
        let piece: Vec<f64> =
            (begin..longest.min(begin + PIECE)).map(|i| own.get(i).map_or(0.0, |&loss| f64::from(loss))).collect();
        for (rank, received) in queue.all_gather_f64("losses of tokens", &piece)?.iter().enumerate() {
            let left = counts[rank] - of_ranks[rank].len();
            of_ranks[rank].extend(received.iter().take(left).map(|&loss| loss as f32));
        }
    }
    Ok(of_ranks)
}

/// Returns the lines of the file in their order.
fn lines(dataset: &Dataset, max_tokens: usize, of_ranks: &[Vec<f32>]) -> Result<impl Iterator<Item = TokenLoss>> {
    let mut of_documents: Vec<&[f32]> = vec![&[]; dataset.num_documents()];
    for (rank, losses) in of_ranks.iter().enumerate() {
        let mut rest = &losses[..];
        for document in data::eval_documents(dataset, max_tokens, of_ranks.len(), rank) {
            watch::beat();
            let targets = dataset.document(document).num_target_tokens();
            ensure!(targets <= rest.len(), "rank {rank} has {} losses, too few", losses.len());
            (of_documents[document], rest) = rest.split_at(targets);
        }
        ensure!(rest.is_empty(), "rank {rank} has {} losses, {} too many", losses.len(), rest.len());
    }
    let documents = dataset.documents().zip(dataset.origins()?);
    Ok(documents.zip(of_documents).flat_map(|((Document { input_ids, is_target, .. }, (row, first)), losses)| {
        let targets = (1..input_ids.len()).filter(move |&i| is_target[i]);
        let line = move |(i, &loss): (usize, &f32)| TokenLoss { row, position: first + i, token: input_ids[i], loss };
        targets.zip(losses).map(line)
    }))
}
