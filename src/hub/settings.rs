//! The environment variables of `huggingface_hub`, with the meanings that it gives them. In paths `~` is the home folder; variables are
//! refused there, where Python expands them.

use std::env::VarError;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};

use crate::files;

/// The hub where `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";

/// Variable that sets the longest time between two bytes of an answer, in seconds.
const SILENCE_VARIABLE: &str = "HF_HUB_DOWNLOAD_TIMEOUT";
const SILENCE: Duration = Duration::from_secs(60);

/// Largest file with a token, and largest file with certificates.
const MAX_TOKEN_BYTES: u64 = 64 << 10;
const MAX_CERTIFICATES_BYTES: u64 = 16 << 20;

/// Where the hub, its cache and its token are.
pub struct Settings {
    /// The address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Folder of all repositories.
    pub cache: PathBuf,
    /// The variable that forbids asking the hub, if one does.
    pub offline: Option<&'static str>,
    /// Longest time between two bytes of an answer.
    pub silence: Duration,
    home: PathBuf,
}

impl Settings {
    pub fn from_environment() -> Result<Settings> {
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| {
            let value = variable(name).unwrap_or_default().to_uppercase();
            ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
        });
        let home = match (path("HF_HOME")?, path("XDG_CACHE_HOME")?) {
            (Some(home), _) => home,
            (None, Some(cache)) => cache.join("huggingface"),
            (None, None) => expanded("~/.cache/huggingface").context("HF_HOME is not set")?,
        };
        let cache = path("HF_HUB_CACHE")?.or(path("HUGGINGFACE_HUB_CACHE")?).unwrap_or_else(|| home.join("hub"));
        let cache = std::path::absolute(cache).context("the working directory")?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or(ENDPOINT.into()).trim_end_matches('/').to_string();
        let is_web = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        ensure!(is_web, "HF_ENDPOINT is {endpoint:?}, allowed: an address such as {ENDPOINT}");
        let silence = match variable(SILENCE_VARIABLE) {
            None => SILENCE,
            Some(text) => {
                let seconds = text.parse::<u64>().ok().filter(|&seconds| seconds > 0);
                Duration::from_secs(
                    seconds.with_context(|| format!("{SILENCE_VARIABLE} is {text:?}, allowed: seconds, 1 or more"))?,
                )
            }
        };
        Ok(Settings { endpoint, cache, offline, silence, home })
    }

    /// Returns the token, if there is one, and its place: `HF_TOKEN`, else the file that `hf auth login` writes. Errors never show the
    /// token.
    pub fn token(&self) -> Result<Option<(String, String)>> {
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if let Some(token) = variable(name) {
                return Ok(Some((checked_token(&token, name)?, name.into())));
            }
        }
        let file = path("HF_TOKEN_PATH")?.unwrap_or_else(|| self.home.join("token"));
        if !file.exists() {
            return Ok(None);
        }
        let (token, place) = (files::read_text(&file, MAX_TOKEN_BYTES)?, files::shown_path(&file));
        if token.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some((checked_token(&token, &place)?, place)))
    }

    /// Returns the certificates to trust instead of the built-in ones, and their file. A proxy that decrypts traffic needs its own.
    /// `None` if no variable names such a file.
    pub fn certificates(&self) -> Result<Option<(PathBuf, Vec<u8>)>> {
        for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
            if let Some(file) = path(name)? {
                let bytes = files::read(&file, MAX_CERTIFICATES_BYTES).context(name)?;
                return Ok(Some((file, bytes)));
            }
        }
        Ok(None)
    }
}

/// Returns the value of a variable; `None` if it is empty or not set.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// Returns the path in a variable; `None` if it is empty or not set.
fn path(name: &str) -> Result<Option<PathBuf>> {
    ensure!(!matches!(std::env::var(name), Err(VarError::NotUnicode(_))), "{name} is not UTF-8");
    variable(name).map(|text| expanded(&text)).transpose().with_context(|| name.to_string())
}

fn expanded(text: &str) -> Result<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    files::written_path(text, home.as_deref()).map_err(Error::msg)
}

/// Returns a token that can be sent in a header, without the space around it.
fn checked_token(token: &str, place: &str) -> Result<String> {
    let token = token.trim();
    ensure!(
        token.bytes().all(|b| b.is_ascii_graphic()),
        "{place}: not a token of the hub, because it has characters that no token has"
    );
    Ok(token.into())
}
