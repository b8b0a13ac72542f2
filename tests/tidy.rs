//! Style that no lint checks, as a test: lengths of files, pairs of kernels and their twins, imports.

use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 600;

/// What a module must not name.
const FORBIDDEN: [(&str, &[&str]); 11] = [
    (
        "device/",
        &["crate::model", "crate::comm", "crate::fsdp", "crate::data", "crate::train", "crate::recipe", "crate::cli"],
    ),
    ("quant/", &["crate::device", "crate::model", "crate::comm", "crate::fsdp", "crate::train", "crate::recipe"]),
    ("comm/", &["crate::model", "crate::fsdp", "crate::train", "crate::recipe", "crate::cli", "crate::checkpoint"]),
    ("model/", &["crate::comm", "crate::fsdp", "crate::train", "crate::recipe", "crate::cli", "crate::checkpoint"]),
    ("fsdp/", &["crate::data", "crate::train", "crate::recipe", "crate::cli", "crate::checkpoint"]),
    ("data/", &["crate::device", "crate::fsdp", "crate::train", "crate::recipe", "crate::cli"]),
    ("optim/", &["crate::train", "crate::recipe", "crate::cli", "crate::fsdp", "crate::comm"]),
    ("checkpoint/", &["crate::data", "crate::train", "crate::recipe", "crate::start", "crate::cli"]),
    ("plan/", &["crate::data", "crate::train", "crate::recipe", "crate::start", "crate::cli"]),
    ("train/", &["crate::cli", "crate::start"]),
    // The job is all that it sees of the recipe.
    ("start/", &["crate::cli", "recipe::load", "recipe::from_options"]),
];

fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.sort();
    let name = |f: &PathBuf| f.strip_prefix(&root).unwrap().to_str().unwrap().to_string();
    files.iter().map(|f| (name(f), std::fs::read_to_string(f).unwrap())).collect()
}

/// The part of a file before its tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

#[test]
fn files_are_short() {
    let lines = |text: &str| text.lines().count();
    let long: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| lines(text) > MAX_FILE_LINES)
        .map(|(name, text)| format!("{name}: {} lines", lines(&text)))
        .collect();
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn every_kernel_has_its_two_twins() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for entry in std::fs::read_dir(root.join("kernels")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "cu") {
            let stem = path.file_stem().unwrap().to_str().unwrap();
            // Kernels of one architecture have the twins of what they do.
            let stem = stem.split("_hopper").next().unwrap();
            for twin in ["cpu", "cuda"].map(|device| root.join(format!("src/device/{device}/{stem}.rs"))) {
                assert!(twin.exists(), "{} has no {}", path.display(), twin.display());
            }
        }
    }
}

#[test]
fn imports_go_one_way() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        for (module, forbidden) in FORBIDDEN.iter().filter(|(module, _)| name.starts_with(module)) {
            for path in forbidden.iter() {
                if code(&text).lines().any(|l| !is_comment(l) && l.contains(path)) {
                    wrong.push(format!("{name} ({module}) names {path}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
