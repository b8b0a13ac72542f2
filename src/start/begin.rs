//! The beginning of a run: its first step, or the step after a checkpoint.

use anyhow::{Context, Result};
use jiff::Zoned;

use crate::checkpoint::output::record::RunIdentity;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::state::{Found, Progress};
use crate::comm::{Comm, broadcast_bytes};
use crate::recipe::Job;
use crate::train::log::Log;

use super::Start;
use super::agree::{Agreed, agree_on_batch};

/// Form of the clock in the identity of a run. Another machine may not know the time zone by its name.
pub const CLOCK: &str = "%Y-%m-%dT%H:%M:%S%:z";

/// The place that a run begins from.
pub struct Beginning {
    pub progress: Progress,
    /// The checkpoint from which the run goes on; rank 0 has it.
    pub checkpoint: Option<Found>,
}

/// Returns the job of the run that goes on in an output folder, if one does: its steps have as many sequences as
/// before, whatever the number of ranks is now. More ranks than can share such a step are refused afterwards; where the folder may be
/// overwritten they begin another run. Rank 0 has the folder. `identity` is that of a job on a number of ranks. Collective.
pub fn with_batch_of_the_run(
    comm: &mut dyn Comm,
    job: Agreed<Job>,
    output: Option<&Output>,
    log: Log,
    identity: impl Fn(&Job, usize) -> Result<RunIdentity>,
) -> Result<Agreed<Job>> {
    let (resume, own) = (&job.training.resume, job.training.global_batch_size(comm.world_size()));
    let mut kept = None;
    if let Some(output) = output
        && let Some(sequences) = output.global_batch_size(&job.values(), resume)?.filter(|kept| *kept != own)
        && let job = job.with_global_batch(sequences)
        && let Ok(run) = identity(&job, comm.world_size())
            .or_else(|error| if output.overwrites() { Err(error) } else { identity(&job, 1) })
    {
        kept = output.knows(&run, resume)?.then_some(sequences);
    }
    if let Some(sequences) = kept {
        log.line(format!(
            "each step keeps the {sequences} sequences that the run began with; with this number of ranks it would have {own}"
        ));
    }
    agree_on_batch(comm, job, kept)
}

/// Returns the time that chat templates see: that of the run which goes on in an output folder or has finished there, so that its
/// rows are the same on another day, or else that of this start. Rank 0 has the folder. Collective.
pub fn clock_of_the_run(comm: &mut dyn Comm, start: &Start, job: &Job, output: Option<&Output>) -> Result<Zoned> {
    let kept = output.map(|output| output.clock(&job.values(), &job.training.resume)).transpose()?.flatten();
    let kept: Option<String> = serde_json::from_slice(&broadcast_bytes(comm, serde_json::to_vec(&kept)?)?)?;
    match kept {
        Some(text) => {
            Zoned::strptime(CLOCK, &text).with_context(|| format!("output_dir: the clock of the run there is {text:?}"))
        }
        None => Ok(start.clock.clone()),
    }
}

/// Begins the run in its output folder, which rank 0 has. Returns `None` if the run has finished there. Collective.
pub fn begin(
    comm: &mut dyn Comm,
    job: &Job,
    output: Option<&mut Output>,
    run: RunIdentity,
    log: Log,
) -> Result<Option<Beginning>> {
    let begun = output.map(|output| output.begin(run, &job.training.resume, &mut |line| log.line(line)));
    let checkpoint = match begun.transpose().context("output_dir")? {
        Some(Begun::Finished) => None,
        Some(Begun::Resumed(found)) => Some(Some(*found)),
        Some(Begun::New) | None => Some(None),
    };
    // Other ranks take over the answer of rank 0.
    let progress = checkpoint.as_ref().map(|found| found.as_ref().map_or(Progress::default(), |f| f.state.progress));
    let progress = broadcast_bytes(comm, serde_json::to_vec(&progress)?)?;
    let progress: Option<Progress> = serde_json::from_slice(&progress)?;
    Ok(progress.map(|progress| Beginning { progress, checkpoint: checkpoint.flatten() }))
}
