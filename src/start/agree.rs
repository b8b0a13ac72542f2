//! Ranks agree: whatever all ranks must have in common is compared before anything is written or trained.
//!
//! | when | what is compared |
//! |---|---|
//! | right after MPI has started | program (version and a digest of its file), subcommand, options, environment |
//! | when the job is decided | every key that the command reads |
//! | when the model is opened | identity of the base |
//! | when the inputs are read, before shards are made | tokenizer and template, rows, adapter, limits |
//!
//! Each is one call with a list of [`Facts`]. An [`Agreed`] value has been through it: what opens a model or makes an engine takes
//! a job of this kind only, so that no subcommand can leave it out.
//!
//! Where files lie may differ between ranks, since each node may keep its inputs in a folder of its own; what the files hold may
//! not. So paths are not compared, and digests of the contents are. Only rank 0 writes results, and only its clock is read
//! ([`clock_of_rank_0`]).

use std::fmt::{self, Display};
use std::fs::File;
use std::io::Read;
use std::ops::Deref;

use anyhow::{Context, Result, bail};
use jiff::tz::Offset;
use jiff::{Timestamp, Zoned};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::checkpoint::adapter::Adapter;
use crate::comm::{Comm, all_gather_bytes, all_gather_u64, all_gather_u64s};
use crate::data::{Dataset, TextTokenizer};
use crate::files;
use crate::fsdp::memory::Limits;
use crate::recipe::{EvalData, Job};

/// Variables of this program are named so.
const OWN_VARIABLES: &str = "FSDP_QLORA_";

/// Those of them that say where something lies.
const PATH_VARIABLES: [&str; 2] = ["FSDP_QLORA_CACHE", "FSDP_QLORA_CUDA_PATH"];

/// Variables of libraries that change results, or that NCCL needs alike on all ranks.
const LIBRARY_VARIABLES: [&str; 16] = [
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_BUFFSIZE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_IB_DISABLE",
    "NCCL_MAX_CTAS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_CTAS",
    "NCCL_MIN_NCHANNELS",
    "NCCL_NET",
    "NCCL_NTHREADS",
    "NCCL_P2P_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_PROTO",
    "NCCL_SHM_DISABLE",
];

/// Keys of a recipe that say where something lies.
const PATH_KEYS: [&str; 5] = ["model", "output_dir", "shards", "data.train", "lora.adapter"];

/// Number of values of a key that a message shows.
const MAX_VALUES: usize = 8;

/// The values that a rank was started with or has found, by key.
#[derive(Default)]
pub struct Facts(Vec<(String, String)>);

impl Facts {
    pub fn add(&mut self, key: impl Display, value: impl Display) {
        self.0.push((key.to_string(), value.to_string()));
    }

    /// The program and the environment of this process. Reads the program's file.
    pub fn of_process() -> Facts {
        let mut facts = Facts::default();
        let build = build_digest().unwrap_or_else(|error| format!("unknown ({error:#})"));
        facts.add("program", format!("{} {}, build {build}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")));
        let mut variables: Vec<(String, String)> = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
            .filter(|(name, _)| {
                let own = name.starts_with(OWN_VARIABLES) && !PATH_VARIABLES.contains(&name.as_str());
                own || LIBRARY_VARIABLES.contains(&name.as_str())
            })
            .collect();
        variables.sort();
        variables.iter().for_each(|(name, value)| facts.add(format!("environment variable {name}"), value));
        facts
    }

    /// Every key of a job, without the paths.
    pub fn of_job(job: &Job) -> Facts {
        let mut facts = Facts::default();
        for (key, value) in job.values() {
            let is_path = PATH_KEYS.contains(&key.as_str())
                || matches!(job.data.eval, Some(EvalData::File(_))) && key == "data.eval";
            facts.add(key, if is_path { "a path".into() } else { value.to_string() });
        }
        facts
    }

    pub fn add_tokenizer(&mut self, tokenizer: Option<&TextTokenizer>) {
        self.add(
            "tokenizer and chat template",
            tokenizer.map_or("none".into(), |t| format!("digest {}", t.identity())),
        );
    }

    /// Sizes of a step.
    pub fn add_limits(&mut self, limits: &Limits) {
        self.add("sizes of a step", format!("{limits:?}"));
    }

    /// `key` names where the rows are from.
    pub fn add_data(&mut self, key: &str, data: &Dataset) {
        let (sequences, digest) = (data.sequences.len(), data.digest());
        self.add(format!("rows of {key}"), format!("{sequences} sequences, digest {digest:016x}"));
    }

    /// `key` names where the adapter is from.
    pub fn add_adapter(&mut self, key: &str, adapter: Option<&Adapter>) {
        let value = adapter.map_or("none".into(), |adapter| {
            let mut digest = Xxh3::new();
            digest.update(format!("{:?}", adapter.settings).as_bytes());
            adapter.layers.iter().for_each(|values| digest.update(bytemuck::cast_slice(values)));
            format!("digest {:016x}", digest.digest())
        });
        self.add(key, value);
    }
}

/// Digest of the file of the running program, which tells apart builds of one version.
fn build_digest() -> Result<String> {
    let mut file = File::open("/proc/self/exe").context("/proc/self/exe")?;
    let (mut digest, mut buffer) = (Xxh3::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).context("/proc/self/exe")? {
            0 => return Ok(format!("{:016x}", digest.digest())),
            n => digest.update(&buffer[..n]),
        }
    }
}

/// A value that all ranks have in common.
#[derive(Clone)]
pub struct Agreed<T>(T);

impl<T> Deref for Agreed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// The job, if all ranks have decided the same. Collective.
pub fn agree_on(comm: &mut dyn Comm, job: Job) -> Result<Agreed<Job>> {
    agree(comm, &Facts::of_job(&job))?;
    Ok(Agreed(job))
}

/// The inputs of a run, if all ranks have read the same. Collective.
pub fn agree_on_inputs(comm: &mut dyn Comm, inputs: Facts) -> Result<Agreed<Facts>> {
    agree(comm, &inputs)?;
    Ok(Agreed(inputs))
}

/// Fails on every rank, with the same error, unless all ranks have the same facts. Collective.
pub fn agree(comm: &mut dyn Comm, facts: &Facts) -> Result<()> {
    let text = serde_json::to_vec(&facts.0)?;
    let digest = xxh3_64(&text);
    if all_gather_u64(comm, digest)?.iter().all(|&other| other == digest) {
        return Ok(());
    }
    let of_ranks = all_gather_bytes(comm, &text)?;
    let of_ranks = of_ranks.iter().map(|text| serde_json::from_slice(text));
    let of_ranks: Vec<Vec<(String, String)>> = of_ranks.collect::<Result<_, _>>().context("what ranks agree on")?;
    Err(Disagreement(differences(&of_ranks)).into())
}

/// The keys in which ranks differ, one line each. It ends the program with status 2.
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

/// The keys whose values differ, in the order in which ranks have them, with all values and the ranks of each.
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

/// A value as messages show it; one that is cut comes with a digest, since values may differ behind the cut.
fn shown(value: &str) -> String {
    let shown = if value.is_empty() { "\"\"".into() } else { files::shown(value) };
    match value.chars().count() > 200 {
        true => format!("{shown} with digest {:016x}", xxh3_64(value.as_bytes())),
        false => shown,
    }
}

/// `rank 3`, or `ranks 0-2, 5`.
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

/// The time on rank 0, in its distance from UTC, on every rank: templates that ask for the date see the same one. Collective.
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

    /// The error of each rank of a world whose ranks have these facts.
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

    /// The lines of keys in the error, which must be the same on every rank.
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
