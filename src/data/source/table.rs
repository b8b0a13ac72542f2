//! Files of comma-separated or tab-separated values. The first record names the columns, and an empty field is no
//! column of its row.

use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use csv::{ReaderBuilder, StringRecord};
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
        let limited = Limited { reader, left: MAX_READ_BYTES, end: END, given: 0, last: Vec::new() };
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
        let next = Place::line(&self.path, self.reader.position().line() as usize);
        let mut record = std::mem::take(&mut self.record).into_byte_record();
        match self.reader.read_byte_record(&mut record) {
            Ok(false) => return Ok(None),
            Ok(true) => {}
            Err(error) => bail!("{next}: {}", shown(&error.to_string())),
        }
        // The library's own line of a record is that of the empty lines before it, or of the \n of a \r\n before it.
        let (position, read) = (self.reader.position(), self.reader.get_ref());
        let within = record.as_slice().iter().filter(|&&byte| byte == b'\n').count();
        let ended = position.line() as usize - usize::from(read.ends_line(position.byte()));
        let place = Place::line(&self.path, ended.saturating_sub(within));
        if read.end.is_empty() && position.byte() == read.given {
            let is_end = record.len() == 1 && record[0].is_empty();
            ensure!(is_end, "{place}: the file ends within the quotes of this row; help: close them");
            return Ok(None);
        }
        match StringRecord::from_byte_record(record) {
            Ok(record) => self.record = record,
            Err(error) => bail!("{place}: {}", shown(&format!("not UTF-8: {}", error.utf8_error()))),
        }
        Ok(Some(place))
    }
}

/// Bytes that are read for one record: those of the longest, and what the library reads ahead.
const MAX_READ_BYTES: usize = MAX_ROW_BYTES + (64 << 10);

/// These bytes are read after a file. They make a record of one empty field, unless the quotes of the last row are open:
/// then the line break is within the quotes, and the quote closes them.
const END: &[u8] = b"\n\"";

/// A reader that fails where one record, such as one with a quote that is not closed, takes too much of it.
struct Limited {
    reader: Box<dyn BufRead + Send>,
    left: usize,
    /// The part of [`END`] that is still to be read.
    end: &'static [u8],
    /// Number of bytes that have been read, with those of [`END`].
    given: u64,
    /// The bytes that were read last.
    last: Vec<u8>,
}

impl Limited {
    /// Tells whether a line ends before this position of the file, which lies in the bytes that were read last.
    fn ends_line(&self, position: u64) -> bool {
        let begin = self.given - self.last.len() as u64;
        let before = position.checked_sub(begin + 1).and_then(|i| self.last.get(i as usize));
        before == Some(&b'\n')
    }
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut n = self.reader.read(buffer)?;
        self.left = self.left.checked_sub(n).ok_or_else(|| {
            std::io::Error::other(format!(
                "the row is longer than {} MiB, the longest that is read; help: close its quotes, or make several rows of it",
                MAX_ROW_BYTES >> 20
            ))
        })?;
        if n == 0 {
            n = self.end.read(buffer)?;
        }
        if n > 0 {
            self.given += n as u64;
            self.last.clear();
            self.last.extend_from_slice(&buffer[..n]);
        }
        Ok(n)
    }
}
