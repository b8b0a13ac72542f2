//! A file that is one array of JSON objects, read object by object.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::super::place::Place;
use super::lines::{check_length, object};

/// Tells whether the first character of a file, but for whitespace, begins an array. It stays there.
pub fn is_array(reader: &mut dyn BufRead) -> std::io::Result<bool> {
    Ok(reader.fill_buf()?.trim_ascii_start().first() == Some(&b'['))
}

/// Passes over whitespace and returns the byte that follows, which stays there.
fn peek(reader: &mut dyn BufRead) -> std::io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        let spaces = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        match (buffer.is_empty(), buffer.get(spaces).copied()) {
            (true, _) => return Ok(None),
            (false, Some(byte)) => {
                reader.consume(spaces);
                return Ok(Some(byte));
            }
            (false, None) => reader.consume(spaces),
        }
    }
}

/// The objects of an array.
pub struct Array {
    reader: Box<dyn BufRead + Send>,
    path: Arc<PathBuf>,
    /// Number of rows that have been read.
    row: usize,
    is_over: bool,
    bytes: Vec<u8>,
}

impl Array {
    /// `reader` stands at the beginning of the file.
    pub fn new(reader: Box<dyn BufRead + Send>, path: Arc<PathBuf>) -> Array {
        Array { reader, path, row: 0, is_over: false, bytes: Vec::new() }
    }

    /// Reads the next object.
    pub fn next_object(&mut self) -> Result<Option<(Place, Map<String, Value>)>> {
        if self.is_over {
            return Ok(None);
        }
        let place = Place::row(&self.path, self.row + 1);
        match self.begin_element().with_context(|| place.to_string())? {
            false => {
                self.is_over = true;
                let rest = peek(&mut *self.reader).with_context(|| place.to_string())?;
                ensure!(rest.is_none(), "{}: something follows the array's last bracket", self.path.display());
                Ok(None)
            }
            true => {
                self.row += 1;
                self.element(&place)?;
                let object = object(&self.bytes).with_context(|| place.to_string())?;
                Ok(Some((place, object)))
            }
        }
    }

    /// Passes over what stands before an element. Returns false where the array ends instead.
    fn begin_element(&mut self) -> Result<bool> {
        let before = peek(&mut *self.reader)?;
        match (before, self.row) {
            (Some(b'['), 0) | (Some(b','), 1..) => {
                self.reader.consume(1);
                let first = peek(&mut *self.reader)?;
                if (first, self.row) != (Some(b']'), 0) {
                    return Ok(true);
                }
            }
            (Some(b']'), 1..) => {}
            (Some(byte), _) => {
                bail!("found {:?}; allowed: a comma, or the bracket that closes the array", byte as char)
            }
            (None, _) => bail!("the file ends before its array; allowed: ]"),
        }
        self.reader.consume(1);
        Ok(false)
    }

    /// Reads one element into `bytes`, up to the comma or the bracket behind it.
    fn element(&mut self, place: &Place) -> Result<()> {
        self.bytes.clear();
        let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
        loop {
            let buffer = self.reader.fill_buf().with_context(|| place.to_string())?;
            ensure!(!buffer.is_empty(), "{place}: the file ends within this row");
            let is_last = |&byte: &u8| {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' if in_string => is_escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b'[' | b'{' => depth += 1,
                    b',' | b']' | b'}' if depth == 0 => return true,
                    b']' | b'}' => depth -= 1,
                    _ => {}
                }
                false
            };
            let end = buffer.iter().position(is_last);
            let len = end.unwrap_or(buffer.len());
            self.bytes.extend_from_slice(&buffer[..len]);
            self.reader.consume(len);
            check_length(self.bytes.len(), place)?;
            if end.is_some() {
                // An element that is missing is reported as the text that stands in its place.
                ensure!(!self.bytes.is_empty(), "{place}: found no value; allowed: an object");
                return Ok(());
            }
        }
    }
}
