//! Style that no lint checks, as a test: lengths of files, pairs of kernels and their twins, imports.

use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 500;

/// Folders of code.
const FOLDERS: [&str; 4] = ["src", "kernels", "tests", "benches"];

/// Names that must not stand in a module.
const FORBIDDEN: [(&str, &[&str]); 13] = [
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
    (
        "hub/",
        &[
            "crate::device",
            "crate::model",
            "crate::fsdp",
            "crate::train",
            "crate::recipe",
            "crate::start",
            "crate::cli",
        ],
    ),
    ("plan/", &["crate::data", "crate::train", "crate::recipe", "crate::start", "crate::cli"]),
    ("train/", &["crate::cli", "crate::start"]),
    // These make a job from what was written; `start` and `bench` see the job alone.
    ("start/", &["crate::bench", "crate::cli", "recipe::load", "recipe::from_options"]),
    ("bench/", &["crate::cli", "recipe::load", "recipe::from_options"]),
];

/// Path from a folder, and text, of all code below it.
fn code_below(folder: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files = Vec::new();
    walk(&root, &mut files);
    files.retain(|f| f.extension().is_some_and(|e| ["rs", "cu", "cuh"].iter().any(|code| e == *code)));
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
    let mut long = Vec::new();
    for folder in FOLDERS {
        for (name, text) in code_below(folder) {
            let (path, lines) = (format!("{folder}/{name}"), text.lines().count());
            if lines > MAX_FILE_LINES {
                long.push(format!("{path}: {lines} lines"));
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

/// Stems of the files of a folder that end so.
fn stems(folder: &Path, extension: &str) -> Vec<String> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let paths = paths.filter(|path| path.extension().is_some_and(|e| e == extension));
    paths.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string()).collect()
}

/// The trait of ops that a file of `src/device` declares, without `Ops`.
fn trait_of_ops(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("pub trait ")?.split_once("Ops:").map(|(name, _)| name))
}

#[test]
fn an_op_is_the_files_of_one_stem() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let device = root.join("src/device");
    let mut stems_of_ops = Vec::new();
    for stem in stems(&device, "rs") {
        let text = std::fs::read_to_string(device.join(format!("{stem}.rs"))).unwrap();
        let Some(name) = trait_of_ops(&text).filter(|_| stem != "mod") else { continue };
        assert_eq!(name.to_lowercase(), stem.replace('_', ""), "the trait of device/{stem}.rs");
        for (twin, of) in [("cpu", "Cpu"), ("cuda", "Cuda<A>")] {
            let path = device.join(format!("{twin}/{stem}.rs"));
            let implementation = std::fs::read_to_string(&path).unwrap_or_default();
            let wanted = format!("{name}Ops for {of} {{");
            assert!(implementation.contains(&wanted), "{} has no `{wanted}`", path.display());
        }
        assert!(
            root.join(format!("tests/kernels/{stem}.rs")).exists(),
            "device/{stem}.rs has no tests/kernels/{stem}.rs"
        );
        stems_of_ops.push(stem);
    }
    assert!(!stems_of_ops.is_empty());
    let kernels = stems(&root.join("kernels"), "cu");
    for kernel in &kernels {
        // Kernels of one architecture belong to the op that has kernels for all, and those of backward to the op that
        // has a forward.
        let stem = kernel.split("_hopper").next().unwrap().trim_end_matches("_backward");
        assert!(stems_of_ops.iter().any(|op| op == stem), "kernels/{kernel}.cu has no src/device/{stem}.rs");
    }
    for stem in stems_of_ops {
        // Matrix products are those of cuBLAS.
        assert!(stem == "gemm" || kernels.contains(&stem), "src/device/{stem}.rs has no kernels/{stem}.cu");
    }
}

#[test]
fn imports_go_one_way() {
    let mut wrong = Vec::new();
    for (name, text) in code_below("src") {
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
