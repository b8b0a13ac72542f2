//! Names of repositories of the hub, as people write them.

use std::fmt::{self, Display};
use std::path::Path;

pub use crate::checkpoint::folder::is_commit;
use serde::{Deserialize, Serialize};

/// Kinds of repositories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Models and adapters.
    Model,
    Dataset,
}

impl Kind {
    /// Returns the word for this kind in folders of the cache and in addresses of the API.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }
}

/// A repository of the hub at a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    pub kind: Kind,
    /// `organization/name`
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A file or folder in the repository; empty for the whole repository.
    pub path: String,
}

/// The branch that is meant if no revision is written.
const MAIN: &str = "main";

/// Beginning of an address of the hub, from `huggingface_hub`'s `HfFileSystem`.
pub const SCHEME: &str = "hf://";

/// The short forms that [`Reference::of`] reads, for messages.
pub const FORMS: &str = "ORG/NAME, ORG/NAME@REVISION";

impl Reference {
    /// Returns the repository that a path stands for: `ORG/NAME`, `ORG/NAME@REVISION`, or `hf://ORG/NAME@REVISION` for a model and
    /// `hf://datasets/ORG/NAME@REVISION/PATH` for a data set. Returns `None` for a path that exists on disk, and for one that ends like
    /// the name of a file.
    pub fn of(path: &Path, kind: Kind) -> Option<Reference> {
        let text = path.to_str()?;
        if text.starts_with(SCHEME) {
            return Self::of_address(text).filter(|reference| reference.kind == kind);
        }
        let is_file =
            [".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".gguf", ".safetensors", ".bin"]
                .iter()
                .any(|ending| text.ends_with(ending));
        if is_file || path.symlink_metadata().is_ok() {
            return None;
        }
        Self::of_id(text, kind)
    }

    /// Reads `ORG/NAME` or `ORG/NAME@REVISION`, even if such a path exists on disk.
    pub fn of_id(text: &str, kind: Kind) -> Option<Reference> {
        let (id, revision) = text.split_once('@').unwrap_or((text, MAIN));
        Some(Reference { kind, id: checked_id(id)?, revision: checked_revision(revision)?, path: String::new() })
    }

    /// Reads an address that begins with [`SCHEME`].
    pub fn of_address(text: &str) -> Option<Reference> {
        let text = text.strip_prefix(SCHEME)?;
        let (kind, text) = match text.split_once('/')? {
            ("datasets", rest) => (Kind::Dataset, rest),
            ("models", rest) => (Kind::Model, rest),
            _ => (Kind::Model, text),
        };
        let (organization, rest) = text.split_once('/')?;
        let end = rest.find(['@', '/']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let (revision, path) = match rest.strip_prefix('@') {
            Some(rest) => rest.split_at(end_of_revision(rest)),
            None => (MAIN, rest),
        };
        let path = path.trim_matches('/');
        if !(path.is_empty() || kind == Kind::Dataset && is_inside(path)) {
            return None;
        }
        let (id, revision) = (checked_id(&format!("{organization}/{name}"))?, checked_revision(revision)?);
        Some(Reference { kind, id, revision, path: path.into() })
    }

    /// Returns this repository at a commit or another revision.
    pub fn at(&self, commit: &str) -> Reference {
        Reference { revision: commit.into(), ..self.clone() }
    }

    /// Returns the command that downloads the repository into the cache.
    pub fn download_line(&self) -> String {
        let kind = if self.kind == Kind::Dataset { " --repo-type dataset" } else { "" };
        format!("hf download {} --revision {}{kind}", self.id, self.revision)
    }
}

/// Writes a repository in the form that a user would write.
impl Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Reference { kind, id, revision, path } = self;
        match path.is_empty() {
            true => write!(f, "{id}")?,
            false => write!(f, "{SCHEME}{}/{id}", kind.plural())?,
        }
        if revision != MAIN {
            write!(f, "@{revision}")?;
        }
        if path.is_empty() { Ok(()) } else { write!(f, "/{path}") }
    }
}

/// Returns an id if it has the form that the hub requires.
fn checked_id(id: &str) -> Option<String> {
    let is_part = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        (1..=96).contains(&part.len())
            && part.chars().all(inner)
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
    };
    let (organization, name) = id.split_once('/')?;
    let is_id =
        is_part(organization) && is_part(name) && !id.contains("--") && !id.contains("..") && !name.ends_with(".git");
    is_id.then(|| id.to_string())
}

/// Returns a revision if it can be a part of an address and of a path in the cache.
fn checked_revision(revision: &str) -> Option<String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./+".contains(c);
    (is_inside(revision) && revision.len() <= 200 && revision.chars().all(is_plain)).then(|| revision.to_string())
}

/// Tells whether a path is relative and stays inside its folder, with no part that is empty, `.` or `..`.
pub fn is_inside(path: &str) -> bool {
    !path.contains(['\\', '\0']) && path.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// Returns the length of the revision at the beginning of a text. `refs/convert/NAME` and `refs/pr/NUMBER` have slashes; other
/// revisions have none in an address.
fn end_of_revision(text: &str) -> usize {
    let slashes = if text.starts_with("refs/convert/") || text.starts_with("refs/pr/") { 2 } else { 0 };
    text.match_indices('/').nth(slashes).map_or(text.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn ids_and_addresses_are_read_and_written_alike() {
        for (text, kind, id, revision, path) in [
            ("org/name", Kind::Model, "org/name", "main", ""),
            ("a-b.c/D_1.5@v1.0", Kind::Dataset, "a-b.c/D_1.5", "v1.0", ""),
            ("org/name@refs/pr/3", Kind::Model, "org/name", "refs/pr/3", ""),
            ("hf://datasets/org/name/data/a b.jsonl", Kind::Dataset, "org/name", "main", "data/a b.jsonl"),
            ("hf://datasets/org/name@v1/data", Kind::Dataset, "org/name", "v1", "data"),
            ("hf://datasets/o/n@refs/convert/parquet/x/train", Kind::Dataset, "o/n", "refs/convert/parquet", "x/train"),
        ] {
            let found = Reference::of(Path::new(text), kind).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(
                found,
                Reference { kind, id: id.into(), revision: revision.into(), path: path.into() },
                "{text}"
            );
            assert_eq!(found.to_string(), text);
        }
        let address = |text: &str| Reference::of(Path::new(text), Kind::Model).unwrap().to_string();
        assert_eq!(address("hf://org/name"), "org/name");
        assert_eq!(address(&format!("hf://models/org/name@{COMMIT}")), format!("org/name@{COMMIT}"));
        let line = |text: &str, kind| Reference::of_id(text, kind).unwrap().download_line();
        assert_eq!(line("o/n", Kind::Model), "hf download o/n --revision main");
        assert_eq!(line("o/n@v1", Kind::Dataset), "hf download o/n --revision v1 --repo-type dataset");
    }

    #[test]
    fn what_is_a_path_is_no_repository() {
        for text in [
            "name",
            "./org/name",
            "/org/name",
            "org/name/more",
            "org/",
            "/name",
            "org/.name",
            "org/-name",
            "org/na--me",
            "org/na..me",
            "org/name.git",
            "org/a name",
            "org/name@",
            "org/name@../x",
            "org/name@a b",
            "org/name@/a",
            "data/train.jsonl",
            "data/train.csv.gz",
            "models/x.gguf",
            "src/lib",
            "hf://name",
            "hf://org/name/config.json",
            "hf://datasets/org/name",
            "hf://datasets/org/name/../x",
        ] {
            assert_eq!(
                Reference::of(Path::new(text), Kind::Model),
                if text == "src/lib" { Reference::of_id(text, Kind::Model) } else { None },
                "{text}"
            );
        }
        assert_eq!(Reference::of(Path::new("src/hub"), Kind::Model), None, "a folder of this name is here");
        assert_eq!(Reference::of(Path::new("hf://org/name"), Kind::Dataset), None);
        assert!(is_commit(COMMIT) && !is_commit("main") && !is_commit(&COMMIT.to_uppercase()));
    }
}
