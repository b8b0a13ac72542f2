//! Puts local files in the place of what a job names of the hub. Rank 0 decides which commits and files are meant; one rank of each
//! machine downloads what its cache lacks, and the others wait.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, all_gather_u64s, broadcast_bytes};
use crate::hub::{Chosen, Hub, Progress, Wanted};
use crate::progress;
use crate::recipe::{Job, Located};
use crate::train::log::{Log, bytes};

/// Pauses between two looks at a download, which grow from the first to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(200);

/// Returns the job with local paths alone. `downloads` is true on one rank of each machine. Collective.
pub fn locate(comm: &mut dyn Comm, job: Job, downloads: bool, log: Log) -> Result<Job> {
    job.folders_called_like_repositories().into_iter().for_each(|line| log.line(line));
    let wanted = job.wanted();
    if wanted.is_empty() {
        return Ok(job);
    }
    watch::phase(Phase::Fetch)?;
    let (hub, is_first) = (Hub::from_environment()?, comm.rank() == 0);
    let choose =
        |progress: &Progress| wanted.iter().map(|wanted| hub.choose(wanted, progress)).collect::<Result<Vec<_>>>();
    let chosen = while_others_wait(comm, is_first, log, choose)?;
    let chosen = broadcast_bytes(comm, serde_json::to_vec(&chosen.unwrap_or_default())?)?;
    let chosen: Vec<Chosen> = serde_json::from_slice(&chosen).context("the files that rank 0 has chosen")?;
    let pairs: Vec<(Wanted, Chosen)> = wanted.into_iter().zip(chosen).collect();
    for (_, chosen) in &pairs {
        log.line(format!("{}: {}", hub.cache(), chosen.reference));
    }
    let fetch = |progress: &Progress| pairs.iter().try_for_each(|(_, chosen)| hub.fetch(chosen, progress));
    while_others_wait(comm, downloads, log, fetch)?;
    job.located(|wanted| {
        let (_, chosen) =
            pairs.iter().find(|(other, _)| other == wanted).context("a repository that was not chosen")?;
        Ok(Located { reference: chosen.reference.clone(), folder: hub.folder(chosen)?, files: hub.places(chosen)? })
    })
}

/// Does work on some ranks while all others wait, however long it takes. The result is that of this rank, if it works. Collective.
fn while_others_wait<T: Send>(
    comm: &mut dyn Comm,
    works: bool,
    log: Log,
    work: impl FnOnce(&Progress) -> Result<T> + Send,
) -> Result<Option<T>> {
    let download = Progress::default();
    let name = format!("rank {}: ", comm.rank());
    std::thread::scope(|scope| {
        // A failure here ends the waiting of this rank at once, and so that of all.
        let work = || work(&download).inspect_err(|_| download.stop());
        let thread = works.then(|| scope.spawn(work));
        let (mut telling, mut pause) = (Telling::default(), FIRST_PAUSE);
        loop {
            let has_ended = thread.as_ref().is_none_or(|thread| thread.is_finished());
            let has_failed = has_ended && download.is_stopped();
            let of_ranks = all_gather_u64s(comm, &[&[u64::from(has_ended)], &download.bytes()[..]].concat());
            let of_ranks = of_ranks.inspect_err(|_| download.stop())?;
            watch::beat();
            let notes = download.take_notes().into_iter();
            notes.for_each(|note| Log { enabled: true }.warn(if log.enabled { note } else { format!("{name}{note}") }));
            let sum = |place: usize| of_ranks.iter().map(|rank| rank[place]).sum::<u64>() as usize;
            telling.tell(sum(1), sum(2), log);
            if has_failed {
                break;
            }
            if of_ranks.iter().all(|rank| rank[0] == 1) {
                telling.end(sum(1), log);
                break;
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(LAST_PAUSE);
        }
        thread.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).transpose()
    })
}

/// What is told about a download.
#[derive(Default)]
struct Telling {
    begun: Option<Instant>,
}

impl Telling {
    /// Tells how far a download is.
    fn tell(&mut self, done: usize, total: usize, log: Log) {
        if total == 0 {
            return;
        }
        if self.begun.is_none() {
            self.begun = Some(Instant::now());
            log.line(format!("downloading {}", bytes(total)));
        }
        if log.enabled {
            progress::at("downloading (MiB)", done >> 20, total >> 20);
        }
    }

    /// Tells the end of a download.
    fn end(&self, done: usize, log: Log) {
        if let Some(begun) = self.begun {
            progress::end();
            log.line(format!("downloaded {} in {:.1} s", bytes(done), begun.elapsed().as_secs_f64()));
        }
    }
}
