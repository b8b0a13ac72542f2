//! Replaces the repositories of the hub that a job names by local files. Rank 0 decides which commits and files are meant; one rank of
//! each machine downloads what its cache lacks, and the others wait.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::comm::watch::{self, Phase};
use crate::comm::{Comm, all_gather_u64s, broadcast_bytes};
use crate::hub::{Chosen, Hub, Progress, Wanted};
use crate::progress;
use crate::recipe::{Job, Located};
use crate::train::log::{Log, bytes};

/// Shortest and longest pause between two looks at a download; each pause is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(200);

/// Returns the job with local paths only. `downloads` is true on one rank of each machine. Collective.
pub fn locate(comm: &mut dyn Comm, job: Job, downloads: bool, log: Log) -> Result<Job> {
    job.folders_called_like_repositories().into_iter().for_each(|line| log.line(line));
    let wanted = job.wanted();
    if wanted.is_empty() {
        return Ok(job);
    }
    watch::phase(Phase::Fetch)?;
    let (hub, is_first) = (Hub::from_environment()?, comm.rank() == 0);
    let choose = |progress: &Progress| {
        let choose = |wanted: &Wanted| hub.choose(wanted, progress).map(|chosen| (wanted.clone(), chosen));
        wanted.iter().map(choose).collect::<Result<Vec<_>>>()
    };
    let pairs = while_others_wait(comm, is_first, log, choose)?;
    let pairs = broadcast_bytes(comm, serde_json::to_vec(&pairs.unwrap_or_default())?)?;
    let pairs: Vec<(Wanted, Chosen)> = serde_json::from_slice(&pairs).context("the files that rank 0 has chosen")?;
    for (_, chosen) in &pairs {
        log.line(format!("{}: {}", hub.cache(), chosen.reference));
    }
    let fetch = |progress: &Progress| pairs.iter().try_for_each(|(wanted, chosen)| hub.fetch(wanted, chosen, progress));
    while_others_wait(comm, downloads, log, fetch)?;
    job.located(|wanted| {
        let (_, chosen) = pairs.iter().find(|(other, _)| other == wanted).with_context(|| {
            format!("{}: rank 0 wants other files of the hub; help: give every rank the same recipe", wanted.reference)
        })?;
        Ok(Located { reference: chosen.reference.clone(), folder: hub.folder(chosen)?, files: hub.places(chosen)? })
    })
}

/// Does work on some ranks while all others wait, however long it takes. Returns the result of this rank; `None` if it only waits.
/// If the work fails on a rank, that rank returns the error and the others never return `Ok`: they wait until that rank ends them.
/// Collective.
fn while_others_wait<T: Send>(
    comm: &mut dyn Comm,
    works: bool,
    log: Log,
    work: impl FnOnce(&Progress) -> Result<T> + Send,
) -> Result<Option<T>> {
    let download = Progress::default();
    let name = format!("rank {}: ", comm.rank());
    std::thread::scope(|scope| {
        let work = || work(&download);
        let mut thread = works.then(|| scope.spawn(work));
        let mut result: Option<Result<T>> = None;
        let (mut telling, mut pause) = (Telling::default(), FIRST_PAUSE);
        loop {
            if let Some(thread) = thread.take_if(|thread| thread.is_finished()) {
                result = Some(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            let has_failed = matches!(result, Some(Err(_)));
            // A rank that has failed is not done, so that no other rank goes on without the files.
            let is_done = thread.is_none() && !has_failed;
            let of_ranks = all_gather_u64s(comm, &[&[u64::from(is_done)], &download.bytes()[..]].concat());
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
        result.transpose()
    })
}

/// Messages about a download.
#[derive(Default)]
struct Telling {
    /// The time at which the first message was written.
    begun: Option<Instant>,
}

impl Telling {
    /// Tells how much of a download has arrived, once its size is known.
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

    /// Tells that a download is complete.
    fn end(&self, done: usize, log: Log) {
        if let Some(begun) = self.begun {
            progress::end();
            log.line(format!("downloaded {} in {:.1} s", bytes(done), begun.elapsed().as_secs_f64()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::LocalComm;

    /// Returns the result of each of two ranks, of which rank 1 works.
    fn results(work: fn(&Progress) -> Result<u32>) -> Vec<Result<Option<u32>, String>> {
        std::thread::scope(|scope| {
            let ranks = LocalComm::world(2).into_iter().map(|mut comm| {
                scope.spawn(move || {
                    let works = comm.rank() == 1;
                    let result = while_others_wait(&mut comm, works, Log { enabled: false }, work);
                    result.map_err(|error| error.to_string())
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_rank_that_waits_goes_on_only_after_work_that_succeeded() {
        assert_eq!(results(|_| Ok(7)), [Ok(None), Ok(Some(7))]);
        let failed = results(|_| anyhow::bail!("the disk is full"));
        assert!(failed[0].is_err(), "{failed:?}");
        assert_eq!(failed[1], Err("the disk is full".into()));
    }
}
