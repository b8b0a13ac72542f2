//! Tokens of rows in a file, which all ranks of a node map. Nothing in it depends on how the documents will be cut and
//! packed, so that a recipe may change that without tokenizing rows again.
//!
//! | bytes | content |
//! |---|---|
//! | [`Header`] | sizes and checksums |
//! | `num_words` × 4 | a word for each token, documents in the order of the rows: the id, and [`TARGET`] if it counts |
//! | 0 or 4 | zeros, so that entries begin at a multiple of 8 |
//! | `num_entries` × [`Entry`] | the documents in the same order |
//! | `meta_bytes` | [`Meta`] as JSON |
//!
//! Numbers are little-endian. A row that is in no epoch has no entry.

mod writer;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::watch;
use crate::files;
pub use writer::Writer;

/// Bit of a word whose token counts in the loss when it is predicted. Ids are below it.
pub const TARGET: u32 = 1 << 31;

/// Version of what is made of rows. It is raised with every change after which the same rows become other tokens,
/// targets, entries or notes. Files of other versions are not used.
pub const MADE_BY: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), ", tokens 1");

const MAGIC: [u8; 24] = *b"fsdp-qlora tokens\0\0\0\0\0\0\0";

/// Number of entries that are read at a time.
const READ_ENTRIES: usize = 4096;

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 24],
    num_words: u64,
    num_entries: u64,
    meta_bytes: u64,
    /// XXH3 of the words, of all that follows them, and of the header before this digest.
    words_digest: u64,
    rest_digest: u64,
    digest: u64,
}

impl Header {
    const BYTES: usize = size_of::<Header>();

    fn sealed(self) -> Header {
        Header { digest: xxh3_64(&bytemuck::bytes_of(&self)[..Header::BYTES - size_of::<u64>()]), ..self }
    }

    fn padding(&self) -> usize {
        (self.num_words % 2) as usize * size_of::<u32>()
    }
}

/// A document. A row has one entry for each of its documents, or one without a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// Index of the row, counted from 0 over all files.
    pub row_idx: u64,
    /// XXH3 of the row's answer, by which rows are held out.
    pub answer: u64,
    /// Number of the line or row in its file, and the file's index.
    pub number: u64,
    pub file: u32,
    /// Number of times that the row is in an epoch.
    pub times: u32,
    pub num_tokens: u32,
    /// Number of tokens that are predicted and count; the first is never predicted.
    pub num_targets: u32,
    /// Index in [`Meta::remarks`].
    pub remark: u32,
    pub flags: u32,
}

impl Entry {
    /// The number in the file is that of a line.
    pub const IS_LINE: u32 = 1;
    /// The row has no document.
    pub const IS_EMPTY: u32 = 2;

    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// Facts about a document that are told to the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Remark {
    /// The tokens of the prompt alone are not those that the document begins with.
    pub other_prompt: bool,
    /// Roles of messages whose text the chat template does not write, or not as it is.
    pub unwritten: Vec<String>,
}

/// The part of a store that people read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The first one is the default, which tells nothing.
    pub remarks: Vec<Remark>,
    /// Sentences about all rows.
    pub notes: Vec<String>,
    /// [`MADE_BY`] of the program that made this.
    pub made_by: String,
    /// The model's folder and the rows, as they were named when this was made.
    pub made_from: Vec<String>,
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    content: Content,
    words_digest: u64,
    pub meta: Meta,
}

#[derive(Debug)]
enum Content {
    Mapped { file: File, map: Mmap, header: Header },
    Memory { words: Vec<u32>, entries: Vec<Entry> },
}

impl Store {
    /// Maps a file after all of its bytes have been compared with their checksums.
    pub fn open(file: File) -> Result<Store> {
        let (header, size) = header(&file)?;
        let words_bytes = 4 * header.num_words;
        let rest_bytes = size - Header::BYTES as u64 - words_bytes;
        let words_digest = digest(&file, Header::BYTES as u64, words_bytes)?;
        ensure!(words_digest == header.words_digest, "the checksum of its tokens is wrong");
        let rest_digest = digest(&file, Header::BYTES as u64 + words_bytes, rest_bytes)?;
        ensure!(rest_digest == header.rest_digest, "the checksum of its documents is wrong");
        let meta = meta(&file, &header, size)?;
        let map = files::map_opened(&file)?;
        Ok(Store { content: Content::Mapped { file, map, header }, words_digest, meta })
    }

    /// Makes a store without a file, of rows that are one document each and whose tokens all count.
    pub fn in_memory(rows: impl Iterator<Item = Vec<u32>>) -> Store {
        let (mut words, mut entries) = (Vec::new(), Vec::new());
        for (row_idx, ids) in (0..).zip(rows) {
            let num_tokens = ids.len() as u32;
            let num_targets = num_tokens.saturating_sub(1);
            entries.push(Entry { row_idx, times: 1, num_tokens, num_targets, ..Entry::zeroed() });
            words.extend(ids.iter().map(|id| id | TARGET));
        }
        let words_digest = xxh3_64(bytemuck::cast_slice(&words));
        let meta = Meta { remarks: vec![Remark::default()], ..Meta::default() };
        Store { content: Content::Memory { words, entries }, words_digest, meta }
    }

    /// Reads the number of tokens of a file and its [`Meta`], without looking at the tokens.
    pub fn peek(file: &File) -> Result<(u64, Meta)> {
        let (header, size) = header(file)?;
        Ok((header.num_words, meta(file, &header, size)?))
    }

    /// Words of all documents, one after the other.
    pub fn words(&self) -> &[u32] {
        match &self.content {
            Content::Mapped { map, header, .. } => {
                bytemuck::cast_slice(&map[Header::BYTES..Header::BYTES + 4 * header.num_words as usize])
            }
            Content::Memory { words, .. } => words,
        }
    }

    /// XXH3 of [`Store::words`].
    pub fn words_digest(&self) -> u64 {
        self.words_digest
    }

    /// Bytes of the mapped file; 0 where there is none.
    pub fn mapped_bytes(&self) -> usize {
        match &self.content {
            Content::Mapped { map, .. } => map.len(),
            Content::Memory { .. } => 0,
        }
    }

    /// Bytes of host memory of the tokens and entries; 0 where they are in a mapped file.
    pub fn host_bytes(&self) -> usize {
        match &self.content {
            Content::Mapped { .. } => 0,
            Content::Memory { words, entries } => size_of_val(&words[..]) + size_of_val(&entries[..]),
        }
    }

    /// Calls `take` for each entry with the index of its first word. Entries are read, not mapped, so that none stays
    /// in memory.
    pub fn each_entry(&self, mut take: impl FnMut(&Entry, usize) -> Result<()>) -> Result<()> {
        let mut begin = 0;
        let mut take_all = |entries: &[Entry]| {
            entries.iter().try_for_each(|entry| {
                take(entry, begin)?;
                begin += entry.num_tokens as usize;
                Ok(())
            })
        };
        let (file, header) = match &self.content {
            Content::Mapped { file, header, .. } => (file, header),
            Content::Memory { entries, .. } => return take_all(entries),
        };
        let mut at = Header::BYTES as u64 + 4 * header.num_words + header.padding() as u64;
        let mut left = header.num_entries as usize;
        let mut entries = vec![Entry::zeroed(); READ_ENTRIES.min(left)];
        while left > 0 {
            let entries = &mut entries[..READ_ENTRIES.min(left)];
            file.read_exact_at(bytemuck::cast_slice_mut(entries), at).context("reading the file of tokens")?;
            take_all(entries)?;
            watch::beat();
            at += size_of_val(entries) as u64;
            left -= entries.len();
        }
        Ok(())
    }
}

/// Reads the header of a file and compares the size that it says with the file's, which is returned too.
fn header(file: &File) -> Result<(Header, u64)> {
    let mut header = Header::zeroed();
    let size = file.metadata()?.len();
    file.read_exact_at(bytemuck::bytes_of_mut(&mut header), 0).context("its header cannot be read")?;
    ensure!(header.magic == MAGIC && header.sealed().digest == header.digest, "its header is damaged");
    let expected = || {
        let entries = header.num_entries.checked_mul(size_of::<Entry>() as u64)?;
        let words = header.num_words.checked_mul(4)?.checked_add(header.padding() as u64)?;
        entries.checked_add(words)?.checked_add(header.meta_bytes)?.checked_add(Header::BYTES as u64)
    };
    ensure!(expected() == Some(size), "it has {size} bytes, but its header says otherwise");
    Ok((header, size))
}

fn meta(file: &File, header: &Header, size: u64) -> Result<Meta> {
    let mut meta = vec![0; header.meta_bytes as usize];
    file.read_exact_at(&mut meta, size - header.meta_bytes)?;
    Ok(serde_json::from_slice(&meta)?)
}

/// Returns the XXH3 of a range of a file. The file is read, because the pages of a mapping would count as this process's
/// memory.
fn digest(mut file: &File, begin: u64, bytes: u64) -> Result<u64> {
    file.seek(SeekFrom::Start(begin))?;
    let (_, digest) = files::digest_of(file.take(bytes))?;
    Ok(digest)
}

#[cfg(test)]
mod tests;
