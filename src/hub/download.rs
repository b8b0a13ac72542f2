//! Downloads a file of the hub into a blob of the cache. A download that was cut goes on where it was, and the file is checked against
//! the hash that the hub names.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ring::digest::{self, Digest};

use super::cache::Folder;
use super::http::{Answer, Failure, Http, Tries, cut};
use super::progress::Progress;
use super::reference::is_commit;
use crate::files::{shown, shown_path};

const BUFFER_BYTES: usize = 1 << 20;

/// The error of a download that is ended from outside.
const STOPPED: &str = "ended, because another download failed";

/// The description of a file, which the hub gives before it sends the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Name in its repository.
    pub name: String,
    pub url: String,
    /// The sha256 of a large file, or git's hash of a small one.
    pub etag: String,
    /// Size of the whole file.
    pub bytes: u64,
}

impl Remote {
    /// Asks the hub for the headers of a file. For a large file the hub answers with a redirect whose headers describe it.
    pub fn ask(http: &Http, name: &str, url: String, progress: &Progress) -> Result<Remote, Failure> {
        let answer = http.head(&url, progress)?;
        let etag = answer.header("x-linked-etag").or(answer.header("etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let size = answer.header("x-linked-size").or(answer.header("content-length").filter(|_| answer.status < 300));
        let bytes = size.and_then(|size| size.parse().ok());
        let is_known = is_commit(&etag) || is_sha256(&etag);
        match bytes.filter(|_| is_known) {
            Some(bytes) => Ok(Remote { name: name.into(), url, etag, bytes }),
            None => Err(Failure::Wrong(format!(
                "{url}: found the ETag {:?} and the size {:?}; allowed: a hash and a number, as the hub has them",
                shown(&etag),
                shown(size.unwrap_or_default())
            ))),
        }
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Returns the number of bytes of a file that have not arrived on this machine.
pub fn missing_bytes(folder: &Folder, remote: &Remote) -> u64 {
    if is_whole(&folder.blob(&remote.etag), remote) {
        return 0;
    }
    let arrived = fs::metadata(folder.incomplete(&remote.etag)).map_or(0, |metadata| metadata.len());
    remote.bytes.saturating_sub(arrived)
}

/// Downloads a file into the blobs of its repository, if it is not there.
pub fn download(http: &Http, folder: &Folder, remote: &Remote, progress: &Progress) -> Result<()> {
    let blob = folder.blob(&remote.etag);
    if is_whole(&blob, remote) {
        progress.add(remote.bytes);
        return Ok(());
    }
    let _lock = folder.lock(&remote.etag, progress)?;
    if is_whole(&blob, remote) {
        progress.add(remote.bytes);
        return Ok(());
    }
    let path = folder.incomplete(&remote.etag);
    let place = || shown_path(&path);
    let mut part = Part::resume(folder.open_incomplete(&remote.etag)?, remote, progress).with_context(place)?;
    let was_begun = part.bytes > 0;
    receive(http, &mut part, remote, progress)?;
    if let Err(error) = part.check(remote) {
        fs::remove_file(&path).with_context(place)?;
        progress.take_back(remote.bytes);
        // The part that an earlier download has left may be wrong; then a second download can succeed.
        ensure!(was_begun, error);
        progress.note(format!("{error}; it is downloaded again from its beginning"));
        part = Part::resume(folder.open_incomplete(&remote.etag)?, remote, progress).with_context(place)?;
        receive(http, &mut part, remote, progress)?;
        if let Err(error) = part.check(remote) {
            fs::remove_file(&path).with_context(place)?;
            bail!(error);
        }
    }
    part.file.sync_all().and_then(|()| fs::rename(&path, &blob)).with_context(place)
}

/// Tells whether a blob is there in its full size.
fn is_whole(blob: &Path, remote: &Remote) -> bool {
    fs::metadata(blob).is_ok_and(|metadata| metadata.is_file() && metadata.len() == remote.bytes)
}

/// The part of a file that has arrived, and its hash.
struct Part {
    file: File,
    bytes: u64,
    hash: digest::Context,
}

impl Part {
    /// Reads what an earlier download has left; more bytes than the file has are dropped.
    fn resume(mut file: File, remote: &Remote, progress: &Progress) -> Result<Part> {
        let found = file.metadata()?.len();
        if found > remote.bytes {
            file.set_len(0)?;
        }
        file.seek(SeekFrom::Start(0))?;
        let mut part = Part { file, bytes: 0, hash: new_hash(remote) };
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match part.file.read(&mut buffer)? {
                0 => break,
                n => {
                    part.hash.update(&buffer[..n]);
                    part.bytes += n as u64;
                    progress.add(n as u64);
                    ensure!(!progress.is_stopped(), STOPPED);
                }
            }
        }
        Ok(part)
    }

    fn restart(&mut self, remote: &Remote, progress: &Progress) -> Result<()> {
        progress.take_back(self.bytes);
        self.file.set_len(0)?;
        (self.bytes, self.hash) = (0, new_hash(remote));
        Ok(())
    }

    fn add(&mut self, bytes: &[u8], progress: &Progress) -> Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        progress.add(bytes.len() as u64);
        Ok(())
    }

    /// Compares the hash of all bytes with the hub's.
    fn check(&self, remote: &Remote) -> Result<(), String> {
        let found = hex(self.hash.clone().finish());
        if found == remote.etag {
            return Ok(());
        }
        let name = if is_sha256(&remote.etag) { "sha256" } else { "hash in git" };
        Err(format!("{}: its {name} is {found}, and the hub says {}", shown(&remote.name), remote.etag))
    }
}

/// Returns the beginning of the hash that an etag is: sha256, or git's sha1 over a header and the file.
fn new_hash(remote: &Remote) -> digest::Context {
    if is_sha256(&remote.etag) {
        return digest::Context::new(&digest::SHA256);
    }
    let mut hash = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(format!("blob {}\0", remote.bytes).as_bytes());
    hash
}

fn hex(digest: Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Receives the rest of a file, in as many requests as it takes. It gives up if several requests one after the other bring nothing new.
fn receive(http: &Http, part: &mut Part, remote: &Remote, progress: &Progress) -> Result<()> {
    let (mut tries, mut most) = (Tries::default(), part.bytes);
    while part.bytes < remote.bytes {
        let failure = match http.get(&remote.url, part.bytes) {
            Ok(answer) => {
                if !continues(&answer, part.bytes) {
                    part.restart(remote, progress)?;
                }
                receive_from(answer, part, remote, progress)?
            }
            Err(Failure::Status { status: 416, .. }) if part.bytes > 0 => {
                part.restart(remote, progress)?;
                continue;
            }
            Err(failure) => Some(failure),
        };
        // A server may make the download restart again and again, so only bytes beyond all earlier ones count.
        if part.bytes > most {
            most = part.bytes;
            tries.succeed();
        }
        if let Some(failure) = failure {
            tries.again(failure, progress)?;
        }
    }
    Ok(())
}

/// Tells whether an answer begins at this byte; a server may ignore the range and send the whole file.
fn continues(answer: &Answer, from: u64) -> bool {
    let begins = answer
        .header("content-range")
        .and_then(|range| range.trim().strip_prefix("bytes ")?.split('-').next()?.parse().ok());
    from == 0 || answer.status == 206 && begins == Some(from)
}

/// Receives the bytes of one answer. Returns the failure of an answer that ended too early.
fn receive_from(answer: Answer, part: &mut Part, remote: &Remote, progress: &Progress) -> Result<Option<Failure>> {
    let mut body = answer.body.into_reader();
    let mut buffer = vec![0; BUFFER_BYTES];
    while part.bytes < remote.bytes {
        ensure!(!progress.is_stopped(), STOPPED);
        let rest = (remote.bytes - part.bytes).min(BUFFER_BYTES as u64) as usize;
        match body.read(&mut buffer[..rest]) {
            Ok(0) => {
                let missing = remote.bytes - part.bytes;
                return Ok(Some(Failure::Network(format!(
                    "{}: the answer ended {missing} bytes early",
                    shown(&remote.name)
                ))));
            }
            Ok(n) => part
                .add(&buffer[..n], progress)
                .with_context(|| format!("{}: cannot be written", shown(&remote.name)))?,
            Err(error) => return Ok(Some(cut(&remote.url, &error))),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256() {
        let hash = |etag: &str, bytes: &[u8]| {
            let remote =
                Remote { name: String::new(), url: String::new(), etag: etag.into(), bytes: bytes.len() as u64 };
            let mut hash = new_hash(&remote);
            hash.update(bytes);
            hex(hash.finish())
        };
        // `echo hello | git hash-object --stdin` and `echo hello | sha256sum`.
        assert_eq!(hash(&"0".repeat(40), b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(hash(sha256, b"hello\n"), sha256);
    }
}
