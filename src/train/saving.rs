//! The trained values on their way from the ranks to files: checkpoints while training goes on, and the adapter at
//! its end.
//!
//! Between two steps the values come to rank 0, layer by layer, into a snapshot, whose memory was taken at the start. A
//! thread of low priority writes them from there while the next steps are taken, without a collective.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::setpriority_process;

use crate::checkpoint::adapter::{Adapter, AdapterSettings};
use crate::checkpoint::output::record::RunIdentity;
use crate::checkpoint::state::{self, Checkpoint, Found, Progress, Values};
use crate::comm::Queue;
use crate::comm::watch::{self, Phase};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::snapshot::{KINDS, Snapshot};
use crate::model::spec::ModelSpec;

use super::log::Log;

/// Niceness of the thread that writes: computation goes first.
const NICE: i32 = 10;
const GONE: &str = "the thread that writes checkpoints has panicked";

/// The parts of a checkpoint that stay as they are during a run.
pub struct Fixed {
    /// Folder that gets the checkpoints.
    pub output: PathBuf,
    /// Path of the base model.
    pub base: PathBuf,
    pub spec: ModelSpec,
    pub settings: AdapterSettings,
    pub run: RunIdentity,
    /// Number of checkpoints that are kept; `None` keeps all.
    pub limit: Option<usize>,
}

/// Writes checkpoints and removes old ones, on a thread of its own; rank 0 has it.
pub struct Writer {
    output: PathBuf,
    log: Log,
    /// `None` while a checkpoint is being written.
    snapshot: Option<Snapshot>,
    /// `None` once no order will come any more.
    orders: Option<Sender<Order>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
    num_open_orders: usize,
    /// The newest checkpoint, until a step after it shows that its adapter is good: its step, and that of the best
    /// checkpoint then.
    unproved: Option<(usize, Option<usize>)>,
    /// True if the newest checkpoint could not be written.
    has_failed: bool,
    /// Duration of the slowest save.
    pub slowest: Duration,
}

enum Order {
    Write {
        snapshot: Snapshot,
        progress: Progress,
        metrics: Vec<u8>,
        begun: Instant,
    },
    /// Removes the oldest checkpoints up to this step, except the best.
    Prune {
        step: usize,
        best: Option<usize>,
    },
}

enum Answer {
    Written { snapshot: Snapshot, result: Result<()>, took: Duration },
    Pruned,
}

impl Writer {
    /// Starts the thread. `progress` is that of the checkpoint from which the run goes on, or none.
    pub fn new(fixed: Fixed, snapshot: Snapshot, progress: &Progress, log: Log) -> Result<Writer> {
        let (output, snapshot) = (fixed.output.clone(), Some(snapshot));
        let (orders, to_do) = channel();
        let (done, answers) = channel();
        let work = move || {
            // On Linux this is the priority of the thread. Where it cannot be lowered, writing goes on as it is.
            let _ = setpriority_process(None, NICE);
            // The loop ends when the writer is dropped.
            for order in to_do {
                let _ = done.send(fixed.carry_out(order, log));
            }
        };
        let thread = Some(std::thread::Builder::new().name("checkpoint".into()).spawn(work)?);
        let orders = Some(orders);
        let unproved = (progress.step > 0).then(|| steps_of(progress));
        Ok(Writer {
            output,
            log,
            snapshot,
            orders,
            answers,
            thread,
            num_open_orders: 0,
            unproved,
            has_failed: false,
            slowest: Duration::ZERO,
        })
    }

    /// Returns the newest complete checkpoint of a step before `limit`.
    pub fn newest_before(&self, limit: usize) -> Option<(usize, PathBuf)> {
        state::list(&self.output).into_iter().find(|(step, _)| *step < limit)
    }

    /// Waits until the thread has done all that it was told. Fails if a checkpoint could not be written.
    pub fn settle(&mut self) -> Result<()> {
        let mut result = Ok(());
        while self.num_open_orders > 0 {
            let wait = watch::wait("writing a checkpoint");
            let answer = self.answers.recv().context(GONE)?;
            drop(wait);
            result = result.and(self.take(answer));
        }
        result
    }

    /// Waits like [`Writer::settle`], and says if a checkpoint could not be written. Returns whether that is so of the newest one.
    pub fn settle_or_tell(&mut self) -> bool {
        if let Err(error) = self.settle() {
            self.tell(&error);
        }
        self.has_failed
    }

    /// Takes note of what the thread has done since the last look.
    pub fn look(&mut self) {
        while let Ok(answer) = self.answers.try_recv() {
            if let Err(error) = self.take(answer) {
                self.tell(&error);
            }
        }
    }

    fn take(&mut self, answer: Answer) -> Result<()> {
        self.num_open_orders -= 1;
        let Answer::Written { snapshot, result, took } = answer else { return Ok(()) };
        self.snapshot = Some(snapshot);
        self.slowest = self.slowest.max(took);
        self.has_failed = result.is_err();
        result
    }

    /// Says that a checkpoint could not be written. Training goes on, since its end may find room again.
    pub fn tell(&self, error: &anyhow::Error) {
        self.log.warn(format!("a checkpoint could not be written, and training goes on without it: {error:#}"));
    }

    /// Takes note of a step with a finite loss. If it began with the adapter of the newest checkpoint, that one is
    /// good, and older ones are removed, except the best of then: a later one may not be written yet.
    pub fn proves(&mut self, step: usize) -> Result<()> {
        match self.unproved.take_if(|(saved, _)| *saved < step) {
            Some((step, best)) => self.order(Order::Prune { step, best }),
            None => Ok(()),
        }
    }

    fn order(&mut self, order: Order) -> Result<()> {
        self.orders.as_ref().context(GONE)?.send(order).ok().context(GONE)?;
        self.num_open_orders += 1;
        Ok(())
    }
}

impl Drop for Writer {
    /// Lets the thread finish.
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Fixed {
    fn carry_out(&self, order: Order, log: Log) -> Answer {
        let Fixed { output, base, spec, settings, run, limit } = self;
        match order {
            Order::Write { snapshot, progress, metrics, begun } => {
                let [adapter, exp_avg, exp_avg_sq] = [0, 1, 2].map(|kind| snapshot.values(kind));
                let values = Values { settings, adapter, exp_avg, exp_avg_sq };
                let checkpoint = Checkpoint { values: &values, progress, run, spec, base, metrics: &metrics };
                let written = checkpoint.write(output).with_context(|| format!("checkpoint of step {}", progress.step));
                let result = written.map(|path| log.line(format!("checkpoint: {}", path.display())));
                Answer::Written { snapshot, result, took: begun.elapsed() }
            }
            Order::Prune { step, best } => {
                let pruned = limit.map_or(Ok(()), |limit| state::prune(output, step, limit, best));
                if let Err(error) = pruned {
                    log.warn(format!("old checkpoints could not be removed: {error:#}"));
                }
                Answer::Pruned
            }
        }
    }
}

/// The step of a checkpoint, and that of the best checkpoint then.
fn steps_of(progress: &Progress) -> (usize, Option<usize>) {
    (progress.step, progress.evaluations.best_checkpoint.map(|best| best.step))
}

/// Takes a checkpoint after a step, and starts to write it. Collective.
pub fn save<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    mut writer: Option<&mut Writer>,
    progress: Progress,
    metrics: &[u8],
) -> Result<()> {
    watch::phase(Phase::Checkpoint)?;
    if let Some(writer) = writer.as_deref_mut() {
        writer.settle_or_tell();
    }
    let begun = Instant::now();
    let mut snapshot = writer.as_deref_mut().and_then(|writer| writer.snapshot.take());
    engine.snapshot(snapshot.as_mut())?;
    let (Some(writer), Some(snapshot)) = (writer, snapshot) else { return Ok(()) };
    (writer.unproved, writer.has_failed) = (Some(steps_of(&progress)), false);
    writer.order(Order::Write { snapshot, progress, metrics: metrics.to_vec(), begun })
}

/// Gives every rank its part of a checkpoint's values, which rank 0 reads. Collective.
pub fn restore<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    found: Option<&Found>,
    settings: &AdapterSettings,
    spec: &ModelSpec,
) -> Result<()> {
    watch::phase(Phase::Resume)?;
    let mut scatter = |layer: usize, values: [Vec<f32>; 3]| {
        KINDS
            .into_iter()
            .zip(values)
            .try_for_each(|(kind, mut values)| engine.scatter_trainable(layer, kind, &mut values))
    };
    match found {
        Some(found) => found.values(settings, spec, scatter),
        None => (0..spec.num_layers()).try_for_each(|layer| scatter(layer, [const { Vec::new() }; 3])),
    }
}

/// Returns the adapter as it is now on rank 0, and `None` elsewhere. Collective.
pub fn adapter<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, settings: &AdapterSettings) -> Result<Option<Adapter>> {
    let layers = engine.trained_values()?;
    Ok((engine.queue.rank() == 0).then(|| Adapter { settings: settings.clone(), layers }))
}
