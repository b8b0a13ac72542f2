//! Reads files of rows, row by row: no file is in memory as a whole.
//!
//! | name | what a row is |
//! |---|---|
//! | `.jsonl` | the object of a line |
//! | `.json` | an object of the array that the file is, or the object of a line |
//! | `.csv`, `.tsv` | a record; the first one names the columns; an empty field is no column |
//! | `.txt` | a line that is not empty, as the column `text` |
//! | `.parquet` | a record |
//!
//! Each may be compressed, with `.gz` or `.zst` behind its name.

mod array;
mod lines;
mod open;
mod parquet;
mod table;

use std::fmt::Debug;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::column_names::ColumnNames;
use super::place::Place;
use super::row::{Columns, Row};
use super::unread::Unread;
use super::{Format, TextTokenizer};
use crate::files::{self, counted};
pub use open::{Kind, kind_of};

/// Bytes of the longest row. Tokenizing takes about 170 times as much host memory, 700 MiB.
pub const MAX_ROW_BYTES: usize = 4 << 20;

/// Files whose rows are read alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// A file, or a folder of files.
    pub path: PathBuf,
    /// Number of times that each row is in an epoch. 0.5 takes every second row, 2.5 each row two or three times.
    pub weight: f64,
    /// `Format::Auto` decides for each file by its first row.
    pub format: Format,
    /// Part of a folder that is read: the files that have this word in their names, or lie in a folder of this name.
    pub split: Option<String>,
    /// The files of a folder that are read, if it is not known by its names which ones are meant; else empty.
    pub files: Vec<PathBuf>,
    pub columns: ColumnNames,
}

impl Source {
    /// A file or folder that is read once, and says itself what is in it.
    pub fn new(path: impl Into<PathBuf>) -> Source {
        Source {
            path: path.into(),
            weight: 1.0,
            format: Format::Auto,
            split: None,
            files: Vec::new(),
            columns: ColumnNames::default(),
        }
    }

    /// Returns how often its first rows are in an epoch together.
    fn times(&self, num_rows: usize) -> usize {
        (num_rows as f64 * self.weight).floor() as usize
    }
}

/// The files of sources, in order.
pub struct Files {
    pub list: Vec<SourceFile>,
    /// Sentences about files of folders that are not read.
    notes: Vec<String>,
}

/// A file of rows.
#[derive(Clone)]
pub struct SourceFile {
    pub path: Arc<PathBuf>,
    pub source: Arc<Source>,
}

impl SourceFile {
    /// Returns the ending of its name, which tells how it is read.
    pub fn form(&self) -> impl Debug {
        kind_of(&self.path)
    }
}

impl Files {
    /// Finds the files of all sources.
    pub fn find(sources: &[Source]) -> Result<Files> {
        let (mut list, mut notes) = (Vec::new(), Vec::new());
        for source in sources {
            let shared = Arc::new(source.clone());
            let file = |path| SourceFile { path: Arc::new(path), source: shared.clone() };
            list.extend(files_of(source, &mut notes)?.into_iter().map(file));
        }
        Ok(Files { list, notes })
    }

    /// Returns sentences about files of folders that are not read.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Counts the bytes of all files that are there.
    pub fn bytes(&self) -> u64 {
        self.list.iter().filter_map(|file| Some(std::fs::metadata(&*file.path).ok()?.len())).sum()
    }

    /// Returns what file systems say about the files: a change of one nearly always changes this.
    pub fn stamps(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        let stamp = |file: &SourceFile| {
            let found = std::fs::metadata(&*file.path).ok()?;
            Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        };
        self.list.iter().map(stamp).collect()
    }

    /// Returns the place of a row.
    pub fn place(&self, file: usize, number: usize, is_line: bool) -> Option<Place> {
        let path = &self.list.get(file)?.path;
        Some(if is_line { Place::line(path, number) } else { Place::row(path, number) })
    }
}

/// Iterates over the rows of files, in order, each with the number of times that it is in an epoch. Errors name file
/// and line, or file and row.
pub struct Rows {
    /// Files with their indices, the last one first.
    files: Vec<(usize, SourceFile)>,
    open: Option<RowFile>,
    /// Number of rows of the files before the open one that are of its source.
    num_rows: usize,
    unread: Unread,
    bytes_read: Arc<AtomicU64>,
}

impl Rows {
    pub fn of(files: &Files) -> Rows {
        let files = files.list.iter().cloned().enumerate().rev().collect();
        Rows { files, open: None, num_rows: 0, unread: Unread::default(), bytes_read: Arc::default() }
    }

    /// Returns sentences about columns and keys of the rows read so far that nothing reads.
    pub fn notes(&self, tokenizer: Option<&TextTokenizer>) -> Vec<String> {
        self.unread.notes(tokenizer)
    }

    /// Returns a counter of the bytes of files that have been read.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.bytes_read.clone()
    }

    fn next_row(&mut self) -> Result<Option<(Row, usize)>> {
        loop {
            if self.open.is_none() {
                let Some((idx, file)) = self.files.pop() else { return Ok(None) };
                self.open = Some(RowFile::open(idx, file, self.num_rows, &self.bytes_read)?);
            }
            if let Some(file) = &mut self.open {
                match file.next_row(&mut self.unread)? {
                    Some(row) => return Ok(Some(row)),
                    None => ensure!(file.format.is_some(), "{}: has no rows", file.path.display()),
                }
            }
            self.num_rows = self.open.take().map_or(Ok(0), |file| self.end(&file))?;
        }
    }

    /// Returns the number of rows before those of the next file, which are 0 unless it is of the same source. Fails if
    /// a source ends of which no row is taken.
    fn end(&self, file: &RowFile) -> Result<usize> {
        let RowFile { source, num_rows, .. } = file;
        if self.files.last().is_some_and(|(_, next)| Arc::ptr_eq(&next.source, source)) {
            return Ok(*num_rows);
        }
        let (place, weight, rows) = (source.path.display(), source.weight, counted(*num_rows, "row"));
        ensure!(source.times(*num_rows) > 0, "{place}: a weight of {weight} takes none of its {rows}");
        Ok(0)
    }
}

impl Iterator for Rows {
    type Item = Result<(Row, usize)>;

    fn next(&mut self) -> Option<Result<(Row, usize)>> {
        self.next_row().transpose()
    }
}

/// Files that `datasets` and others put beside rows.
const NO_ROWS: [&str; 4] = ["dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"];
/// Words by which the files of a folder are told apart.
const TRAINING: [&str; 2] = ["train", "training"];
const HELD_OUT: [&str; 7] = ["dev", "eval", "evaluation", "heldout", "test", "val", "validation"];

/// Returns the file itself, or the files of the folder and of its split. A note says what is left out of a folder.
fn files_of(source: &Source, notes: &mut Vec<String>) -> Result<Vec<PathBuf>> {
    let Source { path, split, .. } = source;
    if !source.files.is_empty() {
        return Ok(source.files.clone());
    }
    if !path.is_dir() {
        let file = path.display();
        ensure!(split.is_none(), "{file}: split is for folders; found a file; help: remove split, or name the folder");
        return Ok(vec![path.clone()]);
    }
    let mut files = entries(path)?;
    if let Some(split) = split {
        let of_split = path.join(split);
        let inside = if of_split.is_dir() { entries(&of_split)? } else { Vec::new() };
        files.retain(|(_, file)| has_word(file, &[split]));
        files.extend(inside);
    }
    let (folder, of) = (path.display(), split.as_ref().map_or(String::new(), |split| format!(" of the split {split}")));
    let kind = files.iter().map(|(kind, _)| *kind).min();
    let of_the_cache = path.file_name().and_then(|name| name.to_str()?.strip_prefix("datasets--"));
    if let (None, Some(id)) = (kind, of_the_cache.filter(|_| path.join("snapshots").is_dir())) {
        let id = id.replacen("--", "/", 1);
        bail!(
            "{folder}: a repository in the hub's cache, whose rows are in a snapshot; help: {id} in the place of this path"
        );
    }
    let kind = kind.with_context(|| format!("{folder}: holds no file of rows{of}; allowed: {}", Kind::NAMES))?;
    let (read, left): (Vec<_>, Vec<_>) = files.into_iter().partition(|(k, _)| *k == kind);
    if let Some((_, first)) = left.first() {
        let first = first.file_name().unwrap_or_default().display();
        notes.push(format!("{folder}: its .{} files are read, and {first} and others like it are not", kind.name()));
    }
    let read: Vec<PathBuf> = read.into_iter().map(|(_, file)| file).collect();
    if let (None, Some(train), Some(other)) =
        (split, read.iter().find(|file| has_word(file, &TRAINING)), read.iter().find(|file| has_word(file, &HELD_OUT)))
    {
        let name = |file: &Path| file.file_name().unwrap_or_default().display().to_string();
        bail!(
            "{folder}: found {} and {}, which are splits; help: name the file, or in a recipe the split: {{path: {folder}, split: train}}",
            name(train),
            name(other)
        );
    }
    Ok(read)
}

/// Returns the files of a folder that may hold rows, by name, each with its form.
fn entries(folder: &Path) -> Result<Vec<(Kind, PathBuf)>> {
    let place = || folder.display().to_string();
    let entries = std::fs::read_dir(folder).with_context(place)?;
    let files = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>().with_context(place)?;
    let of_rows = files.into_iter().filter(|file| !is_about_rows(file) && !file.is_dir());
    let mut files: Vec<_> = of_rows.filter_map(|file| Some((kind_of(&file)?.0, file))).collect();
    files.sort_by(|(_, a), (_, b)| a.cmp(b));
    Ok(files)
}

/// Tells whether a file says something about files of rows, by its name.
pub fn is_about_rows(file: &Path) -> bool {
    NO_ROWS.iter().any(|name| file.ends_with(name))
}

/// Tells whether one of these words stands in the name of a file, with no letter or digit before or behind it.
fn has_word(file: &Path, words: &[impl AsRef<str>]) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    words.iter().map(AsRef::as_ref).any(|word| {
        name.match_indices(word).any(|(at, _)| {
            let (before, behind) = (name[..at].chars().next_back(), name[at + word.len()..].chars().next());
            [before, behind].into_iter().flatten().all(|c| !c.is_alphanumeric())
        })
    })
}

/// A file of rows that is being read.
struct RowFile {
    idx: usize,
    objects: Objects,
    path: Arc<PathBuf>,
    source: Arc<Source>,
    /// Number of rows that have been read, with those of the files before it that are of its source.
    num_rows: usize,
    /// `None` before the first row.
    format: Option<Format>,
}

/// The objects of a file, each with its place: a number of a line or of a row.
enum Objects {
    Lines(lines::Lines),
    Texts(lines::Lines),
    Array(array::Array),
    Table(table::Table),
    Parquet(parquet::Parquet),
}

impl Objects {
    /// Opens a file; what is read of it is added to `bytes_read`.
    fn open(path: &Arc<PathBuf>, bytes_read: &Arc<AtomicU64>) -> Result<Objects> {
        let reader = || open::reader(path, bytes_read);
        let Some((kind, _)) = kind_of(path) else {
            // A file that is not there is told as that, whatever its name.
            files::open(path)?;
            bail!("{}: the name has no known ending; allowed: {}", path.display(), Kind::NAMES)
        };
        Ok(match kind {
            Kind::Jsonl => Objects::Lines(lines::Lines::new(reader()?, path.clone())),
            Kind::Text => Objects::Texts(lines::Lines::new(reader()?, path.clone())),
            Kind::Csv => Objects::Table(table::Table::new(reader()?, path.clone(), b',')?),
            Kind::Tsv => Objects::Table(table::Table::new(reader()?, path.clone(), b'\t')?),
            Kind::Parquet => Objects::Parquet(parquet::Parquet::new(open::file(path, bytes_read)?, path.clone())?),
            Kind::Json => {
                let mut reader = reader()?;
                match array::is_array(&mut reader).with_context(|| path.display().to_string())? {
                    true => Objects::Array(array::Array::new(reader, path.clone())),
                    false => Objects::Lines(lines::Lines::new(reader, path.clone())),
                }
            }
        })
    }

    fn next(&mut self) -> Result<Option<(Place, Map<String, Value>)>> {
        match self {
            Objects::Lines(lines) => lines.next_object(),
            Objects::Array(array) => array.next_object(),
            Objects::Table(table) => table.next_object(),
            Objects::Parquet(parquet) => parquet.next_object(),
            Objects::Texts(lines) => {
                let Some((place, line)) = lines.next_line()? else { return Ok(None) };
                let text = std::str::from_utf8(line).with_context(|| format!("{place}: not UTF-8"))?;
                Ok(Some((place, Map::from_iter([("text".to_string(), json!(text))]))))
            }
        }
    }
}

/// Iterates over the objects of a file, each with its place.
pub fn objects(path: &Path) -> Result<impl Iterator<Item = Result<(Place, Map<String, Value>)>>> {
    let mut objects = Objects::open(&Arc::new(path.into()), &Arc::default())?;
    Ok(std::iter::from_fn(move || objects.next().transpose()))
}

impl RowFile {
    fn open(idx: usize, file: SourceFile, num_rows: usize, bytes_read: &Arc<AtomicU64>) -> Result<RowFile> {
        let SourceFile { path, source } = file;
        let objects = Objects::open(&path, bytes_read)?;
        Ok(RowFile { idx, objects, path, source, num_rows, format: None })
    }

    /// Returns the next row, and the number of times that it is in an epoch.
    fn next_row(&mut self, unread: &mut Unread) -> Result<Option<(Row, usize)>> {
        let Some((place, object)) = self.objects.next()? else { return Ok(None) };
        let bytes = object.iter().map(|(name, value)| name.len() + size(value)).sum();
        let mut columns = Columns::new(object, &self.source.columns);
        let is_auto = self.source.format == Format::Auto;
        let format = match (self.format, is_auto) {
            (Some(format), _) => format,
            (None, false) => self.source.format,
            (None, true) => columns.detect().with_context(|| place.to_string())?,
        };
        self.format = Some(format);
        if is_auto {
            unread.count_forms(&columns, format);
        }
        let content = columns.content(format).with_context(|| place.to_string())?;
        columns.refuse_rest(format, is_auto).with_context(|| place.to_string())?;
        unread.count(&columns, &content);
        self.num_rows += 1;
        let times = self.source.times(self.num_rows) - self.source.times(self.num_rows - 1);
        Ok(Some((Row { content, place, file: self.idx, bytes }, times)))
    }
}

/// Returns the bytes of the text of a value and of its numbers.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(entries) => entries.iter().map(|(name, value)| name.len() + size(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => size_of::<Value>(),
    }
}

#[cfg(test)]
mod tests;
