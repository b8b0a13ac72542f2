//! The program as a user runs it: a tiny model in a temporary folder, and the binary, alone or under mpirun.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Variables with which mpirun works as root, and with more ranks than cores.
pub const MPI_ENVIRONMENT: [(&str, &str); 8] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("PRTE_ALLOW_RUN_AS_ROOT", "1"),
    ("PRTE_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ("OMPI_MCA_hwloc_base_binding_policy", "none"),
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
];

/// Variables with which MPI makes no files in a single process, for runs whose files may not grow.
pub const MPI_WITHOUT_FILES: [(&str, &str); 3] =
    [("PMIX_MCA_gds", "hash"), ("OMPI_MCA_btl", "self"), ("UCX_TLS", "self")];

/// Returns true if the launcher is MPICH's. It ends the other ranks of one that was killed before they can say so, names the signal on
/// standard output, and returns the statuses of all ranks in one, bit by bit.
pub fn is_mpich() -> bool {
    std::env::var("MPIEXEC").is_ok_and(|launcher| launcher.contains("hydra") || launcher.contains("mpich"))
}

/// The program: `$FSDP_QLORA_PROGRAM` where the tests were carried to another machine.
pub fn program() -> PathBuf {
    std::env::var_os("FSDP_QLORA_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_fsdp-qlora").into(), PathBuf::from)
}

/// A copy of the tiny model with its tokenizer, some rows, and a cache of its own.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(place.path("model")).unwrap();
        for file in [
            "tiny/config.json",
            "tiny/model.safetensors",
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
        ] {
            let to = place.path("model").join(Path::new(file).file_name().unwrap());
            std::fs::copy(super::golden(file), to).unwrap();
        }
        std::fs::copy(super::golden("qlora_steps/rows.jsonl"), place.path("rows.jsonl")).unwrap();
        place.write(
            "recipe.yaml",
            "model: model\noutput_dir: out\ndata: {train: rows.jsonl, max_length: 128, packing: false}\n\
             lora: {r: 4, lora_dropout: 0.0}\n\
             training: {global_batch_size: 6, max_steps: 3, learning_rate: 1.0e-2, warmup_steps: 0}\n",
        );
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Changes config.json of the model.
    pub fn config(&self, key: &str, value: serde_json::Value) {
        let mut config: serde_json::Value = serde_json::from_slice(&self.read("model/config.json")).unwrap();
        config[key] = value;
        self.write("model/config.json", config.to_string());
    }

    /// The program with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        self.with_environment(Command::new(program()), args)
    }

    /// A script of the repository with these arguments.
    pub fn script(&self, path: &str, args: &[&str]) -> Command {
        self.with_environment(Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)), args)
    }

    /// The program on some ranks.
    pub fn mpirun(&self, ranks: usize, args: &[&str]) -> Command {
        let mut command = Command::new(std::env::var("MPIEXEC").unwrap_or("mpirun".into()));
        command.args(["-np", &ranks.to_string()]).arg(program());
        self.with_environment(command, args)
    }

    /// Ranks that each have a command line of their own, the program first.
    pub fn mpirun_each(&self, ranks: &[Vec<String>]) -> Command {
        let mut command = Command::new(std::env::var("MPIEXEC").unwrap_or("mpirun".into()));
        for (rank, words) in ranks.iter().enumerate() {
            command.args((rank > 0).then_some(":")).args(["-np", "1"]).args(words);
        }
        self.with_environment(command, &[])
    }

    fn with_environment(&self, mut command: Command, args: &[&str]) -> Command {
        command.args(args).current_dir(self.dir.path()).env("FSDP_QLORA_CACHE", self.path("cache"));
        command.env("RAYON_NUM_THREADS", "1").envs(MPI_ENVIRONMENT);
        command
    }

    /// Processes of the program that work in this place, one for each rank.
    pub fn ranks(&self) -> Vec<u32> {
        let cache = format!("FSDP_QLORA_CACHE={}", self.path("cache").display());
        let mut ranks: Vec<u32> = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| {
                let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                let text = String::from_utf8_lossy(&environment).into_owned();
                text.contains(&cache) && ["OMPI_COMM_WORLD_RANK=", "PMI_RANK="].iter().any(|rank| text.contains(rank))
            })
            .collect();
        ranks.sort_unstable();
        ranks
    }

    /// Fails if a rank runs after the launcher's end. MPICH's ends a moment before the ranks that it kills.
    pub fn has_no_ranks(&self, what: &str) {
        let (start, moment) = (Instant::now(), Duration::from_secs(u64::from(is_mpich())));
        while !self.ranks().is_empty() {
            assert!(start.elapsed() < moment, "{what}: left running: {:?}", self.ranks());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Files below the folder whose names say that they are not finished, or that are results. Tokens in the cache are
    /// neither.
    pub fn results(&self) -> Vec<String> {
        fn walk(dir: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, found);
                } else if path.extension().is_some_and(|ending| ending == "tokens") {
                    continue;
                } else if ["out", "cache", "shards"].iter().any(|d| path.components().any(|c| c.as_os_str() == *d)) {
                    found.push(path.display().to_string());
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        found
    }
}

pub const TRAIN: [&str; 3] = ["train", "-c", "recipe.yaml"];

/// [`TRAIN`] with these overrides of the recipe.
pub fn train_with<'a>(sets: &[&'a str]) -> Vec<&'a str> {
    TRAIN.into_iter().chain(sets.iter().flat_map(|set| ["--set", set])).collect()
}

/// Standard error of a run that must end well.
pub fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (scripts/setup installs mpirun)"));
    let text = stderr(&output);
    assert!(output.status.success(), "{command:?}: {:?}\n{text}", output.status);
    text
}

/// Standard error of a run that must fail with this status.
pub fn fails(command: Command, status: i32) -> String {
    fails_with(command, &[status])
}

/// Standard error of a run that must fail with one of these statuses.
pub fn fails_with(mut command: Command, allowed: &[i32]) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (scripts/setup installs mpirun)"));
    let text = stderr(&output);
    let is_allowed = output.status.code().is_some_and(|status| allowed.contains(&status));
    assert!(is_allowed, "{command:?}: {:?}, allowed: {allowed:?}\n{text}", output.status);
    text
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Lines of a metrics.jsonl.
pub fn metrics(bytes: &[u8]) -> Vec<serde_json::Value> {
    std::str::from_utf8(bytes).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}
