//! Works on rows on several threads and keeps their order: while threads work on one batch of rows, the batch after it
//! is read, and the results of the one before it are taken.

use anyhow::{Context, Result};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::row::Row;
use crate::comm::watch;

/// Bytes of the rows of a batch, for each thread, and their bounds for all threads. Tokenizing takes some 170 times as
/// much memory as it has text at a time.
const THREAD_BYTES: usize = 128 << 10;
const MIN_BATCH_BYTES: usize = 1 << 20;
const MAX_BATCH_BYTES: usize = 4 << 20;
/// A longer row is a batch of its own, so that no two of them are tokenized at the same time.
const LONG_ROW_BYTES: usize = 512 << 10;

/// A row with its index, counted from 0 over all files, and the number of times that it is in an epoch.
pub struct Numbered {
    pub row_idx: usize,
    pub row: Row,
    pub times: usize,
}

/// Starts the threads that tokenize: as many as `RAYON_NUM_THREADS` says, else one for each core that this process may
/// use. The threads that compute are others, which start later.
pub fn threads() -> Result<ThreadPool> {
    let threads = ThreadPoolBuilder::new().thread_name(|i| format!("tokenize {i}"));
    threads.build().context("starting the threads that tokenize")
}

/// Calls `work` for the rows on the threads of `pool`, and `take` for each row with its result, on this thread and in
/// the order of the rows. The error of the first row that has one is returned, whichever thread met it.
pub fn work_on_rows<T: Send>(
    pool: &ThreadPool,
    rows: impl Iterator<Item = Result<(Row, usize)>>,
    work: impl Fn(&Numbered) -> Result<T> + Sync,
    mut take: impl FnMut(&Numbered, T) -> Result<()>,
) -> Result<()> {
    let with_result = |row: Numbered| work(&row).map(|result| (row, result));
    let bytes = (THREAD_BYTES * pool.current_num_threads()).clamp(MIN_BATCH_BYTES, MAX_BATCH_BYTES);
    let mut batches = Batches { rows: rows.enumerate(), bytes, next: None, is_over: false };
    let (mut batch, mut done) = (batches.next_batch(), Vec::new());
    while !(batch.is_empty() && done.is_empty()) {
        let (mut made, mut next, mut taken) = (Vec::new(), Vec::new(), Ok(()));
        pool.in_place_scope(|scope| {
            scope.spawn(|_| made = batch.into_par_iter().map(|row| row.and_then(&with_result)).collect());
            taken = std::mem::take(&mut done).into_iter().try_for_each(|row: Result<_>| {
                watch::beat();
                let (row, result) = row?;
                take(&row, result)
            });
            if taken.is_ok() {
                next = batches.next_batch();
            }
        });
        taken?;
        (batch, done) = (next, made);
    }
    Ok(())
}

/// Reads rows in batches. An error ends the batch that it is in, as its last entry, and no row is read after it.
struct Batches<I> {
    rows: I,
    bytes: usize,
    /// A long row that waits for its own batch.
    next: Option<Result<Numbered>>,
    is_over: bool,
}

impl<I: Iterator<Item = (usize, Result<(Row, usize)>)>> Batches<I> {
    /// Returns the next rows; none at the end.
    fn next_batch(&mut self) -> Vec<Result<Numbered>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < self.bytes {
            let Some(row) = self.next.take().or_else(|| self.read()) else { break };
            let row_bytes = row.as_ref().map_or(0, |numbered| numbered.row.bytes);
            if row_bytes > LONG_ROW_BYTES && !batch.is_empty() {
                self.next = Some(row);
                break;
            }
            bytes += row_bytes + size_of::<Numbered>();
            batch.push(row);
            if row_bytes > LONG_ROW_BYTES || batch.last().is_some_and(Result::is_err) {
                break;
            }
        }
        batch
    }

    fn read(&mut self) -> Option<Result<Numbered>> {
        watch::beat();
        let row = if self.is_over { None } else { self.rows.next() };
        self.is_over = row.as_ref().is_none_or(|(_, row)| row.is_err());
        let (row_idx, row) = row?;
        Some(row.map(|(row, times)| Numbered { row_idx, row, times }))
    }
}
