//! Opens files of rows, compressed or not, by the endings of their names.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result, ensure};

use crate::files;

/// Forms of a file, those that a folder is more likely to be meant for first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Jsonl,
    Parquet,
    Json,
    Csv,
    Tsv,
    Text,
}

impl Kind {
    const ALL: [Kind; 6] = [Kind::Jsonl, Kind::Parquet, Kind::Json, Kind::Csv, Kind::Tsv, Kind::Text];
    /// The endings that are read, for messages.
    pub const NAMES: &str = ".jsonl, .json, .csv, .tsv, .txt, .parquet, also with .gz or .zst behind";

    pub fn name(self) -> &'static str {
        match self {
            Kind::Jsonl => "jsonl",
            Kind::Parquet => "parquet",
            Kind::Json => "json",
            Kind::Csv => "csv",
            Kind::Tsv => "tsv",
            Kind::Text => "txt",
        }
    }
}

/// Ways in which a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Returns the form that a name tells; `None` where its ending is not known.
pub fn kind_of(path: &Path) -> Option<(Kind, Compression)> {
    let name = path.file_name()?.to_str()?;
    let (name, compression) = match name.rsplit_once('.')? {
        (name, "gz") => (name, Compression::Gzip),
        (name, "zst") => (name, Compression::Zstd),
        _ => (name, Compression::None),
    };
    let (_, ending) = name.rsplit_once('.')?;
    Some((Kind::ALL.into_iter().find(|kind| kind.name() == ending)?, compression))
}

const BUFFER_BYTES: usize = 1 << 20;
/// Bytes that are looked at to recognize another kind of file.
const BEGINNING: usize = 1024;

/// Opens a file for reading from its beginning to its end, without its compression and its byte order mark.
///
/// Errors: what is no regular file, a Git LFS pointer, an HTML page, and UTF-16.
pub fn reader(path: &Path, bytes_read: &Arc<AtomicU64>) -> Result<Box<dyn BufRead + Send>> {
    let place = || path.display().to_string();
    let counted = Counted { file: files::open(path)?, bytes_read: bytes_read.clone() };
    let mut file = BufReader::with_capacity(BUFFER_BYTES, counted);
    files::check_lfs_pointer(path, file.fill_buf().with_context(place)?)?;
    let compression = kind_of(path).map_or(Compression::None, |(_, compression)| compression);
    let plain: Box<dyn Read + Send> = match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(file).with_context(place)?),
    };
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, plain);
    let beginning = reader.fill_buf().with_context(place)?;
    let beginning = &beginning[..beginning.len().min(BEGINNING)];
    files::check_lfs_pointer(path, beginning)?;
    files::check_html(path, beginning)?;
    let is_utf16 = beginning.starts_with(&[0xff, 0xfe]) || beginning.starts_with(&[0xfe, 0xff]);
    ensure!(!is_utf16, "{}: found UTF-16; allowed: UTF-8; help: iconv -f UTF-16 -t UTF-8", path.display());
    if beginning.starts_with("\u{feff}".as_bytes()) {
        reader.consume("\u{feff}".len());
    }
    Ok(Box::new(reader))
}

/// A file that counts the bytes that are read of it.
struct Counted {
    file: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.bytes_read.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

/// Opens a file that is not read in one go, and counts it as read. A compressed one is written to a temporary file without a name first.
pub fn file(path: &Path, bytes_read: &Arc<AtomicU64>) -> Result<File> {
    let place = || path.display().to_string();
    let mut beginning = [0; BEGINNING];
    let mut file = files::open(path)?;
    let n = file.read(&mut beginning).with_context(place)?;
    files::check_lfs_pointer(path, &beginning[..n])?;
    files::check_html(path, &beginning[..n])?;
    if let Some((_, Compression::None)) | None = kind_of(path) {
        bytes_read.fetch_add(file.metadata().with_context(place)?.len(), Relaxed);
        return Ok(file);
    }
    let mut plain = tempfile::tempfile().context("a temporary file for what is compressed")?;
    std::io::copy(&mut reader(path, bytes_read)?, &mut plain).with_context(place)?;
    plain.rewind().with_context(place)?;
    Ok(plain)
}
