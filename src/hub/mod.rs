//! The Hugging Face hub: models, adapters and data sets by their names.
//!
//! A repository is taken from the cache of `huggingface_hub` ([`cache`]); files that are missing there are downloaded into that cache.
//! [`Hub::choose`] decides commit and files once, so that all machines of a run have the same ones; [`Hub::fetch`] downloads the files
//! into the cache of one machine. This module has no collectives: `start::locate` makes the other ranks wait.
//!
//! The hub is not trusted more than necessary: file names from it never lead out of the folder of a repository, each file is checked
//! against the hash that the hub names, and the token is sent to the address in `HF_ENDPOINT` only.
//!
//! Sources: the documentation of the cache and of the environment variables of `huggingface_hub`, and the answers that its client gets.

mod cache;
mod dataset;
mod download;
mod http;
mod model;
mod progress;
mod reference;
mod settings;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::checkpoint::folder::{INDEX_FILE, SINGLE_FILE};
use crate::files::{self, shown, shown_path};
use cache::Folder;
pub use dataset::Unsaid;
use download::{Remote, download, missing_bytes};
use http::{Failure, Http};
pub use progress::Progress;
pub use reference::{FORMS, Kind, Reference, SCHEME};
use reference::{is_commit, is_inside};
use settings::Settings;

/// Number of files that are downloaded at the same time.
const DOWNLOADS: usize = 4;

/// The part of a repository that a command needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// The config.json of a model.
    Config,
    /// The config.json, generation_config.json and tokenizer of a model.
    Tokenizer,
    /// The files of [`Part::Tokenizer`] and the weights.
    Weights,
    /// The files of [`Part::Weights`] and all others that a merged model keeps.
    Merge,
    /// The config and the tensors of an adapter of PEFT.
    Adapter,
    /// The rows of a split of a data set.
    Rows { split: Option<String>, unsaid: Unsaid },
}

/// A part of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    pub reference: Reference,
    pub part: Part,
}

/// The files of a repository at a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The repository at a commit, not at a branch.
    pub reference: Reference,
    pub files: Vec<String>,
}

/// The hub that the environment names, with its cache on this machine.
pub struct Hub {
    settings: Settings,
    http: Http,
    /// The variable or the file that the token is from.
    token_place: Option<String>,
}

impl Hub {
    /// Reads the environment.
    pub fn from_environment() -> Result<Hub> {
        let settings = Settings::from_environment()?;
        let (token, token_place) = settings.token()?.unzip();
        Ok(Hub { http: Http::new(&settings, token)?, settings, token_place })
    }

    /// Decides which commit is meant and which of its files are needed. Asks the hub if the cache does not know.
    pub fn choose(&self, wanted: &Wanted, progress: &Progress) -> Result<Chosen> {
        let folder = Folder::of(&self.settings.cache, &wanted.reference);
        let commit = match folder.commit(&wanted.reference.revision) {
            Some(commit) => commit,
            None => self.ask_commit(&wanted.reference, &folder, progress)?,
        };
        let reference = wanted.reference.at(&commit);
        if let Some(names) = folder.names(&commit) {
            let files = self.files(&reference, &names, &wanted.part, &folder, progress)?;
            return Ok(Chosen { reference, files });
        }
        let (names, doubt) = match self.ask_names(&reference, &folder, progress) {
            Ok(names) => (names, None),
            // The cache may have every file that is needed.
            Err(doubt) => (folder.present(&commit), Some(doubt)),
        };
        let files = self.files(&reference, &names, &wanted.part, &folder, progress);
        match (files, doubt) {
            (Ok(files), Some(_)) if files.iter().all(|file| folder.has(&commit, file)) => {
                progress.note(format!(
                    "{reference}: the cache has the files that are needed; the hub may have more of them"
                ));
                Ok(Chosen { reference, files })
            }
            (_, Some(doubt)) => Err(doubt),
            (files, None) => Ok(Chosen { reference, files: files? }),
        }
    }

    /// Downloads the chosen files that the cache of this machine lacks.
    pub fn fetch(&self, wanted: &Wanted, chosen: &Chosen, progress: &Progress) -> Result<()> {
        let Chosen { reference, files } = chosen;
        let folder = Folder::of(&self.settings.cache, reference);
        let commit = &reference.revision;
        let missing = files.iter().filter(|file| !folder.has(commit, file));
        let remotes: Vec<Remote> =
            missing.map(|file| self.describe(reference, file, progress)).collect::<Result<_>>()?;
        if remotes.is_empty() {
            return Ok(());
        }
        folder.check_room(remotes.iter().map(|remote| missing_bytes(&folder, remote)).sum())?;
        progress.expect(remotes.iter().map(|remote| remote.bytes).sum());
        // The index comes last, so that a folder with an index has all files that it names.
        let (index, others): (Vec<&Remote>, Vec<&Remote>) =
            remotes.iter().partition(|remote| remote.name == INDEX_FILE);
        self.download_all(reference, &folder, &others, progress)?;
        self.download_all(reference, &folder, &index, progress)?;
        // Only the cache of rank 0's machine knows the branch so far; a commit that this one has for it stays.
        match folder.commit(&wanted.reference.revision) {
            Some(_) => Ok(()),
            None => folder.note_commit(&wanted.reference.revision, commit),
        }
    }

    /// Returns the paths of the chosen files in the cache of this machine. Fails if one is not there.
    pub fn places(&self, chosen: &Chosen) -> Result<Vec<PathBuf>> {
        let folder = Folder::of(&self.settings.cache, &chosen.reference);
        let snapshot = folder.snapshot(&chosen.reference.revision);
        let absent = chosen.files.iter().find(|file| !folder.has(&chosen.reference.revision, file));
        ensure!(
            absent.is_none(),
            "{}: is not there, although a rank of this machine has downloaded it into its cache; help: give all ranks the same \
             HF_HOME and HF_HUB_CACHE",
            shown_path(&snapshot.join(absent.map_or("", String::as_str)))
        );
        Ok(chosen.files.iter().map(|file| snapshot.join(file)).collect())
    }

    /// Returns the folder of the first chosen file, in which all files of a model or an adapter are.
    pub fn folder(&self, chosen: &Chosen) -> Result<PathBuf> {
        let first = self.places(chosen)?.into_iter().next().context("no file was chosen")?;
        first.parent().map(PathBuf::from).context("a file without a folder")
    }

    /// Returns the folder of all repositories, as messages show it.
    pub fn cache(&self) -> String {
        shown_path(&self.settings.cache)
    }

    fn ask_commit(&self, reference: &Reference, folder: &Folder, progress: &Progress) -> Result<String> {
        let answer = self.ask(reference, progress)?;
        let commit = answer["sha"].as_str().unwrap_or_default().to_string();
        ensure!(is_commit(&commit), "{}: found {:?}, which is not a commit", self.settings.endpoint, shown(&commit));
        self.note_names(&reference.at(&commit), folder, &answer)?;
        folder.note_commit(&reference.revision, &commit)?;
        Ok(commit)
    }

    fn ask_names(&self, reference: &Reference, folder: &Folder, progress: &Progress) -> Result<Vec<String>> {
        let answer = self.ask(reference, progress)?;
        self.note_names(reference, folder, &answer)
    }

    /// Returns the names of all files in an answer, and writes them into the cache if that is possible.
    fn note_names(&self, reference: &Reference, folder: &Folder, answer: &serde_json::Value) -> Result<Vec<String>> {
        let siblings = answer["siblings"]
            .as_array()
            .with_context(|| format!("{}: the answer names no files", self.settings.endpoint))?;
        let names: Vec<String> =
            siblings.iter().filter_map(|file| Some(file["rfilename"].as_str()?.to_string())).collect();
        let outside = names.iter().find(|name| !is_inside(name));
        ensure!(outside.is_none(), "{reference}: the hub names a file {:?}", shown(outside.map_or("", String::as_str)));
        let _ = folder.note_names(&reference.revision, &names);
        Ok(names)
    }

    /// Asks the API about a repository at a revision.
    fn ask(&self, reference: &Reference, progress: &Progress) -> Result<serde_json::Value> {
        self.check_online(reference)?;
        let (endpoint, kind, id) = (&self.settings.endpoint, reference.kind.plural(), &reference.id);
        let url = format!("{endpoint}/api/{kind}/{id}/revision/{}", escaped(&reference.revision, false));
        self.http.json(&url, progress).map_err(|failure| self.explain(reference, None, failure))
    }

    /// Asks the hub for the description of a file.
    fn describe(&self, reference: &Reference, file: &str, progress: &Progress) -> Result<Remote> {
        self.check_online(reference)?;
        let prefix = if reference.kind == Kind::Dataset { "datasets/" } else { "" };
        let Reference { id, revision, .. } = reference;
        let url = format!(
            "{}/{prefix}{id}/resolve/{}/{}",
            self.settings.endpoint,
            escaped(revision, false),
            escaped(file, true)
        );
        Remote::ask(&self.http, file, url, progress).map_err(|failure| self.explain(reference, Some(file), failure))
    }

    fn check_online(&self, reference: &Reference) -> Result<()> {
        let Some(variable) = self.settings.offline else { return Ok(()) };
        bail!(
            "{reference} is not complete in the cache {}, and {variable} forbids asking the hub\nhelp: run `{}` where there is a network",
            self.cache(),
            reference.download_line()
        )
    }

    /// Chooses the files of a part. Downloads the index of the weights or the README of a data set if the cache does not have it.
    fn files(
        &self,
        reference: &Reference,
        names: &[String],
        part: &Part,
        folder: &Folder,
        progress: &Progress,
    ) -> Result<Vec<String>> {
        match part {
            Part::Config | Part::Tokenizer => model::about(reference, names, part),
            Part::Adapter => model::adapter(reference, names),
            Part::Weights | Part::Merge => {
                let mut files = model::about(reference, names, part)?;
                match model::weights(reference, names)? {
                    model::Weights::Single => files.push(SINGLE_FILE.into()),
                    model::Weights::Indexed => {
                        let index = self.blob(reference, INDEX_FILE, folder, progress)?;
                        files.extend(model::shards(&index).with_context(|| reference.to_string())?);
                        files.push(INDEX_FILE.into());
                    }
                }
                Ok(files)
            }
            Part::Rows { split, unsaid } => {
                let readme = match names.iter().any(|name| name == dataset::README) {
                    true => {
                        let file = self.blob(reference, dataset::README, folder, progress)?;
                        Some(String::from_utf8_lossy(&files::read(&file, dataset::MAX_README_BYTES)?).into_owned())
                    }
                    false => None,
                };
                dataset::files_of(reference, names, readme.as_deref(), split.as_deref(), *unsaid)
            }
        }
    }

    /// Returns the path of a small file, which is downloaded if it is not in the cache. An index is not linked into its snapshot,
    /// because the files that it names may not be there yet.
    fn blob(&self, reference: &Reference, file: &str, folder: &Folder, progress: &Progress) -> Result<PathBuf> {
        if folder.has(&reference.revision, file) {
            return Ok(folder.snapshot(&reference.revision).join(file));
        }
        let remote = self.describe(reference, file, progress)?;
        self.download_one(reference, folder, &remote, progress)?;
        if file != INDEX_FILE {
            folder.link(&reference.revision, file, &remote.etag)?;
        }
        Ok(folder.blob(&remote.etag))
    }

    /// Downloads files and links each one as soon as it is complete. The first failure ends the other downloads and is returned.
    fn download_all(
        &self,
        reference: &Reference,
        folder: &Folder,
        remotes: &[&Remote],
        progress: &Progress,
    ) -> Result<()> {
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
        let work = || {
            while let Some(remote) = remotes.get(next.fetch_add(1, Ordering::Relaxed))
                && !progress.is_stopped()
            {
                let done = self.download_one(reference, folder, remote, progress);
                if let Err(error) = done.and_then(|()| folder.link(&reference.revision, &remote.name, &remote.etag)) {
                    // The others fail because they are stopped, so the error must be kept before.
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    progress.stop();
                }
            }
        };
        std::thread::scope(|scope| (0..DOWNLOADS.min(remotes.len())).for_each(|_| _ = scope.spawn(work)));
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn download_one(&self, reference: &Reference, folder: &Folder, remote: &Remote, progress: &Progress) -> Result<()> {
        let explain = |error: anyhow::Error| match error.downcast::<Failure>() {
            Ok(failure) => self.explain(reference, Some(&remote.name), failure),
            Err(error) => error.context(format!("{reference}: {}", shown(&remote.name))),
        };
        download(&self.http, folder, remote, progress).map_err(explain)
    }

    /// Returns an error that says what the failure of a request means and what helps.
    fn explain(&self, reference: &Reference, file: Option<&str>, failure: Failure) -> anyhow::Error {
        let Reference { id, revision, kind, .. } = reference;
        let what = if *kind == Kind::Dataset { "data set" } else { "model" };
        let token = match &self.token_place {
            Some(place) => format!("the token of {place} was sent"),
            None => "no token was sent".into(),
        };
        let login = "a token comes from `hf auth login` or HF_TOKEN";
        let page = format!("{}/{}{id}", self.settings.endpoint, if *kind == Kind::Dataset { "datasets/" } else { "" });
        let text = match (&failure, file) {
            (Failure::Status { code, status: 401 | 403, .. }, _) if code == "GatedRepo" => {
                format!("{reference} is gated ({failure}); {token}\nhelp: accept the conditions at {page}; {login}")
            }
            (Failure::Status { code, .. }, _) if code == "RevisionNotFound" => {
                format!("{reference}: the hub has no revision {} of this {what}", shown(revision))
            }
            (Failure::Status { status: 404, .. }, Some(file)) => {
                format!("{reference}: the hub has no file {} ({failure})", shown(file))
            }
            (Failure::Status { status: 401 | 403, .. }, Some(file)) => {
                format!("{reference}: the hub refuses to send {} ({failure}); {token}\nhelp: {login}", shown(file))
            }
            (Failure::Status { status: 401 | 403 | 404, .. }, None) => format!(
                "{reference}: no file or folder has this name, and the hub has no such {what} or keeps it private ({failure}); {token}\n\
                 help: {login}"
            ),
            (Failure::Status { .. } | Failure::Wrong(_), _) => format!("{reference}: {failure}"),
            (Failure::Network(_), _) => format!(
                "{reference} is not complete in the cache {}, and the hub cannot be reached: {failure}\nhelp: run `{}` where there is \
                 a network; with HF_HUB_OFFLINE=1 the hub is not asked",
                self.cache(),
                reference.download_line()
            ),
        };
        anyhow!(text)
    }
}

/// Escapes a text that becomes a part of an address. Slashes are kept if `with_slashes`.
fn escaped(text: &str, with_slashes: bool) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || with_slashes && b == b'/';
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_addresses_are_escaped() {
        assert_eq!(escaped("refs/convert/parquet", false), "refs%2Fconvert%2Fparquet");
        assert_eq!(escaped("data/a b?.jsonl", true), "data/a%20b%3F.jsonl");
    }
}
