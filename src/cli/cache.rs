//! `cache`: lists and prunes the shard files in the user's cache folder. Only rank 0 works if there are several ranks.

use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::checkpoint::cache::{self, Pruned, ShardSet};
use crate::checkpoint::shards;
use crate::train::log::bytes;

#[derive(Subcommand)]
pub enum Cache {
    /// List the shard files of each base and number of ranks, the ones used last first
    List {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove shard files that are incomplete or of a layout that is not read any more, never those in use
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
    let root = shards::automatic_root()?;
    match *command {
        Cache::List { json: true } => {
            let sets: Vec<Value> = cache::list(&root)?.iter().map(as_json).collect::<Result<_>>()?;
            println!("{}", serde_json::to_string_pretty(&sets)?);
        }
        Cache::List { json: false } => {
            let sets = cache::list(&root)?;
            sets.iter().for_each(|set| println!("{}", line(set)));
            println!("{}: {} sets of shard files, {}", root.display(), sets.len(), total(sets.iter()));
        }
        Cache::Prune { older_than, dry_run } => {
            let pruned = cache::prune(&root, older_than, dry_run)?;
            for (set, outcome) in &pruned {
                let said = match outcome {
                    Pruned::Removed => "removed",
                    Pruned::WouldBeRemoved => "would be removed",
                    Pruned::InUse => "left: a run uses it",
                    Pruned::Left(reason) => &format!("left: {reason}"),
                };
                println!("{said}: {}", line(set));
            }
            let gone = pruned.iter().filter(|(_, said)| matches!(said, Pruned::Removed | Pruned::WouldBeRemoved));
            let verb = if dry_run { "would be freed" } else { "freed" };
            println!("{}: {} {verb}", root.display(), total(gone.map(|(set, _)| set)));
        }
    }
    Ok(())
}

fn total<'a>(sets: impl Iterator<Item = &'a ShardSet>) -> String {
    bytes(sets.map(|set| set.bytes as usize).sum())
}

fn line(set: &ShardSet) -> String {
    let used = Timestamp::try_from(set.last_used).unwrap_or_default().to_zoned(TimeZone::system());
    let state = match (set.is_complete, set.is_in_use) {
        (_, true) => "in use",
        (true, false) => "complete",
        (false, false) => "incomplete",
    };
    let (unknown, size) = ("unknown".to_string(), bytes(set.bytes as usize));
    let (ranks, files) = (set.world_size, set.files.len());
    let [base, encoding, model] =
        [&set.base, &set.encoding, &set.model].map(|text| text.as_ref().unwrap_or(&unknown).as_str());
    let (used, folder) = (used.strftime("%Y-%m-%d %H:%M"), set.folder.display());
    format!("{used}  {size:>9}  {ranks} ranks  {files} files  {state}  {model}  {encoding}  base {base}  {folder}")
}

fn as_json(set: &ShardSet) -> Result<Value> {
    Ok(json!({
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
