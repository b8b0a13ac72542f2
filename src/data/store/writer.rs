//! Writes a store: words as they come, entries into a temporary file without a name that is appended to them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use xxhash_rust::xxh3::Xxh3;

use super::{Entry, Header, MADE_BY, MAGIC, Meta, Remark, TARGET};
use crate::data::parallel::Numbered;
use crate::data::tokenize::Tokenized;

/// Bytes that are written, or read, at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A store that is being written. It has no header before it is complete.
pub struct Writer<'a> {
    out: BufWriter<&'a mut File>,
    place: &'a str,
    entries: BufWriter<File>,
    words: Vec<u32>,
    hash: Xxh3,
    num_words: u64,
    num_entries: u64,
    remarks: HashMap<Remark, u32>,
}

impl<'a> Writer<'a> {
    /// Writes to an empty file, which messages call `place`.
    pub fn new(file: &'a mut File, place: &'a str) -> Result<Writer<'a>> {
        let entries = tempfile::tempfile().context("making a temporary file in $TMPDIR, or /tmp")?;
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        out.write_all(&[0; Header::BYTES]).with_context(|| cannot(place))?;
        Ok(Writer {
            out,
            place,
            entries: BufWriter::with_capacity(BUFFER_BYTES, entries),
            words: Vec::new(),
            hash: Xxh3::new(),
            num_words: 0,
            num_entries: 0,
            remarks: HashMap::from([(Remark::default(), 0)]),
        })
    }

    /// Appends the documents of a row. `answer` is the digest of its answer.
    pub fn add(&mut self, row: &Numbered, answer: u64, documents: Vec<Tokenized>) -> Result<()> {
        let Numbered { row_idx, times, ref row } = *row;
        let entry = Entry {
            row_idx: row_idx as u64,
            answer,
            number: row.place.number() as u64,
            file: u32::try_from(row.file).context("too many files")?,
            times: u32::try_from(times).with_context(|| format!("{}: {times} times", row.place))?,
            flags: if row.place.is_line() { Entry::IS_LINE } else { 0 },
            ..Entry::zeroed()
        };
        if documents.is_empty() {
            return self.add_entry(Entry { flags: entry.flags | Entry::IS_EMPTY, ..entry });
        }
        for Tokenized { input_ids, is_target, prompt_is_prefix, unwritten } in documents {
            let remark = self.remark(Remark { other_prompt: !prompt_is_prefix, unwritten });
            let num_targets = is_target.iter().skip(1).filter(|&&t| t).count() as u32;
            self.add_entry(Entry { num_tokens: input_ids.len() as u32, num_targets, remark, ..entry })?;
            let word = |(id, is_target): (u32, bool)| if is_target { id | TARGET } else { id };
            self.words.clear();
            ensure!(input_ids.iter().all(|&id| id < TARGET), "{}: a token id of {TARGET} or more", row.place);
            self.words.extend(input_ids.into_iter().zip(is_target).map(word));
            let bytes: &[u8] = bytemuck::cast_slice(&self.words);
            self.hash.update(bytes);
            self.out.write_all(bytes).with_context(|| cannot(self.place))?;
            self.num_words += self.words.len() as u64;
        }
        Ok(())
    }

    fn add_entry(&mut self, entry: Entry) -> Result<()> {
        self.num_entries += 1;
        self.entries.write_all(bytemuck::bytes_of(&entry)).with_context(|| cannot(self.place))
    }

    fn remark(&mut self, remark: Remark) -> u32 {
        let next = self.remarks.len() as u32;
        *self.remarks.entry(remark).or_insert(next)
    }

    /// Number of tokens so far.
    pub fn num_tokens(&self) -> u64 {
        self.num_words
    }

    /// Appends the entries and [`Meta`], and writes the header.
    pub fn finish(self, notes: Vec<String>, made_from: Vec<String>) -> Result<()> {
        let place = self.place;
        self.append(notes, made_from).with_context(|| cannot(place))
    }

    fn append(mut self, notes: Vec<String>, made_from: Vec<String>) -> std::io::Result<()> {
        let mut remarks: Vec<(Remark, u32)> = self.remarks.into_iter().collect();
        remarks.sort_by_key(|(_, idx)| *idx);
        let remarks = remarks.into_iter().map(|(remark, _)| remark).collect();
        let meta = serde_json::to_vec(&Meta { remarks, notes, made_by: MADE_BY.into(), made_from })?;
        let header = Header {
            magic: MAGIC,
            num_words: self.num_words,
            num_entries: self.num_entries,
            meta_bytes: meta.len() as u64,
            words_digest: self.hash.digest(),
            ..Header::zeroed()
        };
        let mut hash = Xxh3::new();
        let mut append = |bytes: &[u8]| {
            hash.update(bytes);
            self.out.write_all(bytes)
        };
        append(&[0; 4][..header.padding()])?;
        let mut entries = self.entries.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        entries.rewind()?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match entries.read(&mut buffer)? {
                0 => break,
                n => append(&buffer[..n])?,
            }
        }
        append(&meta)?;
        let header = Header { rest_digest: hash.digest(), ..header }.sealed();
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(bytemuck::bytes_of(&header))?;
        self.out.flush()
    }
}

fn cannot(place: &str) -> String {
    format!(
        "{place}: cannot be written (is the disk full?)\nhelp: name folders with more room in FSDP_QLORA_CACHE and TMPDIR"
    )
}
