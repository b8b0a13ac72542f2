//! The trained values on their way from the ranks to files: checkpoints while training goes on, and the adapter at
//! its end.
//!
//! Between two steps the values come to rank 0, layer by layer, into memory that was taken at the start. A thread
//! writes them from there while the next steps are taken, without a collective.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::checkpoint::adapter::{Adapter, AdapterSettings};
use crate::checkpoint::output::record::RunIdentity;
use crate::checkpoint::state::{self, Checkpoint, Found, Progress, Values};
use crate::comm::Queue;
use crate::comm::watch::{self, Phase};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::grads::Values as Kind;
use crate::model::spec::ModelSpec;

use super::log::Log;

/// The values that a checkpoint holds, in the order in which they come.
pub const KINDS: [Kind; 3] = [Kind::Master, Kind::ExpAvg, Kind::ExpAvgSq];

/// The parts of a checkpoint that stay as they are during a run.
pub struct Fixed {
    /// Folder that gets the checkpoints.
    pub output: PathBuf,
    /// Path of the base model.
    pub base: PathBuf,
    pub spec: ModelSpec,
    pub run: RunIdentity,
    /// Number of checkpoints that are kept; `None` keeps all.
    pub limit: Option<usize>,
}

/// Writes checkpoints; rank 0 has it.
pub struct Writer {
    fixed: Arc<Fixed>,
    log: Log,
    /// `None` while a checkpoint is being written.
    values: Option<Box<Values>>,
    thread: Option<JoinHandle<Written>>,
    /// Duration of the slowest save.
    pub slowest: Duration,
}

/// The end of a save: the memory that it used, the path or an error, and its duration.
struct Written {
    values: Box<Values>,
    result: Result<PathBuf>,
    took: Duration,
}

impl Writer {
    /// Takes the memory for the values of training from this adapter.
    pub fn new(fixed: Fixed, adapter: &Adapter, log: Log) -> Writer {
        let values = Some(Box::new(Values::like(adapter)));
        Writer { fixed: Arc::new(fixed), log, values, thread: None, slowest: Duration::ZERO }
    }

    /// Waits for the checkpoint that is being written, if there is one. Fails if it could not be written.
    pub fn settle(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let wait = watch::wait("writing a checkpoint");
        let Written { values, result, took } =
            thread.join().map_err(|_| anyhow!("the thread that writes checkpoints has panicked"))?;
        drop(wait);
        self.values = Some(values);
        self.slowest = self.slowest.max(took);
        let path = result?;
        self.log.line(format!("checkpoint: {}", path.display()));
        Ok(())
    }

    /// Takes note of the checkpoint that was being written, if it is done.
    pub fn look(&mut self) -> Result<()> {
        match &self.thread {
            Some(thread) if thread.is_finished() => self.settle().or_else(|error| self.tell(&error)),
            _ => Ok(()),
        }
    }

    /// Says that a checkpoint could not be written. Training goes on, since its end may find room again.
    pub fn tell(&self, error: &anyhow::Error) -> Result<()> {
        self.log.line(format!("a checkpoint could not be written, and training goes on without it: {error:#}"));
        Ok(())
    }

    fn start(&mut self, values: Box<Values>, progress: Progress, metrics: &[u8], begun: Instant) -> Result<()> {
        let (fixed, metrics) = (self.fixed.clone(), metrics.to_vec());
        let write = move || {
            let Fixed { output, base, spec, run, limit } = &*fixed;
            let checkpoint = Checkpoint { values: &values, progress, run, spec, base, metrics: &metrics };
            let written = checkpoint.write(output).and_then(|path| {
                limit.map_or(Ok(()), |limit| state::prune(output, progress.step, limit))?;
                Ok(path)
            });
            let step = progress.step;
            let result = written.with_context(|| format!("checkpoint of step {step}"));
            Written { values, result, took: begun.elapsed() }
        };
        self.thread = Some(std::thread::Builder::new().name("checkpoint".into()).spawn(write)?);
        Ok(())
    }
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
        writer.settle().or_else(|error| writer.tell(&error))?;
    }
    let begun = Instant::now();
    let mut values = writer.as_deref_mut().and_then(|writer| writer.values.take());
    for layer in 0..engine.spec().num_layers() {
        for kind in KINDS {
            let gathered = engine.gather_trainable_to_host(layer, kind)?;
            let Some(values) = &mut values else { continue };
            let of_layer = match kind {
                Kind::ExpAvg => &mut values.exp_avg[layer],
                Kind::ExpAvgSq => &mut values.exp_avg_sq[layer],
                _ => &mut values.adapter.layers[layer],
            };
            of_layer.copy_from_slice(&gathered);
        }
    }
    match (writer, values) {
        (Some(writer), Some(values)) => writer.start(values, progress, metrics, begun),
        _ => Ok(()),
    }
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

/// Returns the adapter as it is now, where it `is_wanted`. Collective.
pub fn adapter<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    settings: &AdapterSettings,
    is_wanted: bool,
) -> Result<Option<Adapter>> {
    let mut layers = Vec::new();
    for layer in 0..engine.spec().num_layers() {
        let values = engine.gather_trainable_to_host(layer, Kind::Master)?;
        if is_wanted {
            layers.push(values);
        }
    }
    Ok(is_wanted.then(|| Adapter { settings: settings.clone(), layers }))
}
