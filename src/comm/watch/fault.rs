//! Deliberate faults, `FSDP_QLORA_FAULT=KIND:RANK:PHASE`, for tests of how a job ends.
//!
//! KIND is `panic`, `error`, `abort` (dies without a message), `kill` and `stop` (send SIGKILL and SIGSTOP to the
//! process itself), `hang`, `slow` (takes some seconds and reports progress) or `drag=MS` (pauses for so many
//! milliseconds before each action from here on). PHASE is the number of a step or a word of [`Phase::word`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, getpid, kill_process};

use super::Phase;

const VARIABLE: &str = "FSDP_QLORA_FAULT";

/// Number of times that a slow rank reports progress, and the time between.
const SLOW_BEATS: u32 = 8;
const SLOW_PAUSE: Duration = Duration::from_millis(500);

/// The pause before each action of this rank, in milliseconds.
static PAUSE_MS: AtomicU64 = AtomicU64::new(0);

/// Makes the pause before an action.
pub fn drag() {
    let pause = PAUSE_MS.load(Ordering::Relaxed);
    if pause > 0 {
        std::thread::sleep(Duration::from_millis(pause));
    }
}

/// Makes the fault that the variable asks for at this rank and phase, if any.
pub fn inject(rank: usize, phase: Phase) -> Result<()> {
    let Ok(fault) = std::env::var(VARIABLE) else { return Ok(()) };
    let parts: Vec<&str> = fault.split(':').collect();
    let [kind, at_rank, at_phase] = parts[..] else {
        bail!("{VARIABLE} is {fault:?}; allowed: panic|error|abort|kill|stop|hang|slow|drag=MS:RANK:PHASE")
    };
    let at_rank: usize = at_rank.parse().with_context(|| format!("{VARIABLE}: {at_rank:?} is no rank"))?;
    if at_rank != rank || at_phase != phase.word() {
        return Ok(());
    }
    match kind {
        "panic" => panic!("a panic was asked for by {VARIABLE}"),
        "error" => bail!("an error was asked for by {VARIABLE}"),
        "abort" => std::process::abort(),
        "kill" => kill_process(getpid(), Signal::KILL)?,
        "stop" => kill_process(getpid(), Signal::STOP)?,
        "hang" => loop {
            std::thread::park();
        },
        "slow" => (0..SLOW_BEATS).for_each(|_| {
            std::thread::sleep(SLOW_PAUSE);
            super::beat();
        }),
        other => match other.strip_prefix("drag=").and_then(|text| text.parse().ok()) {
            Some(pause) => PAUSE_MS.store(pause, Ordering::Relaxed),
            None => bail!("{VARIABLE}: {other:?}; allowed: panic, error, abort, kill, stop, hang, slow, drag=MS"),
        },
    }
    Ok(())
}
