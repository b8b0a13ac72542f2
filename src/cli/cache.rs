//! `cache`: lists and prunes shard files and tokens in the user's cache folder. Only rank 0 works if there are several ranks.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Subcommand;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::checkpoint::cache::{self, Pruned, ShardSet};
use crate::checkpoint::shards;
use crate::files::shown;
use crate::start::tokens::{self, TokenFile};
use crate::train::log::bytes;

#[derive(Subcommand)]
pub enum Cache {
    /// List the shard files of each base and number of ranks, and the tokens of rows, the ones used last first
    List {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove shard files that are incomplete, and files that this version does not read, never those in use
    Prune {
        /// Also remove files that were not used for this long, e.g. 30d, 12h or 2w
        #[arg(long, value_name = "D", value_parser = duration)]
        older_than: Option<Duration>,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
    },
}

pub fn run(command: &Cache) -> Result<()> {
    let (root, folder) = (shards::automatic_root()?, tokens::folder()?);
    match *command {
        Cache::List { json: true } => {
            let sets = cache::list(&root)?;
            let files = tokens::list(&folder)?;
            let all = sets.iter().map(as_json).chain(files.iter().map(tokens_as_json));
            println!("{}", serde_json::to_string_pretty(&all.collect::<Result<Vec<Value>>>()?)?);
        }
        Cache::List { json: false } => {
            let (sets, files) = (cache::list(&root)?, tokens::list(&folder)?);
            sets.iter().for_each(|set| println!("{}", line(set)));
            files.iter().for_each(|file| println!("{}", tokens_line(file)));
            println!("{}: {} sets of shard files, {}", root.display(), sets.len(), total(sets.iter().map(|s| s.bytes)));
            println!(
                "{}: {} files of tokens, {}",
                folder.display(),
                files.len(),
                total(files.iter().map(|file| file.bytes))
            );
        }
        Cache::Prune { older_than, dry_run } => {
            let sets = cache::prune(&root, older_than, dry_run)?;
            let files = tokens::prune(&folder, older_than, dry_run)?;
            let sets = sets.iter().map(|(set, outcome)| (outcome, line(set), set.bytes));
            let files = files.iter().map(|(file, outcome)| (outcome, tokens_line(file), file.bytes));
            let mut freed = 0;
            for (outcome, line, bytes) in sets.chain(files) {
                let said = match outcome {
                    Pruned::Removed => "removed",
                    Pruned::WouldBeRemoved => "would be removed",
                    Pruned::InUse => "left: a run uses it",
                    Pruned::Left(reason) => &format!("left: {reason}"),
                };
                println!("{said}: {line}");
                freed += if matches!(outcome, Pruned::Removed | Pruned::WouldBeRemoved) { bytes } else { 0 };
            }
            let verb = if dry_run { "would be freed" } else { "freed" };
            println!("{}: {} {verb}", shards::cache_dir()?.display(), total([freed].into_iter()));
        }
    }
    Ok(())
}

fn total(of: impl Iterator<Item = u64>) -> String {
    bytes(of.sum::<u64>() as usize)
}

fn used(at: SystemTime) -> String {
    let at = Timestamp::try_from(at).unwrap_or_default().to_zoned(TimeZone::system());
    at.strftime("%Y-%m-%d %H:%M").to_string()
}

fn tokens_line(file: &TokenFile) -> String {
    let (used, size, path) = (used(file.last_used), bytes(file.bytes as usize), file.path.display());
    let state = if file.is_in_use { "in use" } else { "complete" };
    match &file.content {
        None => format!("{used}  {size:>9}  damaged  {path}"),
        Some((tokens, meta)) => {
            let made_from = shown(&meta.made_from.join(" "));
            format!("{used}  {size:>9}  {tokens} tokens  {state}  {made_from}  {}  {path}", shown(&meta.made_by))
        }
    }
}

fn tokens_as_json(file: &TokenFile) -> Result<Value> {
    let (num_tokens, meta) = file.content.as_ref().map(|(tokens, meta)| (tokens, meta)).unzip();
    Ok(json!({
        "kind": "tokens",
        "num_tokens": num_tokens,
        "made_from": meta.map(|meta| &meta.made_from),
        "made_by": meta.map(|meta| &meta.made_by),
        "bytes": file.bytes,
        "last_used": Timestamp::try_from(file.last_used)?.to_string(),
        "complete": meta.is_some(),
        "in_use": file.is_in_use,
        "path": file.path,
    }))
}

fn line(set: &ShardSet) -> String {
    let state = match (set.is_complete, set.is_in_use) {
        (_, true) => "in use",
        (true, false) => "complete",
        (false, false) => "incomplete",
    };
    let (unknown, size) = ("unknown".to_string(), bytes(set.bytes as usize));
    let (ranks, files) = (set.world_size, set.files.len());
    let [base, encoding, model] =
        [&set.base, &set.encoding, &set.model].map(|text| text.as_ref().unwrap_or(&unknown).as_str());
    let (used, folder) = (used(set.last_used), set.folder.display());
    format!("{used}  {size:>9}  {ranks} ranks  {files} files  {state}  {model}  {encoding}  base {base}  {folder}")
}

fn as_json(set: &ShardSet) -> Result<Value> {
    Ok(json!({
        "kind": "shards",
        "base": set.base,
        "model": set.model,
        "encoding": set.encoding,
        "layout_version": set.layout_version,
        "world_size": set.world_size,
        "num_files": set.files.len(),
        "bytes": set.bytes,
        "last_used": Timestamp::try_from(set.last_used)?.to_string(),
        "complete": set.is_complete,
        "in_use": set.is_in_use,
        "path": set.folder,
    }))
}

/// Reads a number with a unit: s, m, h, d or w.
fn duration(text: &str) -> Result<Duration, String> {
    let error = || format!("found {text:?}, allowed: a whole number with s, m, h, d or w, e.g. 30d");
    let unit = text.chars().last().ok_or_else(error)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        'w' => 7 * 24 * 3600,
        _ => return Err(error()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| error())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("30d"), Ok(Duration::from_secs(30 * 24 * 3600)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for text in ["", "30", "d", "-1d", "1.5h", "30 d", "99999999999999999999w", "18446744073709551615w", "1é"] {
            assert!(duration(text).unwrap_err().contains("e.g. 30d"), "{text}");
        }
    }
}
