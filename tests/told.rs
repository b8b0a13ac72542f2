//! Checks what a command writes to standard error: lines, JSON, only warnings, or a bar on a terminal.

mod common;

use std::process::Command;

use common::cli::{Place, TRAIN, fails, program, succeeds};
use serde_json::Value;

#[test]
fn a_quiet_run_tells_warnings_alone() {
    let place = Place::new();
    assert_eq!(succeeds(place.command(&[&TRAIN[..], &["--quiet"]].concat())), "");
    let rows = String::from_utf8(place.read("rows.jsonl")).unwrap();
    place.write("rows.jsonl", rows.replace("{\"", "{\"note\": 1, \""));
    let text = succeeds(place.command(&[&TRAIN[..], &["--quiet", "--overwrite"]].concat()));
    assert!(text.contains("note") && text.lines().count() < 4, "{text}");
}

#[test]
fn events_are_objects() {
    let place = Place::new();
    let json = [&TRAIN[..], &["--log-format", "json"]].concat();
    let said = succeeds(place.mpirun(2, &json));
    let events: Vec<Value> =
        said.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    let step = events.iter().find(|event| event["message"].as_str().unwrap().starts_with("step 3/3")).unwrap();
    assert_eq!((&step["level"], &step["rank"]), (&"info".into(), &0.into()));
    let failed = fails(place.command(&[&json[..], &["--set", "training.learning_rate=-1"]].concat()), 2);
    let error: Value = serde_json::from_str(failed.lines().next().unwrap()).unwrap();
    assert_eq!(error["level"], "error");
    assert!(error["message"].as_str().unwrap().contains("learning_rate"), "{error}");
    let generate = ["generate", "--model", "model", "--prompt", "a", "--log-format=json"];
    for (wrong, words) in [
        (vec!["eval", "--log-format", "json"], "--dataset <DATASET>"),
        ([&generate[..], &["--top-k", "5"]].concat(), "--top-k, --top-p and --seed are for a --temperature above 0"),
    ] {
        let failed = fails(place.command(&wrong), 2);
        let error: Value = serde_json::from_str(failed.lines().next().unwrap()).unwrap();
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
}

/// Runs the program with standard error on a terminal. Returns what the terminal got.
fn on_a_terminal(place: &Place, args: &str) -> String {
    let command = format!("{} {args}", program().display());
    let mut script = Command::new("script");
    script.args(["-qefc", &command, "/dev/null"]).current_dir(place.path(""));
    script.env("FSDP_QLORA_CACHE", place.path("cache")).env("RAYON_NUM_THREADS", "1");
    let output = script.output().expect("script of bsdutils or util-linux");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn a_terminal_has_a_bar_and_a_pipe_has_none() {
    let place = Place::new();
    let shown = on_a_terminal(&place, "train -c recipe.yaml");
    for part in ["quantizing units", "training", "━", "\x1b[2K", "step 3/3  loss"] {
        assert!(shown.contains(part), "{part:?} in {shown:?}");
    }
    let again = [&TRAIN[..], &["--overwrite"]].concat();
    let piped = succeeds(place.command(&again));
    assert!(!piped.contains('\x1b') && !piped.contains('━') && piped.contains("step 3/3  loss"), "{piped:?}");
    let quiet = on_a_terminal(&place, "train -c recipe.yaml --overwrite --quiet");
    assert!(!quiet.contains('━') && !quiet.contains("step"), "{quiet:?}");
}

#[test]
fn a_result_that_cannot_be_printed_is_an_error() {
    let place = Place::new();
    let mut eval = place.command(&["eval", "--model", "model", "--dataset", "rows.jsonl", "--quiet"]);
    eval.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let said = fails(eval, 1);
    assert!(said.contains("error: standard output: No space left on device"), "{said}");
}
