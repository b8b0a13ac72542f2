//! The loop over steps.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::checkpoint::mapped::MappedBase;
use crate::checkpoint::state::Progress;
use crate::comm::Queue;
use crate::comm::watch::{self, Phase};
use crate::data::{self, Dataset, Sampler};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::model::batch::MicroBatch;
use crate::model::trainable::Kind;
use crate::optim::adamw::Update;
use crate::plan::{ceiling, trace};
use crate::progress;
use crate::recipe::{Steps, TrainingJob};

use super::best::Bests;
use super::log::{Log, duration};
use super::metrics::{EvalMetrics, MetricsFile, StepMetrics, peak_host_bytes};
use super::saving::{self, Writer};
use super::skipping::{self, Fate, NotFinite, has_updated};
use super::step::{StepArgs, StepRecord, step_unless};
use super::stop::{Activity, Stop};
use super::{check, eval};

/// Steps between two looks at whether ranks that hold the same values hold the same bytes.
const REPLICA_CHECK_STEPS: usize = 100;

/// A run and all that it works on.
pub struct Run<'a, D: Ops, Q: Queue<D>> {
    pub engine: &'a mut Engine<D, Q>,
    pub job: &'a TrainingJob,
    pub steps: &'a Steps,
    pub train: &'a Dataset,
    /// True if each epoch has an order of its own.
    pub shuffle: bool,
    pub eval: Option<&'a Dataset>,
    /// Progress so far: of the checkpoint from which the run goes on, or none.
    pub progress: Progress,
    /// Progress when the trained values were last known to be good or unproved, and the number of bytes of metrics.jsonl
    /// then.
    pub last_good: (Progress, usize),
    /// `None` on all ranks but the first, and so is `writer`.
    pub metrics: Option<&'a mut MetricsFile>,
    pub writer: Option<&'a mut Writer>,
    pub log: Log,
    /// The file to which rank 0 writes a trace of the second step after this start, or of the only one.
    pub trace: Option<&'a Path>,
    pub base: &'a MappedBase,
    /// Rate at which this rank's GPU multiplies large matrices, in FLOP/s, if it is known.
    pub matrix_flops: Option<f64>,
    pub stop: Stop,
    /// Progress in the newest checkpoint; that before the first step if there is none.
    pub saved: Progress,
    pub bests: Bests,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// The run was stopped after this step, for this reason. If the step is not 0, its checkpoint is there.
    Stopped { step: usize, reason: String },
}

/// The kinds of matrices whose gradients have been checked since the program was started.
#[derive(Default)]
struct Checked {
    a: bool,
    b: bool,
}

impl<D: Ops, Q: Queue<D>> Run<'_, D, Q> {
    /// Trains to the last step, with an evaluation before the first and after the last. A step whose loss or gradient
    /// is not finite updates nothing; if too many do so in a row, the last good adapter is kept, and the run fails.
    pub fn run(&mut self) -> Result<Outcome> {
        match self.train() {
            Err(error) if error.is::<NotFinite>() => Err(self.keep_last_good(error)?),
            result => result,
        }
    }

    fn train(&mut self) -> Result<Outcome> {
        let num_steps = self.steps.num_steps;
        let mut sampler = self.sampler();
        let (start, first, mut checked) = (Instant::now(), self.progress.step, Checked::default());
        self.progress.owes_evaluation |= first == 0;
        let Some(mut is_last) = self.judge(first == num_steps)? else { return self.stopped() };
        let mut next = (first < num_steps).then(|| self.batches(&mut sampler, first));
        for step_idx in first..num_steps {
            let Some(batches) = next.take().filter(|_| !is_last) else { break };
            watch::phase(Phase::Step(step_idx + 1))?;
            next = (step_idx + 1 < num_steps).then(|| self.batches(&mut sampler, step_idx + 1));
            let is_traced = self.trace.is_some() && step_idx == (first + 1).min(num_steps - 1);
            let upcoming = next.as_ref().and_then(|batches| batches.first());
            let Some((record, update)) = self.step(step_idx, &batches, upcoming, is_traced)? else {
                return self.stopped();
            };
            let (done, left) = (step_idx + 1 - first, num_steps - step_idx - 1);
            self.progress.step = step_idx + 1;
            let fate = skipping::note(&mut self.progress, &record);
            let ceiling_share = self.ceiling_share(&batches, &record);
            self.record(&update, &record, ceiling_share, start.elapsed().mul_f64(left as f64 / done as f64))?;
            self.take_note(fate, &record, &update, &batches, &mut checked)?;
            let step = self.progress.step;
            self.progress.owes_evaluation = left == 0 || self.job.eval.is_at(step, self.steps.epochs);
            is_last = match self.judge(left == 0)? {
                Some(is_last) => is_last,
                None => return self.stopped(),
            };
            self.mark_as_good()?;
            if is_last || step.is_multiple_of(REPLICA_CHECK_STEPS) {
                self.engine.check_replicas()?;
            }
            if let Some(writer) = self.writer.as_deref_mut() {
                writer.look();
            }
            let is_due = self.stop.asks_for_checkpoint() || self.saves();
            if !is_last && is_due {
                self.save()?;
            }
            if !is_last && self.stop.reason.is_some() {
                return self.stopped();
            }
        }
        self.settle()?;
        has_updated(&self.progress)?;
        self.check_last_steps()?;
        Ok(Outcome::Finished)
    }

    /// Returns whether a checkpoint is due after the step. While steps are skipped nothing changes that could be saved.
    pub(super) fn saves(&self) -> bool {
        self.progress.skipped_in_a_row == 0 && self.job.save.is_at(self.progress.step, self.steps.epochs)
    }

    /// Takes a checkpoint, unless what was learned may be wrong. Collective.
    fn save(&mut self) -> Result<()> {
        self.base.check_lengths()?;
        self.settle()?;
        let lines = self.metrics.as_ref().map_or(&[][..], |metrics| metrics.lines());
        saving::save(self.engine, self.writer.as_deref_mut(), self.progress, lines)?;
        self.saved = self.progress;
        if let Some(writer) = &self.writer {
            self.stop.saved_in(writer.slowest);
        }
        Ok(())
    }

    /// Waits until the newest checkpoint is written, and takes note of the best one. Returns whether it could not be written. Collective.
    fn settle(&mut self) -> Result<bool> {
        let has_failed = self.writer.as_deref_mut().is_some_and(Writer::settle_or_tell);
        let has_failed = self.engine.queue.all_reduce_f64("checkpoints", &[f64::from(has_failed)])?[0] > 0.0;
        self.progress.evaluations.best_checkpoint = self.bests.next(self.progress.step, has_failed);
        Ok(has_failed)
    }

    /// Ends the run early: its newest checkpoint is that of the last whole step. Collective.
    fn stopped(&mut self) -> Result<Outcome> {
        let saved = self.saved == self.progress;
        if self.progress.step > 0 && (self.settle()? || !saved) {
            self.save()?;
        }
        self.writer.as_deref_mut().map_or(Ok(()), Writer::settle).context("saving a checkpoint")?;
        let reason = self.stop.reason.clone().context("the run was stopped without a reason")?;
        Ok(Outcome::Stopped { step: self.progress.step, reason })
    }

    /// Takes a step, with a trace of it if one is wanted. `next` is the first micro-batch of the step after it. Returns
    /// `None` if the step was abandoned.
    fn step(
        &mut self,
        step_idx: usize,
        batches: &[MicroBatch],
        next: Option<&MicroBatch>,
        is_traced: bool,
    ) -> Result<Option<(StepRecord, Update)>> {
        let update = self.update(step_idx);
        let args = StepArgs {
            step: step_idx as u32 + 1,
            num_micro_batches: batches.len(),
            update: &update,
            seed: self.job.seed,
            next,
        };
        self.engine.record_spans(is_traced);
        self.stop.begin(Activity::Step)?;
        let Some(record) = step_unless(self.engine, batches, &args, &mut |done| self.stop.abandons(done))? else {
            return Ok(None);
        };
        self.stop.end()?;
        if let Some(path) = self.trace.filter(|_| is_traced && self.engine.queue.rank() == 0) {
            trace::write(path, self.engine.spans())?;
            self.log.line(format!("trace of step {}: {}", step_idx + 1, path.display()));
        }
        Ok(Some((record, update)))
    }

    /// Takes note of the progress up to here as the last that is good, unless a step since has shown otherwise.
    fn mark_as_good(&mut self) -> Result<()> {
        if self.progress.skipped_in_a_row > 0 {
            return Ok(());
        }
        self.last_good = (self.progress, self.metrics.as_ref().map_or(0, |metrics| metrics.lines().len()));
        // A step that updated began with a good adapter.
        let proved = self.progress.last_update == self.progress.step;
        let writer = self.writer.as_deref_mut().filter(|_| proved);
        writer.map_or(Ok(()), |writer| writer.proves(self.progress.step))
    }

    /// Takes note of a step's outcome. Fails if the loss or a gradient was not finite in too many steps in a row.
    fn take_note(
        &mut self,
        fate: Fate,
        record: &StepRecord,
        update: &Update,
        batches: &[MicroBatch],
        checked: &mut Checked,
    ) -> Result<()> {
        let step = self.progress.step;
        match fate {
            Fate::Updated => {
                self.check_gradients(checked, batches)?;
                self.progress.num_updates += 1;
                self.progress.last_update = step;
                self.progress.has_learned |= update.learning_rate > 0.0;
            }
            Fate::Overflowed => {
                let scale = self.progress.loss_scaler.scale();
                self.log
                    .line(format!("step {step}: gradients overflowed fp16, no update; the loss scale is {scale} now"));
            }
            Fate::Skipped => {
                self.log.warn(skipping::allow(&self.progress, record, update, self.job.max_skipped_steps)?);
            }
        }
        Ok(())
    }

    /// Checks the gradients of each kind of matrix at the first step in which they must not be zero.
    fn check_gradients(&mut self, checked: &mut Checked, batches: &[MicroBatch]) -> Result<()> {
        let (checks_a, checks_b) = (self.progress.has_learned && !checked.a, !checked.b);
        for kind in [checks_b.then_some(Kind::B), checks_a.then_some(Kind::A)].into_iter().flatten() {
            let base = self.base;
            let is_zero = |weight: &str| base.weights.is_zero(weight);
            if let Some(line) = check::every_matrix_has_a_gradient(self.engine, kind, batches, &is_zero)? {
                self.log.line(line);
            }
        }
        *checked = Checked { a: checked.a || checks_a, b: true };
        Ok(())
    }

    /// Returns the update that a step ends with.
    fn update(&self, step_idx: usize) -> Update {
        let (job, steps) = (self.job, self.steps);
        Update {
            learning_rate: job.learning_rate * job.lr_scheduler.factor(step_idx, steps.warmup_steps, steps.num_steps),
            lr_ratio: job.loraplus_lr_ratio.unwrap_or(1.0),
            beta1: job.adam_beta1,
            beta2: job.adam_beta2,
            epsilon: job.adam_epsilon,
            weight_decay: job.weight_decay,
            max_grad_norm: job.max_grad_norm,
            loss_scale: self.progress.loss_scaler.scale(),
            step: self.progress.num_updates + 1,
        }
    }

    pub(super) fn batches(&self, sampler: &mut Sampler, step_idx: usize) -> Vec<MicroBatch> {
        let (world_size, rank) = (self.engine.queue.world_size(), self.engine.queue.rank());
        let (places, per_device) = (self.steps.epochs.places(step_idx), self.job.per_device_train_batch_size);
        let num_sequences = (places.end - places.start) as usize;
        data::step_micro_batches(self.train, sampler, places.start, num_sequences, per_device, world_size, rank)
    }

    pub(super) fn sampler(&self) -> Sampler {
        let num_sequences = self.train.sequences.len();
        match self.shuffle {
            true => Sampler::new(num_sequences, self.job.seed),
            false => Sampler::in_order(num_sequences),
        }
    }

    /// Returns the share of its GPU's rate of matrix products that this rank reached in a step.
    fn ceiling_share(&self, batches: &[MicroBatch], record: &StepRecord) -> Option<f64> {
        let most = self.matrix_flops? * record.step_ms * 1e-3;
        Some(ceiling::training_flops(self.engine.spec(), batches) / most)
    }

    /// Writes the metrics of a step, and a line of the log. `left` is the time that the rest of the run will take.
    fn record(
        &mut self,
        update: &Update,
        record: &StepRecord,
        ceiling_share: Option<f64>,
        left: Duration,
    ) -> Result<()> {
        let (step, num_steps) = (self.progress.step, self.steps.num_steps);
        let tokens_per_second = record.num_tokens as f64 / (record.step_ms * 1e-3);
        let learning_rate_b = self.job.loraplus_lr_ratio.map(|ratio| update.learning_rate * ratio);
        let line = StepMetrics {
            step,
            epoch: self.steps.epochs.after(step),
            loss: record.loss,
            grad_norm: record.grad_norm,
            learning_rate: update.learning_rate,
            learning_rate_b,
            num_target_tokens: record.num_target_tokens,
            tokens_per_second,
            ceiling_share,
            step_ms: record.step_ms,
            compute_ms: record.compute_ms,
            gather_wait_ms: record.gather_wait_ms,
            copy_wait_ms: record.copy_wait_ms,
            loss_scale: D::NEEDS_LOSS_SCALING.then_some(update.loss_scale),
            skipped_steps: self.progress.num_skipped,
            peak_device_bytes: self.engine.plan().device.total_bytes() + self.engine.queue.device_bytes(),
            peak_host_bytes: peak_host_bytes(),
        };
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&line)?;
        }
        let StepRecord { loss, grad_norm, .. } = record;
        let of_ceiling =
            ceiling_share.map_or(String::new(), |share| format!(" ({:.0} % of the ceiling)", 100.0 * share));
        let speed = format!("{tokens_per_second:.0} tok/s{of_ceiling}  {} left", duration(left));
        progress::bar("training", step, num_steps, || format!("loss {loss:.4}  {speed}"));
        if step.is_multiple_of(self.job.logging_steps) || step == num_steps {
            let of_b = learning_rate_b.map_or(String::new(), |rate| format!(" (B {rate:.2e})"));
            self.log.line(format!(
                "step {step}/{num_steps}  loss {loss:.4}  grad_norm {grad_norm:.3}  lr {:.2e}{of_b}  {speed}",
                update.learning_rate
            ));
        }
        Ok(())
    }

    /// Returns the held-out loss over a data set, or `None` if the evaluation was abandoned. Collective.
    pub(super) fn evaluate(&mut self, dataset: &Dataset) -> Result<Option<f64>> {
        let step = self.progress.step;
        let (world_size, rank) = (self.engine.queue.world_size(), self.engine.queue.rank());
        let batches = data::eval_micro_batches(dataset, self.engine.limits().max_tokens, world_size, rank);
        self.stop.begin(Activity::Evaluation)?;
        let score = eval::score_unless(self.engine, batches, true, |_| (), &mut |done| self.stop.abandons(done))
            .with_context(|| format!("evaluation after step {step}"))?;
        let Some(score) = score else { return Ok(None) };
        self.stop.end()?;
        self.log.line(format!("step {step}  eval_loss {:.4}  ({} target tokens)", score.loss, score.num_target_tokens));
        let epoch = self.steps.epochs.after(step);
        if let Some(metrics) = &mut self.metrics {
            let (eval_loss, num_target_tokens) = (score.loss, score.num_target_tokens);
            metrics.write(&EvalMetrics { step, epoch, eval_loss, num_target_tokens })?;
        }
        Ok(Some(score.loss))
    }
}
