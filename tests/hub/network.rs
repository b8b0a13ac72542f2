//! Downloads that are cut, damaged, refused or redirected, and the requests that the token goes with.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::{COMMIT, WEIGHTS, cached, hub, model, one_step, remove_result, tiny};
use crate::common::cli::{Place, fails, succeeds, train_with};
use crate::common::golden;
use crate::common::hub::{Answer, Hub, git_hash, sha256};

#[test]
fn the_token_goes_to_the_hub_alone_and_into_no_file() {
    let (hub, place) = (hub(), Place::new());
    place.write("elsewhere", "hf_secret\n");
    let elsewhere = place.path("elsewhere").display().to_string();
    for variable in [Some(("HF_TOKEN", " hf_secret\n")), Some(("HF_TOKEN_PATH", &elsewhere)), None] {
        drop(std::fs::remove_dir_all(place.path("hf")));
        std::fs::create_dir(place.path("hf")).unwrap();
        place.write("hf/token", if variable.is_none() { "hf_secret" } else { "hf_other" });
        drop(std::fs::remove_dir_all(place.path("out")));
        hub.forget();
        let text = succeeds(hub.client_with(&place, place.command(&one_step(&[])), variable.as_slice()));
        let log = hub.log();
        assert!(log.iter().any(|request| request.is_storage), "{log:?}");
        for request in log {
            let expected = if request.is_storage { "" } else { "Bearer hf_secret" };
            assert_eq!(request.header("authorization"), expected, "{variable:?}: {request:?}");
        }
        let record = String::from_utf8(place.read("out/run.json")).unwrap();
        assert!(!text.contains("hf_secret") && !record.contains("hf_secret"), "{text}");
    }
    let other = place.command(&one_step(&["model=org/other"]));
    let text = fails(hub.client_with(&place, other, &[("HF_TOKEN", "a\u{1b}b")]), 1);
    assert!(text.contains("HF_TOKEN: not a token") && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_was() {
    const CUT: usize = 100_000;
    let hash = sha256(&tiny()[WEIGHTS]);
    let weights = format!("/storage/{hash}");
    let ranges = |hub: &Hub| -> Vec<String> {
        let log = hub.log().into_iter().filter(|request| request.path == weights);
        log.map(|request| request.header("range").to_string()).collect()
    };
    let fault = |fault: fn(usize, Answer) -> Answer| {
        let weights = weights.clone();
        Hub::with_fault(&[("models/org/tiny", model())], move |request, nth, answer| {
            if request.path == weights { fault(nth, answer) } else { answer }
        })
    };

    // In one process: the connection ends early, then it hangs.
    let hub = fault(|nth, answer| match nth {
        0 => Answer { cut: Some(CUT), ..answer },
        1 => Answer { cut: Some(CUT), hangs: true, ..answer },
        _ => answer,
    });
    let place = Place::new();
    let timeout = [("HF_HUB_DOWNLOAD_TIMEOUT", "1")];
    let text = succeeds(hub.client_with(&place, place.command(&one_step(&[])), &timeout));
    assert_eq!(ranges(&hub), ["", "bytes=100000-", "bytes=200000-"]);
    assert!(text.contains("trying again in"), "{text}");

    // In another process, which reads what the first one has left.
    let hub = fault(|nth, answer| match nth {
        0 => Answer { cut: Some(CUT), ..answer },
        1 => Answer::new(400, &[], ""),
        _ => answer,
    });
    let place = Place::new();
    let text = fails(hub.client(&place, place.command(&one_step(&[]))), 1);
    assert!(text.contains("answered 400") && !text.contains("secret"), "{text}");
    succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert_eq!(ranges(&hub), ["", "bytes=100000-", "bytes=100000-"]);

    // A server that ignores ranges sends the whole file again.
    let hub = fault(|nth, answer| match nth {
        0 => Answer { cut: Some(CUT), ..answer },
        _ => Answer::new(200, &[], std::fs::read(golden("tiny/model.safetensors")).unwrap()),
    });
    let place = Place::new();
    succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert_eq!(ranges(&hub), ["", "bytes=100000-"]);

    // A server that cuts each answer and refuses ranges never sends the whole file, so the download gives up.
    let hub = fault(|nth, answer| match nth % 2 {
        0 => Answer { cut: Some(CUT), ..answer },
        _ => Answer::new(416, &[], ""),
    });
    let place = Place::new();
    let text = fails(hub.client(&place, place.command(&one_step(&[]))), 1);
    assert!(text.contains("the hub cannot be reached: "), "{text}");
    assert_eq!(ranges(&hub).len(), 9, "five answers that are cut, and four refusals between them");
}

#[test]
fn a_redirect_within_the_hub_is_followed_with_the_token() {
    let config = tiny()["config.json"].clone();
    let etag = format!("\"{}\"", git_hash(&config));
    let hub = Hub::with_fault(&[("models/org/tiny", model())], move |request, _, answer| match &*request.path {
        "/kept/config" => Answer::new(200, &[("ETag", &*etag)], config.clone()),
        path if path.ends_with("/config.json") => {
            Answer::new(307, &[("Location", "/kept/config"), ("X-Linked-Etag", &*etag)], "")
        }
        _ => answer,
    });
    let place = Place::new();
    succeeds(hub.client_with(&place, place.command(&one_step(&[])), &[("HF_TOKEN", "hf_secret")]));
    let log = hub.log();
    let kept: Vec<_> = log.iter().filter(|request| request.path == "/kept/config").collect();
    assert_eq!(kept.len(), 2, "HEAD and GET: {log:?}");
    assert!(kept.iter().all(|request| request.header("authorization") == "Bearer hf_secret"), "{kept:?}");
}

#[test]
fn bytes_that_are_not_those_of_the_hub_are_refused() {
    for (name, path, hash) in [
        (WEIGHTS, format!("/storage/{}", sha256(&tiny()[WEIGHTS])), "its sha256 is "),
        ("config.json", format!("/org/tiny/resolve/{COMMIT}/config.json"), "its hash in git is "),
    ] {
        let flipped = Arc::new(AtomicUsize::new(1));
        let flips = flipped.clone();
        let hub = Hub::with_fault(&[("models/org/tiny", model())], move |request, _, mut answer| {
            if request.method == "GET" && request.path == path && flips.load(Ordering::Relaxed) > 0 {
                *answer.body.last_mut().unwrap() ^= 1;
            }
            answer
        });
        let place = Place::new();
        let text = fails(hub.client(&place, place.command(&one_step(&[]))), 1);
        assert!(text.contains(&format!("{name}: {hash}")) && text.contains("and the hub says "), "{text}");
        let left = std::fs::read_dir(place.path(&cached("blobs"))).unwrap().flatten();
        let etag = text.split("the hub says ").nth(1).unwrap().split_whitespace().next().unwrap();
        assert!(left.map(|entry| entry.file_name()).all(|name| !name.to_string_lossy().starts_with(etag)));
        assert_eq!(place.results(), Vec::<String>::new());
        flipped.store(0, Ordering::Relaxed);
        succeeds(hub.client(&place, place.command(&one_step(&[]))));
    }
}

#[test]
fn a_wrong_part_that_an_earlier_download_has_left_is_not_kept() {
    let (hub, place) = (hub(), Place::new());
    succeeds(hub.client(&place, place.command(&one_step(&[]))));
    // The blob becomes the part of a download whose first bytes are wrong.
    let blobs = cached("blobs");
    let hash = sha256(&tiny()[WEIGHTS]);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let host = xxhash_rust::xxh3::xxh3_64(host.trim().as_bytes()) as u32;
    place.write(&format!("{blobs}/{hash}.{host:08x}.incomplete"), vec![7; 1000]);
    std::fs::remove_file(place.path(&format!("{blobs}/{hash}"))).unwrap();
    remove_result(&place);
    hub.forget();
    let text = succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert!(
        text.contains("model.safetensors: its sha256 is") && text.contains("it is downloaded again from its beginning"),
        "{text}"
    );
    let ranges: Vec<String> =
        hub.log().iter().filter(|r| r.is_storage).map(|r| r.header("range").to_string()).collect();
    assert_eq!(ranges, ["bytes=1000-", ""]);
}

#[test]
fn what_the_hub_refuses_is_told_with_what_to_do() {
    let fails_at = |path: &'static str, answer: fn() -> Answer, name: &str, token: bool| {
        let hub = Hub::with_fault(&[("models/org/tiny", model())], move |request, _, usual| {
            if !path.is_empty() && request.path.contains(path) { answer() } else { usual }
        });
        let place = Place::new();
        let token = if token { &[("HF_TOKEN", "hf_secret")][..] } else { &[] };
        let text = fails(hub.client_with(&place, place.command(&one_step(&[&format!("model={name}")])), token), 1);
        assert_eq!(place.results(), Vec::<String>::new(), "{text}");
        text
    };
    let none = || Answer::default();
    let gated = || Answer::new(401, &[("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access is restricted")], "");
    let cases: [(&str, &[&str]); 7] = [
        (
            &fails_at("/resolve/", gated, "org/tiny", false),
            &[" is gated (", "answered 401", "no token was sent\nhelp: accept the conditions at http://", "HF_TOKEN"],
        ),
        (&fails_at("/api/", gated, "org/tiny", true), &["org/tiny is gated (", "the token of HF_TOKEN was sent"]),
        (
            &fails_at("", none, "org/none", false),
            &[
                "org/none: no file or folder has this name, and the hub has no such model or keeps it private",
                "help: a token",
            ],
        ),
        (&fails_at("", none, "org/tiny@v2", false), &["org/tiny@v2: the hub has no revision v2 of this model"]),
        (
            &fails_at("/api/", || Answer::new(429, &[("Retry-After", "86400")], ""), "org/tiny", false),
            &["org/tiny: http://", "answered 429"],
        ),
        (&fails_at("/api/", || Answer::new(200, &[], "<html>"), "org/tiny", false), &["answered no JSON: <html>"]),
        (
            &fails_at(
                "/api/",
                || Answer::new(200, &[], json!({"sha": COMMIT, "siblings": [{"rfilename": "../x"}]}).to_string()),
                "org/tiny",
                false,
            ),
            &["the hub names a file \"../x\""],
        ),
    ];
    for (text, words) in cases {
        for word in words {
            assert!(text.contains(word), "{word:?} is not in:\n{text}");
        }
        assert!(!text.contains("hf_secret"), "{text}");
    }
    let place = Place::new();
    for (model, words) in [
        ("name", "found name, which is not a directory, and no model of the hub (ORG/NAME, ORG/NAME@REVISION)"),
        ("hf://name", "hf://ORG/NAME@REVISION and hf://datasets/"),
        ("org/name@", "which is not a directory"),
    ] {
        let text = fails(place.command(&train_with(&[&format!("model={model}")])), 2);
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_hub_that_asks_to_wait_is_waited_for() {
    let hub = Hub::with_fault(&[("models/org/tiny", model())], |request, nth, answer| {
        let is_first = nth == 0 && ["/api/", "/storage/"].iter().any(|part| request.path.contains(part));
        match (is_first, request.is_storage) {
            (true, true) => Answer::new(503, &[], ""),
            (true, false) => Answer::new(429, &[("Retry-After", "2")], ""),
            _ => answer,
        }
    });
    let place = Place::new();
    let text = succeeds(hub.client(&place, place.command(&one_step(&[]))));
    assert!(
        text.contains("answered 429; trying again in 2.0 s") && text.contains("answered 503; trying again in 0.5 s"),
        "{text}"
    );
}

#[test]
fn a_proxy_of_the_environment_is_used() {
    let (hub, place) = (hub(), Place::new());
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    std::thread::spawn(move || {
        for stream in proxy.incoming().flatten() {
            counted.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(|| relay(stream));
        }
    });
    let with = |no_proxy: &str| {
        let variables = [("HTTP_PROXY", &*address), ("NO_PROXY", no_proxy)];
        hub.client_with(&place, place.command(&one_step(&[])), &variables)
    };
    succeeds(with(""));
    assert!(connections.load(Ordering::Relaxed) > 0);
    connections.store(0, Ordering::Relaxed);
    std::fs::remove_dir_all(place.path("hf")).unwrap();
    remove_result(&place);
    succeeds(with("127.0.0.1"));
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

/// Answers CONNECT with a connection to its target.
fn relay(stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let target = line.split_whitespace().nth(1).unwrap().to_string();
    while line.trim() != "" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    let mut there = TcpStream::connect(target).unwrap();
    let mut here = stream;
    here.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
    let (mut from, mut to) = (there.try_clone().unwrap(), here.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 1 << 14];
        while let Ok(n) = from.read(&mut buffer)
            && n > 0
            && to.write_all(&buffer[..n]).is_ok()
        {}
    });
    drop(std::io::copy(&mut reader, &mut there));
}
