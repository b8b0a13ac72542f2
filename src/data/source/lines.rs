//! Files whose rows are lines.

use std::io::{BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Map, Value};

use super::super::place::Place;
use super::super::python;
use super::MAX_ROW_BYTES;
use crate::files;

/// The lines of a file that are not empty.
pub struct Lines {
    reader: Box<dyn BufRead + Send>,
    path: Arc<PathBuf>,
    /// Number of lines that have been read.
    line: usize,
    bytes: Vec<u8>,
}

impl Lines {
    pub fn new(reader: Box<dyn BufRead + Send>, path: Arc<PathBuf>) -> Lines {
        Lines { reader, path, line: 0, bytes: Vec::new() }
    }

    /// Reads the next line that is not empty, without its end.
    pub fn next_line(&mut self) -> Result<Option<(Place, &[u8])>> {
        loop {
            self.bytes.clear();
            let mut limited = self.reader.by_ref().take(MAX_ROW_BYTES as u64 + 2);
            let n = limited.read_until(b'\n', &mut self.bytes).with_context(|| self.path.display().to_string())?;
            if n == 0 {
                return Ok(None);
            }
            self.line += 1;
            let place = Place::line(&self.path, self.line);
            check_length(self.bytes.len() - 1, &place)?;
            if !self.bytes.trim_ascii().is_empty() {
                let line = self.bytes.strip_suffix(b"\n").unwrap_or(&self.bytes);
                return Ok(Some((place, line.strip_suffix(b"\r").unwrap_or(line))));
            }
        }
    }

    /// Reads the object of the next line that is not empty.
    pub fn next_object(&mut self) -> Result<Option<(Place, Map<String, Value>)>> {
        let Some((place, line)) = self.next_line()? else { return Ok(None) };
        let object = object(line.trim_ascii()).with_context(|| place.to_string())?;
        Ok(Some((place, object)))
    }
}

/// Refuses a row over [`MAX_ROW_BYTES`].
pub fn check_length(bytes: usize, place: &Place) -> Result<()> {
    ensure!(
        bytes <= MAX_ROW_BYTES,
        "{place}: the row is longer than {} MiB, the longest that is read; help: make several rows of it",
        MAX_ROW_BYTES >> 20
    );
    Ok(())
}

/// Reads an object of JSON.
pub fn object(text: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(&python::keep_long_integers(text)?).map_err(|error| {
        // A row is one line, so that serde_json's own line number is always 1.
        let error = error.to_string().replace(" at line 1 column ", ", column ");
        let help = match text[0] {
            b'[' => "; help: name the file .json, or write one object a line (jq -c '.[]')",
            b'{' if text.len() == 1 => "; help: one object a line (jq -c .)",
            _ => "",
        };
        anyhow!("not a JSON object: {}{help}", files::shown(&error))
    })
}
