//! Style as a test: lengths, imports, unsafe, printing.

use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;
/// Declaring every buffer in order is one list; splitting it would hide the order.
const LONG_LISTS: [&str; 3] = ["fsdp/memory.rs:carve", "model/layer.rs:forward", "model/layer.rs:backward"];

/// The only files that may be unsafe: mappings, allocations, MPI, NCCL, CUDA, and calls that take raw pointers.
const UNSAFE: [&str; 10] = [
    "checkpoint/shards.rs",
    "checkpoint/source.rs",
    "comm/cuda_queue.rs",
    "comm/cuda_store.rs",
    "comm/mpi.rs",
    "comm/nccl.rs",
    "comm/node.rs",
    "device/cpu/gemm.rs",
    "device/cpu/memory.rs",
    "device/cuda/",
];

/// The only files that may print.
const PRINTS: [&str; 6] = ["main.rs", "train/log.rs", "comm/mpi.rs", "comm/watch/", "cli/", "stderr.rs"];

/// What a module must not name.
const FORBIDDEN: [(&str, &[&str]); 9] = [
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
    ("train/", &["crate::cli", "crate::start"]),
    ("start/", &["crate::cli"]),
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
fn files_and_functions_are_short() {
    let mut long = Vec::new();
    for (name, text) in sources() {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > MAX_FILE_LINES {
            long.push(format!("{name}: {} lines", lines.len()));
        }
        for (i, line) in lines.iter().enumerate() {
            let Some(rest) = line.split("fn ").nth(1).filter(|_| !is_comment(line)) else { continue };
            let indent = line.len() - line.trim_start().len();
            let end = " ".repeat(indent) + "}";
            let Some(len) = lines[i..].iter().position(|l| *l == end) else { continue };
            let function: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if len + 1 > MAX_FUNCTION_LINES && !LONG_LISTS.contains(&format!("{name}:{function}").as_str()) {
                long.push(format!("{name}:{function}: {} lines", len + 1));
            }
        }
    }
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

#[test]
fn unsafe_and_printing_stay_where_they_belong() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        for line in code(&text).lines().filter(|l| !is_comment(l)) {
            if line.contains("unsafe ") && !UNSAFE.iter().any(|p| name.starts_with(p)) {
                wrong.push(format!("{name}: {line}"));
            }
            if line.contains("println!(") && !PRINTS.iter().any(|p| name.starts_with(p)) {
                wrong.push(format!("{name}: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
