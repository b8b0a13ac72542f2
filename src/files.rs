//! Opens and reads input files that a user or another file names, without hanging and with bounded memory.
//!
//! Every input is a regular file. A FIFO would wait for a writer, a device may never end, and neither can be read
//! twice.
#![expect(unsafe_code, reason = "maps files")]

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::Xxh3;

use crate::comm::watch;

/// Largest JSON file of settings: config.json, generation_config.json, adapter_config.json, tokenizer_config.json.
pub const MAX_SETTINGS_BYTES: u64 = 4 << 20;

/// Largest file of a tokenizer; the largest tokenizer.json known has 40 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// Number of bytes that are read at a time for a digest.
const DIGEST_BYTES: usize = 1 << 20;

/// First line of a file that Git LFS has left in the place of a large one.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// Opens a regular file for reading; links are followed. Never blocks.
///
/// Errors name the path and what is there: nothing, a folder, a FIFO, a device, a socket, a chain of links without
/// end.
pub fn open(path: &Path) -> Result<File> {
    let place = || shown_path(path);
    // Asked before the file is opened, because opening a device can have effects.
    check_regular(path, &std::fs::metadata(path).with_context(place)?)?;
    // NONBLOCK: the file may have been replaced by a FIFO in the meantime.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file =
        File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from).with_context(place)?);
    check_regular(path, &file.metadata().with_context(place)?)?;
    Ok(file)
}

fn check_regular(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let found = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a FIFO (a named or anonymous pipe)",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () if kind.is_socket() => "a socket",
        () => "not a file",
    };
    bail!("{}: {found}; a regular file is needed here", shown_path(path))
}

/// Returns the path that a person has written: `~` is the folder `home`, and variables are refused, because no shell has expanded them.
/// The error says why the text is no path.
pub fn written_path(text: &str, home: Option<&Path>) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("a path is not empty".into());
    }
    if text.contains('\0') {
        return Err("a path has no zero byte".into());
    }
    let is_variable = |(at, _)| text[at + 1..].starts_with(|c: char| c == '{' || c == '_' || c.is_ascii_alphabetic());
    if text.match_indices('$').any(is_variable) {
        return Err("variables are not expanded here; write the path out".into());
    }
    let Some(rest) = text.strip_prefix('~') else { return Ok(text.into()) };
    match (home, rest.strip_prefix('/')) {
        (Some(home), Some(rest)) => Ok(home.join(rest.trim_start_matches('/'))),
        (Some(home), None) if rest.is_empty() => Ok(home.into()),
        (None, _) => Err("~ is the folder that HOME names, and HOME is not set".into()),
        _ => Err("only ~ and ~/… are known, not the home folder of another user; write the path out".into()),
    }
}

/// Returns whether something has this name. A broken link counts, so that reading it reports what is wrong.
pub fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Reads a whole file of at most `max_bytes`.
///
/// Errors: those of [`open`], a longer file, and a pointer of Git LFS in the place of the file.
pub fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let place = || shown_path(path);
    let size = file.metadata().with_context(place)?.len();
    let check = |size: u64| {
        ensure!(size <= max_bytes, "{}: {size} bytes, at most {max_bytes} are allowed", shown_path(path));
        Ok(())
    };
    check(size)?;
    let mut bytes = Vec::with_capacity(size as usize);
    // The size is only what the file system says; a file may grow, and files of /proc have none.
    file.take(max_bytes + 1).read_to_end(&mut bytes).with_context(place)?;
    check(bytes.len() as u64)?;
    check_lfs_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Returns the number of bytes of a file and their XXH3 of 64 bits.
pub fn digest(path: &Path) -> Result<(u64, u64)> {
    digest_of(open(path)?).with_context(|| shown_path(path))
}

/// Reads to the end. Returns the number of bytes and their XXH3 of 64 bits.
pub fn digest_of(mut from: impl Read) -> std::io::Result<(u64, u64)> {
    let (mut hash, mut bytes, mut buffer) = (Xxh3::new(), 0, vec![0; DIGEST_BYTES]);
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok((bytes, hash.digest())),
            n => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
        watch::beat();
    }
}

/// Maps a whole file read-only.
pub fn map(path: &Path) -> Result<Mmap> {
    map_opened(&open(path)?).with_context(|| shown_path(path))
}

/// Maps an open file read-only.
pub fn map_opened(file: &File) -> Result<Mmap> {
    // SAFETY: read-only, and no file is written in place by this program. Another process that cuts the file short
    // under us makes a read fail with SIGBUS, which ends all ranks with a message (`comm::watch`); nothing but a copy
    // of the whole file prevents that.
    unsafe { Mmap::map(file) }.context("cannot be mapped")
}

/// Fails if a mapped file has another length than it had when it was mapped.
pub fn check_length(path: &Path, file: &File, map: &Mmap) -> Result<()> {
    let (path, mapped) = (shown_path(path), map.len());
    let found = file.metadata().with_context(|| path.clone())?.len();
    ensure!(
        found == mapped as u64,
        "{path}: {found} bytes, but {mapped} when this run mapped it: what was read from it since may be wrong"
    );
    Ok(())
}

/// Reads a whole text file of at most `max_bytes` in UTF-8.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    let bytes = read(path, max_bytes)?;
    String::from_utf8(bytes)
        .map_err(|error| error.utf8_error())
        .with_context(|| format!("{}: not UTF-8", shown_path(path)))
}

/// Reads a JSON file of at most `max_bytes`.
pub fn read_json<T: DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<T> {
    parse_json(path, &read(path, max_bytes)?)
}

/// Parses the content of a JSON file. The errors of an empty file and of an HTML page say so.
pub fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    ensure!(!bytes.trim_ascii().is_empty(), "{}: an empty file; {DOWNLOAD_AGAIN}", shown_path(path));
    check_html(path, bytes)?;
    serde_json::from_slice(bytes).with_context(|| format!("{}: not the JSON that is expected", shown_path(path)))
}

const DOWNLOAD_AGAIN: &str = "download it again\nhelp: hf download ORG/NAME --local-dir FOLDER";

/// The advice for a model that is in GGUF.
pub fn gguf_advice(file: &Path) -> String {
    format!(
        "`python scripts/gguf_to_hf.py {} FOLDER` makes a model's folder of it (llama and qwen2); of others, download the model that \
         it was made from",
        shown_path(file)
    )
}

/// Refuses a pointer of Git LFS, given the file or its beginning.
pub fn check_lfs_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    ensure!(
        !bytes.starts_with(LFS_POINTER),
        "{}: a Git LFS pointer, not the file itself\nhelp: `git lfs pull` in its folder, or hf download ORG/NAME --local-dir FOLDER",
        shown_path(path)
    );
    Ok(())
}

/// Refuses an HTML page, such as a server's error or login page saved under the name of the file.
pub fn check_html(path: &Path, bytes: &[u8]) -> Result<()> {
    let start: Vec<u8> = bytes.trim_ascii_start().iter().take(14).map(u8::to_ascii_lowercase).collect();
    let is_html = [&b"<!doctype html"[..], b"<html"].iter().any(|tag| start.starts_with(tag));
    ensure!(!is_html, "{}: an HTML page, not the file itself; {DOWNLOAD_AGAIN}", shown_path(path));
    Ok(())
}

/// Returns a name or value that came from a file as messages show it: control characters and those that reverse the
/// direction of text are escaped, and what is longer than 200 characters is cut.
pub fn shown(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    let cut = text.char_indices().nth(MAX_CHARS).map_or(text.len(), |(at, _)| at);
    let dots = if cut < text.len() { format!("… ({} bytes)", text.len()) } else { String::new() };
    escaped(&text[..cut]).into_owned() + &dots
}

/// Returns a path as messages show it, escaped as by [`shown`].
pub fn shown_path(path: &Path) -> String {
    escaped(&path.to_string_lossy()).into_owned()
}

/// `1 row`, `2 rows`
pub fn counted(n: usize, unit: &str) -> String {
    format!("{n} {unit}{}", if n == 1 { "" } else { "s" })
}

/// Returns problems as indented lines of one message, at most the first 20.
pub fn listed(problems: &[String]) -> String {
    const MAX_LINES: usize = 20;
    let mut lines = problems.iter().take(MAX_LINES).fold(String::new(), |text, problem| text + "\n  " + problem);
    if problems.len() > MAX_LINES {
        lines += &format!("\n  and {} more", problems.len() - MAX_LINES);
    }
    lines
}

/// Returns the text with Rust's escapes for control characters and characters that reverse the direction of text.
pub fn escaped(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(hidden) {
        return text.into();
    }
    text.chars()
        .map(|c| if hidden(c) { c.escape_default().to_string() } else { c.to_string() })
        .collect::<String>()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use tempfile::tempdir;

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        std::os::unix::fs::symlink("loop", path("loop")).unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        for (name, found) in [
            ("fifo", "fifo: a FIFO"),
            ("link", "link: a FIFO"),
            ("socket", "socket: a socket"),
            ("", ": a folder"),
            ("loop", "loop: Too many levels of symbolic links"),
            ("none", "none: No such file"),
        ] {
            let error = format!("{:#}", open(&path(name)).unwrap_err());
            assert!(error.contains(found), "{found} in {error}");
        }
        let error = open(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("/dev/zero: a device"), "{error}");
        std::fs::write(path("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", path("good")).unwrap();
        assert_eq!(read_text(&path("good"), 4).unwrap(), "text");
    }

    #[test]
    fn sizes_are_bounded_before_anything_is_read() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("sparse");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = read(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("1099511627776 bytes, at most 1048576"), "{error}");
        // The size of a file of /proc is 0, whatever it holds.
        let error = read(Path::new("/proc/self/maps"), 10).unwrap_err().to_string();
        assert!(error.contains("11 bytes, at most 10"), "{error}");
    }

    #[test]
    fn other_content_is_recognized() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("config.json");
        for (content, found) in [
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "a Git LFS pointer"),
            ("\n <!DOCTYPE HTML><html>", "an HTML page"),
            ("<html lang=en>", "an HTML page"),
            (" \n", "an empty file"),
            ("{\"a\": ", "not the JSON that is expected: EOF"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = format!("{:#}", read_json::<serde_json::Value>(&path, 1000).unwrap_err());
            assert!(error.contains(&format!("config.json: {found}")), "{found} in {error}");
        }
        std::fs::write(&path, [b'a', 0xff]).unwrap();
        assert!(format!("{:#}", read_text(&path, 10).unwrap_err()).contains("config.json: not UTF-8: invalid utf-8"));
    }

    #[test]
    fn what_is_shown_moves_no_cursor() {
        assert_eq!(shown("plain ü"), "plain ü");
        assert_eq!(shown("a\x1b[2J\n\u{202e}b\u{9b}"), "a\\u{1b}[2J\\n\\u{202e}b\\u{9b}");
        assert_eq!(shown(&"ü".repeat(300)), format!("{}… (600 bytes)", "ü".repeat(200)));
        assert_eq!(shown_path(Path::new("a\nb")), "a\\nb");
        assert_eq!(listed(&["a".into(), "b".into()]), "\n  a\n  b");
        assert!(listed(&vec!["a".into(); 1000]).ends_with("\n  a\n  and 980 more"));
    }
}
