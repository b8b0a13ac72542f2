//! Fuzz targets: readers of files that come from somebody else, called in-process as the program calls them.
//!
//! Each target reads the inputs that are kept in `tests/fuzz/corpus/<target>`, then inputs that are made from these
//! by changes of their form ([`form`]). Every run must end within bounds of time and memory, in a result or in a message:
//! no panic on any thread, no file opened outside of the folder that is read.
//!
//! `cargo test --test fuzz` reads the same inputs each time. `scripts/fuzz` runs campaigns with new ones, in a build that
//! counts the edges of the control flow, and keeps the sum of their time in `benches/results/fuzz.jsonl`. An input that was
//! a finding is put into the corpus together with the change that mends it.

mod adapter;
mod alloc;
mod base;
mod checkpoint;
mod coverage;

mod driver;
mod folder;
mod form;
mod json;
mod recipe;
mod script;
mod text;
mod text_files;

use std::path::PathBuf;

/// The folder of the repository. It is asked for at run time, since a program may have been built on another machine.
fn repository() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// A file of tests/golden.
fn golden(path: &str) -> PathBuf {
    repository().join("tests/golden").join(path)
}

macro_rules! targets {
    ($($name:ident: $target:expr;)*) => {
        $(#[test] fn $name() {
            driver::fuzz(stringify!($name), $target);
        })*
    };
}

targets! {
    adapter_config: adapter::config();
    adapter_tensors: adapter::tensors();
    checkpoint_state: checkpoint::checkpoint_state();
    checkpoint_tensors: checkpoint::checkpoint_tensors();
    config: base::config();
    header: base::header();
    index: base::index();
    prompts: text_files::prompts();
    quant_state: base::quant_state();
    recipe: recipe::recipe();
    rows: text_files::rows();
    run_record: checkpoint::run_record();
    shard: checkpoint::shard();
    template: text_files::template();
    tokenizer: text_files::tokenizer();
    tokenizer_config: text_files::tokenizer_config();
}
