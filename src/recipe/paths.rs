//! Reads the paths and the addresses of the hub that a user writes.

use std::path::{Path, PathBuf};

use crate::files;
use crate::hub::{Reference, SCHEME};

/// Reads a path. The error says why the text is none.
pub fn read(text: &str) -> Result<PathBuf, String> {
    read_at(text, std::env::var_os("HOME").map(PathBuf::from).as_deref())
}

fn read_at(text: &str, home: Option<&Path>) -> Result<PathBuf, String> {
    if text.starts_with(SCHEME) {
        let allowed = format!(
            "{SCHEME}ORG/NAME@REVISION and {SCHEME}datasets/ORG/NAME@REVISION/PATH are allowed, @REVISION and /PATH may be left out"
        );
        return Reference::of_address(text).map(|_| text.into()).ok_or(allowed);
    }
    files::written_path(text, home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tilde_is_the_home_folder() {
        let read = |text: &str| read_at(text, Some(Path::new("/home/me")));
        for (text, path) in [
            ("~", "/home/me"),
            ("~/a", "/home/me/a"),
            ("~//a", "/home/me/a"),
            ("a/~/b", "a/~/b"),
            ("./~", "./~"),
            ("costs 5$", "costs 5$"),
            ("$5", "$5"),
            ("hf://datasets/o/n/a", "hf://datasets/o/n/a"),
        ] {
            assert_eq!(read(text), Ok(path.into()), "{text}");
        }
        for text in ["~you/a", "${HOME}/a", "$HOME", "a/$x", "", "a\0b", "hf://x", "hf://datasets/o/n/../x"] {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(read_at("~/a", None).unwrap_err().contains("HOME is not set"));
    }
}
