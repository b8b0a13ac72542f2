//! The loop over steps.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::checkpoint::adapter::{Adapter, AdapterSettings};
use crate::comm::Queue;
use crate::comm::watch::{self, Phase};
use crate::data::{self, Dataset, Sampler};
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::grads::Values;
use crate::model::batch::MicroBatch;
use crate::model::trainable::Kind;
use crate::optim::adamw::Update;
use crate::optim::loss_scale::LossScaler;
use crate::plan::trace;
use crate::recipe::{Steps, TrainingJob};

use super::log::{Log, duration};
use super::metrics::{EvalMetrics, MetricsFile, StepMetrics, peak_host_bytes};
use super::step::{StepArgs, StepRecord, step};
use super::{check, eval};

/// Steps between two looks at whether ranks that hold the same values hold the same bytes.
const REPLICA_CHECK_STEPS: usize = 100;

/// A run and all that it works on.
pub struct Run<'a, D: Ops, Q: Queue<D>> {
    pub engine: &'a mut Engine<D, Q>,
    pub job: &'a TrainingJob,
    pub steps: &'a Steps,
    pub train: &'a Dataset,
    pub eval: Option<&'a Dataset>,
    /// `None` on all ranks but the first.
    pub metrics: Option<&'a mut MetricsFile>,
    pub log: Log,
    /// Where rank 0 writes a trace of the second step, or of the only one.
    pub trace: Option<&'a Path>,
    pub is_zero: check::IsZero<'a>,
}

/// The updates and checks that have been made so far.
#[derive(Default)]
struct Progress {
    num_updates: u32,
    /// An update with a learning rate above 0 was made: from the next step on lora_A has a gradient.
    has_learned: bool,
    a_is_checked: bool,
    b_is_checked: bool,
}

impl Progress {
    /// Fails at the end of a run that updated nothing: in fp16, gradients may overflow in each of a few steps while
    /// the loss scale falls.
    fn has_updated(&self, num_steps: usize) -> Result<()> {
        ensure!(
            self.num_updates > 0,
            "in none of the {num_steps} steps were the gradients finite in fp16, so nothing was learned and nothing was saved; help: \
             train for more steps, or lower training.learning_rate"
        );
        Ok(())
    }
}

impl<D: Ops, Q: Queue<D>> Run<'_, D, Q> {
    fn global_batch_size(&self) -> usize {
        self.job.global_batch_size(self.engine.queue.world_size())
    }

    /// Trains from the first step to the last, with an evaluation before and after. Fails at the first loss or
    /// gradient that is not finite, before it is applied.
    pub fn run(mut self) -> Result<()> {
        let (num_steps, rank) = (self.steps.num_steps, self.engine.queue.rank());
        let mut sampler = Sampler::new(self.train.sequences.len(), self.job.seed);
        self.evaluate(0)?;
        let start = Instant::now();
        let (mut scaler, mut progress) = (LossScaler::new(D::NEEDS_LOSS_SCALING), Progress::default());
        for step_idx in 0..num_steps {
            watch::phase(Phase::Step(step_idx + 1))?;
            let update = self.update(step_idx, num_steps, progress.num_updates, scaler.scale());
            let batches = self.batches(&mut sampler, step_idx);
            let num_micro_batches = self.job.accumulation_steps(self.engine.queue.world_size());
            let args = StepArgs { step: step_idx as u32 + 1, num_micro_batches, update: &update, seed: self.job.seed };
            let is_traced = self.trace.is_some() && step_idx == 1.min(num_steps - 1);
            self.engine.record_spans(is_traced);
            let record = step(self.engine, &batches, &args)?;
            if let Some(path) = self.trace.filter(|_| is_traced && rank == 0) {
                trace::write(path, self.engine.spans())?;
                self.log.line(format!("trace of step {}: {}", step_idx + 1, path.display()));
            }
            self.record(step_idx + 1, num_steps, &update, &record, start.elapsed())?;
            let goes_on = record.loss.is_finite() && scaler.note(record.updated);
            ensure!(goes_on, divergence(step_idx + 1, &record, &update, progress.has_learned));
            if record.updated {
                self.check_gradients(&mut progress, &batches)?;
                progress.num_updates += 1;
                progress.has_learned |= update.learning_rate > 0.0;
            } else {
                let (step, scale) = (step_idx + 1, scaler.scale());
                self.log
                    .line(format!("step {step}: gradients overflowed fp16, no update; the loss scale is {scale} now"));
            }
            let last = step_idx + 1 == num_steps;
            if last || (step_idx + 1).is_multiple_of(REPLICA_CHECK_STEPS) {
                self.engine.check_replicas()?;
            }
            if last || self.job.eval_steps.is_some_and(|every| (step_idx + 1) % every == 0) {
                self.evaluate(step_idx + 1)?;
            }
        }
        progress.has_updated(num_steps)
    }

    /// Checks the gradients of each kind of matrix at the first step in which they must not be zero.
    fn check_gradients(&mut self, progress: &mut Progress, batches: &[MicroBatch]) -> Result<()> {
        let (checks_a, checks_b) = (progress.has_learned && !progress.a_is_checked, !progress.b_is_checked);
        for kind in [checks_b.then_some(Kind::B), checks_a.then_some(Kind::A)].into_iter().flatten() {
            if let Some(line) = check::every_matrix_has_a_gradient(self.engine, kind, batches, self.is_zero)? {
                self.log.line(line);
            }
        }
        (progress.a_is_checked, progress.b_is_checked) = (progress.a_is_checked || checks_a, true);
        Ok(())
    }

    fn update(&self, step_idx: usize, num_steps: usize, num_updates: u32, loss_scale: f32) -> Update {
        let job = self.job;
        Update {
            learning_rate: job.learning_rate * job.lr_scheduler.factor(step_idx, self.steps.warmup_steps, num_steps),
            beta1: job.adam_beta1,
            beta2: job.adam_beta2,
            epsilon: job.adam_epsilon,
            weight_decay: job.weight_decay,
            max_grad_norm: job.max_grad_norm,
            loss_scale,
            step: num_updates + 1,
        }
    }

    fn batches(&self, sampler: &mut Sampler, step_idx: usize) -> Vec<MicroBatch> {
        let global = self.global_batch_size();
        let (world_size, rank) = (self.engine.queue.world_size(), self.engine.queue.rank());
        let per_device = self.job.per_device_train_batch_size;
        let cursor = (step_idx * global) as u64;
        data::step_micro_batches(self.train, sampler, cursor, global, per_device, world_size, rank)
    }

    fn epoch(&self, step: usize) -> f64 {
        (step * self.global_batch_size()) as f64 / self.train.sequences.len() as f64
    }

    fn record(
        &mut self,
        step: usize,
        num_steps: usize,
        update: &Update,
        record: &StepRecord,
        elapsed: Duration,
    ) -> Result<()> {
        let tokens_per_second = record.num_tokens as f64 / (record.step_ms * 1e-3);
        let line = StepMetrics {
            step,
            epoch: self.epoch(step),
            loss: record.loss,
            grad_norm: record.grad_norm,
            learning_rate: update.learning_rate,
            num_target_tokens: record.num_target_tokens,
            tokens_per_second,
            step_ms: record.step_ms,
            compute_ms: record.compute_ms,
            gather_wait_ms: record.gather_wait_ms,
            copy_wait_ms: record.copy_wait_ms,
            loss_scale: D::NEEDS_LOSS_SCALING.then_some(update.loss_scale),
            peak_device_bytes: self.engine.plan().device.total_bytes() + self.engine.queue.device_bytes(),
            peak_host_bytes: peak_host_bytes(),
        };
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&line)?;
        }
        if step.is_multiple_of(self.job.logging_steps) || step == num_steps {
            let left = elapsed.mul_f64((num_steps - step) as f64 / step as f64);
            let StepRecord { loss, grad_norm, .. } = record;
            self.log.line(format!(
                "step {step}/{num_steps}  loss {loss:.4}  grad_norm {grad_norm:.3}  lr {:.2e}  {tokens_per_second:.0} tok/s  {} left",
                update.learning_rate,
                duration(left)
            ));
        }
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> Result<()> {
        let Some(dataset) = self.eval else { return Ok(()) };
        let (world_size, rank) = (self.engine.queue.world_size(), self.engine.queue.rank());
        let batches = data::eval_micro_batches(dataset, self.engine.limits().max_tokens, world_size, rank);
        let score =
            eval::score(self.engine, &batches, true).with_context(|| format!("evaluation after step {step}"))?;
        self.log.line(format!("step {step}  eval_loss {:.4}  ({} target tokens)", score.loss, score.num_target_tokens));
        let epoch = self.epoch(step);
        match &mut self.metrics {
            Some(metrics) => metrics.write(&EvalMetrics {
                step,
                epoch,
                eval_loss: score.loss,
                num_target_tokens: score.num_target_tokens,
            }),
            None => Ok(()),
        }
    }
}

/// Returns the whole adapter, as it is now, on every rank. Collective.
pub fn adapter<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, settings: &AdapterSettings) -> Result<Adapter> {
    let num_layers = engine.spec().num_layers();
    let layers =
        (0..num_layers).map(|layer| engine.gather_trainable_to_host(layer, Values::Master)).collect::<Result<_>>()?;
    Ok(Adapter { settings: settings.clone(), layers })
}

/// Says that training cannot go on from here, and what can be done about it. `has_learned`: an update was made
/// before, so that the learning rate may be the cause.
fn divergence(step: usize, record: &StepRecord, update: &Update, has_learned: bool) -> String {
    let StepRecord { loss, grad_norm, .. } = record;
    let rate = update.learning_rate;
    let cause = match has_learned {
        true => "training diverged; help: lower training.learning_rate, or raise training.warmup_steps",
        false => "nothing was learned before, so the base model or the adapter that training starts from computes this",
    };
    format!(
        "step {step}: loss {loss}, grad_norm {grad_norm}, learning rate {rate:e}: {cause}; this step updated nothing"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_whose_every_step_overflows_fails_at_its_end() {
        let (mut scaler, mut progress, num_steps) = (LossScaler::new(true), Progress::default(), 5);
        assert!((0..num_steps).all(|_| scaler.note(false)), "no step fails, as a smaller scale may help the next");
        let error = progress.has_updated(num_steps).unwrap_err().to_string();
        assert!(error.starts_with("in none of the 5 steps") && error.contains("help: train for more steps"), "{error}");
        progress.num_updates += 1;
        progress.has_updated(num_steps).unwrap();
    }
}
