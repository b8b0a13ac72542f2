//! A hub on the loopback that a test starts: its API, files, and a second port in the place of the storage that large files are
//! redirected to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

use ring::digest;
use serde_json::json;

use super::cli::Place;

/// Files from this size on are large: kept by their sha256, and redirected.
const LARGE: usize = 4096;

/// What a client has asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Path without its query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
    /// True on the port of the storage.
    pub is_storage: bool,
}

impl Request {
    pub fn asks_for(&self, method: &str, part: &str) -> bool {
        self.method == method && self.path.contains(part)
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// An answer, which may end before its last byte.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Number of bytes of the body after which the connection is cut.
    pub cut: Option<usize>,
    /// True if no byte comes after those, and the connection stays.
    pub hangs: bool,
}

impl Answer {
    pub fn new(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Answer {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Answer { status, headers, body: body.into(), ..Answer::default() }
    }
}

/// Changes the answer to a request; the number counts equal requests from 0.
pub type Fault = Box<dyn Fn(&Request, usize, Answer) -> Answer + Send + Sync>;

/// A repository: its revisions, and the files of each commit.
#[derive(Clone, Default)]
pub struct Repository {
    pub revisions: BTreeMap<String, String>,
    pub commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

impl Repository {
    /// A repository whose main branch has these files.
    pub fn new(commit: &str, files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Repository {
        let mut repository = Repository::default();
        repository.commit("main", commit, files);
        repository
    }

    /// Moves a revision to a commit with these files.
    pub fn commit(&mut self, revision: &str, commit: &str, files: impl IntoIterator<Item = (String, Vec<u8>)>) {
        self.revisions.insert(revision.into(), commit.into());
        self.commits.insert(commit.into(), files.into_iter().collect());
    }
}

struct State {
    /// By their names in the API, e.g. `models/org/name`.
    repositories: Mutex<BTreeMap<String, Repository>>,
    fault: Fault,
    log: Mutex<Vec<Request>>,
    storage: String,
}

/// A hub that serves until the test ends.
pub struct Hub {
    pub endpoint: String,
    state: Arc<State>,
}

impl Hub {
    pub fn start(repositories: &[(&str, Repository)]) -> Hub {
        Hub::with_fault(repositories, |_, _, answer| answer)
    }

    pub fn with_fault(
        repositories: &[(&str, Repository)],
        fault: impl Fn(&Request, usize, Answer) -> Answer + Send + Sync + 'static,
    ) -> Hub {
        let [hub, storage] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            repositories: Mutex::new(repositories.iter().map(|(name, r)| (name.to_string(), r.clone())).collect()),
            fault: Box::new(fault),
            log: Mutex::default(),
            storage: address(&storage),
        });
        let endpoint = address(&hub);
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let state = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    std::thread::spawn(move || serve(&state, stream, is_storage));
                }
            });
        }
        Hub { endpoint, state }
    }

    /// Requests so far.
    pub fn log(&self) -> Vec<Request> {
        self.state.log.lock().unwrap().clone()
    }

    pub fn forget(&self) {
        self.state.log.lock().unwrap().clear();
    }

    /// Number of requests of this method whose path has this part.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.log().iter().filter(|request| request.asks_for(method, part)).count()
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        change(self.state.repositories.lock().unwrap().get_mut(name).unwrap());
    }

    /// The same command with this hub, a cache in `hf` of the place, and no token.
    pub fn client(&self, place: &Place, command: Command) -> Command {
        self.client_with(place, command, &[])
    }

    /// The same with these variables.
    pub fn client_with(&self, place: &Place, mut command: Command, variables: &[(&str, &str)]) -> Command {
        for name in VARIABLES {
            command.env_remove(name);
        }
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", place.path("hf")).envs(variables.iter().copied());
        command
    }
}

/// Variables of the machine that must not decide what a test sees.
const VARIABLES: [&str; 17] = [
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "ALL_PROXY",
    "all_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "HF_HUB_DOWNLOAD_TIMEOUT",
];

fn serve(state: &State, stream: TcpStream, is_storage: bool) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader, is_storage) {
        let nth = {
            let mut log = state.log.lock().unwrap();
            let is_same = |other: &&Request| other.method == request.method && other.path == request.path;
            let nth = log.iter().filter(is_same).count();
            log.push(request.clone());
            nth
        };
        let answer = (state.fault)(&request, nth, answer(state, &request));
        if !send(reader.get_mut(), &request, answer) {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>, is_storage: bool) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_string(), words.next()?);
    let path = path.split('?').next()?.to_string();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    Some(Request { method, path, headers, is_storage })
}

/// Sends an answer. False if the connection is at its end.
fn send(stream: &mut TcpStream, request: &Request, answer: Answer) -> bool {
    let Answer { status, headers, body, cut, hangs } = answer;
    let mut head = format!("HTTP/1.1 {status} X\r\n");
    if !headers.iter().any(|(name, _)| name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    let body = if request.method == "HEAD" { &[][..] } else { &body[..cut.unwrap_or(body.len())] };
    let sent = stream.write_all((head + "\r\n").as_bytes()).and_then(|()| stream.write_all(body));
    if hangs {
        std::thread::sleep(std::time::Duration::from_secs(30));
    }
    sent.is_ok() && cut.is_none()
}

fn answer(state: &State, request: &Request) -> Answer {
    let repositories = state.repositories.lock().unwrap();
    let path = request.path.replace("%2F", "/");
    if let Some(hash) = path.strip_prefix("/storage/").filter(|_| request.is_storage) {
        let files = repositories.values().flat_map(|r| r.commits.values().flat_map(BTreeMap::values));
        let file = files.into_iter().find(|file| sha256(file) == hash);
        return file.map_or(Answer::new(404, &[], ""), |file| range(request, file));
    }
    let missing = |code: &str| Answer::new(404, &[("X-Error-Code", code)], "");
    if let Some(rest) = path.strip_prefix("/api/") {
        let Some((name, revision)) = rest.split_once("/revision/") else { return missing("RepoNotFound") };
        // The hub does not tell a repository that is not there from a private one.
        let Some(repository) = repositories.get(name) else {
            return Answer::new(401, &[("X-Error-Code", "RepoNotFound")], "");
        };
        let commit = repository.revisions.get(revision).map_or(revision, String::as_str);
        let Some(files) = repository.commits.get(commit) else { return missing("RevisionNotFound") };
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        return Answer::new(200, &[], json!({"sha": commit, "siblings": siblings}).to_string());
    }
    let Some((name, rest)) = path.split_once("/resolve/") else { return missing("RepoNotFound") };
    let name = if name.starts_with("/datasets/") { name[1..].to_string() } else { format!("models{name}") };
    let Some((repository, (commit, file))) = repositories.get(&name).zip(rest.split_once('/')) else {
        return missing("RepoNotFound");
    };
    let Some(bytes) = repository.commits.get(commit).and_then(|files| files.get(file)) else {
        return missing("EntryNotFound");
    };
    if bytes.len() < LARGE {
        let etag = format!("\"{}\"", git_hash(bytes));
        return Answer::new(200, &[("ETag", &etag), ("X-Repo-Commit", commit)], bytes.clone());
    }
    let (hash, size) = (sha256(bytes), bytes.len().to_string());
    let (location, etag) = (format!("{}/storage/{hash}?X-Signature=secret", state.storage), format!("\"{hash}\""));
    let headers =
        [("Location", &*location), ("X-Linked-Etag", &etag), ("X-Linked-Size", &size), ("X-Repo-Commit", commit)];
    Answer::new(302, &headers, "")
}

/// All of a file, or its bytes from the one on that a range begins with.
fn range(request: &Request, file: &[u8]) -> Answer {
    let from =
        request.header("range").strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse().ok());
    match from {
        Some(from) if from < file.len() => {
            let range = format!("bytes {from}-{}/{}", file.len() - 1, file.len());
            Answer::new(206, &[("Content-Range", &range)], &file[from..])
        }
        Some(_) => Answer::new(416, &[], ""),
        None => Answer::new(200, &[], file),
    }
}

fn hex(digest: digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes))
}

pub fn git_hash(bytes: &[u8]) -> String {
    let object = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &object))
}
