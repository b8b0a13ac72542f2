//! The variables of the environment that `huggingface_hub` reads, with its meanings and defaults.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::files;

/// The hub where `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";

/// Largest file of a token, and of certificates.
const MAX_TOKEN_BYTES: u64 = 64 << 10;
const MAX_CERTIFICATES_BYTES: u64 = 16 << 20;

/// Where the hub, its cache and its token are.
pub struct Settings {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// Folder of all repositories.
    pub cache: PathBuf,
    /// The variable that forbids asking the hub, if one does.
    pub offline: Option<&'static str>,
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
            (None, None) => expanded("~/.cache/huggingface")?,
        };
        let cache = path("HF_HUB_CACHE")?.or(path("HUGGINGFACE_HUB_CACHE")?).unwrap_or_else(|| home.join("hub"));
        let cache = std::path::absolute(cache).context("the working directory")?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or(ENDPOINT.into()).trim_end_matches('/').to_string();
        let is_web = endpoint.starts_with("http://") || endpoint.starts_with("https://");
        ensure!(is_web, "HF_ENDPOINT is {endpoint:?}, allowed: an address such as {ENDPOINT}");
        Ok(Settings { endpoint, cache, offline, home })
    }

    /// Returns the token, if there is one, and where it is from: `HF_TOKEN`, else the file that `hf auth login` writes. Errors never
    /// show it.
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

    /// Returns the certificates to trust in the place of those that this program brings along, as a proxy that looks into traffic
    /// needs; `None` if no variable names a file of them.
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

/// Returns a variable; one that is empty counts as not set.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

fn path(name: &str) -> Result<Option<PathBuf>> {
    variable(name).map(|text| expanded(&text)).transpose().with_context(|| name.to_string())
}

/// Returns a path whose `~` is the home folder.
fn expanded(text: &str) -> Result<PathBuf> {
    match text.strip_prefix("~/") {
        None => Ok(text.into()),
        Some(rest) => match std::env::var_os("HOME") {
            Some(home) => Ok(Path::new(&home).join(rest)),
            None => bail!("{text}: HOME is not set, so that ~ is not known; set HF_HOME"),
        },
    }
}

/// Returns a token that can stand in a header.
fn checked_token(token: &str, place: &str) -> Result<String> {
    let token = token.trim();
    ensure!(
        token.bytes().all(|b| b.is_ascii_graphic()),
        "{place}: not a token of the hub; it has characters that no token has"
    );
    Ok(token.into())
}
