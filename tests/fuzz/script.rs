//! `scripts/fuzz --program`: a program that was built before, where neither cargo nor git works.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the script with a program and these arguments; programs in the program's folder come before others.
fn script(program: &Path, args: &[&str]) -> Output {
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(super::repository().join("scripts/fuzz"));
    command.env("PATH", path).arg("--program").arg(program).args(args).output().unwrap()
}

#[test]
fn a_program_that_was_built_before_is_taken() {
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("fuzz-of-before");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for name in ["cargo", "git"] {
        std::fs::write(place.path().join(name), "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::set_permissions(place.path().join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let output = script(&program, &["--commit", "before", "--short", "--seconds", "1", "--jobs", "1", "index"]);
    assert!(output.status.success(), "{output:?}");
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&record["target"], &record["commit"]), (&"index".into(), &"before".into()));
    assert!(record["inputs"].as_u64() > Some(0) && record["findings"] == 0, "{record}");
    assert!(place.path().join("fuzz/grown/index").is_dir(), "inputs are kept beside the program");
    let output = script(&program, &["--commit", "before", "--short", "no_target"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("no target no_target; allowed: adapter_config,"), "{text}");
}
