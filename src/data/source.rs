//! Reads JSONL files row by row: a file is never in memory as a whole.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Map, Value};

use super::python;
use super::row::{self, Row};
use super::unread::Unread;
use super::{Format, TextTokenizer};
use crate::files;

/// Bytes of the longest row. Tokenizing takes about 170 times as much host memory, 700 MiB, on every rank.
pub const MAX_ROW_BYTES: usize = 4 << 20;

/// Iterates over the rows of files and folders (their *.jsonl, by name), in order. Errors name file and line.
pub struct Rows {
    files: std::vec::IntoIter<PathBuf>,
    open: Option<RowFile>,
    format: Format,
    unread: Unread,
}

impl Rows {
    /// `Format::Auto` decides for each file by its first row.
    pub fn open(paths: &[PathBuf], format: Format) -> Result<Rows> {
        let files = paths.iter().map(|path| files_of(path)).collect::<Result<Vec<_>>>()?.concat().into_iter();
        Ok(Rows { files, open: None, format, unread: Unread::default() })
    }

    /// Returns sentences about columns and keys of the rows read so far that nothing reads.
    pub fn notes(&self, tokenizer: Option<&TextTokenizer>) -> Vec<String> {
        self.unread.notes(tokenizer)
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        loop {
            if self.open.is_none() {
                let Some(path) = self.files.next() else { return Ok(None) };
                self.open = Some(RowFile::open(path)?);
            }
            if let Some(file) = &mut self.open {
                match file.next_row(self.format, &mut self.unread)? {
                    Some(row) => return Ok(Some(row)),
                    None => ensure!(file.format.is_some(), "{}: has no rows", file.path.display()),
                }
            }
            self.open = None;
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        self.next_row().transpose()
    }
}

/// Returns the path itself, or the *.jsonl files of the folder that it is.
fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
        .with_context(|| path.display().to_string())?;
    files.retain(|f| f.extension().is_some_and(|e| e == "jsonl"));
    files.sort();
    ensure!(!files.is_empty(), "{}: holds no *.jsonl file", path.display());
    Ok(files)
}

/// A file of rows that is being read.
struct RowFile {
    reader: BufReader<File>,
    path: Arc<PathBuf>,
    /// Number of lines that have been read.
    line: usize,
    bytes: Vec<u8>,
    /// `None` before the first row.
    format: Option<Format>,
}

impl RowFile {
    fn open(path: PathBuf) -> Result<RowFile> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        ensure!(
            extension == "jsonl",
            "{}: found .{extension}; allowed: .jsonl (json, parquet and txt are not supported yet)",
            path.display()
        );
        let reader = BufReader::with_capacity(1 << 20, files::open(&path)?);
        Ok(RowFile { reader, path: Arc::new(path), line: 0, bytes: Vec::new(), format: None })
    }

    fn next_row(&mut self, format: Format, unread: &mut Unread) -> Result<Option<Row>> {
        let Some(object) = self.next_object()? else { return Ok(None) };
        let place = || row::place(&self.path, self.line);
        let mut columns = row::Columns::new(object);
        let is_auto = format == Format::Auto;
        let format = match (self.format, is_auto) {
            (Some(format), _) => format,
            (None, false) => format,
            (None, true) => columns.detect().with_context(place)?,
        };
        self.format = Some(format);
        if is_auto {
            unread.count_forms(&columns, format);
        }
        let content = columns.content(format).with_context(place)?;
        columns.refuse_rest(format, is_auto).with_context(place)?;
        unread.count(&columns, &content);
        Ok(Some(Row { content, file: self.path.clone(), line: self.line }))
    }

    /// Reads the next line that is not empty.
    fn next_object(&mut self) -> Result<Option<Map<String, Value>>> {
        loop {
            self.bytes.clear();
            let mut limited = self.reader.by_ref().take(MAX_ROW_BYTES as u64 + 2);
            let n = limited.read_until(b'\n', &mut self.bytes).with_context(|| self.path.display().to_string())?;
            if n == 0 {
                return Ok(None);
            }
            self.line += 1;
            let place = || row::place(&self.path, self.line);
            ensure!(
                self.bytes.len() <= MAX_ROW_BYTES + 1,
                "{}: the row is longer than {} MiB, the longest that is read; help: make several rows of it",
                place(),
                MAX_ROW_BYTES >> 20
            );
            let line = self.bytes.trim_ascii();
            let line = if self.line == 1 { first_line(&self.path, line)? } else { line };
            if !line.is_empty() {
                return object(line).with_context(place).map(Some);
            }
        }
    }
}

/// Returns the first line without a byte order mark. Errors: a file of another kind under the name of a JSONL file.
fn first_line<'a>(path: &Path, line: &'a [u8]) -> Result<&'a [u8]> {
    files::check_lfs_pointer(path, line)?;
    files::check_html(path, line)?;
    let is_utf16 = line.starts_with(&[0xff, 0xfe]) || line.starts_with(&[0xfe, 0xff]);
    ensure!(!is_utf16, "{}: found UTF-16; allowed: UTF-8; help: iconv -f UTF-16 -t UTF-8", path.display());
    Ok(line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line).trim_ascii())
}

fn object(line: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(&python::keep_long_integers(line)?).map_err(|error| {
        // A row is one line, so that serde_json's own line number is always 1.
        let error = error.to_string().replace(" at line 1 column ", ", column ");
        let help = match line[0] {
            b'[' => "; help: one object a line (jq -c '.[]')",
            b'{' if line.len() == 1 => "; help: one object a line (jq -c .)",
            _ => "",
        };
        anyhow!("not a JSON object: {}{help}", files::shown(&error))
    })
}

#[cfg(test)]
mod tests {
    use super::super::row::{Alpaca, Content};
    use super::*;

    fn read_bytes(bytes: &[u8], format: Format) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, bytes)?;
        Rows::open(&[path], format)?.collect()
    }

    fn error_of(bytes: &[u8]) -> String {
        format!("{:#}", read_bytes(bytes, Format::Auto).unwrap_err())
    }

    #[test]
    fn the_format_is_that_of_the_first_row() {
        let alpaca = Alpaca { instruction: "a".into(), output: "b".into(), ..Alpaca::default() };
        for (text, expected) in [
            (r#"{"text": "a"}"#, Content::Text("a".into())),
            (r#"{"instruction": "a", "input": null, "output": "b"}"#, Content::Alpaca(alpaca)),
        ] {
            assert_eq!(read_bytes(text.as_bytes(), Format::Auto).unwrap()[0].content, expected);
        }
        let error = error_of(b"{\"text\": \"a\"}\n{\"instruction\": \"a\", \"output\": \"b\"}");
        assert!(error.contains("rows.jsonl:2: the column \"text\" is missing"), "{error}");
    }

    #[test]
    fn errors_name_file_and_line() {
        let deep = "[".repeat(200);
        for (text, said) in [
            (
                "{\"text\": \"a\"}\n\n{\"text\": ",
                "rows.jsonl:3: not a JSON object: EOF while parsing a value, column 8",
            ),
            (
                "[1]",
                "rows.jsonl:1: not a JSON object: invalid type: sequence, expected a map, column 0; help: one object a line",
            ),
            ("{\n \"text\": \"a\"\n}", "rows.jsonl:1: not a JSON object: EOF while parsing an object, column 1; help"),
            ("{\"text\": \"a\"}\r\n{\"text\": ", "rows.jsonl:2: not a JSON object"),
            ("{\"text\": \"a\0b\"}", "rows.jsonl:1: not a JSON object: control character"),
            (&format!("{{\"text\": {deep}"), "rows.jsonl:1: not a JSON object: recursion limit exceeded"),
            (r#"{"text": 1}"#, "rows.jsonl:1: text: found 1; allowed: a string"),
            (r#"{"body": "a"}"#, "rows.jsonl:1: found the columns [\"body\"]"),
            (r#"{"messages": []}"#, "rows.jsonl:1: messages: the list is empty"),
            (r#"{"messages": [{"content": "a"}]}"#, "rows.jsonl:1: messages[0]: found"),
            (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, "rows.jsonl:1: completion: found"),
            (r#"{"input_ids": [1.0]}"#, "rows.jsonl:1: input_ids: found [1.0]"),
            (r#"{"input_ids": [[1]]}"#, "rows.jsonl:1: input_ids: found [[1]]"),
            (r#"{"input_ids": "1 2"}"#, "rows.jsonl:1: input_ids: found \"1 2\""),
            ("version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
            ("<!DOCTYPE html>\n<p>", "an HTML page"),
            ("\n \n", "rows.jsonl: has no rows"),
            ("", "rows.jsonl: has no rows"),
        ] {
            let error = error_of(text.as_bytes());
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_with_their_line() {
        let error = error_of(b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n");
        assert!(error.contains("rows.jsonl:2: not a JSON object: invalid unicode"), "{error}");
        let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(error_of(&utf16).contains("found UTF-16"), "{}", error_of(&utf16));
    }

    #[test]
    fn a_byte_order_mark_and_ends_of_lines_are_no_part_of_rows() {
        let rows =
            read_bytes("\u{feff}{\"text\": \"a\"}\r\n\r\n  {\"text\": \"b\"}  ".as_bytes(), Format::Auto).unwrap();
        assert_eq!(rows.iter().map(Row::answer).collect::<Vec<_>>(), ["a", "b"]);
        assert!(rows[1].place().ends_with("rows.jsonl:3"));
    }

    #[test]
    fn the_longest_row_is_bounded() {
        let row = |bytes: usize| format!("{{\"text\": \"{}\"}}", "a".repeat(bytes - 12));
        let long = format!("{}\n{}\n", row(20), row(MAX_ROW_BYTES + 1));
        let error = error_of(long.as_bytes());
        assert!(error.contains("rows.jsonl:2: the row is longer than 4 MiB"), "{error}");
        assert!(error.len() < 500, "{} bytes", error.len());
        let longest = format!("{}\n{}", row(MAX_ROW_BYTES), row(20));
        assert_eq!(read_bytes(longest.as_bytes(), Format::Auto).unwrap().len(), 2);
    }

    #[test]
    fn errors_show_the_beginning_of_a_value() {
        let error = error_of(format!("{{\"text\": [\"\u{9b}2J{}\"]}}", "x".repeat(3_000_000)).as_bytes());
        assert!(error.contains("rows.jsonl:1: text: found [\"\\u{9b}2Jxxx") && error.len() < 1000, "{}", error.len());
    }

    #[test]
    fn folders_are_read_by_name_and_other_files_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: PathBuf| Rows::open(&[path], Format::Auto)?.collect::<Result<Vec<Row>>>();
        assert!(open(dir.path().into()).unwrap_err().to_string().contains("no *.jsonl"));
        for (name, text) in [("b.jsonl", r#"{"text": "2"}"#), ("a.jsonl", r#"{"text": "1"}"#), ("c.csv", "x")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let answers: Vec<String> = open(dir.path().into()).unwrap().iter().map(Row::answer).collect();
        assert_eq!(answers, ["1", "2"]);
        let error = open(dir.path().join("c.csv")).unwrap_err().to_string();
        assert!(error.contains("c.csv") && error.contains(".jsonl"), "{error}");
        let fifo = dir.path().join("d.jsonl");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for path in [fifo, dir.path().into()] {
            let error = format!("{:#}", open(path).unwrap_err());
            assert!(error.contains("d.jsonl: a FIFO"), "{error}");
        }
    }
}
