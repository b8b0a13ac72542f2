//! Requests to the hub. Redirects are followed here and not by `ureq`, because the token goes to the hub and to no other origin.

use std::io::Read;
use std::time::Duration;

use anyhow::{Result, ensure};
use ureq::http::{HeaderMap, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::progress::Progress;
use super::settings::Settings;
use crate::files::{shown, shown_path};

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;

/// Longest time in which a connection is made.
const CONNECT: Duration = Duration::from_secs(15);

/// Pauses before a request is tried again, one after the other, as long as no further byte arrives.
const PAUSES_MS: [u64; 4] = [500, 1000, 2000, 4000];

/// Longest time for which the hub may ask the client to wait (Retry-After). The hub counts requests in windows of five minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Largest answer of the API, with room for the names of a million files.
const MAX_ANSWER_BYTES: u64 = 256 << 20;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There was no answer, or it was cut.
    #[error("{0}")]
    Network(String),
    /// The status of the answer is an error.
    #[error("{url} answered {status}{}", if said.is_empty() { String::new() } else { format!(" ({said})") })]
    Status { url: String, status: u16, code: String, said: String, wait: Option<Duration> },
    /// A second try would fail as well.
    #[error("{0}")]
    Wrong(String),
}

impl Failure {
    /// Returns the shortest time after which the request may succeed; `None` if it will not.
    fn wait(&self) -> Option<Duration> {
        match self {
            Failure::Network(_) => Some(Duration::ZERO),
            Failure::Status { status: 408 | 429 | 500 | 502 | 503 | 504, wait, .. } => {
                Some(wait.unwrap_or_default()).filter(|wait| *wait <= LONGEST_WAIT)
            }
            Failure::Status { .. } | Failure::Wrong(_) => None,
        }
    }
}

/// Counts tries of a request, and pauses between them.
#[derive(Default)]
pub struct Tries(usize);

impl Tries {
    /// Pauses and returns `Ok` if the request is worth another try; otherwise returns its failure.
    pub fn again(&mut self, failure: Failure, progress: &Progress) -> Result<(), Failure> {
        let (Some(pause), Some(wait)) = (PAUSES_MS.get(self.0), failure.wait()) else { return Err(failure) };
        let pause = wait.max(Duration::from_millis(*pause));
        self.0 += 1;
        progress.note(format!("{failure}; trying again in {:.1} s", pause.as_secs_f64()));
        progress.pause(pause);
        Ok(())
    }

    /// Counts from the beginning again, because bytes have arrived.
    pub fn succeed(&mut self) {
        self.0 = 0;
    }
}

/// An answer whose status is a success, or a redirect to another origin.
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Body,
}

impl Answer {
    /// Returns the text of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Redirects that are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    All,
    /// A redirect that describes the file is returned, and so is one that leaves the hub.
    UntilDescribed,
}

/// A client of one hub.
pub struct Http {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Http {
    pub fn new(settings: &Settings, token: Option<String>) -> Result<Http> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(settings.silence))
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges count the bytes of the file itself, not those of a compressed form.
            .accept_encoding("identity")
            .tls_config(tls(settings)?);
        Ok(Http { agent: config.build().into(), endpoint: settings.endpoint.clone(), token })
    }

    /// Asks for a JSON answer.
    pub fn json(&self, url: &str, progress: &Progress) -> Result<serde_json::Value, Failure> {
        let mut tries = Tries::default();
        loop {
            let read = |answer: Answer| {
                let mut bytes = Vec::new();
                let taken = answer.body.into_reader().take(MAX_ANSWER_BYTES).read_to_end(&mut bytes);
                taken.map_err(|error| cut(url, &error))?;
                serde_json::from_slice(&bytes)
                    .map_err(|_| Failure::Wrong(format!("{url} answered no JSON: {}", beginning(&bytes))))
            };
            match self.send("GET", url, 0, Follow::All).and_then(read) {
                Err(failure) => tries.again(failure, progress)?,
                found => return found,
            }
        }
    }

    /// Asks for the headers that describe a file. The hub sends them before it redirects to the storage.
    pub fn head(&self, url: &str, progress: &Progress) -> Result<Answer, Failure> {
        let mut tries = Tries::default();
        loop {
            match self.send("HEAD", url, 0, Follow::UntilDescribed) {
                Err(failure) => tries.again(failure, progress)?,
                found => return found,
            }
        }
    }

    /// Asks for the bytes of a file from byte `from` to its end.
    pub fn get(&self, url: &str, from: u64) -> Result<Answer, Failure> {
        self.send("GET", url, from, Follow::All)
    }

    fn send(&self, method: &str, url: &str, from: u64, follow: Follow) -> Result<Answer, Failure> {
        let mut url = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.send_once(method, &url, from)?;
            if !(300..400).contains(&answer.status) {
                return Ok(answer);
            }
            let target = answer.header("location").unwrap_or_default();
            let target = absolute(&url, target).ok_or_else(|| {
                let (from, to) = (without_query(&url), without_query(target));
                Failure::Wrong(format!("{from} redirects to {to:?}, which is no address"))
            })?;
            let has = |name: &str| answer.headers.contains_key(name);
            let leaves = origin(&target) != origin(&url) && (has("x-linked-etag") || has("x-repo-commit"));
            // The hub may redirect to another of its own addresses, which states the size.
            let is_described = has("x-linked-etag") && has("x-linked-size");
            if follow == Follow::UntilDescribed && (is_described || leaves) {
                return Ok(answer);
            }
            url = target;
        }
        Err(Failure::Wrong(format!("{}: more than {MAX_REDIRECTS} redirects", without_query(&url))))
    }

    fn send_once(&self, method: &str, url: &str, from: u64) -> Result<Answer, Failure> {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        let is_hub = origin(url).is_some() && origin(url) == origin(&self.endpoint);
        if let Some(token) = self.token.as_ref().filter(|_| is_hub) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let request = request.body(()).map_err(|error| Failure::Wrong(format!("{}: {error}", without_query(url))))?;
        let response = self.agent.run(request).map_err(|error| failed(url, error))?;
        let (parts, body) = response.into_parts();
        let answer = Answer { status: parts.status.as_u16(), headers: parts.headers, body };
        match answer.status {
            200..400 => Ok(answer),
            status => Err(refused(url, status, answer)),
        }
    }
}

/// Returns the settings of TLS, with the certificates that the environment names.
fn tls(settings: &Settings) -> Result<TlsConfig> {
    let Some((path, pem)) = settings.certificates()? else { return Ok(TlsConfig::default()) };
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = certificates.collect();
    ensure!(!certificates.is_empty(), "{}: holds no certificate in PEM", shown_path(&path));
    Ok(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&certificates)).build())
}

/// Returns scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// Returns where a redirect leads from `url`; `None` if that is no address of the web.
fn absolute(url: &str, target: &str) -> Option<String> {
    if let Some(path) = target.strip_prefix('/').filter(|path| !path.starts_with('/')) {
        let (scheme, host, port) = origin(url)?;
        return Some(format!("{scheme}://{host}:{port}/{path}"));
    }
    origin(target).filter(|(scheme, ..)| ["http", "https"].contains(&scheme.as_str())).map(|_| target.to_string())
}

/// Returns the failure of an answer that ended early.
pub fn cut(url: &str, error: &std::io::Error) -> Failure {
    Failure::Network(format!("{}: the answer was cut: {error}", without_query(url)))
}

fn failed(url: &str, error: ureq::Error) -> Failure {
    let url = without_query(url);
    match error {
        ureq::Error::HostNotFound => Failure::Network(format!("{url}: the name of the host is not known")),
        // Errors of rustls arrive as errors of the connection.
        ureq::Error::Io(error) if error.to_string().contains("certificate") => Failure::Wrong(format!(
            "{url}: {error}; help: if a proxy decrypts traffic, SSL_CERT_FILE must name a file with its certificate"
        )),
        ureq::Error::Io(error) => Failure::Network(format!("{url}: {error}")),
        ureq::Error::Timeout(what) => Failure::Network(format!("{url}: no answer in time ({what})")),
        ureq::Error::ConnectionFailed => Failure::Network(format!("{url}: no connection")),
        ureq::Error::ConnectProxyFailed(error) => Failure::Network(format!("{url}: the proxy: {}", shown(&error))),
        ureq::Error::Protocol(error) => Failure::Network(format!("{url}: {error}")),
        error => Failure::Wrong(format!("{url}: {error}")),
    }
}

fn refused(url: &str, status: u16, answer: Answer) -> Failure {
    let text = |name: &str| answer.header(name).map(shown).unwrap_or_default();
    let wait = text("retry-after").parse().ok().or_else(|| seconds_of_limit(&text("ratelimit")));
    let (code, said) = (text("x-error-code"), text("x-error-message"));
    Failure::Status { url: without_query(url), status, code, said, wait: wait.map(Duration::from_secs) }
}

/// Returns the seconds until requests are allowed again, from a header such as `"api";r=0;t=55`; `None` if requests are left.
fn seconds_of_limit(header: &str) -> Option<u64> {
    let field = |name: &str| header.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse().ok());
    field("t=").filter(|_| field("r=") == Some(0))
}

/// Returns an address as messages show it, without its query, because the query of a signed address is a secret.
fn without_query(url: &str) -> String {
    shown(url.split('?').next().unwrap_or_default())
}

/// Returns the first words of an answer.
fn beginning(bytes: &[u8]) -> String {
    shown(&String::from_utf8_lossy(&bytes[..bytes.len().min(80)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| origin(a).is_some() && origin(a) == origin(b);
        assert!(same("https://HuggingFace.co/a", "https://huggingface.co:443/b?c"));
        for other in [
            "http://huggingface.co",
            "https://huggingface.co:444",
            "https://cdn.huggingface.co",
            "https://huggingface.co.evil.org",
        ] {
            assert!(!same("https://huggingface.co", other), "{other}");
        }
        assert!(!same("x", "x"));
        let from = "https://a.org:8443/x/y";
        assert_eq!(absolute(from, "/z?q").as_deref(), Some("https://a.org:8443/z?q"));
        assert_eq!(absolute(from, "http://b.org/z").as_deref(), Some("http://b.org/z"));
        assert_eq!(
            ["", "z", "//b.org/z", "file:///etc/hostname"].map(|target| absolute(from, target)),
            [const { None }; 4]
        );
    }

    #[test]
    fn what_may_pass_is_tried_again_and_the_hub_says_when() {
        let status = |status, wait: Option<u64>| Failure::Status {
            url: String::new(),
            status,
            code: String::new(),
            said: String::new(),
            wait: wait.map(Duration::from_secs),
        };
        assert_eq!(status(429, Some(7)).wait(), Some(Duration::from_secs(7)));
        assert_eq!(status(503, None).wait(), Some(Duration::ZERO));
        assert_eq!([status(429, Some(86_400)), status(404, None), status(401, None)].map(|f| f.wait()), [None; 3]);
        assert_eq!(seconds_of_limit("\"api\";r=0;t=55"), Some(55));
        assert_eq!(seconds_of_limit("\"api\";r=9;t=55"), None);
        assert_eq!(without_query("https://a.org/b?X-Signature=secret"), "https://a.org/b");
    }
}
