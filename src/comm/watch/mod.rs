//! The watchdog: a thread of each rank that ends waits which take too long, from before MPI_Init to after MPI_Finalize.
//!
//! A rank says what it is at ([`at`], [`phase()`]) and what it waits for ([`wait`]). All ranks of a node write this on one `board`.
//! If a rank waits and no rank of the node has made progress for the time limit, the watchdog ends all ranks with one message: which
//! ranks are missing, and what each rank is doing. A rank that works for long reports progress now and then ([`beat`]), and the
//! ranks that wait for it go on waiting. A process that ends without a message ends all ranks too, and so does a mapped file that can
//! no longer be read.
//!
//! There is one watchdog a process, as there is one MPI: its functions do nothing before it is started. It takes part in no collective
//! and changes no value.

mod board;
mod bus;
mod fault;
mod limits;
mod phase;
mod process;
mod report;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Signal, getpid, kill_process};

pub use board::{Board, End};
use board::{Record, State};
pub use limits::Limit;
use limits::Limits;
pub use phase::Phase;
use process::Process;
use report::TimeOut;

use super::mpi::abort;
use crate::logging;

/// Time between two checks (a tick).
const TICK: Duration = Duration::from_millis(50);

/// Number of ticks between two checks of the other processes.
const TICKS_OF_A_LOOK: u32 = 4;

/// Longest time that one tick counts for, so that a suspended job or a sleeping laptop does not use up the limit.
const LONGEST_TICK: Duration = Duration::from_secs(1);

/// Time for which the other ranks leave the message to rank 0 if all may fail alike. It is longer before there is a board on which they
/// see that rank 0 reports.
const RANK_0_FIRST: Duration = Duration::from_secs(1);
const RANK_0_FIRST_WITHOUT_A_BOARD: Duration = Duration::from_secs(3);

/// Time that the launcher has to end all ranks when one is gone, since it notices that as well.
const LAUNCHER_FIRST: Duration = Duration::from_secs(4);

/// Time for which a rank that leaves the message to another waits to be ended by it.
const WAIT_FOR_THE_END: Duration = Duration::from_secs(10);

/// Time that an orderly end of the process may take.
const END_IN_ANY_CASE: Duration = Duration::from_secs(15);

/// Lets the watchdog see actions that are under way on a GPU.
pub trait Probe: Send {
    /// Returns how many actions have ended since the last call and the name of the oldest that has not. An error ends all ranks.
    fn look(&mut self) -> Result<(usize, Option<String>)>;
}

struct Waiting {
    id: u64,
    name: String,
    limit: Limit,
    help: Option<&'static str>,
}

struct Inner {
    rank: usize,
    world_size: usize,
    /// The ranks of this node, in the order of the board; empty before MPI tells who they are.
    ranks: Vec<usize>,
    /// The ranks among them whose processes /proc shows.
    seen: Vec<usize>,
    board: Board,
    phase: String,
    /// The phase and the action within it.
    doing: String,
    /// Phases and the times at which they began; steps are among them if they are asked for.
    begun: Vec<(Phase, Instant)>,
    keeps_steps: bool,
    /// Waits under way, oldest first.
    waits: Vec<Waiting>,
    next_id: u64,
}

impl Inner {
    fn publish(&self) {
        self.board.write(&self.doing, self.waits.first().map_or("", |wait| &wait.name));
    }

    /// Replaces this rank's own board by the board of the node, which every rank of the node has.
    fn join(&mut self, board: Board, rank: usize, world_size: usize, ranks: Vec<usize>) {
        let is_seen = |local: usize| {
            let record = board.read(local);
            process::start_time(record.process) == Some(record.started)
        };
        self.seen = ranks.iter().enumerate().filter(|(local, _)| is_seen(*local)).map(|(_, &rank)| rank).collect();
        (self.board, self.rank, self.world_size, self.ranks) = (board, rank, world_size, ranks);
        self.publish();
    }

    fn begin(&mut self, name: String, limit: Limit, help: Option<&'static str>) -> u64 {
        self.next_id += 1;
        self.waits.push(Waiting { id: self.next_id, name, limit, help });
        self.publish();
        self.next_id
    }

    fn end(&mut self, id: u64) {
        self.waits.retain(|wait| wait.id != id);
        self.publish();
    }

    /// Keeps the time at which a phase begins.
    fn note(&mut self, phase: Phase) {
        if self.keeps_steps || !matches!(phase, Phase::Step(_)) {
            self.begun.push((phase, Instant::now()));
        }
    }

    fn prefix(&self) -> String {
        self.prefix_of(self.rank)
    }

    fn prefix_of(&self, rank: usize) -> String {
        if self.world_size > 1 { format!("rank {rank}: ") } else { String::new() }
    }

    /// Returns how and why all ranks end, if a rank has said so. A failure begins with its rank; a reason to stop names it itself.
    fn end_of_all(&self) -> Option<(End, String)> {
        let (local_rank, end, why) = self.board.end()?;
        let rank = self.ranks.get(local_rank).copied().unwrap_or(self.rank);
        let prefix = if end == End::Failed { self.prefix_of(rank) } else { String::new() };
        Some((end, prefix + &why))
    }
}

/// A probe, its number, which is also the number of its wait, and its help.
type Looked = (u64, Option<&'static str>, Box<dyn Probe>);

type OnEnd = Box<dyn FnOnce(End, &str) + Send>;

struct Watch {
    limits: Limits,
    inner: Mutex<Inner>,
    /// Locked before `inner`.
    probes: Mutex<Vec<Looked>>,
    on_end: Mutex<Option<OnEnd>>,
}

static WATCH: OnceLock<Watch> = OnceLock::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

fn with_inner<T>(f: impl FnOnce(&mut Inner) -> T) -> Option<T> {
    WATCH.get().map(|watch| f(&mut watch.inner()))
}

/// Starts the watchdog of this process if none runs. Rank and number of ranks come from the launcher.
pub fn start(rank: usize, world_size: usize) -> Result<()> {
    if WATCH.get().is_some() {
        return Ok(());
    }
    let inner = Inner {
        rank,
        world_size,
        ranks: Vec::new(),
        seen: Vec::new(),
        board: Board::alone()?,
        phase: String::new(),
        doing: String::new(),
        begun: Vec::new(),
        keeps_steps: false,
        waits: Vec::new(),
        next_id: 0,
    };
    let watch = Watch {
        limits: Limits::from_environment()?,
        inner: Mutex::new(inner),
        probes: Mutex::default(),
        on_end: Mutex::default(),
    };
    bus::listen()?;
    if WATCH.set(watch).is_ok() {
        let thread = std::thread::Builder::new().name("watchdog".into());
        thread.spawn(|| run(WATCH.get().expect("set above"))).context("starting the watchdog")?;
    }
    Ok(())
}

/// Gives the watchdog the rank of this process in its world and the board that the ranks of its node share.
pub fn join(board: Board, rank: usize, world_size: usize, ranks: Vec<usize>) {
    with_inner(|inner| inner.join(board, rank, world_size, ranks));
}

/// Says which action of its phase this rank begins. In tests, makes the pause that is set for it.
pub fn at(action: impl std::fmt::Display) {
    with_inner(|inner| {
        inner.doing = format!("{}: {action}", inner.phase);
        inner.publish();
    });
    fault::drag();
}

/// Begins a part of the run. In tests, makes the fault that is set for it.
pub fn phase(phase: Phase) -> Result<()> {
    let rank = with_inner(|inner| {
        inner.phase = phase.text();
        inner.doing.clone_from(&inner.phase);
        inner.publish();
        inner.note(phase);
        inner.rank
    });
    match rank {
        Some(rank) => fault::inject(rank, phase),
        None => Ok(()),
    }
}

/// Keeps the time at which each step begins, for [`begun`].
pub fn keep_steps() {
    with_inner(|inner| inner.keeps_steps = true);
}

/// Returns the phases of this rank so far, each with the time at which it began; steps only after [`keep_steps`].
pub fn begun() -> Vec<(Phase, Instant)> {
    with_inner(|inner| inner.begun.clone()).unwrap_or_default()
}

/// Reports progress of a long action, while others may be waiting for this rank.
pub fn beat() {
    with_inner(|inner| inner.board.beat());
}

/// A wait that is under way until this is dropped.
#[must_use]
pub struct Wait(Option<u64>);

/// Begins a wait for other ranks or for a device, in the action of this name.
pub fn wait(name: impl Into<String>) -> Wait {
    wait_within(name, Limit::Any, None)
}

/// Begins a wait with a given limit, and with help for the message if it takes too long.
pub fn wait_within(name: impl Into<String>, limit: Limit, help: Option<&'static str>) -> Wait {
    Wait(with_inner(|inner| inner.begin(name.into(), limit, help)))
}

/// Begins a wait for other ranks in the current action.
pub fn wait_here() -> Wait {
    Wait(with_inner(|inner| inner.begin(inner.doing.clone(), Limit::Any, None)))
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some(id) = self.0 {
            with_inner(|inner| inner.end(id));
        }
    }
}

/// A probe that the watchdog looks at until this is dropped.
#[must_use]
pub struct Probed(u64);

/// Looks at `probe` until the returned value is dropped. `help` says what may help when an action takes too long.
pub fn probe(probe: Box<dyn Probe>, help: Option<&'static str>) -> Result<Probed> {
    let watch = WATCH.get().context("the watchdog was not started")?;
    let id = {
        let mut inner = watch.inner();
        inner.next_id += 1;
        inner.next_id
    };
    lock(&watch.probes).push((id, help, probe));
    Ok(Probed(id))
}

impl Drop for Probed {
    fn drop(&mut self) {
        if let Some(watch) = WATCH.get() {
            lock(&watch.probes).retain(|(id, ..)| *id != self.0);
            watch.inner().end(self.0);
        }
    }
}

/// Says that this rank has succeeded, so that its process may end.
pub fn done() {
    with_inner(|inner| inner.board.set_state(State::Done));
}

/// Calls `note` with how and why when a rank of this node ends all ranks, on a thread of this process. It replaces what was set before.
pub fn on_end(note: impl FnOnce(End, &str) + Send + 'static) {
    if let Some(watch) = WATCH.get() {
        *lock(&watch.on_end) = Some(Box::new(note));
    }
}

/// Calls what [`on_end`] has set, once, if a rank has said why all ranks end.
pub fn tell_the_end() {
    let Some(watch) = WATCH.get() else { return };
    let Some((end, why)) = watch.inner().end_of_all() else { return };
    let note = lock(&watch.on_end).take();
    if let Some(note) = note {
        // It may write to a disk that does not answer.
        end_soon();
        note(end, &why);
    }
}

/// Returns true on the one rank of this node that reports why all ranks end. The others wait here to be ended, and return false if
/// nobody ends them. With `gives_way`, rank 0 reports it if it fails too. [`on_end`] gets `end` and `why`, unless `why` is
/// empty.
pub fn takes_the_word(gives_way: bool, end: End, why: &str) -> bool {
    let Some(watch) = WATCH.get() else { return true };
    let (is_rank_0, has_a_board) = {
        let inner = watch.inner();
        inner.board.set_state(State::Done);
        (inner.rank == 0, !inner.ranks.is_empty())
    };
    if gives_way && !is_rank_0 {
        std::thread::sleep(if has_a_board { RANK_0_FIRST } else { RANK_0_FIRST_WITHOUT_A_BOARD });
    }
    let takes = watch.inner().board.take_the_word(end, why);
    if !takes {
        // The other rank may be about to write its reason, and this thread may be the watchdog.
        std::thread::sleep(TICK);
        tell_the_end();
        std::thread::sleep(WAIT_FOR_THE_END);
    }
    takes
}

/// Counts how long no rank has made progress.
struct Quiet {
    beats: u64,
    time: Duration,
}

impl Quiet {
    /// Counts a tick that took this long.
    fn tick(&mut self, beats: u64, elapsed: Duration) {
        self.time = if beats == self.beats { self.time + elapsed.min(LONGEST_TICK) } else { Duration::ZERO };
        self.beats = beats;
    }
}

fn run(watch: &Watch) {
    let mut quiet = Quiet { beats: 0, time: Duration::ZERO };
    let mut silenced = Duration::ZERO;
    let mut last = Instant::now();
    for tick in 0.. {
        std::thread::sleep(TICK);
        let elapsed = last.elapsed();
        last = Instant::now();
        if let Err(error) = look_at_probes(watch) {
            end_all_ranks(&format!("{error:#}"), Duration::ZERO);
        }
        if let Some(message) = bus::message() {
            end_all_ranks(&message, Duration::ZERO);
        }
        let (beats, another_speaks) = {
            let inner = watch.inner();
            (inner.board.beats(), inner.board.another_speaks())
        };
        quiet.tick(beats, elapsed);
        if another_speaks {
            tell_the_end();
            // That rank ends all ranks; if it cannot, this one ends by itself.
            silenced += elapsed;
            if silenced > WAIT_FOR_THE_END {
                abort(1);
            }
            continue;
        }
        if tick % TICKS_OF_A_LOOK == 0
            && let Some(message) = gone(watch)
        {
            end_all_ranks(&message, LAUNCHER_FIRST);
        }
        if let Some(message) = timed_out(watch, quiet.time) {
            end_all_ranks(&message, Duration::ZERO);
        }
    }
}

/// Counts actions that are under way on GPUs as waits of this rank.
fn look_at_probes(watch: &Watch) -> Result<()> {
    for (id, help, probe) in lock(&watch.probes).iter_mut() {
        let (ended, oldest) = probe.look()?;
        let mut inner = watch.inner();
        let known = inner.waits.iter().find(|wait| wait.id == *id).map(|wait| &wait.name);
        if ended > 0 || known != oldest.as_ref() {
            inner.waits.retain(|wait| wait.id != *id);
            if let Some(name) = oldest {
                // It comes first, because a host that ran ahead waits for it.
                inner.waits.insert(0, Waiting { id: *id, name, limit: Limit::Any, help: *help });
            }
            inner.publish();
        }
    }
    Ok(())
}

/// Returns the message about a rank of this node whose process has ended without a message of its own.
fn gone(watch: &Watch) -> Option<String> {
    let running: Vec<(usize, Record)> = {
        let inner = watch.inner();
        let records = inner.ranks.iter().enumerate().map(|(local, &rank)| (rank, inner.board.read(local)));
        records.filter(|(rank, record)| inner.seen.contains(rank) && record.state == State::Running).collect()
    };
    let (rank, Record { process, doing, .. }) =
        running.into_iter().find(|(_, record)| process::look(record.process, record.started) == Process::Gone)?;
    // The rank may have written its end after its record was read.
    let inner = watch.inner();
    let local = inner.ranks.iter().position(|&other| other == rank)?;
    (inner.board.read(local).state == State::Running && !inner.board.another_speaks()).then(|| {
        format!(
            "rank {rank} (process {process}) was killed or has crashed at {doing}: where the kernel ran out of memory, `dmesg` \
             says so"
        )
    })
}

/// Returns the message about a wait that has taken too long.
fn timed_out(watch: &Watch, quiet: Duration) -> Option<String> {
    let inner = watch.inner();
    let wait = inner.waits.iter().find(|wait| watch.limits.of(wait.limit).0 <= quiet)?;
    let (limit, variable) = watch.limits.of(wait.limit);
    let ranks = inner.ranks.iter().enumerate().map(|(local, &rank)| {
        let record = inner.board.read(local);
        let process = process::look(record.process, record.started);
        (rank, record, process)
    });
    let ranks: Vec<_> = ranks.collect();
    let (name, limit_s, help, world_size) = (&wait.name, limit.as_secs(), wait.help, inner.world_size);
    Some(TimeOut { name, limit_s, variable, help, ranks: &ranks, world_size }.text())
}

/// Prints the message and ends all ranks after a pause. It never returns: this rank may itself be waiting for the action.
fn end_all_ranks(message: &str, pause: Duration) -> ! {
    end_soon();
    let has_no_board = with_inner(|inner| inner.ranks.is_empty()).unwrap_or(true);
    if takes_the_word(has_no_board, End::Failed, message) {
        logging::error(&with_inner(|inner| inner.prefix()).unwrap_or_default(), &format!("error: {message}"));
        tell_the_end();
        std::thread::sleep(pause);
    }
    abort(1)
}

/// Ends this process even if its orderly end waits for the stuck action.
pub fn end_soon() {
    let thread = std::thread::Builder::new().name("end".into());
    // If the thread cannot be started, ending this process is left to the launcher.
    let _ = thread.spawn(|| {
        std::thread::sleep(END_IN_ANY_CASE);
        let _ = kill_process(getpid(), Signal::KILL);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_in_which_nothing_moves_counts() {
        let (second, mut quiet) = (Duration::from_secs(1), Quiet { beats: 0, time: Duration::ZERO });
        (0..5).for_each(|_| quiet.tick(0, second));
        assert_eq!(quiet.time, 5 * second);
        quiet.tick(1, second);
        assert_eq!(quiet.time, Duration::ZERO, "a rank has moved");
        quiet.tick(1, 3600 * second);
        assert_eq!(quiet.time, LONGEST_TICK, "this process was suspended");
    }
}
