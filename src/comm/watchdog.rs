//! A thread that sees to it that what was started on a GPU ends: an action that takes too long, or an error that NCCL found on
//! the way, ends all ranks with the name of the action.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cudarc::driver::CudaEvent;

use super::mpi::abort;
use super::nccl::Nccl;

/// Time between two looks.
const POLL: Duration = Duration::from_millis(5);

/// An action's name and the event that follows it.
type Watched = (String, Arc<CudaEvent>);

/// The thread, which ends when this is dropped.
pub struct Watchdog {
    actions: Option<Sender<Watched>>,
    gives_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Of rank `rank`.
    pub fn new(nccl: Vec<Arc<Nccl>>, rank: usize) -> Result<Watchdog> {
        let (actions, watched) = channel();
        let (gives_up, timeout) = (Arc::new(AtomicBool::new(false)), super::timeout()?);
        let stop = gives_up.clone();
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || watch(watched, &nccl, rank, timeout, &stop))
            .context("starting the watchdog")?;
        Ok(Watchdog { actions: Some(actions), gives_up, thread: Some(thread) })
    }

    /// Actions are watched in the order in which they are given.
    pub fn watch(&self, name: String, done: Arc<CudaEvent>) {
        if let Some(actions) = &self.actions {
            // The thread ends before the sender only by ending the process.
            let _ = actions.send((name, done));
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.gives_up.store(true, Ordering::Relaxed);
        self.actions = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was told by the panic hook, which ends the process.
            let _ = thread.join();
        }
    }
}

fn watch(actions: Receiver<Watched>, nccl: &[Arc<Nccl>], rank: usize, timeout: Duration, gives_up: &AtomicBool) {
    let fail = |message: String| end_all_ranks(&format!("rank {rank}: error: {message}"));
    for (name, done) in actions {
        let start = Instant::now();
        while !gives_up.load(Ordering::Relaxed) {
            if let Err(error) = nccl.iter().try_for_each(|nccl| nccl.check_errors()) {
                fail(format!("{name}: {error:#}"));
            }
            match done.try_is_complete() {
                Ok(true) => break,
                Ok(false) if start.elapsed() < timeout => std::thread::sleep(POLL),
                Ok(false) => {
                    let seconds = timeout.as_secs();
                    fail(format!("{name} did not end within {seconds} s: another rank is stuck or gone"))
                }
                Err(error) => fail(format!("{name}: the GPU reports: {error}")),
            }
        }
    }
}

/// The executor may be waiting for the very action, so there is nothing to return to.
fn end_all_ranks(message: &str) -> ! {
    crate::stderr::line(message);
    abort(1)
}
