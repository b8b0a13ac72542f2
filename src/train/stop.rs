//! Reasons to end a run before its last step: a signal to any rank, a deadline, a word in the control file. The ranks
//! vote, so that all of them stop at the same action.
//!
//! A vote is a collective over a communicator of its own, which never waits for the queue. There is one after each
//! step and each evaluation, and about one a second while they last. If a reason is there, a step that would end
//! within the grace goes on to its end; a longer one is abandoned.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libc::{SIGINT, SIGTERM, SIGUSR1, c_int};

use crate::comm::Comm;
use crate::comm::mpi::{World, abort};
use crate::comm::watch::{self, End};
use crate::files;

use super::log::{Log, duration};
use super::signals;

/// Name of the file in the output folder in which people ask for a checkpoint or for the end of the run.
pub const CONTROL_FILE: &str = "control";

const MAX_CONTROL_BYTES: u64 = 1 << 10;

/// Exit status of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h).
pub const STOPPED: i32 = 75;

/// Time between two votes, and the largest part of a step or an evaluation between them: the first once it is known
/// how long such a thing takes, the second until then.
const VOTE_SECONDS: f64 = 1.0;
const VOTE_PART: f64 = 1.0 / 32.0;
const FIRST_VOTE_PART: f64 = 1.0 / 256.0;

/// Least time that is kept for saving at a deadline.
const LEAST_SAVE: Duration = Duration::from_secs(30);

/// True once a [`Stop`] looks for signals.
static IS_WATCHED: AtomicBool = AtomicBool::new(false);

/// Time between two looks for a signal while no [`Stop`] does so.
const LOOK: Duration = Duration::from_millis(50);

/// Takes note of the signals from here on, instead of ending at once ([`signals::claim`]). Until a [`Stop`] looks for
/// them, a signal ends all ranks with [`STOPPED`], since there is nothing to save.
pub fn listen(world: &World) -> Result<()> {
    signals::claim()?;
    let (rank, is_one_machine) = (world.rank, world.world_size == world.local_size);
    let thread = std::thread::Builder::new().name("signals".into());
    thread
        .spawn(move || end_before_the_first_step(rank, is_one_machine))
        .context("starting the thread that looks for signals")?;
    Ok(())
}

/// Returns the signal that came to this rank, if one did.
fn signal() -> Option<Reason> {
    signals::caught().and_then(Reason::of_signal)
}

/// Ends all ranks if a signal comes before a [`Stop`] looks for it. Libraries are loaded meanwhile, which may take the signals.
fn end_before_the_first_step(rank: usize, is_one_machine: bool) {
    while !IS_WATCHED.load(Ordering::Relaxed) {
        // It cannot fail: it has not done so in `listen`.
        let _ = signals::claim();
        if let Some(reason) = signal() {
            let text = format!("{} before the first step", reason.text(rank));
            // The launcher sends SIGTERM when a rank on another machine has failed, too, and this rank cannot tell.
            let why = if reason == Reason::Sigterm && !is_one_machine { "" } else { &text };
            if watch::takes_the_word(false, End::Stopped, why) {
                tracing::warn!("stopped by {text}; help: the same `train` again goes on");
            }
            abort(STOPPED);
        }
        std::thread::sleep(LOOK);
    }
}

/// A reason to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Sigint,
    Sigterm,
    Sigusr1,
    MaxTime,
    SlurmEnd,
    Control,
}

impl Reason {
    const ALL: [Reason; 6] =
        [Reason::Sigint, Reason::Sigterm, Reason::Sigusr1, Reason::MaxTime, Reason::SlurmEnd, Reason::Control];

    /// Returns the number of an optional reason in a vote.
    fn number(reason: Option<Reason>) -> f64 {
        Self::ALL.iter().position(|one| Some(*one) == reason).map_or(0.0, |i| (i + 1) as f64)
    }

    fn of_number(number: f64) -> Option<Reason> {
        Self::ALL.get((number as usize).checked_sub(1)?).copied()
    }

    fn of_signal(signal: c_int) -> Option<Reason> {
        match signal {
            SIGINT => Some(Reason::Sigint),
            SIGTERM => Some(Reason::Sigterm),
            SIGUSR1 => Some(Reason::Sigusr1),
            _ => None,
        }
    }

    fn text(self, rank: usize) -> String {
        match self {
            Reason::Sigint => format!("SIGINT to rank {rank}"),
            Reason::Sigterm => format!("SIGTERM to rank {rank}"),
            Reason::Sigusr1 => format!("SIGUSR1 to rank {rank}"),
            Reason::MaxTime => "training.max_time".into(),
            Reason::SlurmEnd => "the end of the SLURM job's time".into(),
            Reason::Control => format!("\"stop\" in output_dir/{CONTROL_FILE}"),
        }
    }
}

/// Time at which the run must have stopped and saved.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    /// Time from the start of the program to then.
    whole: Duration,
    reason: Reason,
}

impl Deadline {
    /// Returns the earlier of `training.max_time`, which counts from the start of the program, and the end of the
    /// SLURM job's time (SLURM_JOB_END_TIME, in seconds since 1970), if there is one. An end that has passed is that
    /// of another job, and is ignored.
    pub fn earliest(started: Instant, max_time: Option<Duration>) -> Option<Deadline> {
        let slurm_end = std::env::var("SLURM_JOB_END_TIME").ok().and_then(|text| text.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let of_slurm =
            slurm_end.and_then(|end| Duration::from_secs(end).checked_sub(now)).map(|left| left + started.elapsed());
        let all = [(max_time, Reason::MaxTime), (of_slurm, Reason::SlurmEnd)];
        let deadlines = all.into_iter().filter_map(|(whole, reason)| {
            let whole = whole?;
            Some(Deadline { at: started.checked_add(whole)?, whole, reason })
        });
        deadlines.min_by_key(|deadline| deadline.at)
    }

    /// Returns a line that announces the deadline.
    pub fn text(&self) -> String {
        let left = duration(self.at.saturating_duration_since(Instant::now()));
        let what = if self.reason == Reason::SlurmEnd { "SLURM_JOB_END_TIME" } else { "training.max_time" };
        format!("the run stops with a checkpoint within the next {left} ({what})")
    }

    /// Returns whether it is time to stop. Before the deadline the grace passes and the run saves; this margin is a
    /// quarter of the whole time at most.
    fn is_near(&self, grace: Duration, save: Duration) -> bool {
        Instant::now() + (grace + save).min(self.whole / 4) >= self.at
    }
}

/// The places in which a run looks for reasons to stop.
pub struct Options {
    /// Time that a step may still take after a signal.
    pub grace: Duration,
    /// Rank 0 watches the clock.
    pub deadline: Option<Deadline>,
    /// The control file, which rank 0 watches.
    pub control: Option<PathBuf>,
    pub log: Log,
}

/// A part of the run that may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Step,
    Evaluation,
}

/// The votes of all ranks.
struct Votes {
    /// The reason of the first rank that has one.
    reason: Option<String>,
    /// Time since the reason came up.
    age: f64,
    /// Time since the activity began, in seconds, on the slowest rank.
    elapsed: f64,
    save: bool,
}

/// Watches for reasons to stop, and votes.
pub struct Stop {
    comm: Box<dyn Comm>,
    options: Options,
    /// This rank's reason, and a time before it came up.
    noticed: Option<(Reason, Instant)>,
    last_look: Instant,
    /// True if somebody has asked this rank for a checkpoint, and if any rank was asked for one.
    wants_checkpoint: bool,
    owes_checkpoint: bool,
    /// Time that saving may take.
    save: Duration,
    activity: Activity,
    began: Instant,
    next_vote: f64,
    /// Durations of the last step and of the last evaluation in seconds, on the slowest rank.
    last: [Option<f64>; 2],
    /// The reason to stop, once the ranks have agreed on one.
    pub reason: Option<String>,
}

impl Stop {
    /// Watches from here on. All ranks have `comm`, which is used for nothing else.
    pub fn new(comm: Box<dyn Comm>, options: Options) -> Stop {
        IS_WATCHED.store(true, Ordering::Relaxed);
        let now = Instant::now();
        let stop = Stop {
            comm,
            options,
            noticed: None,
            last_look: now,
            wants_checkpoint: false,
            owes_checkpoint: false,
            save: LEAST_SAVE,
            activity: Activity::Step,
            began: now,
            next_vote: 0.0,
            last: [None; 2],
            reason: None,
        };
        stop.remove_control("was there before the run began, and is removed");
        stop
    }

    /// Says that an activity begins. Every rank says so.
    pub fn begin(&mut self, activity: Activity) -> Result<()> {
        signals::claim()?;
        (self.activity, self.began, self.next_vote) = (activity, Instant::now(), 0.0);
        Ok(())
    }

    /// Takes note of how long a save took.
    pub fn saved_in(&mut self, duration: Duration) {
        self.save = self.save.max(2 * duration);
    }

    /// Returns whether the activity, of which this part is done, is to be abandoned. All ranks ask at the same parts,
    /// and get the same answer.
    pub fn abandons(&mut self, done: f64) -> Result<bool> {
        self.look();
        if done < self.next_vote {
            return Ok(false);
        }
        let Votes { reason, age, elapsed, .. } = self.votes()?;
        let known = self.last[self.activity as usize];
        let by_pace = if done > 0.0 { elapsed / done } else { 0.0 };
        let whole = known.unwrap_or(0.0).max(by_pace);
        let largest = if known.is_some() { VOTE_PART } else { FIRST_VOTE_PART };
        self.next_vote = done + largest.min(VOTE_SECONDS / whole);
        // At its very beginning nobody knows how long the first step takes; the next vote will.
        let left = f64::max(known.unwrap_or(0.0) - elapsed, by_pace * (1.0 - done)).max(0.0);
        if reason.is_none() || age + left <= self.options.grace.as_secs_f64() {
            return Ok(false);
        }
        let (left, grace) = (duration(Duration::from_secs_f64(left)), duration(self.options.grace));
        let what = format!("{:?}", self.activity).to_lowercase();
        let why = format!("would take about {left} more, and training.grace is {grace}");
        self.options.log.line(format!("the {what} under way {why}: it is abandoned"));
        self.reason = reason;
        Ok(true)
    }

    /// Votes at the end of an activity.
    pub fn end(&mut self) -> Result<()> {
        self.look();
        let Votes { reason, elapsed, save, .. } = self.votes()?;
        self.last[self.activity as usize] = Some(elapsed);
        self.wants_checkpoint = false;
        self.owes_checkpoint |= save;
        self.reason = reason;
        Ok(())
    }

    /// Returns whether somebody has asked for a checkpoint since the last call.
    pub fn asks_for_checkpoint(&mut self) -> bool {
        std::mem::take(&mut self.owes_checkpoint)
    }

    /// Looks for a reason on this rank.
    fn look(&mut self) {
        let before = std::mem::replace(&mut self.last_look, Instant::now());
        let deadline = self.options.deadline.filter(|deadline| deadline.is_near(self.options.grace, self.save));
        self.notice(signal().or_else(|| Some(deadline?.reason)), before);
    }

    /// Takes note of a reason that came up after a time.
    fn notice(&mut self, reason: Option<Reason>, before: Instant) {
        if let (None, Some(reason)) = (self.noticed, reason) {
            self.noticed = Some((reason, before));
        }
    }

    /// Reads the control file, if there is one.
    fn control(&mut self) -> Option<Reason> {
        let path = self.options.control.as_ref()?;
        if !path.is_file() {
            return None;
        }
        let (reason, what) = match files::read_text(path, MAX_CONTROL_BYTES).as_deref().map(str::trim) {
            // Its writer may be about to write the word.
            Ok("") => return None,
            Ok("checkpoint") => {
                self.wants_checkpoint = true;
                (None, "is obeyed")
            }
            Ok("stop") => (Some(Reason::Control), "is obeyed"),
            _ => (None, "is removed; allowed in it: checkpoint, stop"),
        };
        self.remove_control(what);
        reason
    }

    /// Removes the control file, and says why.
    fn remove_control(&self, why: &str) {
        let Some(path) = &self.options.control else { return };
        match std::fs::remove_file(path) {
            Ok(()) => self.options.log.line(format!("{} {why}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => self.options.log.line(format!("{} {why}, but is still there: {error}", path.display())),
        }
    }

    /// Votes. Collective.
    fn votes(&mut self) -> Result<Votes> {
        let asked = self.control();
        self.notice(asked, self.last_look);
        let now = Instant::now();
        let age = self.noticed.map_or(0.0, |(_, at)| (now - at).as_secs_f64());
        let own = [
            Reason::number(self.noticed.map(|(reason, _)| reason)),
            age,
            (now - self.began).as_secs_f64(),
            f64::from(self.wants_checkpoint),
        ];
        let mut all = vec![[0f64; 4]; self.comm.world_size()];
        self.comm
            .all_gather(bytemuck::cast_slice(&own), bytemuck::cast_slice_mut(&mut all))
            .context("a vote about stopping")?;
        let largest = |i: usize| all.iter().map(|vote| vote[i]).fold(0.0, f64::max);
        let first = all.iter().enumerate().find_map(|(rank, vote)| Some((rank, Reason::of_number(vote[0])?)));
        let reason = first.map(|(rank, reason)| reason.text(rank));
        Ok(Votes { reason, age: largest(1), elapsed: largest(2), save: largest(3) > 0.0 })
    }
}
