//! Runs of a schedule: their arguments and results, how one is performed, and how one is abandoned.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::comm::spans::{Lane, Span};
use crate::comm::{Queue, Waits, watch};
use crate::device::Ops;
use crate::model::batch::MicroBatch;
use crate::optim::adamw::Update;

use super::check;
use super::exec::Engine;
use super::schedule::{Action, Descriptor, Mode, build};
use super::unwind;

/// Stands between the scores of target tokens and their gradients.
pub trait Objective: Debug + Sync {
    /// Returns the factor of −log p of each target token of a micro-batch in the gradient. `log_probabilities` has
    /// those of each micro-batch that has been scored.
    fn coefficients(&self, micro: usize, log_probabilities: &[Vec<f64>]) -> Vec<f32>;
}

/// The arguments of one run of a schedule, besides its micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct RunArgs<'a> {
    pub mode: Mode,
    /// One for each of M micro-batches. M is the largest of any rank: a rank that has fewer runs empty ones.
    pub micro_batches: &'a [Descriptor],
    /// The objective of training; `None` in other modes.
    pub objective: Option<&'a dyn Objective>,
    /// Seed and step of the dropout masks; `None` switches dropout off.
    pub dropout: Option<(u64, u32)>,
    /// The update that [`Action::Optimizer`] makes.
    pub update: Option<&'a Update>,
    /// The first micro-batch of the next run, if it is known. Its rows are looked up while a GPU computes.
    pub next: Option<&'a MicroBatch>,
}

impl<'a> RunArgs<'a> {
    /// Makes the arguments of a run that does not train.
    pub fn forward(mode: Mode, micro_batches: &'a [Descriptor]) -> RunArgs<'a> {
        RunArgs { mode, micro_batches, objective: None, dropout: None, update: None, next: None }
    }

    /// Returns whether the adapter takes part in any micro-batch.
    pub(super) fn needs_adapter(&self) -> bool {
        self.micro_batches.iter().any(|micro| micro.adapter)
    }
}

/// The results of a run.
#[derive(Clone, Debug, Default)]
pub struct RunOutput {
    /// log p of each target token, by micro-batch.
    pub log_probabilities: Vec<Vec<f64>>,
    /// Number of target tokens to which the model gives no smaller probability than to any other.
    pub num_most_likely: usize,
    /// Global norm before clipping (training).
    pub grad_norm: f64,
    /// True if the trainable values were updated. They are not if a loss or a gradient of any rank is not finite.
    pub updated: bool,
    /// Time for which the computation stood still.
    pub waits: Waits,
    pub elapsed: Duration,
    /// Bytes of frozen shards received from other ranks.
    pub gathered_bytes: usize,
}

/// Answers whether a run is to be abandoned, of which this part is done.
pub type Abandons<'a> = dyn FnMut(f64) -> Result<bool> + 'a;

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// Builds the schedule, checks it, and performs it.
    pub fn run(&mut self, args: &RunArgs<'_>, batches: &[MicroBatch]) -> Result<RunOutput> {
        self.run_unless(args, batches, &mut |_| Ok(false))?.context("the run was abandoned")
    }

    /// Runs like [`Engine::run`], but asks before each action whether to abandon the run. `abandons` gets the part of
    /// the actions that is done, from 0 to below 1, and must answer alike on every rank. An abandoned run (`None`) has
    /// changed no trained value.
    pub fn run_unless(
        &mut self,
        args: &RunArgs<'_>,
        batches: &[MicroBatch],
        abandons: &mut Abandons<'_>,
    ) -> Result<Option<RunOutput>> {
        let inputs = self.limits.inputs(self.units, args.mode, args.micro_batches);
        let actions = build(&inputs);
        check::check(&actions, &inputs)?;
        self.perform_unless(&actions, args, batches, abandons)
    }

    /// Switches the recording of spans on or off for the runs that follow.
    pub fn record_spans(&mut self, on: bool) {
        self.spans = on.then(Vec::new);
        self.queue.record_spans(on);
    }

    /// Spans of the last run; empty if they were not recorded.
    pub fn spans(&self) -> &[Span] {
        self.spans.as_deref().unwrap_or_default()
    }

    /// Performs any list of actions.
    pub fn perform(&mut self, actions: &[Action], args: &RunArgs<'_>, batches: &[MicroBatch]) -> Result<RunOutput> {
        self.perform_unless(actions, args, batches, &mut |_| Ok(false))?.context("the run was abandoned")
    }

    fn perform_unless(
        &mut self,
        actions: &[Action],
        args: &RunArgs<'_>,
        batches: &[MicroBatch],
        abandons: &mut Abandons<'_>,
    ) -> Result<Option<RunOutput>> {
        let start = Instant::now();
        let mut output =
            RunOutput { log_probabilities: vec![Vec::new(); args.micro_batches.len()], ..Default::default() };
        let begin = self.device.mark()?;
        let mut marks = Vec::new();
        for (i, action) in actions.iter().enumerate() {
            if abandons(i as f64 / actions.len() as f64)? {
                self.unwind(&actions[..i], args, batches)?;
                return Ok(None);
            }
            let before = if self.spans.is_some() { Some(self.device.mark()?) } else { None };
            self.take(action, args, batches, &mut output)?;
            if let Some(before) = before {
                marks.push((action, before, self.device.mark()?));
            }
        }
        self.finish_queues()?;
        if let Some(spans) = &mut self.spans {
            *spans = self.queue.take_spans(&begin)?;
            for (action, from, to) in marks {
                let seconds = |at| self.device.seconds_between(&begin, at);
                let (name, begin, end) = (format!("{action:?}"), seconds(&from)?, seconds(&to)?);
                spans.push(Span { lane: Lane::Compute, name, begin, end });
            }
        }
        output.elapsed = start.elapsed();
        output.waits = self.queue.take_waits()?;
        Ok(Some(output))
    }

    /// Ends a run after these actions: all that is under way is waited for and given up.
    fn unwind(&mut self, done: &[Action], args: &RunArgs<'_>, batches: &[MicroBatch]) -> Result<()> {
        let mut output = RunOutput::default();
        for action in unwind::actions(done) {
            self.take(&action, args, batches, &mut output)?;
        }
        self.boundaries.clear()?;
        self.finish_queues()?;
        self.queue.take_waits().map(drop)
    }

    /// Performs one action.
    fn take(
        &mut self,
        action: &Action,
        args: &RunArgs<'_>,
        batches: &[MicroBatch],
        output: &mut RunOutput,
    ) -> Result<()> {
        let empty = MicroBatch::new();
        watch::at(format!("{action:?}"));
        // On a GPU the long part is waiting for the device.
        let _wait = (!D::IS_HOST).then(watch::wait_here);
        self.act(action, args, |micro| batches.get(micro).unwrap_or(&empty), output)
            .with_context(|| format!("{action:?}"))
    }

    fn finish_queues(&mut self) -> Result<()> {
        watch::at("the end of the queues");
        let _wait = watch::wait_here();
        self.device.synchronize()
    }
}
