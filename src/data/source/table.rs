//! Files of comma-separated or tab-separated values. The first record names the columns, and an empty field is no
//! column of its row.

use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use csv::{ErrorKind, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::super::place::Place;
use super::MAX_ROW_BYTES;
use crate::files::{counted, shown};

/// The records of a file.
pub struct Table {
    reader: csv::Reader<Limited>,
    path: Arc<PathBuf>,
    names: Vec<String>,
    record: StringRecord,
}

impl Table {
    pub fn new(reader: Box<dyn BufRead + Send>, path: Arc<PathBuf>, delimiter: u8) -> Result<Table> {
        let limited = Limited { reader, left: MAX_READ_BYTES };
        let reader = ReaderBuilder::new().delimiter(delimiter).has_headers(false).flexible(true).from_reader(limited);
        let mut table = Table { reader, path, names: Vec::new(), record: StringRecord::new() };
        if let Some(place) = table.read()? {
            table.names = table.record.iter().map(str::to_string).collect();
            let twice = (1..table.names.len()).find(|&i| table.names[..i].contains(&table.names[i]));
            if let Some(i) = twice {
                bail!("{place}: two columns have the name {}; allowed: one of each name", shown(&table.names[i]));
            }
        }
        Ok(table)
    }

    /// Reads the next record as an object of strings.
    pub fn next_object(&mut self) -> Result<Option<(Place, Map<String, Value>)>> {
        let Some(place) = self.read()? else { return Ok(None) };
        ensure!(
            self.record.len() == self.names.len(),
            "{place}: found {}; allowed: {}, one for each name in the first line",
            counted(self.record.len(), "field"),
            self.names.len()
        );
        let fields = self.names.iter().zip(&self.record).filter(|(_, field)| !field.is_empty());
        Ok(Some((place, fields.map(|(name, field)| (name.clone(), field.into())).collect())))
    }

    /// Reads a record, and returns the line that it begins in.
    fn read(&mut self) -> Result<Option<Place>> {
        self.reader.get_mut().left = MAX_READ_BYTES;
        let begin = self.reader.position().line() as usize;
        match self.reader.read_record(&mut self.record) {
            Ok(false) => Ok(None),
            Ok(true) => {
                let line = self.record.position().map_or(begin, |position| position.line() as usize);
                Ok(Some(Place::line(&self.path, line)))
            }
            Err(error) => {
                let line = error.position().map_or(begin, |position| position.line() as usize);
                let why = match error.kind() {
                    ErrorKind::Utf8 { err, .. } => format!("not UTF-8: {err}"),
                    ErrorKind::Io(error) => error.to_string(),
                    _ => error.to_string(),
                };
                bail!("{}: {}", Place::line(&self.path, line), shown(&why))
            }
        }
    }
}

/// Bytes that are read for one record: those of the longest, and what the library reads ahead.
const MAX_READ_BYTES: usize = MAX_ROW_BYTES + (64 << 10);

/// A reader that fails where one record, such as one with a quote that is never closed, takes too much of it.
struct Limited {
    reader: Box<dyn BufRead + Send>,
    left: usize,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.left = self.left.checked_sub(n).ok_or_else(|| {
            std::io::Error::other(format!(
                "the row is longer than {} MiB, the longest that is read; help: close its quotes, or make several rows of it",
                MAX_ROW_BYTES >> 20
            ))
        })?;
        Ok(n)
    }
}
