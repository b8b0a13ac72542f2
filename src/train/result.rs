//! The end of a run: the base is compared with what it was, and the adapter comes to rest with all that belongs to
//! it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::mapped::MappedBase;
use crate::checkpoint::output::{METRICS_FILE, Output, Place, RunResult, TOKENIZER_FILES};
use crate::comm::{Queue, watch};
use crate::device::Device;
use crate::files;
use crate::fsdp::snapshot::KINDS;
use crate::model::spec::ModelSpec;
use crate::recipe::{TrainingJob, When};

/// A line of metrics.jsonl takes less.
const METRICS_LINE_BYTES: usize = 1000;
/// Most room that is looked for before training for metrics.jsonl: `max_steps` may be a number that nobody waits for.
const MAX_METRICS_BYTES: usize = 1 << 28;

/// Parts of the model's folder that belong to the result. They are read at the start, since the folder may be gone at
/// the end.
pub struct Kept {
    /// Absolute path of the base, for `adapter_config.json`.
    pub base: PathBuf,
    tokenizer_files: Vec<(&'static str, Vec<u8>)>,
}

impl Kept {
    pub fn read(model: &Path) -> Result<Kept> {
        let base = std::fs::canonicalize(model).with_context(|| model.display().to_string())?;
        let present =
            TOKENIZER_FILES.into_iter().map(|name| (name, model.join(name))).filter(|(_, path)| files::is_there(path));
        let read = |(name, path): (_, PathBuf)| Ok((name, files::read(&path, files::MAX_TOKENIZER_BYTES)?));
        Ok(Kept { base, tokenizer_files: present.map(read).collect::<Result<_>>()? })
    }

    /// Returns the bytes that a run writes, with an adapter of this size: the result, with a line of metrics for each
    /// step where their number is set, and the checkpoints that are kept, or one, and one that is being written.
    pub fn room(&self, adapter: &Adapter, job: &TrainingJob) -> usize {
        let lines = job.max_steps.unwrap_or_default().saturating_mul(METRICS_LINE_BYTES).min(MAX_METRICS_BYTES);
        let tokenizer: usize = self.tokenizer_files.iter().map(|(_, content)| content.len()).sum();
        // The newest stays, and so does the best.
        let least = 1 + usize::from(job.load_best_model_at_end);
        let saves = job.save != When::Never;
        let checkpoints = if saves { job.save_total_limit.unwrap_or(1).max(least).saturating_add(1) } else { 0 };
        let of_checkpoints = checkpoints.saturating_mul(KINDS.len() * adapter.bytes() + lines);
        (adapter.bytes() + tokenizer + lines).saturating_add(of_checkpoints)
    }
}

/// Returns a sentence that says where the base has changed during the run, or `None` where it has not. Collective;
/// the first rank of each node looks at the contents, and each at the lengths of what it has mapped.
pub fn doubt<D: Device, Q: Queue<D>>(queue: &mut Q, local_rank: usize, base: &MappedBase) -> Result<Option<String>> {
    watch::at("comparing the base with what it was at the start");
    let looks = local_rank == 0;
    let changed = || looks.then(|| base.weights.check_unchanged().err()).flatten();
    let own = base.check_lengths().err().or_else(changed).map(|error| format!("{error:#}"));
    // Rank 0 tells its own at the end.
    if let Some(own) = own.as_ref().filter(|_| queue.rank() > 0) {
        tracing::warn!("{own}");
    }
    let changed = queue.all_gather_f64("stamps of the base", &[f64::from(own.is_some())])?;
    let other = changed.iter().position(|changed| changed[0] > 0.0);
    Ok(own.or(other.map(|rank| format!("the base that rank {rank} reads, or its shard, has changed during the run"))))
}

/// Brings the adapter of a step to rest, with the tokenizer and the metrics. Fails, naming the place, if that is not output_dir
/// or if there is a doubt about the result.
pub fn save(
    output: &mut Output,
    (step, adapter): (usize, &Adapter),
    config: &ModelSpec,
    kept: &Kept,
    metrics: &[u8],
    doubt: Option<String>,
) -> Result<()> {
    let mut others = kept.tokenizer_files.clone();
    others.push((METRICS_FILE, metrics.to_vec()));
    let write = |dir: &Path| adapter::save(adapter, config, &kept.base, dir);
    let result = RunResult { adapter: &write, others, step, doubt: doubt.clone() };
    let place = output.finish(&result).context("saving the adapter")?;
    if let Some(doubt) = doubt {
        let dir = match &place {
            Place::OutputDir => "output_dir",
            Place::Elsewhere { dir, .. } => &dir.display().to_string(),
        };
        bail!("{doubt}; the adapter was saved in {dir}, but cannot be trusted");
    }
    match place {
        Place::OutputDir => Ok(()),
        Place::Elsewhere { dir, why } => {
            bail!("output_dir takes no result ({why}); the adapter is complete and was saved in {}", dir.display())
        }
    }
}
