//! Ranks agree: all that they must have in common is compared before anything is written or trained.
//!
//! | when | what is compared |
//! |---|---|
//! | right after MPI has started | program (version and a digest of its file), subcommand, options, environment |
//! | when the job is decided | every key that the command reads |
//! | when the model is opened | identity of the base |
//! | when the inputs are read, before shards are made | tokenizer and template, rows, adapter, limits |
//!
//! Each comparison is one call with a list of [`Facts`]. An [`Agreed`] value has been compared: functions that open a
//! model or make an engine take no other job, so that no subcommand can leave the comparison out.
//!
//! Ranks may have their files in different places, since each node may keep its inputs in a folder of its own; the
//! contents must be equal. So paths are not compared, and digests of the contents are. Only rank 0 writes results,
//! and only its clock is read ([`clock_of_rank_0`]).

use std::fmt::{self, Display};
use std::ops::Deref;

use anyhow::{Context, Result, bail};
use jiff::tz::Offset;
use jiff::{Timestamp, Zoned};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::{Comm, all_gather_bytes, all_gather_u64, all_gather_u64s};
use crate::files;
use crate::recipe::Job;

use super::facts::Facts;

/// Largest number of values that a message shows for a key.
const MAX_VALUES: usize = 8;

/// A value that all ranks have in common.
#[derive(Clone)]
pub struct Agreed<T>(pub(super) T);

impl<T> Deref for Agreed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Returns the job if all ranks have decided the same one. Collective.
pub fn agree_on(comm: &mut dyn Comm, job: Job) -> Result<Agreed<Job>> {
    agree(comm, &Facts::of_job(&job))?;
    Ok(Agreed(job))
}

/// Returns the job with steps of as many sequences as rank 0 says, if it says so. Collective.
pub fn agree_on_batch(comm: &mut dyn Comm, job: Agreed<Job>, sequences: Option<usize>) -> Result<Agreed<Job>> {
    let sequences = all_gather_u64(comm, sequences.unwrap_or(0) as u64)?[0] as usize;
    Ok(if sequences > 0 { Agreed(job.with_global_batch(sequences)) } else { job })
}

/// Returns the inputs of a run if all ranks have read the same ones. Collective.
pub fn agree_on_inputs(comm: &mut dyn Comm, inputs: Facts) -> Result<Agreed<Facts>> {
    agree(comm, &inputs)?;
    Ok(Agreed(inputs))
}

/// Fails on every rank, with the same error, unless all ranks have the same facts. Collective.
pub fn agree(comm: &mut dyn Comm, facts: &Facts) -> Result<()> {
    let text = serde_json::to_vec(facts.entries())?;
    let digest = xxh3_64(&text);
    if all_gather_u64(comm, digest)?.iter().all(|&other| other == digest) {
        return Ok(());
    }
    let of_ranks = all_gather_bytes(comm, &text)?;
    let of_ranks = of_ranks.iter().map(|text| serde_json::from_slice(text));
    let of_ranks: Vec<Vec<(String, String)>> = of_ranks.collect::<Result<_, _>>().context("what ranks agree on")?;
    Err(Disagreement(differences(&of_ranks)).into())
}

/// Ranks differ in these keys, one line for each. This error ends the program with status 2.
#[derive(Debug)]
pub struct Disagreement(Vec<String>);

impl Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "the ranks were not started alike, so nothing is done:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))?;
        write!(
            f,
            "\nhelp: give every rank the same program, command, recipe, environment (mpirun -x NAME) and content of files; \
             where the files lie may differ"
        )
    }
}

impl std::error::Error for Disagreement {}

/// Returns a line for each key whose values differ, with all its values and the ranks that have them, in the order in
/// which ranks have the keys.
fn differences(of_ranks: &[Vec<(String, String)>]) -> Vec<String> {
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in of_ranks.iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let difference = |key: &String| {
        let mut values: Vec<(Option<&String>, Vec<usize>)> = Vec::new();
        for (rank, facts) in of_ranks.iter().enumerate() {
            let value = facts.iter().find(|(k, _)| k == key).map(|(_, value)| value);
            match values.iter_mut().find(|(other, _)| *other == value) {
                Some((_, ranks)) => ranks.push(rank),
                None => values.push((value, vec![rank])),
            }
        }
        let shown = |value: &Option<&String>| value.map_or("not set".into(), |value| shown(value));
        let mut parts: Vec<String> = values
            .iter()
            .take(MAX_VALUES)
            .map(|(value, ranks)| format!("{} on {}", shown(value), list(ranks)))
            .collect();
        if values.len() > MAX_VALUES {
            parts.push(format!("and {} more values", values.len() - MAX_VALUES));
        }
        (values.len() > 1).then(|| format!("{}: {}", files::shown(key), parts.join("; ")))
    };
    keys.into_iter().filter_map(difference).collect()
}

/// Returns a value as messages show it. A value that is cut comes with a digest, since it may differ behind the cut.
fn shown(value: &str) -> String {
    let shown = if value.is_empty() { "\"\"".into() } else { files::shown(value) };
    match value.chars().count() > 200 {
        true => format!("{shown} with digest {:016x}", xxh3_64(value.as_bytes())),
        false => shown,
    }
}

/// Returns `rank 3`, or `ranks 0-2, 5`.
fn list(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let run = |&(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    };
    let runs: Vec<String> = runs.iter().map(run).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, runs.join(", "))
}

/// Returns the time on rank 0 with rank 0's distance from UTC, so that templates which ask for the date see the same
/// one on every rank. Collective.
pub fn clock_of_rank_0(comm: &mut dyn Comm) -> Result<Zoned> {
    let own = Zoned::now();
    // Another machine may not know the time zone by its name.
    let (seconds, offset) = (own.timestamp().as_second(), own.offset().seconds());
    let of_rank_0 = all_gather_u64s(comm, &[seconds as u64, offset as u64])?.swap_remove(0);
    let [seconds, offset] = of_rank_0[..] else { bail!("the clock of rank 0: {of_rank_0:?}") };
    let offset = Offset::from_seconds(offset as i32).context("the clock of rank 0")?;
    let timestamp = Timestamp::from_second(seconds as i64).context("the clock of rank 0")?;
    Ok(timestamp.to_zoned(offset.to_time_zone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::LocalComm;

    /// Returns the error of each rank of a world whose ranks have these facts.
    fn errors(of_ranks: &[&[(&str, &str)]]) -> Vec<Option<String>> {
        std::thread::scope(|scope| {
            let ranks = LocalComm::world(of_ranks.len()).into_iter().map(|mut comm| {
                scope.spawn(move || {
                    let mut facts = Facts::default();
                    of_ranks[comm.rank()].iter().for_each(|(key, value)| facts.add(key, value));
                    agree(&mut comm, &facts).err().map(|error| error.to_string())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// Returns the lines of keys in the error, which must be the same on every rank.
    fn lines(of_ranks: &[&[(&str, &str)]]) -> Vec<String> {
        let errors = errors(of_ranks);
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        errors[0]
            .as_deref()
            .map_or(vec![], |text| text.lines().filter_map(|line| line.strip_prefix("  ")).map(String::from).collect())
    }

    #[test]
    fn equal_facts_pass() {
        assert!(errors(&[&[("a", "1"), ("b", "2")][..]; 4]).iter().all(Option::is_none));
        assert!(errors(&[&[]]).iter().all(Option::is_none));
    }

    #[test]
    fn all_differing_keys_are_named_with_all_values_and_ranks() {
        let (common, other) = ([("same", "x"), ("rate", "0.1"), ("seed", "42")], [("same", "x"), ("rate", "0.2")]);
        assert_eq!(
            lines(&[&common, &other, &common, &common, &common, &other, &other]),
            ["rate: 0.1 on ranks 0, 2-4; 0.2 on ranks 1, 5, 6", "seed: 42 on ranks 0, 2-4; not set on ranks 1, 5, 6"]
        );
        assert_eq!(lines(&[&[], &[("only here", "1")]]), ["only here: not set on rank 0; 1 on rank 1"]);
    }

    #[test]
    fn values_of_any_length_are_told_apart_and_shown_in_one_line() {
        let long = "x".repeat(3_000_000);
        let found = lines(&[&[("a", &(long.clone() + "1"))], &[("a", &(long + "2\n\u{1b}[2J"))], &[("a", "")]]);
        let [line] = &found[..] else { panic!("{found:?}") };
        assert!(line.len() < 700 && !line.contains('\u{1b}'), "{line}");
        assert!(line.matches("with digest").count() == 2 && line.ends_with("; \"\" on rank 2"), "{line}");
        let many: Vec<String> = (0..12).map(|i| i.to_string()).collect();
        let many: Vec<[(&str, &str); 1]> = many.iter().map(|value| [("a", value.as_str())]).collect();
        let many: Vec<&[(&str, &str)]> = many.iter().map(|facts| &facts[..]).collect();
        assert!(lines(&many)[0].ends_with("7 on rank 7; and 4 more values"));
    }

    #[test]
    fn every_rank_sees_the_clock_of_rank_0() {
        let clocks: Vec<Zoned> = std::thread::scope(|scope| {
            let ranks = LocalComm::world(3).into_iter();
            let ranks: Vec<_> =
                ranks.map(|mut comm| scope.spawn(move || clock_of_rank_0(&mut comm).unwrap())).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(clocks.iter().all(|clock| *clock == clocks[0] && clock.offset() == clocks[0].offset()));
        assert_eq!(clocks[0].offset(), Zoned::now().offset());
    }
}
