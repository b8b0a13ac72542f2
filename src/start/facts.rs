//! The facts that ranks compare: how this process was started, the job that it has decided, the inputs that it has
//! read.

use std::fmt::Display;
use std::path::Path;

use anyhow::Result;
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::adapter::Adapter;
use crate::data::{Dataset, TextTokenizer};
use crate::files;
use crate::fsdp::memory::Limits;
use crate::recipe::{EvalData, Job};

/// Prefix of this program's own variables.
const OWN_VARIABLES: &str = "FSDP_QLORA_";

/// Own variables that say where something lies, so that ranks may differ in them.
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

/// Keys and the values that this rank has for them, in the order in which they were added.
#[derive(Default)]
pub struct Facts(Vec<(String, String)>);

impl Facts {
    /// Keys and values.
    pub fn entries(&self) -> &[(String, String)] {
        &self.0
    }

    pub fn add(&mut self, key: impl Display, value: impl Display) {
        self.0.push((key.to_string(), value.to_string()));
    }

    /// Returns the program and the environment of this process. Reads the program's file.
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

    /// Returns every key of a job with its decided value, except that a path is only said to be one.
    pub fn of_job(job: &Job) -> Facts {
        let mut facts = Facts::default();
        for (key, value) in job.values() {
            let is_path = PATH_KEYS.contains(&key.as_str())
                || matches!(job.data.eval, Some(EvalData::Sources(_))) && key == "data.eval";
            facts.add(key, if is_path { "a path".into() } else { value.to_string() });
        }
        let wanted: Vec<String> = job.wanted().iter().map(|wanted| wanted.reference.to_string()).collect();
        if !wanted.is_empty() {
            facts.add("repositories of the hub", wanted.join(", "));
        }
        facts
    }

    /// Adds the tokenizer with its chat template.
    pub fn add_tokenizer(&mut self, tokenizer: Option<&TextTokenizer>) {
        self.add(
            "tokenizer and chat template",
            tokenizer.map_or("none".into(), |t| format!("digest {}", t.identity())),
        );
    }

    /// Adds the sizes of a step.
    pub fn add_limits(&mut self, limits: &Limits) {
        self.add("sizes of a step", format!("{limits:?}"));
    }

    /// Adds rows; `key` is the key or option that names them.
    pub fn add_data(&mut self, key: &str, data: &Dataset) {
        let (sequences, digest) = (data.sequences.len(), data.digest());
        self.add(format!("rows of {key}"), format!("{sequences} sequences, digest {digest:016x}"));
    }

    /// Adds adapters; `key` is the key or option that names them.
    pub fn add_adapters(&mut self, key: &str, adapters: &[Adapter]) {
        let digests: Vec<String> = adapters.iter().map(|adapter| format!("digest {:016x}", adapter.digest())).collect();
        self.add(key, if digests.is_empty() { "none".into() } else { digests.join(", ") });
    }

    /// Adds the tokens of prompts.
    pub fn add_prompts(&mut self, prompts: &[Vec<u32>]) {
        let digest = xxh3_64(format!("{prompts:?}").as_bytes());
        self.add("prompts", format!("{} prompts, digest {digest:016x}", prompts.len()));
    }
}

/// Returns a digest of the running program's file, which tells builds of one version apart.
fn build_digest() -> Result<String> {
    let (_, digest) = files::digest(Path::new("/proc/self/exe"))?;
    Ok(format!("{digest:016x}"))
}
