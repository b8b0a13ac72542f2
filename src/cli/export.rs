//! `export`: writes an adapter in the format of another program. Only rank 0 works if there are several ranks.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::checkpoint::gguf::{Export, Type};
use crate::files::{self, shown_path};
use crate::model::spec::ModelSpec;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::train::log::bytes;

/// The type of the matrices.
#[derive(Clone, Copy, ValueEnum)]
enum OutType {
    F32,
    F16,
    Bf16,
}

#[derive(Args)]
pub struct ExportArgs {
    /// The base, a Hugging Face directory or ORG/NAME of the hub; only its config.json is read
    #[arg(long)]
    model: String,
    /// PEFT adapter, a folder or of the hub
    #[arg(long)]
    adapter: String,
    /// Write the adapter in GGUF, for llama.cpp
    #[arg(long, value_name = "FILE", value_parser = recipe::read_path)]
    gguf: PathBuf,
    /// Type of the matrices in the file
    #[arg(long, value_enum, default_value_t = OutType::F32)]
    outtype: OutType,
    /// Replace the file, if it is one in GGUF
    #[arg(long)]
    overwrite: bool,
}

/// Writes the file, and prints the command line that serves it.
pub fn run(start: &Start, args: &ExportArgs, overrides: &[String]) -> Result<()> {
    let given: Vec<(&str, Value)> =
        vec![("model", args.model.clone().into()), ("lora.adapter", args.adapter.clone().into())];
    let job = Start::job_of_one(recipe::from_options(Command::Export, given, overrides)?)?;
    check_free(&args.gguf, args.overwrite).context("--gguf")?;
    let spec = ModelSpec::load(&job.model)?;
    let adapter = start.named_adapter(&job, &spec)?.context("--adapter: missing")?;
    let kind = match args.outtype {
        OutType::F32 => Type::F32,
        OutType::F16 => Type::F16,
        OutType::Bf16 => Type::Bf16,
    };
    let export = Export::new(&adapter, &spec, &name(&args.adapter), kind).context("--gguf")?;
    export.write(&args.gguf).context("--gguf")?;
    start.log.line(format!("{}: {}", args.gguf.display(), bytes(export.bytes())));
    start.log.line(
        "MODEL.gguf stands for the base in GGUF; `python convert_hf_to_gguf.py MODEL --outfile MODEL.gguf` of llama.cpp makes it",
    );
    println!("llama-server -m MODEL.gguf --lora {}", quoted(&args.gguf.to_string_lossy()));
    Ok(())
}

/// Returns a word as a shell reads it, in quotes if it has characters that a shell would change.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if word.chars().all(is_plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// Returns the name of an adapter's folder, which becomes the name of the adapter in the file.
fn name(adapter: &str) -> String {
    let path = std::path::absolute(adapter).unwrap_or_else(|_| adapter.into());
    path.file_name().map_or("adapter".into(), |name| name.to_string_lossy().into_owned())
}

/// Fails if a file is there that must not be replaced, such as a file of the adapter.
fn check_free(path: &Path, overwrite: bool) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    ensure!(
        found.is_file(),
        "{}: something that is no regular file is there\nhelp: name another file",
        shown_path(path)
    );
    ensure!(overwrite, "{}: it is there already\nhelp: name another file, or add --overwrite", shown_path(path));
    let mut beginning = Vec::new();
    files::open(path)?.take(4).read_to_end(&mut beginning).with_context(|| shown_path(path))?;
    let is_gguf = beginning.is_empty() || beginning == b"GGUF";
    ensure!(is_gguf, "{}: it is no GGUF file, and only those are replaced\nhelp: name another file", shown_path(path));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_command_line_can_be_copied() {
        assert_eq!(quoted("out/adapter-1.gguf"), "out/adapter-1.gguf");
        assert_eq!(quoted("my adapter's.gguf"), r"'my adapter'\''s.gguf'");
    }

    #[test]
    fn only_gguf_files_are_replaced() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("adapter");
        check_free(&file, false).unwrap();
        for (bytes, is_replaced) in [("GGUF and more", true), ("", true), ("{\"r\": 8}", false), ("GG", false)] {
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(check_free(&file, true).is_ok(), is_replaced, "{bytes}");
            assert!(check_free(&file, false).is_err());
        }
    }
}
